"""Figures of the chapter on keeping experts busy."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from dsv2_ref.plots.style import INK, STYLES, new_axes

Rows = Mapping[str, Sequence[float]]
Curves = Mapping[str, Mapping[int, float]]


def _style() -> dict[Any, Any]:
    style: dict[Any, Any] = {"font.size": 12, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}
    return style | {"xtick.color": INK, "ytick.color": INK}


def load_over_steps(busiest: Curves, idle: Curves) -> list[Axes]:
    """How uneven the loads are during training, a curve for each run: the busiest expert above, the idle ones below.

    Args:
        busiest: for each run, the highest load over an even share by training step; up to four. A line marks the even share.
        idle: for the same runs, how many experts have next to nothing to do, by training step.
    """
    panels = (busiest, "busiest expert,\nover an even share"), (idle, "idle experts")
    with plt.rc_context(_style() | {"axes.spines.top": False, "axes.spines.right": False}):
        figure, (above, below) = plt.subplots(2, 1, figsize=(5, 5.4), dpi=200, layout="constrained", sharex=True)
        figure.set_facecolor("white")
        for axes, (curves, ylabel) in zip((above, below), panels, strict=True):
            for (label, curve), (colour, line) in zip(curves.items(), STYLES, strict=False):
                axes.plot(list(curve), list(curve.values()), line, color=colour, linewidth=2, label=label)
            axes.set(xlim=(0, None), ylim=(0, None), ylabel=ylabel)
            axes.grid(alpha=0.25)
        above.axhline(1, color=INK, linewidth=0.9)
        above.legend(frameon=False, labelcolor=INK, ncols=2, fontsize=11)
        below.set_xlabel("training step")
    return [above, below]


def load_maps(panels: Mapping[str, Rows]) -> list[Axes]:
    """Heat maps of loads over an even share, one below the other, rows by label and a column for each expert.

    Args:
        panels: for each title, rows of loads; all with as many experts. Colours end at four times an even share.
    """
    rows = sum(len(panel) for panel in panels.values())
    with plt.rc_context(_style()):
        height = 1.1 + 0.32 * rows + 0.45 * len(panels)
        ratios = {"height_ratios": [len(panel) for panel in panels.values()]}
        figure, grid = plt.subplots(
            len(panels), 1, figsize=(5, height), dpi=200, layout="constrained", squeeze=False, gridspec_kw=ratios
        )
        figure.set_facecolor("white")
        for axes, (title, panel) in zip(grid[:, 0], panels.items(), strict=True):
            image = axes.imshow(list(panel.values()), cmap="cividis", vmin=0, vmax=4, aspect="auto")
            axes.set_yticks(range(len(panel)), list(panel))
            axes.set_title(title, fontsize=12, loc="left")
            axes.tick_params(left=False, bottom=False)
            axes.set_xticks([])
        experts = len(next(iter(panel.values())))
        axes.set_xticks(range(0, experts, 4))
        axes.set_xlabel("expert")
        bar = figure.colorbar(image, ax=grid[:, 0], shrink=0.9, extend="max")
        bar.set_label("load over an even share")
    return list(grid[:, 0])


def co_activation(ratios: Sequence[Sequence[float]], group: int) -> Axes:
    """How often two experts are chosen together, over what chance would give; white lines part the devices.

    Args:
        ratios: for each pair of experts; the diagonal is not shown. group: experts of a device.
    """
    axes = new_axes("expert", "expert", height=4.2)
    axes.grid(False)
    shown = [[float("nan") if i == j else value for j, value in enumerate(row)] for i, row in enumerate(ratios)]
    image = axes.imshow(shown, cmap="cividis", vmin=0, vmax=3)
    for border in range(group, len(shown), group):
        axes.axhline(border - 0.5, color="white", linewidth=2)
        axes.axvline(border - 0.5, color="white", linewidth=2)
    axes.set_xticks(range(0, len(shown), group))
    axes.set_yticks(range(0, len(shown), group))
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, extend="max")
    bar.set_label("chosen together, over chance", color=INK)
    return axes
