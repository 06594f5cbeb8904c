"""Figures of the chapter on what latent attention caches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from dsv2_ref.plots.style import CENTRED, INK, SMALL, STYLES, add_bars, add_curves, add_legend, new_axes, tick

LATENT, ROPE, QUERY, OTHER = STYLES[0][0], STYLES[2][0], STYLES[3][0], "#B9C0C7"
# What is cached: latents, rope keys; then queries, and the keys and values of heads.


def latent_flow(hidden: int, heads: int, latent: int, nope: int, rope: int, value: int) -> Axes:
    """A token on its way through latent attention, from top to bottom, with the number of features beside each arrow."""
    axes = new_axes("", "", height=4.9, xlim=(0, 10), ylim=(-8.75, 0.45))
    axes.set_axis_off()

    def box(x: float, y: float, half: float, name: str, colour: str, face: str = "white", height: float = 0.62) -> None:
        look: dict[str, Any] = {"facecolor": face, "edgecolor": colour, "linewidth": 1.5, "zorder": 2}
        shape = "round,pad=0,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch((x - half, y - height / 2), 2 * half, height, boxstyle=shape, label=name, **look))
        letters = CENTRED | {"color": INK if face in ("white", OTHER) else "white"}
        axes.text(x, y - 0.02, name, fontsize=10.5, zorder=3, **letters)

    def arrow(x: float, top: float, bottom: float, features: str = "") -> None:
        line = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (x, bottom), (x, top), arrowprops=line)
        axes.text(x + 0.15, (top + bottom) / 2, features, va="center", fontsize=9.5, color=INK)

    left, middle, right = 2.1, 5.5, 8.5
    box(middle, 0, 1.75, f"$u_t$: {hidden:,} features", INK, OTHER)
    axes.plot((left, right), (-0.6, -0.6), color=INK, linewidth=1.2)
    axes.plot((middle, middle), (-0.31, -0.6), color=INK, linewidth=1.2)
    for x, matrix, after, features, colour in (
        (left, "down: $W^{DKV}$", "norm", f"{latent:,}", LATENT),
        (middle, "$W^{KR}$", "rotate", f"{rope:,}", ROPE),
        (right, "$W^Q$", "rotate $q^R$", f"{heads} · {nope + rope}", QUERY),
    ):
        arrow(x, -0.6, -0.95)
        box(x, -1.26, 1.3 if x == left else 0.95, matrix, colour)
        arrow(x, -1.57, -2.1, features)
        box(x, -2.41, 0.95, after, colour)
    for shift in (0.24, 0.12, 0):  # rows of the cache, the new one in front
        for x, name, colour in ((left, f"latent {latent}", LATENT), (middle, f"rope key {rope}", ROPE)):
            box(x + shift, -3.62 + shift, 1.7 if x == left else 1.3, "" if shift else name, "white", colour)
    for x in (left, middle):
        arrow(x, -2.72, -3.05)
    axes.text(0.1, -2.9, "cache", va="center", weight="bold", **SMALL)
    for x in (0.95, 3.2):
        arrow(x, -3.93, -4.9, f"{latent:,}")
    for x, matrix, features in (
        (0.95, "up: $W^{UK}$", f"{heads} · {nope}"),
        (3.2, "up: $W^{UV}$", f"{heads} · {value}"),
    ):
        box(x, -5.21, 0.92, matrix, LATENT)
        arrow(x, -5.52, -6.15, features)
    arrow(middle, -3.93, -6.15, f"{rope}, for all heads")
    arrow(right, -2.72, -6.15)
    box(
        5,
        -6.5,
        4.9,
        f"{heads} heads: scores $q^C \\cdot k^C + q^R \\cdot k^R$, softmax, sum of values",
        INK,
        OTHER,
        0.7,
    )
    arrow(5, -6.85, -7.4, f"{heads} · {value}")
    box(5, -7.71, 0.95, "$W^O$", INK)
    arrow(5, -8.02, -8.55, f"{hidden:,}, added to the stream")
    return axes


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
    looks = {"keys and values": (OTHER, ""), "latent": (LATENT, ""), "rope key": (ROPE, "")}
    add_bars(axes, {row: [parts.get(part, 0) for part in looks] for row, parts in rows.items()}, looks, size=0.62)
    for bar in axes.containers[-1]:  # thin: a dark edge would hide its colour
        bar.set(edgecolor=ROPE, linewidth=0.6 if bar.get_width() else 0)
    totals = [sum(parts.values()) for parts in rows.values()]
    for y, (total, note) in enumerate(zip(totals, notes, strict=True)):
        axes.annotate(f"{total:,}{note}", (total, y), (5, 0), textcoords="offset points", va="center", **SMALL)
    axes.set(xlim=(0, 1.75 * max(totals)))
    tick(axes.xaxis, range(0, max(totals) + 2000, 2000))
    return add_legend(axes, loc="lower right", fontsize=10)


def truncation_errors(errors: Mapping[str, Sequence[float]], kept: int) -> Axes:
    """What is lost of all keys and values, as a relative error, when only the 0, 1, 2, … strongest directions are kept,
    for up to four labels; a labelled line marks the number ``kept``."""
    axes = add_curves(new_axes("directions kept", "relative error"), errors)
    axes.axvline(kept, color=INK, linewidth=0.9)
    axes.annotate(f"{kept}", (kept, 1.0), (4, 2), textcoords="offset points", **SMALL)
    axes.set(xlim=(0, None), ylim=(0, 1.1))
    return axes
