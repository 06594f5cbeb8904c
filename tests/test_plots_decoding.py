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
    rows = {
        "cached": {"attend to keys and values": 500},
        "absorbed": {"attend to latents": 800, "absorb $W$ (once)": 9},
    }
    axes = plots.three_ways(rows, [" elements", ""])
    widths = [bar.get_width() for bars in axes.containers for bar in bars]
    assert widths == [500, 0, 0, 800, 0, 9, 0, 0]
    # The part too thin to see has its number above it, and an edge of its own colour.
    assert [text.get_text() for text in axes.texts] == ["500 elements", "809", "9"]
    thin = axes.containers[2][1]
    assert thin.get_edgecolor() == thin.get_facecolor() != axes.containers[1][1].get_edgecolor()
    assert list(axes.get_xticks()) == [0, 500, 1000]
    assert axes.yaxis_inverted()


def test_moved_bracket_is_to_scale_and_counts_both_orders() -> None:
    axes = plots.moved_bracket(nope=128, latent=512, tokens=8192, drawn=3072)
    sizes = [(patch.get_height(), patch.get_width()) for patch in axes.patches]
    line = 51
    factors = [(line, 128), (128, 512), (512, 3072)]
    assert sizes == [*factors, (line, 128), (128, 3072), *factors, (line, 512), (512, 3072)]
    assert axes.get_aspect() == 1
    names = [text.get_text() for text in axes.texts]
    assert [name for name in names if "multiplications" in name] == [
        "first 536,870,912, then 1,048,576 multiplications",
        "first 65,536, then 4,194,304 multiplications",
    ]
    # Rows that leave tokens out say so.
    assert names.count("…") == sum(width == 3072 for _, width in sizes) == 4
    keys_first, query_first = (line.get_xdata() for line in axes.get_lines())
    assert query_first[0] < keys_first[0] < query_first[-1] < keys_first[-1]


def test_queries_by_distance_has_one_query_above_and_one_for_each_distance_below() -> None:
    axes = plots.queries_by_distance([(1, 2), (-2, 1), (-1, -2)])
    at = {(round(y, 2), text.get_text()): x for text in axes.texts for x, y in [text.get_position()]}
    boxes = {(round(y, 2), name): x for (y, name), x in at.items() if name.startswith(("(", "$c"))}
    assert boxes == {
        (1.35, "(1, 2)"): 1.0,
        (0, "$c_t$"): 2, (-1.1, "(1, 2)"): 2,
        (0, "$c_{t-1}$"): 1, (-1.1, "(−2, 1)"): 1,
        (0, "$c_{t-2}$"): 0, (-1.1, "(−1, −2)"): 0,
    }  # fmt: skip
    lines = [tuple(line.get_xdata()) for line in axes.get_lines()]
    assert lines == [(1.0, 2), (2, 2), (1.0, 1), (1, 1), (1.0, 0), (0, 0)]
    assert [name for _, name in at if name.startswith("distance")] == ["distance 0", "distance 1", "distance 2"]
