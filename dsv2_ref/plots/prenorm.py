"""Figures of the chapter on the pre-norm layer."""

from collections.abc import Mapping, Sequence
from math import atan, atan2, cos, degrees, hypot, sin
from statistics import median_high
from typing import Any

from matplotlib.axes import Axes

from dsv2_ref.plots.style import CENTRED, INK, STYLES, Values, add_curves, add_legend, add_line, new_axes

Runs = Mapping[str, Mapping[Any, Sequence[float]]]
STREAM = "#8A9199"
PARTS = {"attention": ("#DCEBF6", STYLES[0][0]), "feed-forward": ("#FCE5D4", STYLES[1][0]), "norm": ("white", INK)}
"""Face and edge of the boxes."""


def norm_places(orders: Mapping[str, str]) -> Axes:
    """One layer for each title, from top to bottom: the stream as a thick line, its two branches, and where the norms lie.

    Args:
        orders: for each title what happens around ``part``, as in ``"norm part +"``: what stands before the ``+`` lies on
            the branch, what stands after it on the stream.
    """
    steps = max(len(order.split()) for order in orders.values())
    axes = new_axes("", "", height=0.8 + steps, xlim=(0, 3.3 * len(orders)), ylim=(-2 * steps - 1.1, 0.9))
    axes.set_axis_off()
    arrow: dict[str, Any] = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    for number, (title, order) in enumerate(orders.items()):
        stream, branch, y = 3.3 * number + 0.8, 3.3 * number + 2.2, 0.1
        axes.text(stream + 0.7, 0.6, title, fontsize=12.5, weight="bold", **CENTRED)
        thick = arrow | {"color": STREAM, "linewidth": 4}
        axes.annotate("", (stream, -2 * steps - 1), (stream, 0.2), arrowprops=thick)
        for part in ("attention", "feed-forward"):
            top = y = y - 0.35
            x = branch
            for step in order.split():
                y -= 0.9 if step != "+" else 0.75
                if step == "+":
                    axes.plot((stream, branch, branch), (top, top, y), color=INK, linewidth=1.3, zorder=1)
                    axes.annotate("", (stream + 0.22, y), (branch, y), arrowprops=arrow)
                    axes.plot(stream, y, "o", markersize=15, color="white", markeredgecolor=INK, zorder=3)
                    axes.text(stream, y - 0.02, "+", fontsize=15, zorder=4, **CENTRED)
                    x = stream
                else:
                    name = part if step == "part" else step
                    face, edge = PARTS[name]
                    box = {"boxstyle": "round,pad=0.35", "facecolor": face, "edgecolor": edge, "linewidth": 1.5}
                    axes.text(x, y, name, fontsize=11, bbox=box, zorder=5, **CENTRED)
            y -= 0.15 if x == stream and order.endswith("+") else 0.25
    return axes


def stream_spiral(branches: int, marked: int = 4) -> Axes:
    """A stream of length 1 to which attention and feed-forward add steps of length 1 in turn, each at a right angle to it.

    All lie in one plane here. The first ``marked`` angles and lengths are written, and the last.
    """
    axes = new_axes("", "", height=4.4, aspect="equal")
    axes.set_axis_off()
    x, y = 1.0, 0.0
    axes.plot((0, x), (0, y), color=STREAM, linewidth=3.5, solid_capstyle="round", label="stream")
    axes.text(1.17, 0.04, "1", **CENTRED)
    for branch in range(1, branches + 1):
        length, part = hypot(x, y), ("attention", "feed-forward")[(branch - 1) % 2]
        new_x, new_y = x - y / length, y + x / length
        look: dict[str, Any] = {"color": PARTS[part][1], "linewidth": 3, "label": part if branch < 3 else None}
        axes.plot((x, new_x), (y, new_y), solid_capstyle="round", zorder=3, **look)
        last = branch == branches
        axes.plot((0, new_x), (0, new_y), color=STREAM, linewidth=3.5 if last else 1)
        if branch <= marked or last:
            bisector = atan2(y, x) + atan(1 / length) / 2
            out = 0.8 * length
            angle = f"{degrees(atan(1 / length)):.1f}°".replace(".0°", "°")
            axes.text(out * cos(bisector), out * sin(bisector), angle, **CENTRED | {"fontsize": 9})
            out = 1 + 0.3 / hypot(new_x, new_y)
            axes.text(out * new_x, out * new_y, f"$\\sqrt{{{branch + 1}}}$", **CENTRED)
        x, y = new_x, new_y
    axes.margins(0.08)
    return add_legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=11, ncols=3)


def by_layer(curves: Values, ylabel: str, logarithmic: bool = False) -> Axes:
    """A quantity, ``ylabel``, of every layer, for up to four labels; its scale is logarithmic or starts at 0."""
    axes = add_curves(new_axes("layer", ylabel, height=3.4, yscale="log" if logarithmic else "linear"), curves)
    axes.set(xlim=(0, None), ylim=(None if logarithmic else 0, None))
    return axes


def training_curves(runs: Runs, guessing: float) -> Axes:
    """Loss over training steps, for up to four labels: the median of the seeds as a line, their range as a band.

    Args:
        runs: for each label, the seeds' bits per byte by step. guessing: bits without any context, a line.
    """
    axes = add_curves(new_axes("training step", "bits per byte", height=3.8), _medians(runs))
    for run, (colour, _) in zip(runs.values(), STYLES, strict=False):
        lowest, highest = list(map(min, run.values())), list(map(max, run.values()))
        axes.fill_between(list(run), lowest, highest, color=colour, alpha=0.2, linewidth=0)
    add_line(axes, guessing, "frequencies alone")
    axes.set_xlim(0, None)
    return add_legend(axes)


def ends_by_rate(ends: Runs, guessing: float) -> Axes:
    """Where trainings end, over the learning rate: the median of the seeds as a line, each seed as a point.

    Args:
        ends: as ``runs`` of `training_curves`, but by rate, at the end. guessing: as there.
    """
    axes = new_axes("learning rate", "bits per byte at the end", height=4.2, xscale="log")
    add_curves(axes, _medians(ends))
    for by_rate, (colour, _) in zip(ends.values(), STYLES, strict=False):
        for rate, seeds in by_rate.items():
            axes.plot([rate] * len(seeds), seeds, "o", color=colour, markersize=3.5)
    add_line(axes, guessing, "frequencies alone")
    return add_legend(axes, fontsize=11, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)


def _medians(runs: Runs) -> dict[str, dict[float, float]]:
    return {label: {x: median_high(seeds) for x, seeds in run.items()} for label, run in runs.items()}
