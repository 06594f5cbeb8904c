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
    """Bars of what one head multiplies to decode a token: parts by name for each way, and a note after each bar.

    A part too thin to see has its number above it.
    """
    axes = new_axes("multiplications of one head", "", height=1.7 + 0.6 * len(rows))
    looks = {
        "attend to keys and values": (OTHER, ""),
        "attend to latents": (LATENT, ""),
        "absorb $W$ (once)": (QUERY, ""),
        "make keys and values": ("white", "//"),
    }
    add_bars(axes, {row: [parts.get(part, 0) for part in looks] for row, parts in rows.items()}, looks, size=0.62)
    totals = [sum(parts.values()) for parts in rows.values()]
    for y, (total, note) in enumerate(zip(totals, notes, strict=True)):
        axes.annotate(f"{total:,}{note}", (total, y), (5, 0), textcoords="offset points", va="center", **SMALL)
    for bars in axes.containers:
        for y, bar in enumerate(bars):
            if 0 < bar.get_width() < max(totals) / 50:
                bar.set(edgecolor=bar.get_facecolor(), linewidth=2)
                place = (bar.get_x(), y - 0.31)
                axes.annotate(
                    f"{bar.get_width():,.0f}", place, (0, 2), textcoords="offset points", ha="center", **SMALL
                )
    axes.set_xlim(0, 1.65 * max(totals))
    tick(axes.xaxis, range(0, max(totals) + 500, 500))
    return add_legend(axes, fontsize=10, loc="lower center", bbox_to_anchor=(0.3, 1), ncols=2)


def moved_bracket(nope: int, latent: int, tokens: int, drawn: int) -> Axes:
    """The product of a query, a head's W_UK and all latents, to scale: above, keys are made first; below, the query.

    Under each are the factors that the second multiplication meets; the text counts what each of the two multiplies.
    Of the tokens only so many are ``drawn``, and three dots stand for the others.
    """
    gap, line = 0.4 * latent, latent // 10  # a single row would be too thin to see
    end = nope + latent + drawn + 2 * gap
    axes = new_axes("", "", height=4.1, xlim=(-0.5 * gap, end + 1.2 * gap), ylim=(-6 * latent, 0.75 * latent))
    axes.set_axis_off()
    axes.set_aspect("equal")
    first, second, third = 0, nope + gap, nope + latent + 2 * gap

    def draw(left: float, middle: float, height: int, width: int, colour: str, name: str) -> None:
        axes.add_patch(Rectangle((left, middle - height / 2), width, height, facecolor=colour, edgecolor=INK, lw=0.7))
        inside = width == drawn and height == latent
        place = (left + width / 2, middle if inside else middle + height / 2 + 0.06 * latent)
        letters = {"color": "white", "va": "center"} if inside else {"va": "bottom"}
        axes.text(*place, name, **{**SMALL, "ha": "center"} | letters)
        if width == drawn:
            axes.text(left + width + 0.35 * gap, middle, "…", fontsize=14, ha="left", va="center", color=INK)

    def times(left: float, middle: float) -> None:
        axes.text(left - gap / 2, middle, "×", fontsize=13, **CENTRED)

    latents = f"latents, {latent} × {tokens:,}"
    for top, keys_first in ((0, True), (-3.35 * latent, False)):
        draw(first, top, line, nope, QUERY, "$q$")
        draw(second, top, nope, latent, "white", "$W^{UK}$")
        draw(third, top, latent, drawn, LATENT, latents)
        times(second, top)
        times(third, top)
        span, under = (second, end) if keys_first else (first, second + latent), top - 0.68 * latent
        axes.plot((span[0], *span, span[1]), (under + line, under, under, under + line), color=INK, linewidth=1.4)
        once, below = nope * latent, top - (1.35 if keys_first else 1.5) * latent
        if keys_first:
            draw(first, below, line, nope, QUERY, "$q$")
            draw(third, below, nope, drawn, OTHER, f"keys, {nope} × {tokens:,}: read once")
            counts = f"first {once * tokens:,}, then {nope * tokens:,} multiplications"
        else:
            draw(first, below, line, latent, QUERY, "absorbed $q$")
            draw(third, below, latent, drawn, LATENT, latents)
            counts = f"first {once:,}, then {latent * tokens:,} multiplications"
        times(third, below)
        axes.text((end + gap) / 2, below - (0.5 if keys_first else 0.75) * latent, counts, **CENTRED)
    return axes


def queries_by_distance(queries: Sequence[Sequence[int]]) -> Axes:
    """Cached latents; above them one absorbed query that serves all, below them another for every distance.

    Args:
        queries: what a query is absorbed as at distances 0, 1, …; the newest token, at distance 0, is on the right.
    """
    last = len(queries) - 1
    axes = new_axes("", "", height=3.5, xlim=(-0.55, last + 0.55), ylim=(-2.2, 2.15))
    axes.set_axis_off()

    def box(x: float, y: float, text: str, colour: str, half: float = 0.44) -> None:
        axes.add_patch(
            Rectangle((x - half, y - 0.27), 2 * half, 0.54, facecolor=colour, edgecolor=INK, lw=0.7, zorder=2)
        )
        axes.text(x, y, text, **CENTRED | {"fontsize": 11, "color": "white" if colour == LATENT else "black"}, zorder=3)

    def named(query: Sequence[int]) -> str:
        return f"({', '.join(map(str, query))})".replace("-", "−")

    axes.text(last / 2, 1.85, "keys not rotated: absorbed once", **CENTRED)
    box(last / 2, 1.35, named(queries[0]), QUERY)
    for distance, query in enumerate(queries):
        x = last - distance
        box(x, 0, f"$c_{{t-{distance}}}$" if distance else "$c_t$", LATENT)
        box(x, -1.1, named(query), QUERY)
        axes.plot((last / 2, x), (1.08, 0.27), color=INK, linewidth=1.2)
        axes.plot((x, x), (-0.83, -0.27), color=INK, linewidth=1.2)
        axes.text(x, -1.55, f"distance {distance}", **CENTRED | SMALL)
    axes.text(last / 2, -2, "keys rotated: absorbed for every distance", **CENTRED)
    return axes


def crossover(borders: Points, limit: float) -> Axes:
    """Up to how many queries the absorbed form is cheaper, over the tokens attended to, both logarithmic.

    Args:
        borders: two counts of what a call costs, each with the most queries for which absorbing costs no more, by
            context length. Between the two the counts disagree.
        limit: where the first break-even point ends up for long contexts.
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
