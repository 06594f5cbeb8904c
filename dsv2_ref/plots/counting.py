"""The figure of the chapter on counting."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from dsv2_ref.plots.style import INK, new_axes

FILLS = (
    ("#0072B2", "white", ""),
    ("#9CC9E3", INK, "//"),
    ("#E69F00", INK, ""),
    ("#CC79A7", INK, "\\\\"),
    ("#BBBBBB", INK, ""),
)


def shares(rows: Mapping[str, Mapping[str, float]]) -> Axes:
    """What each part has of a whole: a bar of shares for each row, in the order of the parts.

    Args:
        rows: for each label, amounts by part; the same parts everywhere, up to five. Shares of 6 % and more are written in.
    """
    axes = new_axes("share of the whole, %", "", height=1.5 + 0.5 * len(rows))
    left = dict.fromkeys(rows, 0.0)
    for part, (colour, ink, hatch) in zip(next(iter(rows.values())), FILLS, strict=False):
        widths = {row: 100 * amounts[part] / sum(amounts.values()) for row, amounts in rows.items()}
        axes.barh(
            list(rows), list(widths.values()), 0.66, left=list(left.values()), color=colour, edgecolor=INK, hatch=hatch,
            linewidth=0.6, label=part,
        )  # fmt: skip
        for place, (row, width) in enumerate(widths.items()):
            if width >= 6:
                box = {"facecolor": "white" if hatch else colour, "edgecolor": "none", "pad": 1.0}
                axes.text(left[row] + width / 2, place, f"{width:.0f}", ha="center", va="center", color=ink, bbox=box)
            left[row] += width
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(False)
    axes.tick_params(left=False)
    axes.legend(frameon=False, labelcolor=INK, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0), fontsize=11)
    return axes
