"""Figures of the chapter on the models that followed: what each changed in the layer, and what it caches."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from dsv2_ref.plots.mla import LATENT, OTHER, ROPE
from dsv2_ref.plots.overview import EXPERT, SAME
from dsv2_ref.plots.overview import LATENT as ATTENTION
from dsv2_ref.plots.style import CENTRED, INK, SMALL, add_bars, add_legend, new_axes, tick

CHANGED = {"attention": ATTENTION, "experts": EXPERT, "stream": ("#FFFFFF", INK)}
# Face and edge of a box that differs from that of the model before, by what it is a part of.
INDEXER = "#CC79A7"


def layer_changes(models: Mapping[str, Sequence[str]], rows: Mapping[str, str]) -> Axes:
    """The same layer once for each model, side by side: a box for each row, coloured where it differs from its left.

    Args:
        models: for each name the texts of its boxes, from the top.
        rows: for each row's label what it is a part of, a key of ``CHANGED``.
    """
    heights = [0.62 + 0.34 * max(text.count("\n") for text in texts) for texts in zip(*models.values(), strict=True)]
    bottom = -sum(heights) - 0.62 * len(heights)
    axes = new_axes("", "", height=0.55 - 0.62 * bottom, xlim=(-0.03, len(models)), ylim=(bottom - 0.2, 0.75))
    axes.set_axis_off()
    before: Sequence[str] = next(iter(models.values()))
    for column, (name, texts) in enumerate(models.items()):
        axes.text(column + 0.5, 0.45, name, fontsize=13, weight="bold", **CENTRED)
        top = 0.0
        for (label, part), height, text, left in zip(rows.items(), heights, texts, before, strict=True):
            if column == 0:
                axes.text(0.04, top - 0.3, label, va="center", fontsize=11, color=INK)
            face, edge = SAME if text == left else CHANGED[part]
            look: dict[str, Any] = {"facecolor": face, "edgecolor": edge, "linewidth": 1.4}
            shape = "round,pad=0,rounding_size=0.06"
            corner = (column + 0.03, top - 0.56 - height)
            axes.add_patch(FancyBboxPatch(corner, 0.94, height, boxstyle=shape, label=text, **look))
            axes.text(column + 0.5, corner[1] + height / 2, text, fontsize=9, linespacing=1.1, **CENTRED)
            top -= 0.62 + height
        before = texts
    return axes


def cached_per_token(rows: Mapping[str, Mapping[str, float]]) -> Axes:
    """Bars of the bytes that all layers of each model cache per token, by part, with the sum after each bar."""
    axes = new_axes("bytes cached per token, all layers", "", height=1.2 + 0.5 * len(rows))
    looks = {"latent or entry": (LATENT, ""), "rope key": (ROPE, ""), "indexer's key": (INDEXER, "//")}
    looks["keys and values"] = (OTHER, "")
    present = {part: look for part, look in looks.items() if any(part in parts for parts in rows.values())}
    add_bars(axes, {row: [parts.get(part, 0) for part in present] for row, parts in rows.items()}, present, size=0.62)
    totals = [sum(parts.values()) for parts in rows.values()]
    for y, total in enumerate(totals):
        axes.annotate(f"{total:,.0f}", (total, y), (5, 0), textcoords="offset points", va="center", **SMALL)
    axes.set(xlim=(0, 1.25 * max(totals)))
    tick(axes.xaxis, range(0, int(max(totals)) + 1, 20_000))
    return add_legend(axes, loc="lower right", fontsize=10)
