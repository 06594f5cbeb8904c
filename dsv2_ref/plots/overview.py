"""Figures of the chapter that shows the layer at a glance."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from dsv2_ref.plots.style import CENTRED, INK, SMALL, STYLES, name_rows, new_axes

BLUE, ORANGE = STYLES[0][0], STYLES[1][0]
SAME, LATENT, EXPERT = ("#ECEEF0", "#8A9199"), ("#DCEBF6", BLUE), ("#FCE5D4", ORANGE)
# Face and edge of a box: what Llama has as well, what belongs to the latent, and to the experts.
BOX = 0.74  # height of a box, where the rows are 1 apart

LATENT_BOX = "latent attention (MLA)\ncaches one latent\nand one rope key"

Point = tuple[float, float]


def two_layers() -> Axes:
    """Llama's layer beside that of DeepSeek-V2, from top to bottom: the boxes that V2 changed are coloured."""
    axes = new_axes("", "", height=5.6, xlim=(0, 10), ylim=(-9.9, 0.9))
    axes.set_axis_off()
    for title, stream, middle in (("Llama", 0.45, 2.15), ("DeepSeek-V2", 4.15, 7.15)):
        axes.text(middle, 0.55, title, fontsize=13, weight="bold", **CENTRED)
        _arrow(axes, (stream, 0.2), (stream, -9.8), linewidth=3.5, color=SAME[1])
        axes.text(stream + 0.2, 0.05, "$x$", **SMALL)
        axes.text(stream + 0.2, -4.85, "$h$", **SMALL)
        axes.text(stream + 0.2, -9.75, "$y$", **SMALL)
        for top, bottom in ((-0.3, -3.9), (-5.2, -9.1)):
            _line(axes, (stream, top), (middle, top))
            _arrow(axes, (middle, top), (middle, top - 0.35))
            _box(axes, (middle, top - 0.72), 1.25, "RMSNorm", SAME)
            _arrow(axes, (middle, bottom), (stream + 0.28, bottom))
            _plus(axes, (stream, bottom))
    for middle, name, look in ((2.15, "attention\ncaches keys\nand values", SAME), (7.15, LATENT_BOX, LATENT)):
        _arrow(axes, (middle, -1.39), (middle, -1.87))
        _box(axes, (middle, -2.5), 1.25 if look is SAME else 2.1, name, look, height=1.2)
        _line(axes, (middle, -3.1), (middle, -3.9))
    _arrow(axes, (2.15, -6.29), (2.15, -6.67))
    _box(axes, (2.15, -7.15), 1.25, "MLP", SAME, height=0.9)
    _line(axes, (2.15, -7.6), (2.15, -9.1))
    _experts(axes)
    return axes


def _experts(axes: Axes) -> None:
    """The second branch of V2: every token enters all three parts, and the gate hands weights to the sum."""
    gate, routed, shared = 5.35, 7.15, 9.1
    for x in (gate, routed, shared):
        _line(axes, (7.15, -6.45), (x, -6.45))
        _arrow(axes, (x, -6.45), (x, -6.72))
    _line(axes, (7.15, -6.29), (7.15, -6.45))
    _box(axes, (gate, -7.1), 0.6, "gate", EXPERT)
    _box(axes, (routed, -7.1), 0.98, "routed\nexperts", EXPERT)
    _box(axes, (shared, -7.1), 0.8, "shared\nexperts", EXPERT)
    _arrow(axes, (gate, -7.47), (gate, -7.96), linestyle="--")
    axes.text(gate + 0.1, -7.74, "weights", va="center", fontsize=10, color=INK)
    _arrow(axes, (routed, -7.47), (routed, -7.96))
    _box(axes, ((gate + routed) / 2, -8.3), 1.6, "weighted sum", EXPERT, height=0.64)
    _line(axes, (7.15, -8.62), (7.15, -8.83))
    _line(axes, (shared, -7.47), (shared, -9.1))
    _arrow(axes, (shared, -9.1), (7.43, -9.1))
    _plus(axes, (7.15, -9.1))


