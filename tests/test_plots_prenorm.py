"""The figures of the chapter on the pre-norm layer show the data they were given, with labels."""

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


def test_by_layer_draws_every_layer() -> None:
    curves = {"pre-norm": [1.0, 2.0, 3.0], "post-norm": [1.0, 0.1, 0.01]}
    plain = plots.by_layer(curves, "size of the stream")
    assert (plain.get_yscale(), plain.get_ylim()[0]) == ("linear", 0)
    axes = plots.by_layer(curves, "size of the stream", logarithmic=True)
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[1.0, 2.0, 3.0], [1.0, 0.1, 0.01]]
    assert list(axes.get_lines()[0].get_xdata()) == [0, 1, 2]
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "layer"
    assert axes.get_ylabel() == "size of the stream"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pre-norm", "post-norm"]


def test_training_curves_draw_the_median_and_the_range_of_the_seeds() -> None:
    axes = plots.training_curves({"pre-norm": {10: [5.0, 4.0, 4.5], 20: [3.0, 2.0, 2.5]}}, guessing=3.8)
    median, line = axes.get_lines()
    assert list(median.get_xdata()) == [10, 20]
    assert list(median.get_ydata()) == [4.5, 2.5]
    assert set(line.get_ydata()) == {3.8}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pre-norm", "frequencies alone"]
    (band,) = axes.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices}
    assert {(10.0, 4.0), (10.0, 5.0), (20.0, 2.0), (20.0, 3.0)} <= corners
    assert "step" in axes.get_xlabel()
    assert "bits" in axes.get_ylabel()


def test_ends_by_rate_draw_every_seed_and_the_median() -> None:
    axes = plots.ends_by_rate({"pre-norm": {0.001: [2.0, 3.0, 2.5], 0.1: [3.0, 3.5, 3.9]}}, guessing=3.8)
    median, *points, line = axes.get_lines()
    assert (list(median.get_xdata()), list(median.get_ydata())) == ([0.001, 0.1], [2.5, 3.5])
    assert [list(point.get_ydata()) for point in points] == [[2.0, 3.0, 2.5], [3.0, 3.5, 3.9]]
    assert set(line.get_ydata()) == {3.8}
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pre-norm", "frequencies alone"]
    assert "rate" in axes.get_xlabel()
    assert "bits" in axes.get_ylabel()
