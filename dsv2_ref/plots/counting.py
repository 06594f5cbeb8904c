"""Figures of the chapter on counting."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dsv2_ref.plots.style import INK, SMALL, STYLES, add_bars, add_legend, new_axes

BLUE, ORANGE = STYLES[0][0], STYLES[1][0]
LOOKS = {
    "projections": (BLUE, ""),
    "scores and values": ("#9CC9E3", "//"),
    "shared experts": ("#E69F00", ""),
    "routed experts": (ORANGE, "\\\\"),
    "gate": ("#BBBBBB", ""),
}
"""Colour and hatch of each part of a layer."""


def shares(rows: Mapping[str, Mapping[str, float]]) -> Axes:
    """What each part of a layer has of a whole: a bar of shares for each row.

    Args:
        rows: for each label, amounts by part, as in `LOOKS`. Shares from 6 % are written in.
    """
    axes = new_axes("share of the whole, %", "", height=1.5 + 0.42 * len(rows))
    looks = {part: look for part, look in LOOKS.items() if any(part in amounts for amounts in rows.values())}
    percent = {
        row: [100 * amounts.get(part, 0) / sum(amounts.values()) for part in looks] for row, amounts in rows.items()
    }
    add_bars(axes, percent, looks, 0.7)
    for number, (colour, hatch) in enumerate(looks.values()):
        box = {"facecolor": "white" if hatch else colour, "edgecolor": "none", "pad": 1.0}
        ink = "white" if colour == BLUE else INK
        for place, widths in enumerate(percent.values()):
            if widths[number] >= 6:
                middle, text = sum(widths[:number]) + widths[number] / 2, f"{widths[number]:.0f}"
                axes.text(middle, place, text, ha="center", va="center", color=ink, bbox=box)
    axes.set_xlim(0, 100)
    return add_legend(axes, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0), fontsize=11)


def weights_to_scale(
    attention: Sequence[tuple[int, int]], expert: tuple[int, int], routed: int, used: int, shared: int
) -> Axes:
    """All weights of a layer to scale: its attention, its shared experts, and a grid of its routed experts. What a token
    uses is filled.

    Args:
        attention: inputs and outputs of each matrix.
        expert: inputs and width of an expert, which has three such matrices.
        used: of the routed experts, how many a token uses.
    """
    tall, width = expert[0], 3 * expert[1]
    gap, columns = tall // 8, round(routed**0.5)
    step, down = width + gap, tall + gap
    rows = -(-routed // columns)
    right = columns * step - gap
    axes = new_axes("", "", height=4.1, xlim=(-gap, right + gap), ylim=(-(rows + 1.75) * down, 1.2 * tall))
    axes.set_axis_off()
    axes.set_aspect("equal")

    def million(count: int) -> str:
        return f"{count / 1e6:,.1f}"

    left = 0
    for inputs, outputs in attention:
        axes.add_patch(Rectangle((left, -inputs), outputs, inputs, facecolor=BLUE, edgecolor=INK, linewidth=0.5))
        left += outputs + gap // 2
    own = sum(inputs * outputs for inputs, outputs in attention)
    axes.text(0, 0.25 * tall, f"attention {million(own)}", va="bottom", **SMALL)
    for number in range(shared):
        _expert(axes, right - width - number * step, 0, expert, LOOKS["shared experts"][0])
    text = f"{shared} shared experts {million(shared * tall * width)}"
    axes.text(right, 0.25 * tall, text, ha="right", va="bottom", **SMALL)
    for number in range(routed):
        row, column = divmod(number, columns)
        _expert(axes, column * step, -(row + 1.25) * down, expert, ORANGE if number < used else "white")
    text = f"{routed} routed experts {million(routed * tall * width)}; one token uses {used}: {million(used * tall * width)}"
    axes.text(right / 2, -(rows + 1.4) * down, text, ha="center", va="top", **SMALL)
    return axes


def _expert(axes: Axes, left: float, top: float, expert: tuple[int, int], colour: str) -> None:
    """The three matrices of an expert, side by side."""
    tall, width = expert
    for number in range(3):
        place = (left + number * width, top - tall)
        axes.add_patch(Rectangle(place, width, tall, facecolor=colour, edgecolor=INK, linewidth=0.35))
