"""Figures of the chapter that shows the layer at a glance."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from dsv2_ref.plots.style import CENTRED, INK, SMALL, STYLES, add_legend, name_rows, new_axes

BLUE, ORANGE, PALE = STYLES[0][0], STYLES[1][0], "#F5C9A8"
BOX = 0.7  # height of a box, where the rows are 1 apart
STREAM = 0.5  # where the residual stream runs, from left to right 0 to 10
LEFT, RIGHT, GAP = 1.4, 9.95, 0.3  # the columns of boxes, and the room between them
MIDDLE = (LEFT + RIGHT) / 2

Point = tuple[float, float]


def layer_flow(branches: Mapping[str, Sequence[Sequence[str]]], remembered: Collection[str] = ()) -> Axes:
    """A layer from top to bottom: the residual stream at the left, and the branches that read it and are added to it.

    Args:
        branches: for each norm that begins a branch, the rows of boxes behind it. A row of as many boxes as the row
            above continues its lines; another number of boxes gathers or spreads them. An empty name is a line, and
            a name given to neighbours is one box as wide as they are.
        remembered: the boxes whose content a layer keeps between calls; drawn in another colour.
    """
    rows = sum(len(behind) + 2 for behind in branches.values())
    axes = new_axes("", "", height=0.62 * (rows + 1), xlim=(0, 10), ylim=(-rows - 0.5, 0.5))
    axes.set_axis_off()
    _arrow(axes, (STREAM, 0.4), (STREAM, -rows - 0.4), linewidth=3.5, color=BLUE)
    axes.text(STREAM + 0.4, 0.25, "token in", va="center", color=INK)
    axes.text(STREAM + 0.4, -rows - 0.25, "token out", va="center", color=INK)
    y = -0.35
    for norm, behind in branches.items():
        _line(axes, (STREAM, y), (MIDDLE, y))
        y -= 0.65
        above = [MIDDLE]
        for row in ([norm], *behind):
            places = _places(len(row))
            _connect(axes, above, places, y + BOX / 2, row)
            for x, half, name in _boxes(row):
                _box(axes, x, y, name, half, name in remembered)
            above = places
            y -= 1
        middle = y + 0.4
        for x in above:
            _line(axes, (x, y + 1 - BOX / 2), (x, middle))
        _arrow(axes, (max(above), middle), (STREAM + 0.3, middle))
        axes.plot(STREAM, middle, "o", markersize=17, color="white", markeredgecolor=INK, zorder=3)
        axes.text(STREAM, middle - 0.02, "+", fontsize=16, zorder=4, **CENTRED)
        y = middle - 0.75
    return axes


def _line(axes: Axes, start: Point, end: Point) -> None:
    axes.plot(*zip(start, end, strict=True), color=INK, linewidth=1.2)


def _arrow(axes: Axes, start: Point, end: Point, **look: Any) -> None:
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0} | look
    axes.annotate("", end, start, arrowprops=arrow)


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
            _line(axes, (x, bottom), (x, middle))
        ends = [*above, *arrows, *lines]
        _line(axes, (min(ends), middle), (max(ends), middle))
        bottom = middle
    for x in arrows:
        _arrow(axes, (x, bottom), (x, top))
    for x in lines:
        _line(axes, (x, top - BOX), (x, bottom))


def _box(axes: Axes, x: float, y: float, name: str, half: float, remembered: bool) -> None:
    face, edge = ("#FCE5D4", ORANGE) if remembered else ("#F1F5F9", INK)
    look: dict[str, Any] = {"facecolor": face, "edgecolor": edge, "linewidth": 1.4, "zorder": 2}
    corner, shape = (x - half, y - BOX / 2), "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, 2 * half, BOX, boxstyle=shape, **look))
    axes.text(x, y - 0.02, name, fontsize=11.5 if half > 1.5 else 10.5, linespacing=1.15, zorder=3, **CENTRED)


def layer_kinds(models: Mapping[str, Sequence[bool]]) -> Axes:
    """Which layers of each model hold experts: a row of cells, whether layer 0, 1, … does, for each label."""
    looks: dict[bool, Any] = {False: {"facecolor": BLUE}, True: {"facecolor": PALE, "edgecolor": ORANGE}}
    axes = new_axes("index of the layer", "", height=0.8 + 0.5 * len(models))
    for row, kinds in enumerate(models.values()):
        for layer, has_experts in enumerate(kinds):
            look = {"edgecolor": BLUE} | looks[has_experts]
            axes.add_patch(Rectangle((layer - 0.5, row - 0.3), 1, 0.6, linewidth=0.8, **look))
    axes.set_xlim(-1, max(map(len, models.values())))
    name_rows(axes, list(models))
    axes.grid(False)
    handles = [Rectangle((0, 0), 1, 1, **look) for look in looks.values()]
    axes.legend(handles, ["dense MLP", "experts"], ncols=2, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return axes


def parameter_shares(counts: Mapping[str, Mapping[str, int]]) -> Axes:
    """What share of its parameters each part of a layer has, by two ways of counting the same parts."""
    names = list(next(iter(counts.values())))
    axes = new_axes("share of the parameters, %", "", height=0.9 + 0.7 * len(names))
    for number, ((label, parts), colour) in enumerate(zip(counts.items(), (BLUE, PALE), strict=True)):
        shares = [100 * count / sum(parts.values()) for count in parts.values()]
        places = [place - 0.2 + 0.4 * number for place in range(len(parts))]
        bars = axes.barh(places, shares, 0.38, color=colour, edgecolor=INK, hatch="//" * number, label=label)
        texts = [f"{share:.0f} %" if share >= 0.5 else "below 0.5 %" for share in shares]
        axes.bar_label(bars, texts, padding=4, **SMALL)
    axes.set(xlim=(0, 112), yticks=range(len(names)), yticklabels=names, xticks=range(0, 101, 25))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(left=False)
    return add_legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
