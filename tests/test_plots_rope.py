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
    axes = plots.clocks({"fast": [0.0, math.pi / 2], "slow": [0.0, 0.1]}, positions=[0, 4])
    assert [text.get_text() for text in axes.texts] == ["fast", "0", "4", "slow", "0", "4"]
    hands = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
    assert len(hands) == 4
    assert len(axes.get_lines()) == 4 + 2, "a circle for each clock"
    angles = [np.arctan2(np.diff(hand.get_ydata()), np.diff(hand.get_xdata())).item() for hand in hands]
    assert angles == pytest.approx([0, math.pi / 2, 0, 0.1])
    centres = [float(hand.get_xdata()[0]) for hand in hands]
    assert centres[0] == centres[1] != centres[2] == centres[3]
    assert [text.xy[0] for text in axes.texts[::3]] == [centres[0], centres[2]]
    first, second = hands[0].get_alpha(), hands[1].get_alpha()
    assert first is not None
    assert second is not None
    assert first < second
    lengths = [np.hypot(np.diff(hand.get_xdata()), np.diff(hand.get_ydata())).item() for hand in hands]
    assert lengths == pytest.approx([0.65, 1, 0.65, 1])
    assert axes.get_aspect() == 1


def test_quarter_turns_label_each_arrow_with_its_score() -> None:
    axes = plots.quarter_turns((2, 1), (3, 1))
    said = [text.get_text() for text in axes.texts if text.get_text()]
    assert said == [
        "key at 0",
        *(f"query at {n}\nscore {score}" for n, score in enumerate(["7", "−1", "−7", "1"])),
    ]
    tips = [text.xy for text in axes.texts if text.get_text().startswith("query")]
    assert tips == [(2, 1), (-1, 2), (-2, -1), (1, -2)]
    assert axes.get_aspect() == 1


def test_stretch_is_logarithmic_and_starts_at_pair_zero() -> None:
    axes = plots.stretch_by_pair({"linear": [40.0, 40.0], "YaRN": [1.0, 40.0]})
    linear, yarn = axes.get_lines()
    assert list(linear.get_ydata()) == [40.0, 40.0]
    assert list(yarn.get_xdata()) == [0, 1]
    assert list(yarn.get_ydata()) == [1.0, 40.0]
    assert axes.get_yscale() == "log"


def test_bits_are_drawn_at_their_lengths_with_labels_apart() -> None:
    axes = plots.bits_by_length([128, 256], {"no stretch": [3.0, 6.6], "YaRN": [3.0, 3.1], "window": [3.0, 3.0]}, 128)
    mark, window, yarn, none = axes.get_lines()
    assert list(mark.get_xdata()) == [128, 128]
    for line, bits in ((none, [3.0, 6.6]), (yarn, [3.0, 3.1]), (window, [3.0, 3.0])):
        assert list(line.get_xdata()) == [128, 256]
        assert list(line.get_ydata()) == bits
    assert len({line.get_linestyle() for line in (none, yarn, window)}) == 3
    labels = {text.get_text(): text.get_position()[1] for text in axes.texts}
    colours = {line.get_label(): line.get_color() for line in (none, yarn, window)}
    assert colours == {"no stretch": plots.INK, "YaRN": plots.ROPE, "window": plots.INK}
    assert labels["YaRN"] - labels["window"] == pytest.approx(plots.APART)
    assert labels["no stretch"] == 6.6
    assert axes.get_xscale() == "log"


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
        lambda: plots.stretch_by_pair({"a": [1.0]}),
        lambda: plots.bits_by_length([1, 2], {"a": [1.0, 1.0]}, 1),
        lambda: plots.scores_by_distance([0], {"a": [1.0]}),
    ],
)
def test_axes_are_named(axes) -> None:
    drawn = axes()
    assert drawn.get_xlabel()
    assert drawn.get_ylabel()
