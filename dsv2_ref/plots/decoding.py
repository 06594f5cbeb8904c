"""Figures of the chapter on decoding from the latent."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dsv2_ref.plots.style import (
    CENTRED,
    INK,
    SMALL,
    STYLES,
    Points,
    add_bars,
    add_curves,
    add_legend,
    new_axes,
    tick,
    whole,
)

LATENT, QUERY, OTHER = STYLES[0][0], STYLES[3][0], "#B9C0C7"
"""The colours of latents, of queries, and of the keys and values of heads."""


def three_ways(rows: Mapping[str, Mapping[str, int]], notes: Sequence[str]) -> Axes:
    """Bars of what one head multiplies to decode a token: parts by name for each way, and a note after each bar."""
    axes = new_axes("multiplications of one head", "", height=1.7 + 0.6 * len(rows))
    looks = {
        "attend to keys and values": (OTHER, ""),
        "attend to latents": (LATENT, ""),
        "move brackets": (QUERY, ""),
        "make keys and values": ("white", "//"),
    }
    add_bars(axes, {row: [parts.get(part, 0) for part in looks] for row, parts in rows.items()}, looks, size=0.62)
    totals = [sum(parts.values()) for parts in rows.values()]
    for y, (total, note) in enumerate(zip(totals, notes, strict=True)):
        axes.annotate(f"{total:,}{note}", (total, y), (5, 0), textcoords="offset points", va="center", **SMALL)
    axes.set(xlim=(0, 1.6 * max(totals)), xticks=range(0, max(totals) + 1, 500))
    return add_legend(axes, fontsize=10, loc="lower center", bbox_to_anchor=(0.3, 1), ncols=2)


def moved_bracket(nope: int, latent: int, tokens: int) -> Axes:
    """The product of a query, a head's W_UK and all latents, to scale, with the bracket on the left and on the right.

    Below each are the factors that the second multiplication meets; the text counts what each of the two multiplies.
    """
    gap, right = tokens // 16, nope + latent + tokens + tokens // 8
    axes = new_axes("", "", height=4.2, xlim=(-gap, right + gap / 2), ylim=(-11.6 * latent, 1.5 * latent))
    axes.set_axis_off()
    axes.set_aspect("equal")
    line = latent // 10  # the height of a single row, which would be too thin to see

    def draw(left: float, middle: float, height: int, width: int, colour: str, name: str) -> float:
        axes.add_patch(Rectangle((left, middle - height / 2), width, height, facecolor=colour, edgecolor=INK, lw=0.7))
        axes.text(left + width / 2, middle + height / 2 + 0.12 * latent, name, ha="center", va="bottom", **SMALL)
        return left + width + gap

    for top, first in ((0, "left"), (-7.2 * latent, "right")):
        at = draw(0, top, line, nope, QUERY, "$q$")
        axes.text(at - gap / 2, top, "·", **CENTRED)
        at = draw(at, top, nope, latent, "white", "$W^{UK}$")
        axes.text(at - gap / 2, top, "·", **CENTRED)
        end = draw(at, top, latent, tokens, LATENT, f"latents, {latent} × {tokens:,}") - gap
        span = (0, at - gap) if first == "left" else (nope + gap, end)
        under = top - 0.75 * latent
        axes.plot((span[0], *span, span[1]), (under + line, under, under, under + line), color=INK, linewidth=1.4)
        below, once = top - 2.9 * latent, nope * latent
        if first == "left":
            start = draw(0, below, line, latent, QUERY, "absorbed $q$")
            draw(at, below, latent, tokens, LATENT, "latents")
            counts = f"first {once:,}, then {latent * tokens:,} multiplications"
        else:
            start = draw(0, below, line, nope, QUERY, "$q$")
            draw(at, below, nope, tokens, OTHER, f"keys, {nope} × {tokens:,}: made, and read once")
            counts = f"first {once * tokens:,}, then {nope * tokens:,} multiplications"
        axes.text((start - gap + at) / 2, below, "·", **CENTRED)
        axes.text(right / 2, below - 1.1 * latent, counts, **CENTRED)
    return axes


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
    add_curves(axes, borders, marked=True)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    tick(axes.xaxis, contexts)
    axes.tick_params(axis="x", rotation=30)
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
