"""Figures of the chapter on rotary positions."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from dsv2_ref.plots.style import INK, STYLES, Values, add_curves, add_line, new_axes

BETWEEN_CLOCKS = 2.5


def clocks(angles: Values) -> Axes:
    """A clock for each labelled pair of features, with a hand for its angle in radians at position 0, 1, 2, …, the
    later ones darker."""
    centres = [BETWEEN_CLOCKS * number for number in range(len(angles))]
    axes = new_axes("", "", height=2.0, aspect="equal", yticks=[])
    around = np.linspace(0, 2 * np.pi, 100)
    for centre, hands in zip(centres, angles.values(), strict=True):
        axes.plot(centre + np.cos(around), np.sin(around), color=INK, linewidth=0.8)
        for position, angle in enumerate(hands):
            tip = (centre + np.cos(angle), np.sin(angle))
            shade = 0.2 + 0.8 * (position + 1) / len(hands)
            axes.plot([centre, tip[0]], [0, tip[1]], color=STYLES[0][0], alpha=shade, linewidth=1.6)
    axes.set_xticks(centres, labels=list(angles))
    axes.tick_params(bottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    return axes


def turns_by_pair(turns: Values, limits: Mapping[str, float], positions: int) -> Axes:
    """How often pair 0, pair 1, … turns around over a sequence of so many positions, on a logarithmic scale, for up to
    four ways of scaling; labelled lines mark the limits."""
    axes = new_axes("pair of features", f"turns over {positions:,} positions", height=3.6, yscale="log")
    add_curves(axes, turns)
    last = max(map(len, turns.values())) - 1
    for label, value in limits.items():
        add_line(axes, value)
        axes.annotate(label, (last, value), (0, 3), textcoords="offset points", ha="right", fontsize=11)
    return axes


def stretch_by_pair(stretches: Values) -> Axes:
    """By which factor each of up to four ways of scaling slows pair 0, pair 1, … down, on a logarithmic scale."""
    return add_curves(new_axes("pair of features", "times slower", yscale="log"), stretches)


def angle_errors(positions: Sequence[int], errors: Values) -> Axes:
    """The largest error of an angle, in radians, among positions up to each of the given, for up to four number formats.

    Both scales are logarithmic; zeros are left out.
    """
    axes = new_axes("position", "largest error of an angle (radians)", height=3.6)
    add_curves(axes, _over(positions, errors))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", nonpositive="mask")
    return axes


def scores_by_distance(distances: Sequence[int], scores: Values) -> Axes:
    """The score of a query with a key at each of the given distances between them, for up to four labels; thin lines,
    for they are ragged."""
    axes = new_axes("distance (positions)", "score, relative to distance 0")
    add_curves(axes, _over(distances, scores), linewidth=1.5)
    add_line(axes, 0)
    return axes


def _over(places: Sequence[int], curves: Values) -> dict[str, dict[int, float]]:
    return {label: dict(zip(places, values, strict=True)) for label, values in curves.items()}
