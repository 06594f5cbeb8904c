"""Figures of the chapter on MLA compression."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from dsv2_ref.plots.style import INK, STYLES, add_curves, new_axes

MARKERS = "osD^"


def numbers_remembered(counts: Mapping[str, int]) -> Axes:
    """How many numbers a layer keeps of a token, a dot for each way to remember, on a logarithmic scale.

    Args:
        counts: for each label, numbers per token and layer.
    """
    axes = new_axes("numbers per token and layer", "", height=0.8 + 0.4 * len(counts))
    axes.plot(list(counts.values()), range(len(counts)), "o", color=STYLES[0][0], markersize=9)
    for row, count in enumerate(counts.values()):
        axes.annotate(
            f"{count:,}", (count, row), (9, 0), textcoords="offset points", va="center", fontsize=11, color=INK
        )
    least, most = min(counts.values()), max(counts.values())
    axes.set(xscale="log", xlim=(least / 2, most * (most / least) ** 0.35))  # every dot has room for its number
    axes.set(ylim=(len(counts) - 0.5, -0.5), yticks=range(len(counts)), yticklabels=list(counts))
    axes.tick_params(left=False)
    return axes


def cache_growth(computed: Mapping[str, Mapping[int, int]], measured: Mapping[str, Mapping[int, int]]) -> Axes:
    """Bytes of a cache over the tokens in it, both logarithmic: lines for formulas, marks for live caches.

    Args:
        computed: for each kind of attention, bytes by context length; up to four. The lengths are marked on the axis.
        measured: the same kinds, bytes of real caches by context length.
    """
    axes = new_axes("tokens remembered", "bytes of one layer's cache", height=3.9)
    for (label, line), (colour, style), marker in zip(computed.items(), STYLES, MARKERS, strict=False):
        points = measured[label]
        axes.plot(list(line), list(line.values()), style, color=colour, linewidth=2.2, label=label)
        axes.plot(list(points), list(points.values()), marker, color=colour, markersize=7, label="_measured")
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(FixedLocator(list(next(iter(computed.values())))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.legend(frameon=False, labelcolor=INK)
    return axes


def truncation_errors(errors: Mapping[str, Sequence[float]], kept: int) -> Axes:
    """What is lost of all keys and values when only the strongest directions are kept.

    Args:
        errors: for each label, the relative error with 0 directions kept, with 1, with 2, …; up to four curves.
        kept: a number of directions to mark by a labelled vertical line.
    """
    axes = new_axes("size of the latent", "relative error")
    add_curves(axes, errors, start=0)
    axes.axvline(kept, color=INK, linewidth=0.9)
    axes.annotate(f"{kept}", (kept, 1.0), (4, 2), textcoords="offset points", fontsize=11, color=INK)
    axes.set(xlim=(0, None), ylim=(0, 1.1))
    return axes
