"""Figures of the chapter on what latent attention caches."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dsv2_ref.plots.style import CENTRED, INK, SMALL, STYLES, add_bars, add_curves, add_legend, new_axes, tick

LATENT, ROPE, OTHER = STYLES[0][0], STYLES[2][0], "#B9C0C7"
# What is cached: latents, rope keys, keys and values of heads.


def low_rank(rows: int, columns: int, rank: int) -> Axes:
    """W = U A as rectangles to scale: (rows, columns) beside (rows, rank) and (rank, columns), with their weights."""
    gap, top = 0.34 * columns, 1.08 * rows
    axes = new_axes("", "", height=3.2, xlim=(-0.2 * columns, 2.1 * columns + rank + 2 * gap), ylim=(-0.13 * rows, top))
    axes.set_axis_off()
    axes.set_aspect("equal")
    at = 0.0
    for name, height, width, colour in (
        ("W", rows, columns, OTHER), ("U", rows, rank, LATENT), ("A", rank, columns, LATENT)
    ):  # fmt: skip
        low = (rows - height) / 2
        axes.add_patch(Rectangle((at, low), width, height, facecolor=colour, edgecolor=INK, label=name))
        letter = CENTRED | {"color": INK if colour == OTHER else "white"}
        axes.text(at + width / 2, rows / 2, f"${name}$", fontsize=15, **letter)
        axes.text(at + width / 2, low - 0.02 * rows, f"{height:,} × {width:,}", ha="center", va="top", **SMALL)
        if name != "A":
            axes.text(at + width + gap / 2, rows / 2, "=" if name == "W" else "·", fontsize=15, **CENTRED)
        at += width + gap
    return axes


def up_maps(maps: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str]) -> Axes:
    """Matrices side by side, all cells of one size: white is 0, and the darker a cell, the larger its entry."""
    widths = [np.shape(matrix)[1] for matrix in maps.values()]
    right = sum(widths) + 1.6 * (len(maps) - 1)
    axes = new_axes("", "", height=2.7, xlim=(-1.7, right + 0.2), ylim=(len(rows) + 1.3, -1.5))
    axes.set_axis_off()
    axes.set_aspect("equal")
    for y, row in enumerate(rows):
        axes.text(-0.25, y + 0.5, row, ha="right", va="center", fontsize=10, color=INK)
    left = 0.0
    for (name, matrix), width in zip(maps.items(), widths, strict=True):
        for y, entries in enumerate(matrix):
            for x, entry in enumerate(entries):
                place = (left + x, y)
                axes.add_patch(Rectangle(place, 1, 1, facecolor=LATENT, alpha=abs(entry), edgecolor="none"))
                axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=OTHER, linewidth=0.6))
        axes.text(left + width / 2, -0.7, name, **CENTRED)
        axes.text(left + width / 2, len(rows) + 0.6, f"{width}", **CENTRED)
        left += width + 1.6
    return axes


def cached_elements(rows: Mapping[str, Mapping[str, int]], notes: Sequence[str]) -> Axes:
    """Bars of what one token leaves in the cache, for each kind of attention: parts by name, a note after each bar."""
    axes = new_axes("elements cached per token and layer", "", height=0.9 + 0.5 * len(rows))
    looks = {"keys and values": (OTHER, ""), "latent": (LATENT, ""), "rope key": (ROPE, "//")}
    add_bars(axes, {row: [parts.get(part, 0) for part in looks] for row, parts in rows.items()}, looks, size=0.62)
    totals = [sum(parts.values()) for parts in rows.values()]
    for y, (total, note) in enumerate(zip(totals, notes, strict=True)):
        axes.annotate(f"{total:,}{note}", (total, y), (5, 0), textcoords="offset points", va="center", **SMALL)
    axes.set(xlim=(0, 1.75 * max(totals)))
    tick(axes.xaxis, range(0, max(totals) + 1, 2000))
    return add_legend(axes, loc="lower right", fontsize=10)


def truncation_errors(errors: Mapping[str, Sequence[float]], kept: int) -> Axes:
    """What is lost of all keys and values, as a relative error, when only the 0, 1, 2, … strongest directions are kept,
    for up to four labels; a labelled line marks the number ``kept``."""
    axes = add_curves(new_axes("directions kept", "relative error"), errors)
    axes.axvline(kept, color=INK, linewidth=0.9)
    axes.annotate(f"{kept}", (kept, 1.0), (4, 2), textcoords="offset points", **SMALL)
    axes.set(xlim=(0, None), ylim=(0, 1.1))
    return axes
