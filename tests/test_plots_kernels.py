"""The figures of the chapter on fused kernels show the data they were given, with labels."""

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

from dsv2_ref import plots


def test_bars_are_what_is_read_and_behind_it_what_is_written() -> None:
    axes = plots.bytes_moved({"apart": (6e6, 3e6), "fused": (2e6, 2e6)})
    read, written = axes.containers
    assert [bar.get_width() for bar in read] == [6e6, 2e6]
    assert [(bar.get_x(), bar.get_width()) for bar in written] == [(6e6, 3e6), (2e6, 2e6)]
    assert [text.get_text().strip() for text in axes.texts] == ["9 MB", "4 MB"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["read", "written"]
    assert axes.yaxis_inverted()
    assert axes.get_xlim()[1] > 9e6
    plt.close("all")


@pytest.mark.parametrize(("rows", "kv_seq", "programs"), [(48, 1000, 3 * 4), (5, 300, 1), (16, 301, 2)])
def test_programs_cover_every_query_and_key_once(rows: int, kv_seq: int, programs: int) -> None:
    axes = plots.decode_plan(rows, 16, kv_seq, 300)
    *cells, shown = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(cells) == programs
    assert sum(cell.get_width() * cell.get_height() for cell in cells) == rows * kv_seq
    corners = {(cell.get_x(), cell.get_y()) for cell in cells}
    assert len(corners) == programs
    assert max(x for x, _ in corners) + cells[-1].get_width() == kv_seq
    assert (shown.get_width(), shown.get_height()) == (min(300, kv_seq), min(16, rows))
    assert f"{programs} programs" in axes.figure.get_suptitle()
    assert all(cell.get_edgecolor() != cell.get_facecolor() and cell.get_linewidth() > 0 for cell in cells)
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    plt.close("all")


def test_an_arrow_leads_from_a_query_s_shares_to_its_output() -> None:
    axes = plots.decode_plan(48, 16, 1000, 300)
    (arrow,) = (text for text in axes.texts if isinstance(text, Annotation))
    (tail, height), (head, head_height) = arrow.xyann, arrow.xy
    assert tail == 0
    assert head > 1000
    assert height == head_height
    assert 16 < height < 32  # within one group of queries
    assert "4 pairs" in axes.texts[-1].get_text()
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    plt.close("all")


def test_a_pass_is_an_arrow_to_or_from_memory() -> None:
    axes = plots.memory_passes(
        {"two": [("add", ("a", "b"), ("c",)), ("norm", ("c",), ("d",))], "one": [("both", ("a", "b"), ("c", "d"))]}
    )
    arrows = [text for text in axes.texts if isinstance(text, Annotation)]
    up = [arrow for arrow in arrows if arrow.xy[1] < arrow.xyann[1]]  # the axis points down
    assert (len(arrows), len(up)) == (5 + 4, 3 + 2)
    said = [text.get_text() for text in axes.texts]
    assert "two: 5 passes" in said
    assert "one: 4 passes" in said
    assert len(axes.patches) == 2 + 1 + 2  # kernels, and the memory of each chain
    plt.close("all")


def test_a_wave_is_as_high_as_the_slots_it_fills() -> None:
    axes = plots.waves({"half": (5, 8), "two waves": (15, 4)}, slots=10)
    whole, half, both, first, second = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert (whole.get_width(), half.get_width()) == (8, 8)
    assert half.get_height() == pytest.approx(whole.get_height() / 2)
    assert both.get_width() == first.get_width() + second.get_width() == 8
    assert second.get_x() == first.get_width() == 4
    assert (first.get_height(), second.get_height()) == pytest.approx((both.get_height(), both.get_height() / 2))
    assert [text.get_text() for text in axes.texts] == ["8", "8"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["half", "two waves"]
    assert axes.get_xlabel()
    plt.close("all")
