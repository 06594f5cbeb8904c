"""Figures of the chapter on keeping experts busy."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import FancyBboxPatch

from dsv2_ref.plots.style import (
    CENTRED,
    INK,
    OPEN,
    SETTINGS,
    STYLES,
    Points,
    Values,
    add_curves,
    add_legend,
    new_axes,
)

EVEN: dict[str, Any] = {"color": "#E69F00", "linewidth": 2, "zorder": 1, "label": "even share"}
"""The line that all loads are compared with."""


def _panels(number: int, height: float, **options: Any) -> list[Axes]:
    """Empty axes, one below the other."""
    page: dict[str, Any] = {"figsize": (5, height), "dpi": 200, "facecolor": "white", "layout": "constrained"}
    _, grid = plt.subplots(number, 1, squeeze=False, **page, **options)
    return list(grid[:, 0])


def expert_loads(loads: Mapping[str, Sequence[int]]) -> Axes:
    """How many choices each expert got, sorted from the busiest to the idlest, beside an even share; for up to four
    labels with the same sum."""
    axes = new_axes("experts, the busiest first", "choices")
    add_curves(axes, {label: sorted(counts, reverse=True) for label, counts in loads.items()}, start=1, marked=True)
    counts = next(iter(loads.values()))
    axes.axhline(sum(counts) / len(counts), **EVEN)
    axes.set(xlim=(0, None), ylim=(0, None))
    return add_legend(axes)


def load_over_steps(busiest: Points, idle: Points) -> list[Axes]:
    """How uneven the loads are during training, a curve for each run: the busiest expert above, the idle ones below.

    Args:
        busiest: for each of up to four runs, the highest load over an even share, which a line marks, by training step.
        idle: for the same runs, how many experts have next to nothing to do, by training step.
    """
    with plt.rc_context(SETTINGS | OPEN):
        above, below = _panels(2, 5.4, sharex=True)
        add_curves(above, busiest, linewidth=2)
        above.axhline(1, **EVEN)
        add_legend(above, ncols=2, fontsize=11)
        add_curves(below, idle, linewidth=2, named=False)
        for axes, ylabel in ((above, "busiest expert,\nover an even share"), (below, "idle experts")):
            axes.set(xlim=(0, None), ylim=(0, None), ylabel=ylabel)
            axes.grid(alpha=0.25)
        below.set_xlabel("training step")
    return [above, below]


def load_maps(panels: Mapping[str, Values]) -> list[Axes]:
    """Heat maps of loads over an even share, one below the other, rows by label and a column for each expert.

    Args:
        panels: for each title, rows of loads; all with as many experts. An even share is white, and colours end at four.
    """
    rows = [len(panel) for panel in panels.values()]
    with plt.rc_context(SETTINGS):
        maps = _panels(len(rows), 1.1 + 0.32 * sum(rows) + 0.45 * len(rows), gridspec_kw={"height_ratios": rows})
        for axes, (title, panel) in zip(maps, panels.items(), strict=True):
            loads = list(panel.values())
            image = axes.imshow(loads, cmap="RdBu_r", norm=TwoSlopeNorm(1, vmin=0, vmax=4), aspect="auto")
            axes.set(xticks=[], yticks=range(len(panel)), yticklabels=list(panel))
            for edge in range(1, len(loads[0])):
                axes.axvline(edge - 0.5, color=INK, linewidth=0.3)
            for edge in range(1, len(loads)):
                axes.axhline(edge - 0.5, color=INK, linewidth=0.3)
            axes.set_title(title, fontsize=12, loc="left")
            axes.tick_params(left=False, bottom=False)
        axes.set(xticks=range(0, len(loads[0]), 2), xlabel="expert")
        bar = axes.figure.colorbar(image, ax=maps, shrink=0.9, extend="max", label="load over an even share")
        bar.set_ticks([0, 0.5, 1, 2, 3, 4])
    return maps


def three_counts(chosen: Sequence[Sequence[int]], experts: int, devices: int) -> list[Axes]:
    """The same choices, counted for each of the three balance losses: a box holds what is counted together.

    Args:
        chosen: for each token, a row, the experts that it visits.
        experts: routed experts, a column for each; device by device.
        devices: devices that share them.
    """
    size, rows = experts // devices, len(chosen)
    choices = [(row, expert) for row, visited in enumerate(chosen) for expert in visited]
    by_expert = [sum(expert == column for _, expert in choices) for column in range(experts)]
    by_device = [sum(by_expert[size * device : size * (device + 1)]) for device in range(devices)]
    sent = [sorted({expert // size for expert in visited}) for visited in chosen]
    arrivals = [sum(device in reached for reached in sent) for device in range(devices)]
    columns = [(column, 0, 1, rows) for column in range(experts)]
    halves = [(size * device, 0, size, rows) for device in range(devices)]
    pills = [(size * device, row, size, 1) for row, reached in enumerate(sent) for device in reached]
    kinds = (
        ("expert loss: choices of each expert", columns, by_expert),
        ("device loss: choices on each device", halves, by_device),
        ("communication loss: tokens sent to each device", pills, arrivals),
    )
    with plt.rc_context(SETTINGS):
        panels = _panels(len(kinds), 2.1 + 1.05 * rows)
    dot: dict[str, Any] = {"markersize": 19, "color": STYLES[1][0], "markeredgecolor": "white"}
    for axes, (title, boxes, counts) in zip(panels, kinds, strict=True):
        for left, top, width, height in boxes:
            spot, style = (left + 0.12, top + 0.1), "round,pad=0,rounding_size=0.2"
            axes.add_patch(FancyBboxPatch(spot, width - 0.24, height - 0.2, style, facecolor="#F0F0F0", edgecolor=INK))
        for row, expert in choices:
            axes.plot(expert + 0.5, row + 0.5, "o", **dot)
            axes.text(expert + 0.5, row + 0.5, f"{row}", **CENTRED | {"color": "white", "weight": "bold"})
        for place, count in enumerate(counts):
            middle = (place + 0.5) * experts / len(counts)
            axes.text(middle, rows + 0.35, f"{count}", **CENTRED | {"fontsize": 15, "weight": "bold"})
        axes.axvline(size, color=INK, linewidth=1, linestyle=":")
        axes.set_title(title, fontsize=12, loc="left", color=INK)
        axes.set(xlim=(0, experts), ylim=(rows + 0.7, 0))
        axes.set_axis_off()
    for expert in range(experts):
        panels[-1].text(expert + 0.5, rows + 0.95, f"expert {expert}", **CENTRED | {"fontsize": 11})
    return panels
