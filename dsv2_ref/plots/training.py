"""Figures of the chapter on training."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from dsv2_ref.plots.style import INK, SMALL, add_bars, add_curves, add_legend, new_axes

PARTS = {
    "weights": ("#0072B2", ""),
    "gradients": ("#D55E00", "\\\\"),
    "master weights": ("#9CC9E3", ""),
    "optimizer": ("#E69F00", ""),
    "activations": ("#009E73", "//"),
}
"""Colour and hatch of what memory holds in training."""


def bytes_of_training(rows: Mapping[str, Mapping[str, float]], limits: Mapping[str, float]) -> Axes:
    """Bars of bytes to scale, with their totals.

    Args:
        rows: for each label, GB of the parts in `PARTS`; those not named take nothing.
        limits: what devices hold, in GB, as labelled lines.
    """
    axes = new_axes("GB", "", height=2.0 + 0.42 * len(rows))
    sizes = {row: [parts.get(part, 0) for part in PARTS] for row, parts in rows.items()}
    add_bars(axes, sizes, PARTS, 0.62)
    totals = [sum(each) for each in sizes.values()]
    for place, total in enumerate(totals):
        text = f"{total:.1f}" if total < 10 else f"{total:.0f}"
        axes.annotate(text, (total, place), (4, 0), textcoords="offset points", va="center", **SMALL)
    for name, size in limits.items():
        axes.axvline(size, color=INK, linewidth=1.2, linestyle=":")
        axes.annotate(name, (size, len(rows) - 0.62), (4, 0), textcoords="offset points", va="top", **SMALL)
    axes.set(xlim=(0, 1.12 * max(totals)), ylim=(len(rows) - 0.3, -0.5))
    return add_legend(axes, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0), fontsize=11, columnspacing=1.2)


def memory_over_step(curves: Mapping[str, Mapping[float, float]], turn: float) -> Axes:
    """Bytes that are alive while a training step runs, a curve for each policy.

    Args:
        curves: GB by the TFLOPs that have been done.
        turn: TFLOPs of the forward pass, marked by a line.
    """
    axes = new_axes("TFLOP done since the step began", "activations, GB", height=3.4)
    add_curves(axes, curves, named=False)
    top = 1.16 * max(max(curve.values()) for curve in curves.values())
    axes.set(xlim=(0, 1.02 * max(max(curve) for curve in curves.values())), ylim=(0, top))
    axes.axvline(turn, color=INK, linewidth=0.9, linestyle=":")
    for name, shift, side in (("forward", -6, "right"), ("backward", 6, "left")):
        axes.annotate(name, (turn, top), (shift, -3), textcoords="offset points", ha=side, va="top", **SMALL)
    return add_legend(axes, loc="upper right", bbox_to_anchor=(1.0, 0.93))
