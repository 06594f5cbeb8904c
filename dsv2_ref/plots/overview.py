"""Figures of the chapter that shows the layer at a glance."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from dsv2_ref.plots.style import INK, STYLES, new_axes

BLUE, ORANGE = STYLES[0][0], STYLES[1][0]
ARROW = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
BOX = 0.7  # height of a box, where the rows are 1 apart
STREAM = 0.5  # where the residual stream runs, from left to right 0 to 10
LEFT, RIGHT, GAP = 1.4, 9.95, 0.3  # the columns of boxes, and the room between them
MIDDLE = (LEFT + RIGHT) / 2


def layer_flow(branches: Mapping[str, Sequence[Sequence[str]]], remembered: Collection[str] = ()) -> Axes:
    """A layer from top to bottom: the residual stream at the left, and the branches that read it and are added to it.

    Args:
        branches: for each norm that begins a branch, the rows of boxes behind it. A row of as many boxes as the row
            above continues its lines; another number of boxes gathers or spreads them. An empty name is a line, and
            a name given to neighbours is one box as wide as they are.
        remembered: the boxes whose content a layer keeps between calls; drawn in another colour.
    """
    rows = sum(len(behind) + 2 for behind in branches.values())
    axes = new_axes("", "", height=0.62 * (rows + 1))
    axes.set(xlim=(0, 10), ylim=(-rows - 0.5, 0.5))
    axes.set_axis_off()
    axes.annotate("", (STREAM, -rows - 0.4), (STREAM, 0.4), arrowprops=ARROW | {"linewidth": 3.5, "color": BLUE})
    axes.text(STREAM + 0.4, 0.25, "token in", va="center", color=INK)
    axes.text(STREAM + 0.4, -rows - 0.25, "token out", va="center", color=INK)
    y = -0.35
    for norm, behind in branches.items():
        axes.plot([STREAM, MIDDLE], [y, y], color=INK, linewidth=1.2)
        above = [MIDDLE]
        start = y
        y -= 0.65
        for number, row in enumerate([[norm], *behind]):
            places = _places(len(row))
            top = y + BOX / 2
            if number == 0:
                axes.annotate("", (MIDDLE, top), (MIDDLE, start), arrowprops=ARROW)
            else:
                _connect(axes, above, places, top, row)
            for x, half, name in _boxes(row):
                _box(axes, x, y, name, half, name in remembered)
            above = places
            y -= 1
        middle = y + 0.4
        for x in above:
            axes.plot([x, x], [y + 1 - BOX / 2, middle], color=INK, linewidth=1.2)
        axes.annotate("", (STREAM + 0.3, middle), (max(above), middle), arrowprops=ARROW)
        axes.plot(STREAM, middle, "o", markersize=17, color="white", markeredgecolor=INK, zorder=3)
        axes.text(STREAM, middle - 0.02, "+", ha="center", va="center", fontsize=16, color=INK, zorder=4)
        y = middle - 0.75
    return axes


def _places(columns: int) -> list[float]:
    """The middle of each column of a row."""
    apart = (RIGHT - LEFT + GAP) / columns
    return [MIDDLE + apart * (i - (columns - 1) / 2) for i in range(columns)]


def _boxes(row: Sequence[str]) -> Iterator[tuple[float, float, str]]:
    """Middle, half the width and name of each box of a row."""
    places = _places(len(row))
    half = 2.4 if len(row) == 1 else (places[1] - places[0] - GAP) / 2
    for name, columns in groupby(range(len(row)), key=row.__getitem__):
        if name:
            taken = [places[column] for column in columns]
            yield (taken[0] + taken[-1]) / 2, half + (taken[-1] - taken[0]) / 2, name


def _connect(axes: Axes, above: Sequence[float], places: Sequence[float], top: float, row: Sequence[str]) -> None:
    """Lines from the boxes of one row to those of the next, whose upper edge is at ``top``."""
    bottom, middle = top + 1 - BOX, top + (1 - BOX) * 0.62
    lines = [x for x, name in zip(places, row, strict=True) if not name]
    arrows = [x for x in places if x not in lines]
    if len(above) != len(places):
        arrows = [x for x, _, _ in _boxes(row)]
        for x in above:
            axes.plot([x, x], [bottom, middle], color=INK, linewidth=1.2)
        ends = [*above, *arrows, *lines]
        axes.plot([min(ends), max(ends)], [middle, middle], color=INK, linewidth=1.2)
        bottom = middle
    for x in arrows:
        axes.annotate("", (x, top), (x, bottom), arrowprops=ARROW)
    for x in lines:
        axes.plot([x, x], [top - BOX, bottom], color=INK, linewidth=1.2)


def _box(axes: Axes, x: float, y: float, name: str, half: float, remembered: bool) -> None:
    corner, size = (x - half, y - BOX / 2), (2 * half, BOX)
    face, edge = ("#FCE5D4", ORANGE) if remembered else ("#F1F5F9", INK)
    style = "round,pad=0,rounding_size=0.12"
    look: dict[str, Any] = {"boxstyle": style, "facecolor": face, "edgecolor": edge, "linewidth": 1.4, "zorder": 2}
    axes.add_patch(FancyBboxPatch(corner, *size, **look))
    letters = 11.5 if half > 1.5 else 10.5
    axes.text(x, y - 0.02, name, ha="center", va="center", fontsize=letters, linespacing=1.15, color=INK, zorder=3)


def layer_kinds(models: Mapping[str, Sequence[bool]]) -> Axes:
    """Which layers of each model hold experts: a row of cells for each, from layer 0 on.

    Args:
        models: for each label, whether layer 0, 1, … holds experts.
    """
    axes = new_axes("index of the layer", "", height=0.8 + 0.5 * len(models))
    for row, kinds in enumerate(models.values()):
        for layer, has_experts in enumerate(kinds):
            face, edge = ("#F5C9A8", ORANGE) if has_experts else (BLUE, BLUE)
            cell = Rectangle((layer - 0.5, row - 0.3), 1, 0.6, linewidth=0.8, facecolor=face, edgecolor=edge)
            axes.add_patch(cell)
    longest = max(map(len, models.values()))
    axes.set(xlim=(-1, longest), ylim=(len(models) - 0.5, -0.5), yticks=range(len(models)), yticklabels=list(models))
    axes.grid(False)
    axes.tick_params(left=False)
    handles = [Rectangle((0, 0), 1, 1, facecolor=BLUE), Rectangle((0, 0), 1, 1, facecolor="#F5C9A8", edgecolor=ORANGE)]
    axes.legend(handles, ["dense MLP", "experts"], ncols=2, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return axes


def parameter_shares(counts: Mapping[str, Mapping[str, int]]) -> Axes:
    """What share of its parameters each part of a layer has, by two ways of counting.

    Args:
        counts: for each of two ways to count, the parameters of every part; the parts are the same in both.
    """
    axes = new_axes("share of the parameters, %", "", height=0.9 + 0.7 * len(next(iter(counts.values()))))
    for number, ((label, parts), colour) in enumerate(zip(counts.items(), (BLUE, "#F5C9A8"), strict=True)):
        shares = [100 * count / sum(parts.values()) for count in parts.values()]
        places = [place - 0.2 + 0.4 * number for place in range(len(parts))]
        bars = axes.barh(places, shares, 0.38, color=colour, edgecolor=INK, hatch="//" * number, label=label)
        texts = [f"{share:.0f} %" if share >= 0.5 else "below 0.5 %" for share in shares]
        axes.bar_label(bars, texts, padding=4, fontsize=11, color=INK)
    axes.set(xlim=(0, 112), yticks=range(len(parts)), yticklabels=list(parts), xticks=range(0, 101, 25))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(left=False)
    axes.legend(frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return axes
