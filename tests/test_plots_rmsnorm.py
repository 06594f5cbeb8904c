"""The figures show the data they were given, with labels, and stay readable on any page."""

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


def test_growth_starts_at_zero_layers_and_is_logarithmic() -> None:
    axes = plots.growth_through_layers({"without": [1.0, 10.0, 100.0], "with": [1.0, 1.5]})
    without, with_norm = axes.get_lines()
    assert list(without.get_xdata()) == [0, 1, 2]
    assert list(without.get_ydata()) == [1.0, 10.0, 100.0]
    assert list(with_norm.get_ydata()) == [1.0, 1.5]
    assert axes.get_yscale() == "log"


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
