"""Figures of the chapter on fewer bits."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from dsv2_ref.plots.style import CENTRED, INK, SMALL, STYLES, add_curves, add_legend, name_rows, new_axes

LATENT, ROPE, SCALES = STYLES[0][0], STYLES[2][0], INK
RECORD = {"latent": LATENT, "scales": SCALES, "rope key": ROPE}
"""Colour of each part of what a token caches."""


def number_lines(formats: Mapping[str, Sequence[float]], low: float, high: float) -> Axes:
    """Which numbers each format has from ``low`` to ``high``, as ticks on lines, one below the other.

    Numbers must rise. Of those that lie closer together than the eye can tell, some are left out.
    """
    axes = new_axes("", "", height=0.9 + 0.45 * len(formats), xlim=(low, high))
    apart = (high - low) / 1000
    for row, numbers in enumerate(formats.values()):
        inside: list[float] = []
        for number in numbers:
            if low <= number <= high and (not inside or number - inside[-1] >= apart):
                inside.append(number)
        axes.hlines(row, low, high, color=INK, linewidth=0.8)
        thin = 1.8 if len(inside) < 20 else 0.5
        axes.vlines(inside, row - 0.3, row + 0.3, color=INK, linewidth=thin, clip_on=False)
    axes.grid(False)
    name_rows(axes, list(formats))
    axes.spines["left"].set_visible(False)
    return axes


def records_to_scale(records: Mapping[str, Mapping[str, int]]) -> Axes:
    """Bytes that a token takes in a cache, in the parts of `RECORD`, each bar to the same scale, with its total."""
    axes = new_axes("bytes per token and layer", "", height=1.3 + 0.55 * len(records))
    most = max(sum(parts.values()) for parts in records.values())
    for row, parts in enumerate(records.values()):
        left = 0
        for part, size in parts.items():
            if size:
                axes.barh(row, size, 0.6, left, color=RECORD[part], edgecolor="white", linewidth=0.6)
            if size > most / 12:
                axes.text(left + size / 2, row, f"{size:,}", **CENTRED | {"color": "white", "fontsize": 11})
            left += size
        axes.text(left + most / 60, row, f"{left:,}", va="center", **SMALL)
    for part, colour in RECORD.items():
        axes.barh(0, 0, color=colour, label=part)
    axes.set_xlim(0, 1.13 * most)
    axes.grid(False)
    name_rows(axes, list(records))
    return add_legend(axes, ncols=3, loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=11)


def bits_lost(curves: Mapping[str, Mapping[int, float]], least: float = 0.001) -> Axes:
    """What the model loses when a part has fewer bits, on a logarithmic axis; what is below ``least`` is drawn there."""
    axes = new_axes("bits per element", "bits per byte lost", yscale="log", ylim=(0.6 * least, 5))
    add_curves(axes, {name: _from(curve, least) for name, curve in curves.items()}, marked=True)
    low, high = (edge(np.concatenate([list(curve) for curve in curves.values()])) for edge in (np.min, np.max))
    axes.set_xticks(range(int(low), int(high) + 1))
    return axes


def _from(curve: Mapping[int, float], least: float) -> dict[int, float]:
    return {bits: max(least, lost) for bits, lost in curve.items()}
