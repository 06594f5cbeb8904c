"""Figures of the chapter on keeping experts busy."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from dsv2_ref.plots.style import INK, OPEN, SETTINGS, Points, Values, add_curves, add_legend, add_line, new_axes


def _panels(number: int, height: float, **options: Any) -> list[Axes]:
    """Empty axes, one below the other."""
    page: dict[str, Any] = {"figsize": (5, height), "dpi": 200, "facecolor": "white", "layout": "constrained"}
    _, grid = plt.subplots(number, 1, squeeze=False, **page, **options)
    return list(grid[:, 0])


def load_over_steps(busiest: Points, idle: Points) -> list[Axes]:
    """How uneven the loads are during training, a curve for each run: the busiest expert above, the idle ones below.

    Args:
        busiest: for each of up to four runs, the highest load over an even share, which a line marks, by training step.
        idle: for the same runs, how many experts have next to nothing to do, by training step.
    """
    with plt.rc_context(SETTINGS | OPEN):
        above, below = _panels(2, 5.4, sharex=True)
        add_legend(add_curves(above, busiest, linewidth=2), ncols=2, fontsize=11)
        add_line(above, 1)
        add_curves(below, idle, linewidth=2, named=False)
        for axes, ylabel in ((above, "busiest expert,\nover an even share"), (below, "idle experts")):
            axes.set(xlim=(0, None), ylim=(0, None), ylabel=ylabel)
            axes.grid(alpha=0.25)
        below.set_xlabel("training step")
    return [above, below]


def load_maps(panels: Mapping[str, Values]) -> list[Axes]:
    """Heat maps of loads over an even share, one below the other, rows by label and a column for each expert.

    Args:
        panels: for each title, rows of loads; all with as many experts. Colours end at four times an even share.
    """
    rows = [len(panel) for panel in panels.values()]
    with plt.rc_context(SETTINGS):
        maps = _panels(len(rows), 1.1 + 0.32 * sum(rows) + 0.45 * len(rows), gridspec_kw={"height_ratios": rows})
        for axes, (title, panel) in zip(maps, panels.items(), strict=True):
            loads = list(panel.values())
            image = axes.imshow(loads, cmap="cividis", vmin=0, vmax=4, aspect="auto")
            axes.set(xticks=[], yticks=range(len(panel)), yticklabels=list(panel))
            axes.set_title(title, fontsize=12, loc="left")
            axes.tick_params(left=False, bottom=False)
        axes.set(xticks=range(0, len(loads[0]), 4), xlabel="expert")
        axes.figure.colorbar(image, ax=maps, shrink=0.9, extend="max", label="load over an even share")
    return maps


def co_activation(ratios: Sequence[Sequence[float]], group: int) -> Axes:
    """How often two experts are chosen together, over what chance would give; white lines part the devices.

    Args:
        ratios: for each pair of experts; the diagonal is not shown.
        group: experts of a device.
    """
    shown = [[float("nan") if i == j else value for j, value in enumerate(row)] for i, row in enumerate(ratios)]
    firsts = range(0, len(shown), group)
    axes = new_axes("expert", "expert", height=4.2, xticks=firsts, yticks=firsts)
    image = axes.imshow(shown, cmap="cividis", vmin=0, vmax=3)
    axes.grid(False)
    for border in firsts[1:]:
        axes.axhline(border - 0.5, color="white", linewidth=2)
        axes.axvline(border - 0.5, color="white", linewidth=2)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, extend="max")
    bar.set_label("chosen together, over chance", color=INK)
    return axes
