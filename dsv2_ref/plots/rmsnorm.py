"""Figures of the chapter on RMSNorm."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle

from dsv2_ref.plots.style import INK, SMALL, STYLES, Values, add_curves, add_legend, add_line, new_axes

NORMALISED, OTHER = STYLES[3][0], "#8A939B"
# What an RMSNorm makes, and what it is compared with.
FLOAT32_ENDS = 3.4e38


def circle_of_tokens(tokens: Sequence[tuple[float, float]], layer_norm: bool = False) -> Axes:
    """Tokens of two features, the circle on which RMSNorm puts them and, if wanted, the way of LayerNorm to it."""
    axes = new_axes("first feature", "second feature", height=3.8, xlim=(-5.4, 8.4), ylim=(-2.4, 7.8))
    axes.set_aspect("equal")
    axes.add_patch(Circle((0, 0), np.sqrt(2), fill=False, edgecolor=NORMALISED, linewidth=1.6))
    for token in tokens:
        normalised = np.array(token) / np.sqrt(np.square(token).mean())
        left, long = token[0] < 0, np.square(token).sum() > 2
        arrows: list[tuple[Sequence[float], str]] = [(token, OTHER), (list(normalised), NORMALISED)]
        for end, colour in arrows if long else arrows[::-1]:  # the shorter one on top
            _arrow(axes, (0, 0), end, colour)
        axes.plot(*token, "o", color=OTHER, label="token" if token == tokens[0] else None)
        axes.plot(*normalised, "s", color=NORMALISED, label="RMSNorm" if token == tokens[0] else None)
        _name(axes, token, (-7, 3) if left else (8, -2) if long else (28, -10), pointed=not long)
        _name(axes, normalised, (-10, -8) if left else (8, 3) if normalised[0] < 1 else (8, -1))
    if layer_norm:
        axes.plot([-5, 5], [5, -5], linestyle="--", color=INK, linewidth=0.9, label="features sum to 0")
        centred = np.array(tokens[0]) - np.mean(tokens[0])
        axes.plot(*np.transpose([tokens[0], centred]), linestyle=":", color=INK, linewidth=1.4, label="same LayerNorm")
        axes.plot(*centred, "o", color="white", markeredgecolor=INK, label="mean subtracted")
        end = centred / np.sqrt(np.square(centred).mean())
        _arrow(axes, centred, end, INK)
        axes.plot(*end, "D", color=INK, label="LayerNorm")
        _name(axes, centred, (10, -4))
        _name(axes, end, (-10, -8))
    return add_legend(axes, loc="upper right", fontsize=10, handlelength=1.4)


def _arrow(axes: Axes, start: Sequence[float], end: Sequence[float], colour: str) -> None:
    look: dict[str, Any] = {"arrowstyle": "->", "color": colour, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 3}
    axes.annotate("", (end[0], end[1]), (start[0], start[1]), arrowprops=look)


def _name(axes: Axes, point: Sequence[float], offset: tuple[float, float], pointed: bool = False) -> None:
    text = ", ".join(f"{round(float(x), 3):g}".replace("-", "−") for x in point)
    look = SMALL | {"fontsize": 10, "ha": "right" if offset[0] < 0 else "left"}
    if pointed:
        look["arrowprops"] = {"arrowstyle": "-", "color": OTHER, "linewidth": 0.8, "relpos": (0, 0.5)}
    axes.annotate(f"({text})", (point[0], point[1]), offset, textcoords="offset points", **look)


def growth_through_layers(curves: Values, close: Sequence[str] = ()) -> Axes:
    """The root mean square of the residual stream before layer 0, after one layer, after two, …; up to four curves.
    One that leaves float32 ends at a cross on the line of its largest number. Those named in ``close`` are drawn again
    in an inset, on a scale of their own."""
    passed = {name: next((i for i, x in enumerate(xs) if not math.isfinite(x)), len(xs)) for name, xs in curves.items()}
    drawn = {n: [*xs[: passed[n]], FLOAT32_ENDS] if passed[n] < len(xs) else xs for n, xs in curves.items()}
    axes = add_curves(new_axes("layers passed", "root mean square of the stream", height=3.8, yscale="log"), drawn)
    for (name, layers), (colour, _) in zip(passed.items(), STYLES, strict=False):
        if layers < len(curves[name]):
            add_line(axes, FLOAT32_ENDS, linestyle="--")
            axes.plot(layers, FLOAT32_ENDS, "X", color=colour, markersize=10, clip_on=False)
            axes.annotate("float32 ends", (0, FLOAT32_ENDS), (0, -14), textcoords="offset points",
                          **SMALL | {"fontsize": 10})  # fmt: skip
    if close:
        high = 0.96 if any(layers < len(curves[name]) for name, layers in passed.items()) else 1.02
        add_legend(axes, loc="upper left", bbox_to_anchor=(0.46, high), fontsize=10, handlelength=1.8)
        inset = axes.inset_axes((0.56, 0.25, 0.42, 0.3))
        for (name, values), (colour, line) in zip(curves.items(), STYLES, strict=False):
            if name in close:
                inset.plot(range(len(values)), values, line, color=colour, linewidth=2.2)
                inset.annotate(f"{values[-1]:.1f}", (len(values) - 1, values[-1]), (3, -3), fontsize=9, color=INK,
                               textcoords="offset points")  # fmt: skip
        longest, highest = (max(size(curves[name]) for name in close) for size in (len, max))
        inset.set(xlim=(-1, 1.19 * longest), ylim=(0, 1.15 * highest), xticks=[], yticks=range(int(highest) + 1))
        inset.tick_params(labelsize=9)
    return axes


def running_sums(sums: Values) -> Axes:
    """How a sum builds up, by its value after one feature, after two, … for up to four ways of adding."""
    axes = add_curves(new_axes("features added", "running sum of squares"), sums, start=1)
    axes.set(xlim=(0, None), ylim=(0, None))
    return axes
