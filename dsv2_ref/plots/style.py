"""The look of every figure, and the parts they are made of.

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
