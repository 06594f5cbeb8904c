"""Figures of the chapter on published weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dsv2_ref.plots.counting import LOOKS
from dsv2_ref.plots.style import INK, SMALL, add_legend, new_axes

PARTS = {
    "header": (INK, ""),
    "embedding, head": ("#DDE3E8", ""),
    "attention, norms": LOOKS["projections"],
    "dense MLP": ("#F0D9A8", ""),
    "gate, shared experts": LOOKS["shared experts"],
    "routed experts": LOOKS["routed experts"],
}
"""Colour and hatch of each part of a checkpoint; those of a layer are as in the chapter on counting."""


def bytes_to_scale(
    bars: Mapping[str, Sequence[tuple[str, int]]], stretches: Mapping[str, Mapping[str, tuple[int, int]]]
) -> Axes:
    """Bars of bytes, one below the other and each to its own scale, with its total.

    Args:
        bars: for each title, parts of `PARTS` and their bytes, in the order in which they lie.
        stretches: for some titles, brackets below the bar: names, with their first byte and the one after the last.
    """
    bracketed = [title in stretches for title in bars]
    tall = 0.8 * len(bars) + 0.45 * sum(bracketed)
    axes = new_axes("", "", height=0.9 + 0.95 * tall, xlim=(-0.005, 1.005), ylim=(tall - 0.55, -0.6))
    axes.set_axis_off()
    for number, (title, parts) in enumerate(bars.items()):
        row = 0.8 * number + 0.45 * sum(bracketed[:number])
        whole, left = sum(size for _, size in parts), 0
        axes.text(0, row - 0.27, f"{title}: {whole:,} bytes", va="bottom", **SMALL)
        for part, size in parts:
            colour, hatch = PARTS[part]
            look: dict[str, Any] = {"facecolor": colour, "hatch": hatch, "edgecolor": INK, "linewidth": 0.4}
            place = (left / whole, row - 0.22)
            axes.add_patch(Rectangle(place, size / whole, 0.42, **look))
            left += size
        for name, (start, end) in stretches.get(title, {}).items():
            a, b, y = start / whole + 0.004, end / whole - 0.004, row + 0.25
            axes.plot((a, a, b, b), (y, y + 0.06, y + 0.06, y), color=INK, linewidth=1)
            axes.text((a + b) / 2, y + 0.09, name, ha="center", va="top", **SMALL | {"fontsize": 10})
    used = {part for parts in bars.values() for part, _ in parts}
    for part, (colour, hatch) in PARTS.items():
        if part in used:
            look = {"facecolor": colour, "hatch": hatch, "edgecolor": INK, "linewidth": 0.4}
            axes.add_patch(Rectangle((0, 9), 0, 0, label=part, **look))
    return add_legend(axes, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=10.5)
