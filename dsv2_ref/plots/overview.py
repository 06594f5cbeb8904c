"""Figures of the chapter that shows the layer at a glance."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from dsv2_ref.plots.style import CENTRED, INK, SMALL, STYLES, add_legend, name_rows, new_axes

BLUE, ORANGE = STYLES[0][0], STYLES[1][0]
SAME, LATENT, EXPERT = ("#ECEEF0", "#8A9199"), ("#DCEBF6", BLUE), ("#FCE5D4", ORANGE)
# Face and edge of a box: what Llama has as well, what belongs to the latent, and to the experts.
CACHED, MADE = (BLUE, BLUE), ("white", BLUE)  # inside the attention: what the cache holds, and what is made from it
BOX = 0.74  # height of a box, where the rows are 1 apart

LARGE: dict[str, Any] = {"fontsize": 14, "color": INK}
"""Labels that can still be read where a phone shrinks the picture."""

Point = tuple[float, float]


def two_layers() -> Axes:
    """Llama's layer beside that of DeepSeek-V2, from top to bottom: the boxes that V2 changed are coloured."""
    axes = new_axes("", "", height=6.3, xlim=(0, 10), ylim=(-11.2, 0.9))
    axes.set_axis_off()
    for title, stream, middle in (("Llama", 0.4, 1.95), ("DeepSeek-V2", 3.6, 7.2)):
        axes.text(middle, 0.55, title, fontsize=13, weight="bold", **CENTRED)
        _arrow(axes, (stream, 0.2), (stream, -11.1), linewidth=3.5, color=SAME[1])
        for name, y in (("$x$", 0.05), ("$h$", -5.5), ("$y$", -11.05)):
            axes.text(stream + 0.2, y, name, **SMALL)
        for top, bottom in ((-0.3, -4.55), (-5.85, -10.4)):
            _line(axes, (stream, top), (middle, top))
            _arrow(axes, (middle, top), (middle, top - 0.35))
            _box(axes, (middle, top - 0.72), 1.2, "RMSNorm", SAME)
            _arrow(axes, (middle, bottom), (stream + 0.28, bottom))
            _plus(axes, (stream, bottom))
    for y, name, height, bottom in (
        (-2.86, "attention\ncaches keys\nand values", 1.2, -4.55),
        (-8.05, "MLP", 0.9, -10.4),
    ):
        _arrow(axes, (1.95, -1.39 if y > -5 else -6.94), (1.95, y + height / 2))
        _box(axes, (1.95, y), 1.2, name, SAME, height=height)
        _line(axes, (1.95, y - height / 2), (1.95, bottom))
    _latent(axes)
    _experts(axes)
    return axes


def _latent(axes: Axes) -> None:
    """The attention of V2: what is cached is filled, and keys and values are made from it."""
    middle, cached, made = 7.2, 6.15, 8.76
    _arrow(axes, (middle, -1.39), (middle, -1.87))
    _box(axes, (middle, -2.86), 2.5, "", LATENT, height=1.98)
    axes.text(middle, -2.19, "latent attention (MLA)", fontsize=10.5, **CENTRED)
    _box(axes, (made, -3.12), 0.82, "keys and\nvalues of\nall heads", MADE, height=1.15)
    for y, name in ((-2.84, "cached latent"), (-3.42, "cached rope key")):
        _box(axes, (cached, y), 1.3, name, CACHED, height=0.48)
        _arrow(axes, (cached + 1.3, y), (made - 0.82, y))
    _line(axes, (middle, -3.85), (middle, -4.55))


