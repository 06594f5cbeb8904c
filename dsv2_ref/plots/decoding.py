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


def crossover(borders: Mapping[str, Mapping[int, int]], limit: float) -> Axes:
    """Up to how many queries the absorbed form is cheaper, over the tokens attended to, both logarithmic.

    Args:
        borders: two counts of what a call costs, each with the most queries for which absorbing costs no more, by
            context length. Between the two the counts disagree.
        limit: where the first border ends up for long contexts.
    """
    axes = new_axes("tokens attended to, K", "queries in the call, S", height=3.8)
    contexts = list(next(iter(borders.values())))
    first, second = (list(border.values()) for border in borders.values())
    axes.fill_between(contexts, first, second, color=INK, alpha=0.1, linewidth=0, label="counts disagree")
    for (label, border), (colour, style), marker in zip(borders.items(), STYLES, MARKERS, strict=False):
        points = list(border), list(border.values())
        axes.plot(*points, style, marker=marker, color=colour, linewidth=2.2, markersize=6, label=label)
    axes.plot(contexts, contexts, color=INK, linewidth=1.2, label="prompt, S = K")
    axes.axhline(limit, color=INK, linestyle=":", linewidth=1.5)
    axes.text(contexts[0], limit * 1.1, f"{limit:.0f}", color=INK, va="bottom")
    _token_axis(axes, contexts)
    axes.set_yscale("log")
    axes.set_ylim(min(*first, *second) / 2, 1.5 * contexts[-1])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.text(contexts[-1], limit / 4, "absorbed", ha="right", color=INK)
    # Along the strip between the second border and what a prompt asks at once.
    middle = len(contexts) // 2
    between = (contexts[middle] * second[middle]) ** 0.5
    axes.text(contexts[middle], between, "expanded", ha="center", va="center", rotation=32, color=INK)
    axes.legend(frameon=False, labelcolor=INK, loc="upper left", fontsize=11)
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
