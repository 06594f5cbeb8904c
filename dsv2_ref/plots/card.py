"""The figure of the chapter that checks the card."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from dsv2_ref.plots.style import INK, SMALL, STYLES, add_legend, new_axes, tick

MARKS = {"holds": ("o", STYLES[0][0]), "holds if": ("D", STYLES[2][0]), "off": ("s", STYLES[1][0])}
ROW = 0.1  # inches


def claimed_over_computed(sections: Mapping[str, Sequence[tuple[str, float, str]]], named: int = 5) -> Axes:
    """Every claim, in order from the top, by claimed over computed value on a logarithmic scale, marked by its verdict.

    Args:
        sections: for the name of each, its claims: a label, claimed over computed (infinite ones stand at the right
            end), and the verdict, ``holds``, ``holds if`` or ``off``.
        named: so many claims, the farthest from one, get their label.
    """
    rows = sum(map(len, sections.values())) + len(sections)
    axes = new_axes("claimed / computed", "", height=1.2 + ROW * rows, xscale="log")
    finite = [factor for claims in sections.values() for _, factor, _ in claims if math.isfinite(factor)]
    decades = range(math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite))) + 1)
    end = 10.0 ** (decades[-1] + 1)
    farthest = sorted((abs(math.log(factor)) for factor in finite), reverse=True)[:named]
    points: dict[str, dict[int, float]] = {verdict: {} for verdict in MARKS}
    place = 0
    for number, (section, claims) in enumerate(sections.items()):
        axes.axhspan(place, place + len(claims) + 1, color="#EEEEEE" if number % 2 == 0 else "white", zorder=0)
        axes.text(end * 2.5, place + 0.3, section, ha="right", va="top", **SMALL)
        for label, factor, verdict in claims:
            place += 1
            points[verdict][place] = min(factor, end)
            if math.isfinite(factor) and abs(math.log(factor)) in farthest:
                axes.text(factor / 1.4, place, label, ha="right", va="center", **SMALL)
        place += 1
    for verdict, (mark, colour) in MARKS.items():
        factors, places = list(points[verdict].values()), list(points[verdict])
        axes.plot(factors, places, mark, color=colour, markersize=4.5, label=verdict)
    axes.axvline(1, color=INK, linewidth=0.9, zorder=1)
    axes.set(xlim=(10.0 ** decades[0], end * 3), ylim=(rows, 0), yticks=[])
    tick(axes.xaxis, [10.0**n for n in decades] + [end])
    axes.xaxis.set_major_formatter(lambda x, _: "∞" if x == end else f"{x:,.9g}")
    axes.grid(False, axis="y")
    return add_legend(axes, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=11)
