"""The figures show the data they were given, with labels, and stay readable on any page."""

import math
from collections.abc import Iterator

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from dsv2_ref import plots


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_tokens_land_on_the_circle_and_keep_their_direction() -> None:
    axes = plots.circle_of_tokens([(1, 7), (0.5, 0.5)])
    marks = {line.get_color(): line for line in axes.get_lines()}
    points = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.get_lines()]
    assert len(marks) == 2
    assert points == [(1, 7), pytest.approx((0.2, 1.4)), (0.5, 0.5), pytest.approx((1, 1))]
    assert {text.get_text() for text in axes.texts} >= {"(1, 7)", "(0.2, 1.4)", "(0.5, 0.5)", "(1, 1)"}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["token", "RMSNorm"]
    assert axes.patches[0].radius == pytest.approx(2**0.5)


def test_the_shorter_arrow_lies_on_top() -> None:
    axes = plots.circle_of_tokens([(1, 7), (0.5, 0.5)])
    ends = [text.xy for text in axes.texts if text.arrowprops and text.arrowprops["arrowstyle"] == "->"]
    assert ends == [(1, 7), pytest.approx((0.2, 1.4)), pytest.approx((1, 1)), (0.5, 0.5)]


def test_layer_norm_goes_by_the_line_of_sum_zero() -> None:
    axes = plots.circle_of_tokens([(1, 7)], layer_norm=True)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["same LayerNorm"].get_xdata()) == [1, -3]
    for label, point in {"mean subtracted": (-3, 3), "LayerNorm": (-1, 1)}.items():
        assert (lines[label].get_xdata()[0], lines[label].get_ydata()[0]) == pytest.approx(point)
    assert {"(−3, 3)", "(−1, 1)"} <= {text.get_text() for text in axes.texts}


def test_growth_starts_at_zero_layers_and_is_logarithmic() -> None:
    axes = plots.growth_through_layers({"without": [1.0, 10.0, 100.0], "with": [1.0, 1.5]})
    without, with_norm = axes.get_lines()
    assert list(without.get_xdata()) == [0, 1, 2]
    assert list(without.get_ydata()) == [1.0, 10.0, 100.0]
    assert list(with_norm.get_ydata()) == [1.0, 1.5]
    assert axes.get_yscale() == "log"


def test_what_overflows_ends_at_a_cross_where_float32_ends() -> None:
    axes = plots.growth_through_layers({"far": [1.0, 1e9, math.inf, math.nan], "near": [1.0, 1.2, 1.3, 1.4]})
    far, near, level, cross = axes.get_lines()
    assert list(far.get_xdata()) == [0, 1, 2]
    assert far.get_ydata()[-1] == level.get_ydata()[0] == cross.get_ydata()[0] == 3.4e38
    assert (cross.get_xdata()[0], cross.get_color()) == (2, far.get_color())
    assert len(near.get_xdata()) == 4
    assert [text.get_text() for text in axes.texts] == ["float32 ends"]


def test_growth_shows_close_curves_again_in_an_inset_of_their_own_scale() -> None:
    axes = plots.growth_through_layers(
        {"far": [1.0, 1e9], "near": [1.0, 1.2], "nearer": [1.0, 2.7]}, close=["near", "nearer"]
    )
    (inset,) = axes.child_axes
    assert [list(line.get_ydata()) for line in inset.get_lines()] == [[1.0, 1.2], [1.0, 2.7]]
    assert [line.get_color() for line in inset.get_lines()] == [line.get_color() for line in axes.get_lines()[1:]]
    assert [text.get_text() for text in inset.texts] == ["1.2", "2.7"]
    assert inset.get_yscale() == "linear"
    assert not plots.growth_through_layers({"far": [1.0, 1e9]}).child_axes


def test_running_sums_start_after_one_feature_and_at_zero_height() -> None:
    axes = plots.running_sums({"exact": [1.0, 2.0, 3.0], "bfloat16": [1.0, 2.0, 2.0]})
    exact, bfloat16 = axes.get_lines()
    assert list(exact.get_xdata()) == [1, 2, 3]
    assert list(bfloat16.get_ydata()) == [1.0, 2.0, 2.0]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] == 0


@pytest.mark.parametrize("figure", [plots.growth_through_layers, plots.running_sums])
def test_curves_are_named_and_told_apart_without_colour(figure) -> None:
    axes = figure({"one": [1.0, 2.0], "two": [2.0, 3.0], "three": [3.0, 4.0], "four": [4.0, 5.0]})
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two", "three", "four"]
    assert len({line.get_linestyle() for line in axes.get_lines()}) == 4


def test_a_figure_brings_its_own_ground_and_leaves_the_readers_style_alone() -> None:
    before = dict(matplotlib.rcParams)
    axes = plots.new_axes("x", "y")
    assert axes.figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert axes.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert dict(matplotlib.rcParams) == before


def test_a_fifth_curve_is_refused_rather_than_dropped() -> None:
    with pytest.raises(ValueError, match="5 curves; wanted at most 4"):
        plots.running_sums({str(i): [1.0] for i in range(5)})
