"""Figures of the chapter on RMSNorm."""

from matplotlib.axes import Axes

from dsv2_ref.plots.style import Values, add_curves, new_axes


def growth_through_layers(curves: Values) -> Axes:
    """The root mean square of the residual stream before layer 0, after one layer, after two, …; up to four curves."""
    return add_curves(new_axes("layers passed", "root mean square of the stream", yscale="log"), curves)


def running_sums(sums: Values) -> Axes:
    """How a sum builds up, by its value after one feature, after two, … for up to four ways of adding."""
    axes = add_curves(new_axes("features added", "running sum of squares"), sums, start=1)
    axes.set(xlim=(0, None), ylim=(0, None))
    return axes
