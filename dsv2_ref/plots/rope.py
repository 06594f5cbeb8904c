"""Figures of the chapter on rotary positions."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from dsv2_ref.plots.style import CENTRED, INK, SMALL, STYLES, Values, add_curves, add_legend, add_line, new_axes, tick

ROPE, QUERY = STYLES[2][0], STYLES[3][0]
"""The colours of rope keys and of queries."""
WAYS = {way: colour for way, (colour, _) in zip(("linear", "base", "YaRN", "dynamic"), STYLES, strict=True)}
"""The colour of each way of stretching."""
BETWEEN_CLOCKS, APART = 2.5, 0.35


def quarter_turns(query: tuple[int, int], key: tuple[int, int]) -> Axes:
    """A query of one pair at positions 0 to 3 of a clock with quarter turns, a key at position 0, and the scores."""
    axes = new_axes("", "", height=4.2, aspect="equal")
    arrow = {"arrowstyle": "-|>", "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", key, (0, 0), arrowprops=arrow | {"color": ROPE})
    axes.annotate("key at 0", key, (6, 0), textcoords="offset points", va="center", **SMALL)
    x, y = query
    for position, tip in enumerate(((x, y), (-y, x), (-x, -y), (y, -x))):
        axes.annotate("", tip, (0, 0), arrowprops=arrow | {"color": QUERY, "alpha": 0.4 + 0.2 * position})
        score = tip[0] * key[0] + tip[1] * key[1]
        text = f"query at {position}\nscore {score}".replace("-", "−")
        down = tip[1] < 0
        axes.annotate(
            text, tip, (0, -5 if down else 5), textcoords="offset points", ha="center", va="top" if down else "bottom",
            **SMALL,
        )  # fmt: skip
    reach = max(map(abs, (*query, *key))) + 1
    axes.set(xlim=(-reach, reach + 0.5), ylim=(-reach + 0.6, reach - 0.6))
    axes.set(xticks=range(-reach, reach + 1), yticks=range(1 - reach, reach))
    return axes


def clocks(angles: Values, positions: Sequence[int]) -> Axes:
    """A clock for each labelled pair of features, two in a row, with a hand for each of the given positions at its angle
    in radians; later hands are longer and darker, and each has its position at the tip."""
    rows = -(-len(angles) // 2)
    axes = new_axes("", "", height=2.1 * rows, aspect="equal", xticks=[], yticks=[])
    around = np.linspace(0, 2 * np.pi, 100)
    for number, (label, hands) in enumerate(angles.items()):
        across, down = BETWEEN_CLOCKS * (number % 2), -BETWEEN_CLOCKS * (number // 2)
        axes.plot(across + np.cos(around), down + np.sin(around), color=INK, linewidth=0.8)
        axes.annotate(label, (across, down - 1.18), ha="center", va="center", color=INK)
        for place, (position, angle) in enumerate(zip(positions, hands, strict=True), start=1):
            part = place / len(hands)
            x, y = np.cos(angle), np.sin(angle)
            length = 0.3 + 0.7 * part
            hand = [across, across + length * x], [down, down + length * y]
            axes.plot(*hand, color=ROPE, alpha=0.2 + 0.8 * part, linewidth=1.6)
            beside = length - 0.14  # where earlier hands are shorter
            axes.annotate(
                f"{position}", (across + beside * x + 0.12 * y, down + beside * y - 0.12 * x), **CENTRED, fontsize=9
            )
    axes.spines[:].set_visible(False)
    axes.grid(False)
    return axes


def stretch_by_pair(stretches: Values) -> Axes:
    """By which factor linear scaling, a larger base, YaRN and dynamic NTK, in this order, slow pair 0, pair 1, … down, on
    a logarithmic scale."""
    return add_curves(new_axes("pair of features", "times slower", yscale="log"), stretches)


def scores_by_distance(distances: Sequence[int], scores: Values) -> Axes:
    """The score of a query with a key at each of the given distances between them, for up to four labels; thin lines,
    for they are ragged."""
    axes = new_axes("distance (positions)", "score, relative to distance 0")
    add_curves(axes, _over(distances, scores), linewidth=1.5)
    add_line(axes, 0)
    return add_legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def bits_by_length(lengths: Sequence[int], bits: Values, trained: int) -> Axes:
    """Bits per byte after so many bytes, for each labelled way of stretching; a line marks the trained length.

    "no stretch" and "window" are black; a way of stretching has the colour that it has in `stretch_by_pair`.
    """
    axes = new_axes("bytes in the call", "bits per byte of the last 64", height=4.2)
    axes.axvline(trained, color=INK, linewidth=0.9, linestyle=":")
    axes.annotate("trained length", (trained, 1), (3, -3), xycoords=("data", "axes fraction"),
                  textcoords="offset points", va="top", **SMALL)  # fmt: skip
    ends = sorted(bits, key=lambda label: bits[label][-1])
    height = -np.inf
    for number, label in enumerate(ends):
        colour = WAYS.get(label.split()[0], INK)
        line = ("-", "--", "-.", ":")[number % 4]
        axes.plot(lengths, bits[label], line, color=colour, linewidth=2.2, label=label)
        height = max(height + APART, bits[label][-1])
        axes.annotate(label, (lengths[-1], bits[label][-1]), (1.2 * lengths[-1], height), va="center", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8}, **SMALL | {"color": colour})  # fmt: skip
    axes.set_xscale("log", base=2)
    tick(axes.xaxis, [length for length in lengths if length % trained == 0 and (length // trained).bit_count() == 1])
    return axes


def _over(places: Sequence[int], curves: Values) -> dict[str, dict[int, float]]:
    return {label: dict(zip(places, values, strict=True)) for label, values in curves.items()}
