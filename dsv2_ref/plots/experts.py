"""Figures of the chapter on experts and routing."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dsv2_ref.plots.style import CENTRED, INK, STYLES, new_axes

FACES = ("#CFE5F3", "#FCE5D4", "#CDEBE0", "#F3DDE9")  # a pale ground for each colour of STYLES

Choices = Sequence[Sequence[int]]


def narrow_networks(hidden: int, pieces: int, piece: int) -> Axes:
    """A wide SwiGLU, cut through its middle, above the narrow networks that it falls apart into, all to one scale.

    Args:
        hidden: features of a token.
        pieces: how many narrow networks, at most four.
        piece: features in the middle of each.
    """
    wide, gap, thin = pieces * piece, hidden / 4, hidden / 16
    right = 2 * hidden + wide + 5 * gap + thin
    rows = 1.25 * max(hidden, piece)
    axes = new_axes("", "", height=5, xlim=(-1.4 * gap, right + gap), aspect="equal")
    axes.set(ylim=(wide + 1.2 * gap + pieces * rows, -1.4 * gap))
    axes.set_axis_off()

    def network(top: float, height: float, chosen: Sequence[int]) -> None:
        """Token, both first matrices, the middle, the last matrix and the output, left to right, around one line."""
        middle = len(chosen) * piece
        line, first = top + height / 2, top + (height - middle) / 2
        spots = [0.8 * gap, hidden + 2 * gap, 2 * hidden + 3.2 * gap, 2 * hidden + 4 * gap + thin]
        box(-thin / 2, line - hidden / 2, thin, hidden, "#DDDDDD", INK)
        for row, number in enumerate(chosen):
            face, edge = FACES[number], STYLES[number][0]
            for left, width in ((spots[0], hidden), (spots[1], hidden), (spots[2], thin)):
                box(left, first + row * piece, width, piece, face, edge)
            box(spots[3] + row * piece, line - hidden / 2, piece, hidden, face, edge)
        box(spots[3] + middle + gap, line - hidden / 2, thin, hidden, "#DDDDDD", INK)

    def box(left: float, top: float, width: float, height: float, face: str, edge: str) -> None:
        axes.add_patch(Rectangle((left, top), width, height, facecolor=face, edgecolor=edge, linewidth=1))

    network(0, wide, range(pieces))
    spots = 0.8 * gap + hidden / 2, 2 * gap + 1.5 * hidden, 2 * hidden + 3.2 * gap + thin / 2
    names = ("silu($W_{gate}\\,u$)", "$W_{up}\\,u$", "$v$")
    signs = {(spots[0] + spots[1]) / 2: "$\\odot$", (spots[1] + hidden / 2 + spots[2]) / 2: "$=$"}
    for x, name in (*zip(spots, names, strict=True), *signs.items()):
        axes.text(x, -0.8 * gap, name, **CENTRED)
    middle, output = 2 * hidden + 4 * gap + thin + wide / 2, right + thin / 2
    for x, name in ((0, "$u$"), (middle, "$W_{down}$"), (output, "FFN($u$)")):
        axes.text(x, (wide - hidden) / 2 - 0.8 * gap, name, **CENTRED)
    for number in range(pieces):
        top = wide + 1.2 * gap + number * rows
        network(top, hidden, [number])
        sign = "=" if number == 0 else "+"
        axes.text(-gap, top + hidden / 2, sign, **CENTRED | {"fontsize": 16})
    return axes


def routing_map(
    scores: Sequence[Sequence[float]],
    chosen: Choices,
    groups: int = 1,
    closed: Choices = (),
    names: Sequence[str] | None = None,
) -> Axes:
    """A router's scores, a row for each token and a column for each expert, with the choices numbered, best first.

    Args:
        scores: for each token, the score of every expert.
        chosen: for each token, the experts it visits, best first.
        groups: how many groups of equal size the experts form; lines separate them, and each is named as a device.
        closed: for each token, the groups it may not visit; their cells are hatched.
        names: what each row is called; its number if None.
    """
    tokens, experts = len(scores), len(scores[0])
    size = experts // groups
    axes = new_axes("expert", "token", height=1.1 + 0.25 * tokens)
    cells = axes.pcolormesh(scores, cmap="Blues", vmin=0, edgecolors="white", linewidth=0.8)
    shut: dict[str, Any] = {"facecolor": "none", "edgecolor": "#888888", "hatch": "//", "linewidth": 0}
    for token, closed_groups in enumerate(closed):
        for group in closed_groups:
            axes.add_patch(Rectangle((group * size, token + 0.04), size, 0.92, **shut))
    for edge in range(1, groups):
        axes.axvline(edge * size, color=INK, linewidth=2)
    digit = CENTRED | {"fontsize": 10, "weight": "bold", "color": "white"}
    for token, visited in enumerate(chosen):
        for rank, expert in enumerate(visited, start=1):
            axes.plot(expert + 0.5, token + 0.5, "o", markersize=14, color=STYLES[1][0], markeredgecolor="white")
            axes.text(expert + 0.5, token + 0.47, f"{rank}", **digit)
    for group in range(groups if groups > 1 else 0):
        axes.text((group + 0.5) * size, -0.4, f"device {group}", **CENTRED | {"fontsize": 10})
    axes.set(xlim=(0, experts), ylim=(tokens, 0))
    for axis, count in ((axes.xaxis, experts), (axes.yaxis, tokens)):
        named = range(0, count, 2 if count > 8 else 1)
        axis.set_ticks([number + 0.5 for number in named], [str(number) for number in named])
    if names is not None:
        axes.yaxis.set_ticks([number + 0.5 for number in range(tokens)], list(names), family="monospace")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.figure.colorbar(cells, ax=axes, label="score", pad=0.02, aspect=25).outline.set_visible(False)
    return axes


def sorted_choices(choices: Choices, order: Sequence[int], ends: Sequence[int]) -> Axes:
    """How choices are sorted by expert: token by token at the left, expert by expert at the right, all numbered.

    Args:
        choices: for each token, its experts.
        order: for each row at the right, which of the choices, counted through all tokens, stands there.
        ends: for each expert, before which row at the right its group ends; an empty group gets a dashed box.
    """
    pairs = [(token, expert) for token, experts in enumerate(choices) for expert in experts]
    empty = [expert for expert, end in enumerate(ends) if end == (0, *ends)[expert]]
    rows = len(pairs) + len(empty)
    axes = new_axes("", "", height=0.6 + 0.36 * rows, xlim=(0, 11), ylim=(rows, -1))
    axes.set_axis_off()
    for x, title in ((2.2, "as the tokens chose"), (7.8, "sorted by expert"), (10.6, "end")):
        axes.text(x, -0.6, title, **CENTRED)

    def box(left: float, row: int, text: str, **look: Any) -> None:
        axes.add_patch(Rectangle((left, row), 3.4, 0.8, linewidth=1.2, **look))
        axes.text(left + 1.7, row + 0.4, text, fontsize=11, **CENTRED)

    for row, place in enumerate(order):
        token, expert = pairs[place]
        edge, style = STYLES[expert % len(STYLES)]
        look = {"facecolor": FACES[expert % len(FACES)], "edgecolor": edge}
        axes.plot([3.9, 6.1], [place + 0.4, row + 0.4], style, color=edge, linewidth=1.8)
        box(0.5, place, f"token {token}: expert {expert}", **look)
        box(6.1, row, f"expert {expert}: token {token}", **look)
        for x, y in ((0.25, place), (9.75, row)):
            axes.text(x, y + 0.4, f"{place}", fontsize=11, **CENTRED)
    for row, expert in enumerate(empty, start=len(pairs)):
        box(6.1, row, f"expert {expert}: none", facecolor="none", edgecolor=INK, linestyle="--")
    for expert, end in enumerate(ends):
        row = len(pairs) + empty.index(expert) if expert in empty else end - 1
        axes.text(10.6, row + 0.4, f"{end}", fontsize=11, weight="bold", **CENTRED)
    return axes
