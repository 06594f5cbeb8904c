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


def test_three_ways_draws_the_parts_of_every_way_and_its_note() -> None:
    rows = {"cached": {"attend to keys and values": 5}, "absorbed": {"attend to latents": 8, "move brackets": 9}}
    axes = plots.three_ways(rows, [" elements", ""])
    widths = [bar.get_width() for bars in axes.containers for bar in bars]
    assert widths == [5, 0, 0, 8, 0, 9, 0, 0]
    assert [text.get_text() for text in axes.texts] == ["5 elements", "17"]
    assert axes.yaxis_inverted()


def test_moved_bracket_is_to_scale_and_counts_both_orders() -> None:
    axes = plots.moved_bracket(nope=128, latent=512, tokens=8192)
    sizes = [(patch.get_height(), patch.get_width()) for patch in axes.patches]
    assert sizes[1:3] == [(128, 512), (512, 8192)]
    assert sizes[-1] == (128, 8192)
    assert axes.get_aspect() == 1
    counts = [text.get_text() for text in axes.texts if "multiplications" in text.get_text()]
    assert counts == [
        "first 65,536, then 4,194,304 multiplications",
        "first 536,870,912, then 1,048,576 multiplications",
    ]
