"""The figures of the chapter on MLA compression show the data they were given, with labels."""

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


def test_numbers_remembered_are_labelled_dots_from_the_top() -> None:
    axes = plots.numbers_remembered({"all heads": 32768, "latent": 576})
    (dots,) = axes.get_lines()
    assert dict(zip(dots.get_xdata(), dots.get_ydata(), strict=True)) == {32768: 0, 576: 1}
    assert dots.get_linestyle() == "None"
    assert [text.get_text() for text in axes.texts] == ["32,768", "576"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all heads", "latent"]
    assert axes.yaxis_inverted()
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel()


def test_the_dots_and_the_numbers_beside_them_stay_inside_the_figure() -> None:
    axes = plots.numbers_remembered({"all heads": 40960, "latent": 1})
    axes.figure.canvas.draw()
    right = axes.get_window_extent().x1
    assert all(text.get_window_extent().x1 <= right for text in axes.texts)
    assert axes.get_xlim()[0] < 1
    assert axes.get_xlim()[1] > 40960


COMPUTED = {"MHA": {64: 640, 1024: 10240, 16384: 163840}, "MLA": {64: 64, 1024: 1024, 16384: 16384}}
MEASURED = {"MHA": {64: 640, 128: 1280}, "MLA": {64: 64, 128: 128}}


def test_cache_growth_draws_lines_for_what_is_computed_and_marks_for_what_is_measured() -> None:
    axes = plots.cache_growth(COMPUTED, MEASURED)
    drawn = [dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.get_lines()]
    assert drawn == [COMPUTED["MHA"], MEASURED["MHA"], COMPUTED["MLA"], MEASURED["MLA"]]
    lines, marks = axes.get_lines()[::2], axes.get_lines()[1::2]
    assert {line.get_marker() for line in lines} == {"None"}
    assert {mark.get_linestyle() for mark in marks} == {"None"}
    assert [line.get_color() for line in lines] == [mark.get_color() for mark in marks]
    assert len({line.get_linestyle() for line in lines}) == len({mark.get_marker() for mark in marks}) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["MHA", "MLA"]


def test_cache_growth_has_logarithmic_axes_with_units() -> None:
    axes = plots.cache_growth(COMPUTED, MEASURED)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert list(axes.get_xticks()) == [64, 1024, 16384]
    assert axes.xaxis.get_major_formatter()(16384, 0) == "16,384"
    assert axes.yaxis.get_major_formatter()(1e6) == "1 MB"
    assert "tokens" in axes.get_xlabel()
    assert "bytes" in axes.get_ylabel()


def test_truncation_errors_start_with_nothing_kept_and_mark_a_size() -> None:
    axes = plots.truncation_errors({"flat": [1.0, 0.8, 0.0], "decaying": [1.0, 0.1, 0.0]}, kept=1)
    flat, decaying, mark = axes.get_lines()
    assert list(flat.get_xdata()) == [0, 1, 2]
    assert list(flat.get_ydata()) == [1.0, 0.8, 0.0]
    assert list(decaying.get_ydata()) == [1.0, 0.1, 0.0]
    assert set(mark.get_xdata()) == {1}
    assert [text.get_text() for text in axes.texts] == ["1"]
    assert axes.get_xlabel()
    assert axes.get_ylabel()
