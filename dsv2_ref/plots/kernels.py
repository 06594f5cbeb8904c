"""Figures of the chapter on fused kernels."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MultipleLocator

from dsv2_ref.plots.style import INK, SMALL, STYLES, add_bars, add_legend, new_axes, whole


def bytes_moved(rows: Mapping[str, tuple[float, float]]) -> Axes:
    """Bytes read and written by ways to compute the same: a bar for each, the first on top."""
    axes = new_axes("bytes moved", "", height=1.6 + 0.5 * len(rows))
    add_bars(axes, rows, {"read": (STYLES[0][0], ""), "written": ("#E69F00", "//")}, 0.6)
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
    (``kv_seq``, ``split_size`` of a program): a grid of shares of the keys and blocks of rows, one outlined.

    An arrow along one query, through all its shares, says what a program of the second kernel adds.
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
    blocks, shares = len(firsts), len(starts)
    said = f"{blocks} blocks of queries × {shares} shares of the keys = {blocks * shares} programs"
    axes.figure.suptitle(said, **SMALL)
    query = min((blocks // 2 + 0.5) * rows_at_once, rows - 0.5)
    line = {"arrowstyle": "-|>", "color": green, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (1.1 * kv_seq, query), (0, query), arrowprops=line, annotation_clip=False)
    said = f"one query:\n{shares} pairs\n$(o_j, L_j)$\n→ one output"
    axes.text(1.12 * kv_seq, query, said, va="center", **SMALL)
    axes.set(xlim=(0, kv_seq), ylim=(rows, 0))
    axes.yaxis.set_major_locator(MultipleLocator(max(rows_at_once, rows // 4)))
    axes.xaxis.set_major_locator(MultipleLocator(max(1, kv_seq // 2)))
    axes.xaxis.set_major_formatter(whole)
    axes.grid(False)
    return axes
