"""The figures of the chapter on the pre-norm layer show the data they were given, with labels."""

from collections.abc import Iterator

import matplotlib
import numpy as np
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


def test_norm_places_put_norms_on_the_stream_or_on_the_branch() -> None:
    axes = plots.norm_places({"post": "part + norm", "pre": "norm part +"})
    names = [text.get_text() for text in axes.texts]
    wanted = {"post": 1, "pre": 1, "norm": 4, "attention": 2, "feed-forward": 2, "+": 4}
    assert {name: names.count(name) for name in wanted} == wanted
    sums = sorted({text.get_position()[0] for text in axes.texts if text.get_text() == "+"})
    norms = [text.get_position()[0] for text in axes.texts if text.get_text() == "norm"]
    assert [x in sums for x in norms] == [True, True, False, False]
    heights = [text.get_position()[1] for text in axes.texts if text.get_position()[0] == norms[0]]
    assert heights == sorted(heights, reverse=True)


def test_stream_spiral_has_right_angles_and_lengths_that_grow_like_a_root() -> None:
    axes = plots.stream_spiral(5)
    start, *lines = [np.transpose(line.get_data()) for line in axes.get_lines()]
    steps, ends = lines[0::2], [line[1] for line in lines[1::2]]
    assert start[1] == pytest.approx((1, 0))
    assert [np.hypot(*end) for end in ends] == pytest.approx([n**0.5 for n in (2, 3, 4, 5, 6)])
    for begin, end in steps:
        assert (np.hypot(*(end - begin)), (end - begin) @ begin) == pytest.approx((1, 0))
    assert {"45°", "35.3°", "30°", "26.6°", "24.1°"} <= {text.get_text() for text in axes.texts}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["stream", "attention", "feed-forward"]
