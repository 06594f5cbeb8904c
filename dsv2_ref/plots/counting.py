"""The figure of the chapter on counting."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from dsv2_ref.plots.style import INK, add_bars, new_axes

LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2"},
    {"color": "#9CC9E3", "hatch": "//"},
    {"color": "#E69F00"},
    {"color": "#CC79A7", "hatch": "\\\\"},
    {"color": "#BBBBBB"},
)


def shares(rows: Mapping[str, Mapping[str, float]]) -> Axes:
    """What each part has of a whole: a bar of shares for each row, in the order of the parts.

    Args:
        rows: for each label, amounts by part; the same parts everywhere, up to five. Shares of 6 % and more are written in.
    """
    axes = new_axes("share of the whole, %", "", height=1.5 + 0.5 * len(rows))
    looks = dict(zip(next(iter(rows.values())), LOOKS, strict=False))
    percent = {row: [100 * amounts[part] / sum(amounts.values()) for part in looks] for row, amounts in rows.items()}
    for bars, look in zip(add_bars(axes, percent, looks, 0.66, fontsize=11), LOOKS, strict=False):
        ground = {"facecolor": "white" if "hatch" in look else look["color"], "edgecolor": "none", "pad": 1.0}
        letters = "white" if look is LOOKS[0] else INK
        for bar in bars:
            if bar.get_width() >= 6:
                text = f"{bar.get_width():.0f}"
                axes.text(*bar.get_center(), text, ha="center", va="center", color=letters, bbox=ground)
    axes.set_xlim(0, 100)
    return axes
