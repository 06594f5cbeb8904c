"""Figures of the chapter on forgetting and choosing: what policies hide, what they cost, and what they save."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from dsv2_ref.plots.lineage import INDEXER
from dsv2_ref.plots.mla import LATENT
from dsv2_ref.plots.style import INK, SETTINGS, SMALL, Values, add_bars, add_curves, add_legend, new_axes

HIDDEN = "#B9C0C7"


def hidden_by(
    weights: Sequence[Sequence[float]], masks: Mapping[str, Sequence[Sequence[bool]]], text: str, query: int
) -> Axes:
    """The same attention once for each policy, a row for each query: the darker, the more; grey where it is hidden.

    Args:
        weights: square, of queries and keys. masks: for each policy's name what each query may read, two to a row.
        text: a character for each token. query: the one whose row has a frame.
    """
    seen, names = np.asarray(weights), ["⏎" if character == "\n" else character for character in text]
    ink = LinearSegmentedColormap.from_list("latent", ["white", LATENT])
    rows = -(-len(masks) // 2)
    with plt.rc_context(SETTINGS):
        options: dict[str, Any] = {"figsize": (5, 2.75 * rows), "dpi": 200, "facecolor": "white"}
        _, grid = plt.subplots(rows, 2, squeeze=False, layout="constrained", **options)
    for spare in grid.flat[len(masks) :]:
        spare.set_axis_off()
    for axes, (name, mask) in zip(grid.flat, masks.items(), strict=False):
        shown = np.asarray(mask) & np.tri(len(seen), dtype=bool)
        axes.imshow(np.where(shown, seen, np.nan) ** 0.5, cmap=ink, vmin=0, vmax=1)
        dropped = np.where(np.tri(len(seen), dtype=bool) & ~shown, 0.0, np.nan)
        axes.imshow(dropped, cmap=LinearSegmentedColormap.from_list("hidden", [HIDDEN, HIDDEN]))
        axes.add_patch(Rectangle((-0.5, query - 0.5), query + 1, 1, fill=False, edgecolor=INK, linewidth=1.2))
        axes.set_title(name, fontsize=11, color=INK)
        axes.set(xticks=range(len(names)), yticks=range(len(names)))
        axes.set_xticklabels(names, fontsize=8)
        axes.set_yticklabels(names, fontsize=8)
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_visible(False)
    first: Axes = grid[0, 0]
    first.set(xlabel="key", ylabel="query")
    return first


def lost_by_budget(budgets: Sequence[int], lost: Values) -> Axes:
    """Bits that each policy loses, by the number of tokens that a query reads; both scales are logarithmic."""
    axes = new_axes("tokens that a query reads, of 128", "bits per byte lost", height=3.6)
    by_budget = {name: dict(zip(budgets, values, strict=True)) for name, values in lost.items()}
    add_curves(axes, by_budget, marked=True, named=False)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(budgets, [str(budget) for budget in budgets], minor=False)
    axes.minorticks_off()
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2) if tick <= max(max(values) for values in lost.values())]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    return add_legend(axes, fontsize=10)


def kept_and_read(rows: Mapping[str, Mapping[str, float]]) -> Axes:
    """Bars of megabytes by part, kept or read, a bar for each name, with the sum after it."""
    axes = new_axes("megabytes per layer", "", height=1.1 + 0.42 * len(rows))
    looks = {"latent and rope key": (LATENT, ""), "indexer's key": (INDEXER, "//")}
    add_bars(axes, {row: [parts.get(part, 0) for part in looks] for row, parts in rows.items()}, looks, size=0.62)
    totals = [sum(parts.values()) for parts in rows.values()]
    for y, total in enumerate(totals):
        axes.annotate(f"{total:.1f}", (total, y), (5, 0), textcoords="offset points", va="center", **SMALL)
    axes.set_xlim(0, 1.2 * max(totals))
    return add_legend(axes, fontsize=10, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2)
