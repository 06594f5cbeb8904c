"""Figures of the chapter on MLA compression."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from dsv2_ref.plots.style import INK, MARKERS, SMALL, STYLES, Points, add_curves, add_legend, name_rows, new_axes, tick


def numbers_remembered(counts: Mapping[str, int]) -> Axes:
    """How many numbers a layer keeps of a token: a dot for each label and number, on a logarithmic scale."""
    axes = new_axes("numbers per token and layer", "", height=0.8 + 0.4 * len(counts))
    axes.plot(list(counts.values()), range(len(counts)), "o", color=STYLES[0][0], markersize=9)
    for row, count in enumerate(counts.values()):
        axes.annotate(f"{count:,}", (count, row), (9, 0), textcoords="offset points", va="center", **SMALL)
    least, most = min(counts.values()), max(counts.values())
    axes.set(xscale="log", xlim=(least / 2, most * (most / least) ** 0.35))  # every dot has room for its number
    name_rows(axes, list(counts))
    return axes


def cache_growth(computed: Points, measured: Points) -> Axes:
    """Bytes of a cache over the tokens in it, both logarithmic, for up to four kinds of attention: lines for formulas,
    whose lengths are the ticks, and marks for live caches."""
    axes = new_axes("tokens remembered", "bytes of one layer's cache", height=3.9, xscale="log", yscale="log")
    for (label, line), (colour, style), marker in zip(computed.items(), STYLES, MARKERS, strict=False):
        points = measured[label]
        axes.plot(list(line), list(line.values()), style, color=colour, linewidth=2.2, label=label)
        axes.plot(list(points), list(points.values()), marker, color=colour, markersize=7, label="_measured")
    tick(axes.xaxis, list(next(iter(computed.values()))))
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    return add_legend(axes)


def truncation_errors(errors: Mapping[str, Sequence[float]], kept: int) -> Axes:
    """What is lost of all keys and values, as a relative error, when only the 0, 1, 2, … strongest directions are kept,
    for up to four labels; a labelled line marks the number ``kept``."""
    axes = add_curves(new_axes("size of the latent", "relative error"), errors)
    axes.axvline(kept, color=INK, linewidth=0.9)
    axes.annotate(f"{kept}", (kept, 1.0), (4, 2), textcoords="offset points", **SMALL)
    axes.set(xlim=(0, None), ylim=(0, 1.1))
    return axes
