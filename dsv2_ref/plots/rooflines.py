"""Figures of the chapter on rooflines."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from dsv2_ref.plots.style import INK, SMALL, Points, add_curves, add_legend, add_line, new_axes, tick


def roofline(machines: Mapping[str, tuple[float, float]], operations: Mapping[str, float]) -> Axes:
    """What a machine can compute at most for each byte it reads: a roof for each, and where operations stand.

    Args:
        machines: FLOPs a second and bytes a second of up to four.
        operations: FLOPs for each byte read, marked by a labelled line.
    """
    left, right = 0.3, 3000.0
    axes = new_axes("FLOP for each byte read", "attainable FLOP/s", height=4.0, xscale="log", yscale="log")
    roofs = {}
    for name, (peak, bandwidth) in machines.items():
        roofs[name] = {left: left * bandwidth, peak / bandwidth: peak, right: peak}
    add_curves(axes, roofs)
    axes.set_xlim(left, right)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * 30)
    for name, intensity in operations.items():
        axes.axvline(intensity, color=INK, linewidth=0.9, linestyle=":")
        axes.text(intensity * 1.07, top * 25, name, rotation=90, va="top", **SMALL)
    axes.yaxis.set_major_formatter(EngFormatter())
    return add_legend(axes, frameon=True, framealpha=1, edgecolor="white", loc="lower right", fontsize=11)


def intensity_over_batch(curves: Points, balances: Mapping[str, float]) -> Axes:
    """FLOPs for each byte over the batch, both logarithmic, of up to four parts of a layer; and as labelled lines the
    balance of machines: FLOPs that each does in the time in which it reads a byte."""
    axes = new_axes("sequences in the batch", "FLOP for each byte read", height=4.4, xscale="log", yscale="log")
    add_curves(axes, curves)
    batches = list(next(iter(curves.values())))
    for name, balance in balances.items():
        add_line(axes, balance, linestyle=":")
        above = balance == max(balances.values())  # the others keep clear of a curve between two lines
        place = balance * 1.08 if above else balance / 1.12
        axes.text(batches[0], place, name, va="bottom" if above else "top", **SMALL)
    tick(axes.xaxis, batches[:: max(1, len(batches) // 5)])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.5g}")
    return add_legend(axes, loc="lower left", bbox_to_anchor=(0, 1), fontsize=11)
