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
    assert 16 < height < 32  # within one block of queries
    assert "4 pairs" in axes.texts[-1].get_text()
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    plt.close("all")
