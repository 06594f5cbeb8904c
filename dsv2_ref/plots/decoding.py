"""Figures of the chapter on decoding from the latent."""

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from dsv2_ref.plots.style import CENTRED, INK, Points, add_curves, add_legend, new_axes, tick, whole


def _over_tokens(axes: Axes, curves: Points) -> None:
    """Marked curves over numbers of tokens, which are the ticks; both scales are logarithmic."""
    add_curves(axes, curves, marked=True)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    tick(axes.xaxis, list(next(iter(curves.values()))))
    axes.tick_params(axis="x", rotation=30)


def crossover(borders: Points, limit: float) -> Axes:
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
    _over_tokens(axes, borders)
    axes.plot(contexts, contexts, color=INK, linewidth=1.2, label="prompt, S = K")
    axes.axhline(limit, color=INK, linestyle=":", linewidth=1.5)
    axes.set_ylim(min(*first, *second) / 2, 1.5 * contexts[-1])
    axes.yaxis.set_major_formatter(whole)
    axes.text(contexts[0], limit * 1.1, f"{limit:.0f}", color=INK, va="bottom")
    axes.text(contexts[-1], limit / 4, "absorbed", ha="right", color=INK)
    # Along the strip between the second border and what a prompt asks at once.
    middle = len(contexts) // 2
    between = (contexts[middle] * second[middle]) ** 0.5
    axes.text(contexts[middle], between, "expanded", rotation=32, **CENTRED)
    return add_legend(axes, loc="upper left", fontsize=11)


def memory_growth(peaks: Points) -> Axes:
    """Peak bytes beyond the inputs over the number of tokens, both logarithmic, for up to four ways to attend."""
    axes = new_axes("tokens attending to one another", "peak bytes of one head", height=3.6)
    _over_tokens(axes, peaks)
    axes.yaxis.set_major_formatter(EngFormatter("B"))
    return axes
