"""The figure of the chapter that checks the card."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from dsv2_ref.plots.style import INK, STYLES, new_axes

MARKS = {"holds": "o", "holds if": "D", "off": "s"}


def claimed_over_computed(claims: Sequence[tuple[float, str]]) -> Axes:
    """Every claim in order, by claimed over computed value on a logarithmic scale, marked by its verdict.

    Args:
        claims: for each, claimed over computed, and the verdict: ``holds``, ``holds if`` or ``off``.
    """
    axes = new_axes("claim, in the card's order", "claimed / computed", height=3.6)
    for (verdict, mark), (colour, _) in zip(MARKS.items(), STYLES, strict=False):
        points = [(place, factor) for place, (factor, judged) in enumerate(claims, start=1) if judged == verdict]
        places, factors = [place for place, _ in points], [factor for _, factor in points]
        axes.plot(places, factors, mark, color=colour, markersize=6, label=verdict)
    axes.axhline(1, color=INK, linewidth=0.9)
    axes.set_yscale("log")
    axes.legend(frameon=False, labelcolor=INK)
    return axes
