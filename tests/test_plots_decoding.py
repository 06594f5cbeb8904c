"""The figures of the chapter on decoding show the data they were given, with labels."""

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


def test_crossover_draws_both_borders_the_limit_and_what_lies_between() -> None:
    borders = {"operations": {128: 40, 1024: 120, 8192: 160}, "bytes": {128: 30, 1024: 300, 8192: 2400}}
    axes = plots.crossover(borders, limit=171.0)
    operations, moved, prompt, limit = axes.get_lines()
    for line, border in ((operations, borders["operations"]), (moved, borders["bytes"])):
        assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == border
    assert list(prompt.get_xdata()) == list(prompt.get_ydata()) == [128, 1024, 8192]
    assert set(limit.get_ydata()) == {171.0}
    assert operations.get_linestyle() != moved.get_linestyle()
    (strip,) = axes.collections
    corners = {(int(x), int(y)) for x, y in strip.get_paths()[0].vertices}
    assert corners == {(K, S) for border in borders.values() for K, S in border.items()}
    assert [text.get_text() for text in axes.texts] == ["171", "absorbed", "expanded"]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["counts disagree", "operations", "bytes", "prompt, S = K"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert list(axes.get_xticks()) == [128, 1024, 8192]
    assert axes.xaxis.get_major_formatter()(8192, 0) == "8,192"
    assert "tokens" in axes.get_xlabel()
    assert "queries" in axes.get_ylabel()


def test_memory_growth_draws_every_way_with_a_style_of_its_own() -> None:
    peaks = {"all scores": {64: 100, 128: 400}, "by blocks": {64: 50, 128: 100}}
    axes = plots.memory_growth(peaks)
    drawn = [dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.get_lines()]
    assert drawn == list(peaks.values())
    assert len({(line.get_linestyle(), line.get_marker(), line.get_color()) for line in axes.get_lines()}) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(peaks)
    assert axes.get_yscale() == "log"
    assert axes.yaxis.get_major_formatter()(4e6) == "4 MB"
    assert "bytes" in axes.get_ylabel()
