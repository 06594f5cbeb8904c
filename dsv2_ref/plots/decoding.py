"""Figures of the chapter on decoding from the latent."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from dsv2_ref.plots.style import INK, STYLES, new_axes

MARKERS = "osD^"


def _token_axis(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", rotation=30)


def crossover(most_queries: Mapping[int, int], limit: float) -> Axes:
    """Up to how many queries the absorbed form takes fewer operations, over the tokens attended to.

    Args:
        most_queries: by context length, the most queries for which absorbing is cheaper.
        limit: where the curve ends up for long contexts.
    """
    axes = new_axes("tokens attended to, K", "queries in the call, S", height=3.6)
    contexts, queries = list(most_queries), list(most_queries.values())
    colour = STYLES[0][0]
    axes.fill_between(contexts, queries, color=colour, alpha=0.18, linewidth=0)
    axes.plot(contexts, queries, "o-", color=colour, linewidth=2.2, markersize=6)
    axes.axhline(limit, color=INK, linestyle=":", linewidth=1.5)
    axes.text(contexts[0], limit * 1.03, f"{limit:.0f}", color=INK, va="bottom")
    _token_axis(axes, contexts)
    axes.set_ylim(0, 1.35 * limit)
    axes.text(contexts[-1], limit / 4, "absorbed is cheaper", ha="right", color=INK)
    axes.text(contexts[-1], 1.2 * limit, "expanded is cheaper", ha="right", color=INK)
    return axes


def memory_growth(peaks: Mapping[str, Mapping[int, int]]) -> Axes:
    """Peak bytes beyond the inputs over the number of tokens, both logarithmic, a marked line for each way.

    Args:
        peaks: for each way to attend, bytes by number of tokens; up to four ways.
    """
    axes = new_axes("tokens attending to one another", "peak bytes of one head", height=3.6)
    for (label, line), (colour, style), marker in zip(peaks.items(), STYLES, MARKERS, strict=False):
        points = list(line), list(line.values())
        axes.plot(*points, style, marker=marker, color=colour, linewidth=2.2, markersize=6, label=label)
    _token_axis(axes, list(next(iter(peaks.values()))))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(EngFormatter("B"))
    axes.legend(frameon=False, labelcolor=INK)
    return axes
