"""Figures of the chapter on MLA compression."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from dsv2_ref.plots.style import INK, MARKERS, STYLES, add_curves, name_rows, new_axes, tick_only


def numbers_remembered(counts: Mapping[str, int]) -> Axes:
    """How many numbers a layer keeps of a token: a dot for each label and number, on a logarithmic scale."""
    axes = new_axes("numbers per token and layer", "", height=0.8 + 0.4 * len(counts))
    axes.plot(list(counts.values()), range(len(counts)), "o", color=STYLES[0][0], markersize=9)
    beside = {"textcoords": "offset points", "va": "center", "fontsize": 11, "color": INK}
    for row, count in enumerate(counts.values()):
        axes.annotate(f"{count:,}", (count, row), (9, 0), **beside)
    least, most = min(counts.values()), max(counts.values())
    axes.set(xscale="log", xlim=(least / 2, most * (most / least) ** 0.35))  # every dot has room for its number
    name_rows(axes, list(counts))
    return axes


def cache_growth(computed: Mapping[str, Mapping[int, int]], measured: Mapping[str, Mapping[int, int]]) -> Axes:
    """Bytes of a cache over the tokens in it, both logarithmic: lines for formulas, marks for live caches.

    Args:
        computed: for each kind of attention, bytes by context length; up to four. The lengths are marked on the axis.
        measured: the same kinds, bytes of real caches by context length.
    """
    axes = new_axes("tokens remembered", "bytes of one layer's cache", height=3.9, xscale="log", yscale="log")
    add_curves(axes, computed)
    for label, (colour, _), marker in zip(computed, STYLES, MARKERS, strict=False):
        points = measured[label]
        axes.plot(list(points), list(points.values()), marker, color=colour, markersize=7, label="_measured")
    tick_only(axes.xaxis, list(next(iter(computed.values()))))
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    return axes


def truncation_errors(errors: Mapping[str, Sequence[float]], kept: int) -> Axes:
    """What is lost of all keys and values when only the strongest directions are kept.

    Args:
        errors: for each label, the relative error with 0 directions kept, with 1, with 2, …; up to four curves.
        kept: a number of directions to mark by a labelled vertical line.
    """
    axes = add_curves(new_axes("size of the latent", "relative error"), errors)
    axes.axvline(kept, color=INK, linewidth=0.9)
    axes.annotate(f"{kept}", (kept, 1.0), (4, 2), textcoords="offset points", fontsize=11, color=INK)
    axes.set(xlim=(0, None), ylim=(0, 1.1))
    return axes
