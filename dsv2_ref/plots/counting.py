"""The figure of the chapter on counting."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from dsv2_ref.plots.style import INK, add_bars, add_legend, new_axes

LOOKS = (("#0072B2", ""), ("#9CC9E3", "//"), ("#E69F00", ""), ("#CC79A7", "\\\\"), ("#BBBBBB", ""))


def shares(rows: Mapping[str, Mapping[str, float]]) -> Axes:
    """What each part has of a whole: a bar of shares for each row, in the order of the parts.

    Args:
        rows: for each label, amounts by part; the same parts everywhere, up to five. Shares from 6 % are written in.
    """
    axes = new_axes("share of the whole, %", "", height=1.5 + 0.5 * len(rows))
    looks = dict(zip(next(iter(rows.values())), LOOKS, strict=False))
    percent = {row: [100 * amounts[part] / sum(amounts.values()) for part in looks] for row, amounts in rows.items()}
    add_bars(axes, percent, looks, 0.66)
    for number, (colour, hatch) in enumerate(looks.values()):
        box = {"facecolor": "white" if hatch else colour, "edgecolor": "none", "pad": 1.0}
        ink = INK if number else "white"  # on the darkest
        for place, widths in enumerate(percent.values()):
            if widths[number] >= 6:
                middle, text = sum(widths[:number]) + widths[number] / 2, f"{widths[number]:.0f}"
                axes.text(middle, place, text, ha="center", va="center", color=ink, bbox=box)
    axes.set_xlim(0, 100)
    return add_legend(axes, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0), fontsize=11)
