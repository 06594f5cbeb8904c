"""Figures of the chapter on the pre-norm layer."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from dsv2_ref.plots.style import INK, STYLES, new_axes


def by_layer(curves: Mapping[str, Sequence[float]], ylabel: str, logarithmic: bool = False) -> Axes:
    """A quantity of every layer, from the first to the last.

    Args:
        curves: for each label, a value for each layer; up to four. ylabel: what the values are.
        logarithmic: the scale of the values; otherwise it starts at 0.
    """
    axes = new_axes("layer", ylabel, height=3.4)
    for (label, values), (colour, line) in zip(curves.items(), STYLES, strict=False):
        axes.plot(range(len(values)), values, line, color=colour, linewidth=2.2, label=label)
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, None)
    axes.set_xlim(0, None)
    axes.legend(frameon=False, labelcolor=INK)
    return axes


def training_curves(runs: Mapping[str, Mapping[int, Sequence[float]]], guessing: float) -> Axes:
    """Loss over training steps: the median of the seeds as a line, their range as a band.

    Args:
        runs: for each label, the seeds' bits a byte by step; up to four. guessing: bits without any context, a line.
    """
    axes = new_axes("training step", "bits a byte", height=3.8)
    for (label, curve), (colour, line) in zip(runs.items(), STYLES, strict=False):
        steps = list(curve)
        ordered = [sorted(seeds) for seeds in curve.values()]
        middle = [seeds[len(seeds) // 2] for seeds in ordered]
        axes.fill_between(
            steps, [s[0] for s in ordered], [s[-1] for s in ordered], color=colour, alpha=0.2, linewidth=0
        )
        axes.plot(steps, middle, line, color=colour, linewidth=2.2, label=label)
    axes.axhline(guessing, color=INK, linewidth=0.9, label="frequencies alone")
    axes.set_xlim(0, None)
    axes.legend(frameon=False, labelcolor=INK)
    return axes


def ends_by_rate(ends: Mapping[str, Mapping[float, Sequence[float]]], guessing: float) -> Axes:
    """Where trainings end, over the learning rate: the median of the seeds as a line, each seed as a point.

    Args:
        ends: for each label, the seeds' bits a byte at the end by rate; up to four. guessing: as for `training_curves`.
    """
    axes = new_axes("learning rate", "bits a byte at the end", height=4.2)
    for (label, by_rate), (colour, line) in zip(ends.items(), STYLES, strict=False):
        middle = [sorted(seeds)[len(seeds) // 2] for seeds in by_rate.values()]
        axes.plot(list(by_rate), middle, line, color=colour, linewidth=2.2, label=label)
        for rate, seeds in by_rate.items():
            axes.plot([rate] * len(seeds), seeds, "o", color=colour, markersize=3.5)
    axes.axhline(guessing, color=INK, linewidth=0.9, label="frequencies alone")
    axes.set_xscale("log")
    axes.legend(frameon=False, labelcolor=INK, fontsize=11, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)
    return axes