def attention_by_hand(
    tokens: Sequence[str], scores: Sequence[str], weights: Sequence[float], values: Sequence[float], result: float
) -> Axes:
    """The last token that may be seen asks: its scores, what the softmax makes of them (to scale), values and their mix.

    Tokens beyond the last score are in the future, which a causal attention hides.
    """
    axes = new_axes("", "", height=3.5, xlim=(-1.75, len(tokens) + 0.55), ylim=(-4.75, 0.6))
    axes.set_axis_off()
    asks = len(scores) - 1
    for name, y in (("token", 0), ("query · key", -1), ("weight", -2.15), ("value", -3.2)):
        axes.text(-1.7, y, name, va="center", **SMALL)
    for x, token in enumerate(tokens):
        _box(axes, (x, 0), 0.36, token, LATENT if x == asks else SAME)
        if x > asks:
            axes.text(x, -1, "hidden", fontsize=10, style="italic", **CENTRED)
            continue
        axes.text(x, -1, scores[x], **CENTRED)
        axes.add_patch(Rectangle((x - 0.3, -2.5), 0.6, weights[x], facecolor=BLUE, edgecolor=INK, linewidth=0.6))
        axes.text(x, -2.42 + weights[x], f"{weights[x]:.2f}", ha="center", va="bottom", **SMALL)
        _box(axes, (x, -3.2), 0.36, f"{values[x]:g}", SAME)
        _arrow(axes, (x, -3.57), (asks, -4.1), linewidth=6 * weights[x])
    axes.text(asks + 0.15, -4.4, f"{result:g} = " + " + ".join(
        f"{weight:g} · {value:g}" for weight, value in zip(weights, values, strict=True)
    ), ha="center", va="center", **SMALL)  # fmt: skip
    return axes


def what_heads_read(text: str, rows: Mapping[str, Sequence[float]]) -> Axes:
    """For each head the weights over a text, as cells that are darker the more is read; the largest is written there."""
    axes = new_axes("", "", height=0.9 + 0.55 * len(rows))
    for y, weights in enumerate(rows.values()):
        for x, weight in enumerate(weights):
            look: dict[str, Any] = {"facecolor": BLUE, "alpha": weight, "edgecolor": "none"}
            axes.add_patch(Rectangle((x - 0.5, y - 0.4), 1, 0.8, **look))
            axes.add_patch(Rectangle((x - 0.5, y - 0.4), 1, 0.8, fill=False, edgecolor=SAME[1], linewidth=0.5))
        best = max(range(len(weights)), key=weights.__getitem__)
        axes.text(best, y, f"{weights[best]:.2f}"[1:], ha="center", va="center", fontsize=10, color="white")
    name_rows(axes, list(rows))
    axes.set(xlim=(-0.6, len(text) - 0.4), xticks=range(len(text)), xticklabels=text.replace("\n", "⏎"))
    axes.xaxis.tick_top()
    axes.tick_params(bottom=False, top=False)
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
    axes.grid(False)
    handles = [Rectangle((0, 0), 1, 1, **look) for look in looks.values()]
    axes.legend(handles, ["dense MLP", "experts"], ncols=2, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
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
        axes.text(left, -0.05 * unit, label, va="top", linespacing=1.3, **SMALL)
        left += max(side, 0.4 * unit) + 0.06 * unit
    axes.set(xlim=(-0.02 * unit, left), aspect="equal")
    axes.set_axis_off()
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (BLUE, ORANGE)]
    axes.legend(handles, ["used: attention", "used: MLP, experts"], frameon=False, loc="upper left", fontsize=11)
    return axes


def _line(axes: Axes, start: Point, end: Point) -> None:
    axes.plot(*zip(start, end, strict=True), color=INK, linewidth=1.2)


def _arrow(axes: Axes, start: Point, end: Point, **look: Any) -> None:
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0} | look
    axes.annotate("", end, start, arrowprops=arrow)


def _plus(axes: Axes, place: Point) -> None:
    axes.plot(*place, "o", markersize=14, color="white", markeredgecolor=INK, zorder=3)
    axes.text(place[0], place[1] - 0.02, "+", fontsize=14, zorder=4, **CENTRED)


def _box(axes: Axes, place: Point, half: float, name: str, look: tuple[str, str], height: float = BOX) -> None:
    x, y = place
    face, edge = look
    style: dict[str, Any] = {"facecolor": face, "edgecolor": edge, "linewidth": 1.4, "zorder": 2}
    shape = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x - half, y - height / 2), 2 * half, height, boxstyle=shape, **style))
    axes.text(x, y - 0.02, name, fontsize=10.5, linespacing=1.05, zorder=3, **CENTRED)
