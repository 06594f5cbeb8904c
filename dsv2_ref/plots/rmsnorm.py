"""Figures of the chapter on RMSNorm."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from dsv2_ref.plots.style import add_curves, new_axes


def growth_through_layers(curves: Mapping[str, Sequence[float]]) -> Axes:
    """The size of the residual stream after each layer, on a logarithmic scale.

    Args:
        curves: for each label, the root mean square before layer 0, after one layer, after two, …; up to four curves.
    """
    axes = new_axes("layers passed", "root mean square of the stream")
    add_curves(axes, curves, start=0)
    axes.set_yscale("log")
    return axes


def running_sums(sums: Mapping[str, Sequence[float]]) -> Axes:
    """How a sum builds up, term by term, for each way of adding.

    Args:
        sums: for each label, the sum after one feature, after two, …; up to four curves.
    """
    axes = new_axes("features added", "running sum of squares")
    add_curves(axes, sums, start=1)
    axes.set(xlim=(0, None), ylim=(0, None))
    return axes
