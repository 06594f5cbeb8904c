"""Figures of the chapter on RMSNorm."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from dsv2_ref.plots.style import add_curves, new_axes


def growth_through_layers(curves: Mapping[str, Sequence[float]]) -> Axes:
    """The root mean square of the residual stream before layer 0, after one layer, after two, …, for up to four labels."""
    return add_curves(new_axes("layers passed", "root mean square of the stream", yscale="log"), curves)


def running_sums(sums: Mapping[str, Sequence[float]]) -> Axes:
    """How a sum builds up, for up to four ways of adding: its value after one feature, after two, …"""
    axes = add_curves(new_axes("features added", "running sum of squares"), sums, start=1)
    axes.set(xlim=(0, None), ylim=(0, None))
    return axes
