"""The figures of rotary positions show the data they were given."""

import math
from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from dsv2_ref.plots import rope as plots


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_every_clock_has_its_hands_at_the_given_angles_and_the_later_ones_are_darker() -> None:
    axes = plots.clocks({"fast": [0.0, math.pi / 2], "slow": [0.0, 0.1]})
    assert [text.get_text() for text in axes.get_xticklabels()] == ["fast", "slow"]
    hands = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
    assert len(hands) == 4
    assert len(axes.get_lines()) == 4 + 2, "a circle for each clock"
    angles = [np.arctan2(np.diff(hand.get_ydata()), np.diff(hand.get_xdata())).item() for hand in hands]
    assert angles == pytest.approx([0, math.pi / 2, 0, 0.1])
    centres = [float(hand.get_xdata()[0]) for hand in hands]
    assert centres[0] == centres[1] != centres[2] == centres[3]
    assert list(axes.get_xticks()) == [centres[0], centres[2]]
    first, second = hands[0].get_alpha(), hands[1].get_alpha()
    assert first is not None
    assert second is not None
    assert first < second
    assert axes.get_aspect() == 1


def test_turns_start_at_pair_zero_with_the_limits_marked() -> None:
    axes = plots.turns_by_pair({"none": [100.0, 10.0, 1.0], "linear": [10.0, 1.0, 0.1]}, {"one turn": 1.0}, 4096)
    none, linear, limit = axes.get_lines()
    assert list(none.get_xdata()) == [0, 1, 2]
    assert list(none.get_ydata()) == [100.0, 10.0, 1.0]
    assert list(linear.get_ydata()) == [10.0, 1.0, 0.1]
    assert list(limit.get_ydata()) == [1.0, 1.0]
    assert [text.get_text() for text in axes.texts] == ["one turn"]
    assert axes.get_ylabel() == "turns over 4,096 positions"
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "linear"]


def test_stretch_is_logarithmic_and_starts_at_pair_zero() -> None:
    axes = plots.stretch_by_pair({"linear": [40.0, 40.0], "YaRN": [1.0, 40.0]})
    linear, yarn = axes.get_lines()
    assert list(linear.get_ydata()) == [40.0, 40.0]
    assert list(yarn.get_xdata()) == [0, 1]
    assert list(yarn.get_ydata()) == [1.0, 40.0]
    assert axes.get_yscale() == "log"


def test_angle_errors_are_drawn_at_their_positions_and_zeros_left_out() -> None:
    axes = plots.angle_errors([1, 2, 4], {"bfloat16": [0.0, 0.5, 1.0], "float32": [1e-7, 2e-7, 4e-7]})
    bfloat16, float32 = axes.get_lines()
    assert list(bfloat16.get_xdata()) == [1, 2, 4]
    assert list(bfloat16.get_ydata()) == [0.0, 0.5, 1.0]
    assert list(float32.get_ydata()) == [1e-7, 2e-7, 4e-7]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_ylim()[0] > 0
    assert bfloat16.get_linestyle() != float32.get_linestyle()


def test_scores_are_drawn_at_their_distances_around_a_line_at_zero() -> None:
    axes = plots.scores_by_distance([0, 10], {"equal": [1.0, 0.9], "random": [1.0, -0.5]})
    equal, random, zero = axes.get_lines()
    assert list(equal.get_xdata()) == [0, 10]
    assert list(equal.get_ydata()) == [1.0, 0.9]
    assert list(random.get_ydata()) == [1.0, -0.5]
    assert list(zero.get_ydata()) == [0, 0]
    assert equal.get_linestyle() != random.get_linestyle()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["equal", "random"]


@pytest.mark.parametrize(
    "axes",
    [
        lambda: plots.turns_by_pair({"a": [1.0]}, {}, 1),
        lambda: plots.stretch_by_pair({"a": [1.0]}),
        lambda: plots.angle_errors([1], {"a": [1.0]}),
        lambda: plots.scores_by_distance([0], {"a": [1.0]}),
    ],
)
def test_axes_are_named(axes) -> None:
    drawn = axes()
    assert drawn.get_xlabel()
    assert drawn.get_ylabel()
