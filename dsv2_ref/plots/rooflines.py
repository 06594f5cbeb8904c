"""Figures of the chapter on rooflines."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from dsv2_ref.plots.counting import LOOKS
from dsv2_ref.plots.style import INK, SMALL, STYLES, add_bars, add_curves, add_legend, new_axes, whole


def roofline(
    machines: Mapping[str, tuple[float, float]],
    operations: Mapping[str, float] | None = None,
    measured: Mapping[str, tuple[float, float]] | None = None,
) -> Axes:
    """What a machine can compute at most for each byte it reads: a roof for each, and where operations stand.

    Args:
        machines: FLOPs per second and bytes per second of up to four.
        operations: FLOPs for each byte read, marked by a labelled line.
        measured: FLOPs for each byte read, and FLOPs per second that were measured: labelled points.
    """
    left, right = 0.02 if measured else 0.3, 3000.0
    axes = new_axes("FLOP for each byte read", "attainable FLOP/s", height=4.0, xscale="log", yscale="log")
    roofs = {}
    for name, (peak, bandwidth) in machines.items():
        roofs[name] = {left: left * bandwidth, peak / bandwidth: peak, right: peak}
    add_curves(axes, roofs)
    axes.set_xlim(left, right)
    bottom, top = axes.get_ylim()
    if operations:
        axes.set_ylim(bottom, top * 30)
    for name, intensity in (operations or {}).items():
        axes.axvline(intensity, color=INK, linewidth=0.9, linestyle=":")
        axes.text(intensity * 1.07, top * 25, name, rotation=90, va="top", **SMALL)
    for name, (intensity, speed) in (measured or {}).items():
        axes.plot(intensity, speed, "o", color=STYLES[1][0], markersize=8)
        axes.annotate(name, (intensity, speed), (7, -4), textcoords="offset points", va="top", **SMALL)
    if measured:
        low = min(speed for _, speed in measured.values())
        axes.set_ylim(min(bottom, low / 2.5), top * 2)
    axes.yaxis.set_major_formatter(EngFormatter())
    return add_legend(axes, frameon=True, framealpha=1, edgecolor="white", loc="lower right", fontsize=11)


def step_times(rows: Mapping[str, Mapping[str, float]]) -> Axes:
    """Bars of the time per token of a decode step, by part: for each label, times of the parts in `LOOKS`; those of
    other parts are drawn together. The sum is written after each bar."""
    looks = {part: look for part, look in LOOKS.items() if part != "gate"} | {"the rest": LOOKS["gate"]}
    axes = new_axes("time per token, µs", "", height=1.7 + 0.5 * len(rows))
    times = {}
    for row, parts in rows.items():
        rest = sum(time for part, time in parts.items() if part not in looks)
        times[row] = [parts.get(part, 0) + (rest if part == "the rest" else 0) for part in looks]
    add_bars(axes, times, looks, 0.66)
    totals = [sum(parts) for parts in times.values()]
    for place, total in enumerate(totals):
        axes.annotate(f"{total:,.0f}", (total, place), (5, 0), textcoords="offset points", va="center", **SMALL)
    axes.set_xlim(0, 1.15 * max(totals))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(whole)
    return add_legend(axes, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0), fontsize=11)
