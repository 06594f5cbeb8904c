"""The look of every figure, and the parts they are made of.

Figures keep a white ground of their own, so that they read the same on a light and on a dark page, and use colours
that colour-blind readers can tell apart (Okabe and Ito's), each with a line style of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, NullLocator

STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))
MARKERS = ("o", "s", "D", "^")
INK = "#333333"
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
SETTINGS: dict[Any, Any] = {"font.size": 12, **dict.fromkeys(INKED, INK)}
OPEN = {"axes.spines.top": False, "axes.spines.right": False}
SMALL: dict[str, Any] = {"fontsize": 11, "color": INK}
CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "color": INK}

Values = Mapping[str, Sequence[float]]
Points = Mapping[str, Mapping[int, float]]
Curves = Values | Points | Mapping[str, Mapping[float, float]]


def new_axes(xlabel: str, ylabel: str, height: float = 3.2, **settings: Any) -> Axes:
    """Empty axes in the book's style, with the given labels and other settings of ``Axes.set``; ``height`` is in inches.

    Five inches wide, so that the letters are as large as the text of a page, and can be read on a phone.
    """
    with plt.rc_context(SETTINGS | OPEN):
        _, axes = plt.subplots(figsize=(5, height), dpi=200, facecolor="white", layout="constrained")
        axes.set(xlabel=xlabel, ylabel=ylabel, facecolor="white")
        axes.grid(alpha=0.25)
    axes.set(**settings)
    return axes


def add_curves(
    axes: Axes, curves: Curves, start: int = 0, marked: bool = False, named: bool = True, linewidth: float = 2.2
) -> Axes:
    """Draw labelled curves, given as y by x or as the y at start, start + 1, …, and name them in a legend.

    Raises:
        ValueError: for more curves than there are styles.
    """
    if len(curves) > len(STYLES):
        raise ValueError(f"curves has {len(curves)} curves; wanted at most {len(STYLES)}")
    for index, (label, values) in enumerate(curves.items()):
        (colour, line), marker = STYLES[index], MARKERS[index]
        points = values if isinstance(values, Mapping) else dict(enumerate(values, start))
        look: dict[str, Any] = {"color": colour, "linewidth": linewidth, "marker": marker if marked else None}
        axes.plot(list(points), list(points.values()), line, label=label, **look)
    return add_legend(axes) if named else axes


def add_legend(axes: Axes, **look: Any) -> Axes:
    """Name what is labelled, with ``look`` as in ``Axes.legend``."""
    axes.legend(**{"frameon": False, "labelcolor": INK} | look)
    return axes


def add_line(axes: Axes, height: float, label: str | None = None, linestyle: str = "-") -> None:
    """A thin level line, to compare with."""
    axes.axhline(height, color=INK, linewidth=0.9, linestyle=linestyle, label=label)


def add_bars(
    axes: Axes, rows: Mapping[str, Sequence[float]], looks: Mapping[str, tuple[str, str]], size: float
) -> None:
    """A bar of parts for each row, the first on top; ``looks`` has the colour and the hatch of each part."""
    left = np.zeros(len(rows))
    for (part, (colour, hatch)), widths in zip(looks.items(), np.transpose(list(rows.values())), strict=True):
        edge: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.6}
        axes.barh(list(rows), widths, size, left, color=colour, hatch=hatch, label=part, **edge)
        left = left + widths
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(left=False)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows 0, 1, … from the top."""
    axes.set(ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), yticklabels=names)
    axes.tick_params(left=False)


def tick(axis: Axis, places: Sequence[float]) -> None:
    """Ticks at these whole numbers and nowhere else."""
    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(whole)


def whole(number: float, _: object = None) -> str:
    """A tick's number without decimals."""
    return f"{number:,.0f}"
