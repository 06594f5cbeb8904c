"""Every figure of the book: functions that take data and return matplotlib Axes. Only this module needs matplotlib.

Figures keep a white ground of their own, so that they read the same on a light and on a dark page, and use colours
that colour-blind readers can tell apart (Okabe and Ito's), each with a line style of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))
INK = "#333333"


def new_axes(xlabel: str, ylabel: str, height: float = 3.2) -> Axes:
    """Empty axes in the book's style, with the given labels; ``height`` is in inches.

    Five inches wide, so that the letters are as large as the text of a page, and can be read on a phone.
    """
    style: dict[Any, Any] = {"font.size": 12, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}
    style |= {"xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        _, axes = plt.subplots(figsize=(5, height), dpi=200, facecolor="white", layout="constrained")
        axes.set(xlabel=xlabel, ylabel=ylabel, facecolor="white")
        axes.grid(alpha=0.25)
    return axes


def add_curves(axes: Axes, curves: Mapping[str, Sequence[float]], start: int) -> None:
    """Draw each labelled curve over start, start + 1, …, and name them in a legend.

    Raises:
        ValueError: for more curves than there are styles.
    """
    if len(curves) > len(STYLES):
        raise ValueError(f"curves has {len(curves)} curves; wanted at most {len(STYLES)}")
    for (label, values), (colour, line) in zip(curves.items(), STYLES, strict=False):
        axes.plot(range(start, start + len(values)), values, line, color=colour, linewidth=2.2, label=label)
    axes.legend(frameon=False, labelcolor=INK)


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