def _experts(axes: Axes) -> None:
    """The second branch of V2: the gate chooses experts and hands weights to the sum; shared experts bypass it."""
    gate, routed, shared = 4.5, 7.2, 9.15
    for x in (gate, routed, shared):
        _line(axes, (routed, -7.12), (x, -7.12))
        _arrow(axes, (x, -7.12), (x, -7.39))
    _line(axes, (routed, -6.94), (routed, -7.12))
    _box(axes, (gate, -8.06), 0.45, "gate", EXPERT, height=1.34)
    _box(axes, (routed, -8.06), 0.98, "", EXPERT, height=1.34)
    axes.text(routed, -7.74, "routed\nexperts", fontsize=10.5, linespacing=1.05, **CENTRED)
    _box(axes, (shared, -8.06), 0.8, "shared\nexperts", EXPERT, height=1.34)
    _arrow(axes, (gate + 0.45, -8.38), (routed - 0.98, -8.38), linestyle="--")
    axes.text((gate + routed - 0.53) / 2, -8.18, "chooses", fontsize=10, **CENTRED)
    for number in range(4):
        x, chosen = routed + 0.42 * (number - 1.5), number in (0, 2)  # as in the count by hand
        face = ORANGE if chosen else "white"
        axes.add_patch(
            Rectangle((x - 0.15, -8.59), 0.3, 0.36, facecolor=face, edgecolor=ORANGE, linewidth=1.2, zorder=3)
        )
        if chosen:
            _arrow(axes, (x, -8.59), (x, -9.24))
    _arrow(axes, (gate, -8.73), (gate, -9.24), linestyle="--")
    axes.text(gate + 0.12, -8.99, "weights", va="center", fontsize=10, color=INK)
    _box(axes, ((gate + routed) / 2, -9.56), 1.8, "weighted sum", EXPERT, height=0.64)
    _line(axes, (routed, -9.88), (routed, -10.13))
    _line(axes, (shared, -8.73), (shared, -10.4))
    _arrow(axes, (shared, -10.4), (routed + 0.28, -10.4))
    _plus(axes, (routed, -10.4))


def attention_by_hand(
    tokens: Sequence[str], scores: Sequence[str], weights: Sequence[float], values: Sequence[float], result: float
) -> Axes:
    """The last token that may be seen asks: its scores, what the softmax makes of them (to scale), values and their mix.

    Tokens beyond the last score are in the future, which a causal attention hides.
    """
    axes = new_axes("", "", height=3.8, xlim=(-1.8, len(tokens) - 0.5), ylim=(-4.75, 0.6))
    axes.set_axis_off()
    asks = len(scores) - 1
    for name, y in (("token", 0), ("query · key", -1), ("weight", -2.15), ("value", -3.2)):
        axes.text(-1.75, y, name, va="center", **LARGE)
    for x, token in enumerate(tokens):
        _box(axes, (x, 0), 0.36, token, LATENT if x == asks else SAME, size=14)
        if x > asks:
            axes.text(x, -1, "hidden", fontsize=14, style="italic", **CENTRED)
            continue
        axes.text(x, -1, scores[x], fontsize=14, **CENTRED)
        axes.add_patch(Rectangle((x - 0.3, -2.5), 0.6, weights[x], facecolor=BLUE, edgecolor=INK, linewidth=0.6))
        axes.text(x, -2.42 + weights[x], f"{weights[x]:.2f}", ha="center", va="bottom", **LARGE)
        _box(axes, (x, -3.2), 0.36, f"{values[x]:g}", SAME, size=14)
        _arrow(axes, (x, -3.57), (asks, -4.1), linewidth=6 * weights[x])
    axes.text(len(tokens) - 0.6, -4.4, f"{result:g} = " + " + ".join(
        f"{weight:g} · {value:g}" for weight, value in zip(weights, values, strict=True)
    ), ha="right", va="center", **LARGE)  # fmt: skip
    return axes


def what_heads_read(text: str, rows: Mapping[str, Sequence[float]]) -> Axes:
    """For each head the weights over a text, as cells that are darker the more is read; the largest is written there."""
    axes = new_axes("", "", height=0.8 + 0.6 * len(rows))
    for y, weights in enumerate(rows.values()):
        for x, weight in enumerate(weights):
            look: dict[str, Any] = {"facecolor": BLUE, "alpha": weight, "edgecolor": "none"}
            axes.add_patch(Rectangle((x - 0.5, y - 0.4), 1, 0.8, **look))
            axes.add_patch(Rectangle((x - 0.5, y - 0.4), 1, 0.8, fill=False, edgecolor=SAME[1], linewidth=0.5))
        best = max(range(len(weights)), key=weights.__getitem__)
        colour = "white" if weights[best] > 0.75 else INK
        axes.text(best, y, f"{weights[best]:.2f}"[1:], ha="center", va="center", fontsize=13, color=colour)
    name_rows(axes, list(rows))
    axes.set(xlim=(-0.6, len(text) - 0.4), xticks=range(len(text)), xticklabels=text.replace("\n", "⏎"))
    axes.xaxis.tick_top()
    axes.tick_params(bottom=False, top=False, labelsize=14)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.grid(False)
    return axes


