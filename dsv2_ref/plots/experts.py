"""Figures of the chapter on experts and routing."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dsv2_ref.plots.style import CENTRED, INK, STYLES, add_curves, add_legend, new_axes

FACES = ("#CFE5F3", "#FCE5D4", "#CDEBE0", "#F3DDE9")  # a pale ground for each colour of STYLES

Choices = Sequence[Sequence[int]]


def routing_map(scores: Sequence[Sequence[float]], chosen: Choices, groups: int = 1, closed: Choices = ()) -> Axes:
    """A router's scores, a row for each token and a column for each expert, with the choices numbered, best first.

    Args:
        scores: for each token, the score of every expert.
        chosen: for each token, the experts it visits, best first.
        groups: how many groups of equal size the experts form; lines separate them.
        closed: for each token, the groups it may not visit; their cells are hatched, without a colour.
    """
    tokens, experts = len(scores), len(scores[0])
    size = experts // groups
    axes = new_axes("expert", "token", height=1.1 + 0.25 * tokens)
    cells = axes.pcolormesh(scores, cmap="Blues", vmin=0, edgecolors="white", linewidth=0.8)
    shut: dict[str, Any] = {"facecolor": "white", "edgecolor": "#AAAAAA", "hatch": "////", "linewidth": 0}
    for token, closed_groups in enumerate(closed):
        for group in closed_groups:
            axes.add_patch(Rectangle((group * size, token + 0.04), size, 0.92, **shut))
    for border in range(1, groups):
        axes.axvline(border * size, color=INK, linewidth=2)
    digit = CENTRED | {"fontsize": 10, "weight": "bold", "color": "white"}
    for token, visited in enumerate(chosen):
        for rank, expert in enumerate(visited, start=1):
            axes.plot(expert + 0.5, token + 0.5, "o", markersize=14, color=STYLES[1][0], markeredgecolor="white")
            axes.text(expert + 0.5, token + 0.47, f"{rank}", **digit)
    axes.set(xlim=(0, experts), ylim=(tokens, 0))
    for axis, cells_along in ((axes.xaxis, experts), (axes.yaxis, tokens)):
        named = range(0, cells_along, 2)
        axis.set_ticks([place + 0.5 for place in named], [str(place) for place in named])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.figure.colorbar(cells, ax=axes, label="score", pad=0.02, aspect=25).outline.set_visible(False)
    return axes


def sorted_choices(choices: Choices, order: Sequence[int]) -> Axes:
    """How choices are sorted by expert: token by token at the left, expert by expert at the right.

    Args:
        choices: for each token, its experts.
        order: for each row at the right, which of the choices, counted through all tokens, stands there.
    """
    pairs = [(token, expert) for token, experts in enumerate(choices) for expert in experts]
    axes = new_axes("", "", height=0.6 + 0.36 * len(pairs), xlim=(0, 10), ylim=(len(pairs), -1))
    axes.set_axis_off()
    for x, title in ((1.7, "as the tokens chose"), (8.3, "sorted by expert")):
        axes.text(x, -0.6, title, **CENTRED)
    for row, place in enumerate(order):
        token, expert = pairs[place]
        face, (edge, style) = FACES[expert % len(FACES)], STYLES[expert % len(STYLES)]
        axes.plot([3.3, 6.7], [place + 0.4, row + 0.4], style, color=edge, linewidth=1.8)
        before, after = f"token {token}: expert {expert}", f"expert {expert}: token {token}"
        for x, y, text in ((0.1, place, before), (6.7, row, after)):
            axes.add_patch(Rectangle((x, y), 3.2, 0.8, facecolor=face, edgecolor=edge, linewidth=1.2))
            axes.text(x + 1.6, y + 0.4, text, fontsize=11, **CENTRED)
    return axes


def expert_loads(loads: Mapping[str, Sequence[int]]) -> Axes:
    """How many tokens each expert got, sorted from the busiest to the idlest, beside an even share; for up to four
    labels with the same sum."""
    axes = new_axes("experts, the busiest first", "tokens")
    add_curves(axes, {label: sorted(counts, reverse=True) for label, counts in loads.items()}, start=1)
    counts = next(iter(loads.values()))
    axes.axhline(sum(counts) / len(counts), color=INK, linewidth=1, label="even share")
    axes.set(xlim=(0, None), ylim=(0, None))
    return add_legend(axes)
