"""The figures of the chapter on what latent attention caches show the data they were given, with labels."""

from collections.abc import Iterator

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from dsv2_ref import plots
from dsv2_ref.plots.mla import LATENT, ROPE


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


BARS = {"all heads": {"keys and values": 4096}, "latent": {"latent": 512, "rope key": 64}}


def test_cached_elements_are_bars_of_parts_from_the_top() -> None:
    axes = plots.cached_elements(BARS, [" (V2: 32,768)", ""])
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths == {"keys and values": [4096, 0], "latent": [0, 512], "rope key": [0, 64]}
    assert [bars[0].get_facecolor()[:3] for bars in axes.containers[1:]] == [to_rgb(LATENT), to_rgb(ROPE)]
    assert axes.containers[2][1].get_x() == 512
    assert [text.get_text() for text in axes.texts] == ["4,096 (V2: 32,768)", "576"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all heads", "latent"]
    assert axes.yaxis_inverted()
    assert axes.get_xlabel()


def test_the_notes_beside_the_bars_stay_inside_the_figure() -> None:
    axes = plots.cached_elements(BARS, [" (V2: 32,768)", ""])
    axes.figure.canvas.draw()
    right = axes.figure.get_window_extent().x1
    assert all(text.get_window_extent().x1 <= right for text in axes.texts)


def test_the_thin_rope_key_has_an_edge_of_its_own_colour_and_other_bars_none() -> None:
    axes = plots.cached_elements(BARS, ["", ""])
    absent, thin = axes.containers[2]
    assert (absent.get_linewidth(), thin.get_edgecolor()[:3]) == (0, to_rgb(ROPE))
    assert axes.get_xticks()[-1] >= 4096


def test_the_flow_names_what_is_cached_and_how_much_passes_each_arrow() -> None:
    axes = plots.latent_flow(hidden=40, heads=3, latent=11, nope=5, rope=2, value=7)
    texts = [text.get_text() for text in axes.texts]
    assert {"latent 11", "rope key 2", "norm", "rotate", "cache", "$W^O$"} <= set(texts)
    assert {"11", "2, for all heads", "3 · 7", "3 · 5", "40, added to the stream"} <= set(texts)
    cached = [box for box in axes.patches if box.get_facecolor()[:3] in (to_rgb(LATENT), to_rgb(ROPE))]
    assert len(cached) == 6, "three rows of a latent and a rope key"


def test_the_flow_stays_inside_the_figure() -> None:
    axes = plots.latent_flow(2048, 16, 512, 128, 64, 128)
    axes.figure.canvas.draw()
    frame = axes.figure.get_window_extent()
    for text in axes.texts:
        extent = text.get_window_extent()
        assert frame.x0 <= extent.x0
        assert extent.x1 <= frame.x1, text.get_text()


def test_low_rank_draws_three_rectangles_to_scale() -> None:
    axes = plots.low_rank(rows=40, columns=20, rank=5)
    sizes = {p.get_label(): (p.get_height(), p.get_width()) for p in axes.patches}
    assert sizes == {"W": (40, 20), "U": (40, 5), "A": (5, 20)}
    assert axes.get_aspect() == 1
    assert {"40 × 20", "40 × 5", "5 × 20"} <= {text.get_text() for text in axes.texts}
    left, right = axes.get_xlim()
    assert all(left < p.get_x() and p.get_x() + p.get_width() < right for p in axes.patches)


def test_up_maps_have_a_cell_for_each_entry_and_say_their_widths() -> None:
    axes = plots.up_maps({"identity": [[1, 0], [0, 1]], "copies": [[1], [1]]}, ["k", "v"])
    filled = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_fill()]
    assert [p.get_alpha() for p in filled] == [1, 0, 0, 1, 1, 1]
    assert len({p.get_xy() for p in filled}) == 6
    assert [text.get_text() for text in axes.texts] == ["k", "v", "identity", "2", "copies", "1"]


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