def layer_kinds(models: Mapping[str, Sequence[bool]]) -> Axes:
    """Which layers of each model hold experts: a row of cells, whether layer 0, 1, … does, for each label."""
    looks: dict[bool, Any] = {
        kind: {"facecolor": face, "edgecolor": edge} for kind, (face, edge) in ((False, SAME), (True, EXPERT))
    }
    axes = new_axes("index of the layer", "", height=0.8 + 0.5 * len(models))
    for row, kinds in enumerate(models.values()):
        for layer, has_experts in enumerate(kinds):
            axes.add_patch(Rectangle((layer - 0.5, row - 0.3), 1, 0.6, linewidth=0.8, **looks[has_experts]))
    axes.set_xlim(-1, max(map(len, models.values())))
    name_rows(axes, list(models))
    axes.tick_params(labelsize=14)
    axes.xaxis.label.set_fontsize(14)
    axes.grid(False)
    handles = [Rectangle((0, 0), 1, 1, **look) for look in looks.values()]
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "fontsize": 14}
    add_legend(axes, handles=handles, labels=["dense MLP", "experts"], **place)
    return axes


def stored_and_used(counts: Mapping[str, tuple[int, Mapping[str, int]]]) -> Axes:
    """For each layer a square as large as what it stores, and in its corner, filled, what one token uses of it.

    Args:
        counts: for each label the weights stored, and those that one token uses, as attention and the rest.
    """
    sides = [sqrt(stored) for stored, _ in counts.values()]
    unit = max(sides)
    axes = new_axes("", "", height=3.5, ylim=(-0.36 * unit, 1.04 * unit))
    left = 0.0
    for (name, (stored, used)), side in zip(counts.items(), sides, strict=True):
        inner = sqrt(sum(used.values()))
        axes.add_patch(Rectangle((left, 0), side, side, facecolor="white", edgecolor=INK, linewidth=1.2))
        share = inner * used["attention"] / sum(used.values())
        axes.add_patch(Rectangle((left, 0), inner, share, facecolor=BLUE, edgecolor="none"))
        axes.add_patch(Rectangle((left, share), inner, inner - share, facecolor=ORANGE, edgecolor="none"))
        label = f"{name}\nstored {stored / 1e6:,.0f}\nused {sum(used.values()) / 1e6:,.0f}"
        axes.text(left, -0.05 * unit, label, va="top", linespacing=1.3, fontsize=12, color=INK)
        left += max(side, 0.4 * unit) + 0.06 * unit
    axes.set(xlim=(-0.02 * unit, left), aspect="equal")
    axes.set_axis_off()
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (BLUE, ORANGE)]
    add_legend(
        axes,
        handles=handles,
        labels=["used: attention", "used: MLP, experts"],
        loc="upper left",
        fontsize=12,
        handlelength=1.2,
    )
    return axes


def _line(axes: Axes, start: Point, end: Point) -> None:
    axes.plot(*zip(start, end, strict=True), color=INK, linewidth=1.2)


def _arrow(axes: Axes, start: Point, end: Point, **look: Any) -> None:
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0} | look
    axes.annotate("", end, start, arrowprops=arrow)


def _plus(axes: Axes, place: Point) -> None:
    axes.plot(*place, "o", markersize=14, color="white", markeredgecolor=INK, zorder=3)
    axes.text(place[0], place[1] - 0.02, "+", fontsize=14, zorder=4, **CENTRED)


def _box(
    axes: Axes, place: Point, half: float, name: str, look: tuple[str, str], height: float = BOX, size: float = 10.5
) -> None:
    x, y = place
    face, edge = look
    style: dict[str, Any] = {"facecolor": face, "edgecolor": edge, "linewidth": 1.4, "zorder": 2}
    shape = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x - half, y - height / 2), 2 * half, height, boxstyle=shape, **style))
    if name:
        colour = {"color": "white"} if look is CACHED else {}
        axes.text(x, y - 0.02, name, fontsize=size, linespacing=1.05, zorder=3, **CENTRED | colour)
