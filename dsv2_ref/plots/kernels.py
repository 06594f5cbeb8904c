"""Figures of the chapter on fused kernels."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MultipleLocator

from dsv2_ref.plots.style import CENTRED, INK, SMALL, STYLES, add_bars, add_legend, name_rows, new_axes, whole

READ, WRITTEN = STYLES[0][0], "#E69F00"
"""The colours of what is read from memory and of what is written to it."""


def memory_passes(chains: Mapping[str, Sequence[tuple[str, Sequence[str], Sequence[str]]]]) -> Axes:
    """Kernels above a strip of memory, with an arrow for each stream that one reads or writes.

    ``chains`` gives for each chain, by its name, its kernels in order: name, streams read, streams written. One chain is
    drawn below the other, with the number of its passes over memory.
    """
    axes = new_axes("", "", height=0.3 + 1.85 * len(chains))
    axes.set(xlim=(0, 10.2), ylim=(3.6 * len(chains), 0))
    axes.set_axis_off()
    for row, (chain, kernels) in enumerate(chains.items()):
        top = 3.6 * row
        passes = sum(len(read) + len(written) for _, read, written in kernels)
        axes.text(0, top + 0.45, f"{chain}: {passes} passes", va="center", **SMALL | {"fontweight": "bold"})
        axes.add_patch(Rectangle((0, top + 2.6), 10.2, 0.6, facecolor="#ECEFF1", edgecolor=INK))
        axes.text(0.15, top + 2.9, "memory", va="center", **SMALL)
        width = 8.3 / passes
        left = 1.8
        for name, read, written in kernels:
            wide = width * (len(read) + len(written))
            box = Rectangle((left + 0.1, top + 0.8), wide - 0.2, 0.6, facecolor="white", edgecolor=INK)
            axes.add_patch(box)
            axes.text(left + wide / 2, top + 1.1, name, **CENTRED | {"fontsize": 11})
            for stream, colour, (tail, head) in (
                *((stream, READ, (2.6, 1.4)) for stream in read),
                *((stream, WRITTEN, (1.4, 2.6)) for stream in written),
            ):
                x = left + width / 2
                look = {"arrowstyle": "-|>", "color": colour, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
                axes.annotate("", (x, top + head), (x, top + tail), arrowprops=look)
                axes.text(x, top + 2.9, stream, **CENTRED | {"fontsize": 10})
                left += width
    return axes


def bytes_moved(rows: Mapping[str, tuple[float, float]]) -> Axes:
    """Bytes read and written by ways to compute the same: a bar for each, the first on top."""
    axes = new_axes("bytes moved", "", height=1.6 + 0.5 * len(rows))
    add_bars(axes, rows, {"read": (READ, ""), "written": (WRITTEN, "//")}, 0.6)
    totals = [sum(moved) for moved in rows.values()]
    for place, total in enumerate(totals):
        axes.text(total, place, f" {EngFormatter(unit='B')(float(f'{total:.3g}'))}", va="center", color=INK)
    axes.set_xlim(0, 1.2 * max(totals))
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_major_locator(MultipleLocator(_step(max(totals))))
    return add_legend(axes, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0))


def _step(largest: float) -> float:
    """A round distance of ticks, of which at most four fit."""
    power = 10.0 ** (len(str(int(largest))) - 1)
    return next(step * power for step in (0.25, 0.5, 1.0, 2.5) if 4 * step * power >= largest)


def decode_plan(rows: int, rows_at_once: int, kv_seq: int, split_size: int) -> Axes:
    """Which program attends which queries (``rows`` of all heads, ``rows_at_once`` of a program) to which keys
    (``kv_seq``, ``split_size`` of a program): a grid of shares of the keys and groups of rows, one outlined.

    An arrow along one query, through all its shares, says what a program of the second kernel merges.
    """
    axes = new_axes("key", "query of a head", height=3.4)
    firsts, starts = range(0, rows, rows_at_once), range(0, kv_seq, split_size)
    for start in starts:
        for first in firsts:
            size = min(split_size, kv_seq - start), min(rows_at_once, rows - first)
            axes.add_patch(Rectangle((start, first), *size, facecolor="#9CC9E3", edgecolor="white", linewidth=0.8))
    keys, queries = min(split_size, kv_seq), min(rows_at_once, rows)
    orange, green = STYLES[1][0], STYLES[2][0]
    outline = Rectangle((0, 0), keys, queries, facecolor="none", edgecolor=orange, linewidth=2.5, clip_on=False)
    axes.add_patch(outline)
    axes.text(0, -0.03 * rows, f"one program: {queries} queries, {keys:,} keys", color=orange, va="bottom")
    groups, shares = len(firsts), len(starts)
    said = f"{groups} groups of queries × {shares} shares of the keys = {groups * shares} programs"
    axes.figure.suptitle(said, **SMALL)
    query = min((groups // 2 + 0.5) * rows_at_once, rows - 0.5)
    line = {"arrowstyle": "-|>", "color": green, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (1.1 * kv_seq, query), (0, query), arrowprops=line, annotation_clip=False)
    said = f"one query:\n{shares} pairs\n$(o_j, \\lambda_j)$\n→ one output"
    axes.text(1.12 * kv_seq, query, said, va="center", **SMALL)
    axes.set(xlim=(0, kv_seq), ylim=(rows, 0))
    axes.yaxis.set_major_locator(MultipleLocator(max(rows_at_once, rows // 4)))
    axes.xaxis.set_major_locator(MultipleLocator(max(1, kv_seq // 2)))
    axes.xaxis.set_major_formatter(whole)
    axes.grid(False)
    return axes


def waves(plans: Mapping[str, tuple[int, int]], slots: int) -> Axes:
    """When programs run on a GPU with room for ``slots`` of them: a row for each plan (programs, time of one), with a
    block for each wave, as long as a program takes and as high as the places it fills; the frame is the whole GPU."""
    axes = new_axes("time, in tiles of 32 keys", "", height=1.2 + 0.75 * len(plans))
    ends = [-(-programs // slots) * time for programs, time in plans.values()]
    for row, ((programs, time), end) in enumerate(zip(plans.values(), ends, strict=True)):
        bottom, high = row + 0.36, 0.72
        axes.add_patch(Rectangle((0, bottom - high), end, high, facecolor="#ECEFF1", edgecolor=INK, linewidth=0.6))
        for wave in range(-(-programs // slots)):
            filled = high * max(0.03, min(1, (programs - wave * slots) / slots))  # one of many shows, too
            look: dict[str, Any] = {
                "facecolor": STYLES[0][0],
                "edgecolor": "white",
                "linewidth": 0.8 if filled > 0.05 else 0,
            }
            axes.add_patch(Rectangle((wave * time, bottom - filled), time, filled, **look))
        axes.annotate(f"{end}", (end, row), (5, 0), textcoords="offset points", va="center", **SMALL)
    axes.set_xlim(0, 1.12 * max(ends))
    name_rows(axes, list(plans))
    axes.grid(False)
    return axes
