"""Figures of the chapter on experts on many devices."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dsv2_ref.plots.counting import LOOKS
from dsv2_ref.plots.style import CENTRED, INK, SETTINGS, SMALL, STYLES, add_bars, add_legend, name_rows, new_axes

STEPS = {
    "send": (STYLES[2][0], ""),
    "compute": LOOKS["routed experts"],
    "wait": ("white", "..."),
}
"""Colour and hatch of what a device does with its time."""

TRAVELS, STAYS = STYLES[2][0], "#BBBBBB"
HOMES = ("#BBD9EC", "#F6C9A8", "#B9E3D5", "#EBCFDF")
"""Fill of a token by the device that brought it."""

THIN: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.6}


def device_weights(rows: Mapping[str, Mapping[str, float]]) -> Axes:
    """What each device stores: a bar for each row, of billions of weights by part, as in `LOOKS`, with its sum."""
    axes = new_axes("weights on one device, billions", "", height=1.7 + 0.45 * len(rows))
    looks = {part: look for part, look in LOOKS.items() if any(part in amounts for amounts in rows.values())}
    billions = {row: [amounts.get(part, 0) / 1e9 for part in looks] for row, amounts in rows.items()}
    add_bars(axes, billions, looks, 0.66)
    most = max(map(sum, billions.values()))
    for place, parts in enumerate(billions.values()):
        axes.text(sum(parts) + most / 60, place, f"{sum(parts):.2f}", va="center", **SMALL)
    axes.set_xlim(0, 1.13 * most)
    return add_legend(axes, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0), fontsize=11)


def exchange_grids(panels: Mapping[str, Sequence[Sequence[float]]], names: Sequence[str] | None = None) -> list[Axes]:
    """Who sends how much to whom: for each title a grid of bars, a row for each sender and a column for each receiver,
    all to one scale. What stays where it is, on the diagonal, is grey. Below stand the sums of the columns.

    Args:
        panels: for each title as many rows as columns, of amounts from 0 on.
        names: of the senders; None for their numbers.
    """
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with plt.rc_context(SETTINGS):
        page: dict[str, Any] = {"figsize": (5, 2.65 * down), "dpi": 200, "facecolor": "white", "layout": "constrained"}
        _, grid = plt.subplots(down, across, squeeze=False, **page)
    most = max(amount for panel in panels.values() for row in panel for amount in row)
    drawn = list(grid.flat)
    for number, (axes, (title, panel)) in enumerate(zip(drawn, panels.items(), strict=False)):
        size = len(panel)
        for sender, row in enumerate(panel):
            for receiver, amount in enumerate(row):
                axes.add_patch(Rectangle((receiver, sender), 1, 1, facecolor="none", edgecolor="#DDDDDD"))
                tall, colour = 0.62 * amount / most, STAYS if sender == receiver else TRAVELS
                axes.add_patch(Rectangle((receiver + 0.2, sender + 0.95 - tall), 0.6, tall, facecolor=colour))
                axes.text(receiver + 0.5, sender + 0.17, f"{amount:,.0f}", **CENTRED | {"fontsize": 9})
        for receiver, sums in enumerate(zip(*panel, strict=True)):
            look = CENTRED | {"fontsize": 11, "weight": "bold"}
            axes.text(receiver + 0.5, size + 0.3, f"{sum(sums):,.0f}", **look)
        left = number % across == 0
        axes.set(xlim=(0, size), ylim=(size + 0.6, 0), aspect="equal")
        axes.set_title(title, fontsize=11, loc="left", color=INK)
        axes.set_xticks([x + 0.5 for x in range(size)], [f"to {x}" for x in range(size)], fontsize=10)
        senders = names or [f"from {y}" for y in range(size)]
        axes.set_yticks([y + 0.5 for y in range(size)], senders if left else [], fontsize=10)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    for axes in drawn[len(panels) :]:
        axes.remove()
    return drawn[: len(panels)]


def time_lines(rows: Mapping[str, Sequence[tuple[str, float]]], xlabel: str) -> Axes:
    """What each device does, one step after another: for each row, steps of `STEPS` with how long they take."""
    axes = new_axes(xlabel, "", height=1.3 + 0.42 * len(rows))
    for place, steps in enumerate(rows.values()):
        left = 0.0
        for step, time in steps:
            colour, hatch = STEPS[step]
            axes.barh(place, time, 0.62, left, color=colour, hatch=hatch, **THIN)
            left += time
    for step, (colour, hatch) in STEPS.items():
        if any(step == name for steps in rows.values() for name, _ in steps):
            axes.barh(0, 0, color=colour, hatch=hatch, label=step, **THIN)
    name_rows(axes, list(rows))
    axes.set_xlim(0, 1.02 * max(sum(time for _, time in steps) for steps in rows.values()))
    axes.grid(False)
    return add_legend(axes, ncols=3, loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=11)


def journey(stages: Mapping[str, Sequence[Mapping[str, Sequence[int]]]], homes: Sequence[int]) -> Axes:
    """How rows of tokens lie on each device at each step, from above to below, in the colour of the device that brought
    them.

    Args:
        stages: for each step and each device, groups of neighbouring rows: a label, and the numbers of the tokens.
        homes: for each token, the device that brought it.
    """
    gap, between = 0.35, 1.0
    devices = len(next(iter(stages.values())))

    def width(groups: Mapping[str, Sequence[int]]) -> float:
        return sum(max(1, len(rows)) for rows in groups.values()) + gap * (len(groups) - 1)

    widths = [max(width(stage[device]) for stage in stages.values()) for device in range(devices)]
    lefts = [sum(widths[:device]) + between * device for device in range(devices)]
    right = lefts[-1] + widths[-1]
    axes = new_axes("", "", height=0.5 + 0.86 * len(stages), xlim=(-0.2, right + 0.2), ylim=(1.7 * len(stages), -0.75))
    axes.set_axis_off()
    for device, (left, wide) in enumerate(zip(lefts, widths, strict=True)):
        axes.text(left + wide / 2, -0.65, f"device {device}", weight="bold", **CENTRED)
    for number, (title, stage) in enumerate(stages.items()):
        top = 1.7 * number
        axes.text(0, top + 0.08, title, va="center", **SMALL)
        for left, groups in zip(lefts, stage, strict=True):
            x = left
            for label, rows in groups.items():
                for token in rows:
                    axes.add_patch(Rectangle((x, top + 0.34), 1, 0.62, facecolor=HOMES[homes[token]], **THIN))
                    axes.text(x + 0.5, top + 0.65, f"{token}", **CENTRED | {"fontsize": 11})
                    x += 1
                if not rows:
                    axes.add_patch(Rectangle((x, top + 0.34), 1, 0.62, facecolor="none", linestyle="--", **THIN))
                    x += 1
                middle = x - max(1, len(rows)) / 2
                axes.text(middle, top + 1.13, label, **CENTRED | {"fontsize": 9})
                x += gap
    return axes


def hidden_behind(work: Mapping[str, float], links: Mapping[str, float]) -> Axes:
    """Which work hides which link: bars of FLOPs per byte sent, and for each link a line at the FLOPs per byte from
    which on sending takes no longer than computing."""
    axes = new_axes("FLOP for each byte sent", "", height=1.6 + 0.42 * len(work), xscale="log")
    colour, hatch = STEPS["compute"]
    axes.barh(range(len(work)), list(work.values()), 0.6, color=colour, hatch=hatch, **THIN)
    name_rows(axes, list(work))
    for number, (name, balance) in enumerate(links.items()):
        ink, line = STYLES[number]
        axes.axvline(balance, color=ink, linestyle=line, linewidth=2, label=name)
    every = [*work.values(), *links.values()]
    axes.set_xlim(min(every) / 3, max(every) * 1.6)
    return add_legend(axes, ncols=2, loc="lower center", bbox_to_anchor=(0.35, 1.0), fontsize=11)
