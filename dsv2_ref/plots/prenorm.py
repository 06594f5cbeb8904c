"""Figures of the chapter on the pre-norm layer."""

from collections.abc import Mapping, Sequence
from statistics import median_high
from typing import Any

from matplotlib.axes import Axes

from dsv2_ref.plots.style import STYLES, Values, add_curves, add_legend, add_line, new_axes

Runs = Mapping[str, Mapping[Any, Sequence[float]]]


def by_layer(curves: Values, ylabel: str, logarithmic: bool = False) -> Axes:
    """A quantity, ``ylabel``, of every layer, for up to four labels; its scale is logarithmic or starts at 0."""
    axes = add_curves(new_axes("layer", ylabel, height=3.4, yscale="log" if logarithmic else "linear"), curves)
    axes.set(xlim=(0, None), ylim=(None if logarithmic else 0, None))
    return axes


def training_curves(runs: Runs, guessing: float) -> Axes:
    """Loss over training steps, for up to four labels: the median of the seeds as a line, their range as a band.

    Args:
        runs: for each label, the seeds' bits a byte by step. guessing: bits without any context, a line.
    """
    axes = add_curves(new_axes("training step", "bits a byte", height=3.8), _medians(runs))
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
    axes = new_axes("learning rate", "bits a byte at the end", height=4.2, xscale="log")
    add_curves(axes, _medians(ends))
    for by_rate, (colour, _) in zip(ends.values(), STYLES, strict=False):
        for rate, seeds in by_rate.items():
            axes.plot([rate] * len(seeds), seeds, "o", color=colour, markersize=3.5)
    add_line(axes, guessing, "frequencies alone")
    return add_legend(axes, fontsize=11, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)


def _medians(runs: Runs) -> dict[str, dict[float, float]]:
    return {label: {x: median_high(seeds) for x, seeds in run.items()} for label, run in runs.items()}
