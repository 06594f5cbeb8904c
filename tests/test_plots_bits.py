"""The figures of the chapter on fewer bits show the data they were given, to scale, with labels."""

from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from dsv2_ref import plots
from dsv2_ref.plots.bits import RECORD

RECORDS = {
    "bfloat16": {"latent": 1024, "scales": 0, "rope key": 128},
    "fp8": {"latent": 512, "scales": 16, "rope key": 128},
}
CURVES = {"latent": {4: 0.008, 3: 0.03, 2: 0.34}, "rope key": {8: -0.0004, 4: 0.136}}


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_each_number_of_a_format_is_a_tick_and_no_other() -> None:
    axes = plots.number_lines({"whole": [5, 6, 7, 8, 9], "halves": [6, 6.5, 7, 7.5, 8]}, 6, 8)
    lines = [each.get_segments() for each in axes.collections]
    ticks = [segment[0][0] for segments in lines for segment in segments if segment[0][0] == segment[1][0]]
    assert ticks == [6, 7, 8, 6, 6.5, 7, 7.5, 8]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["whole", "halves"]


def test_records_are_to_scale_in_the_order_of_bytes() -> None:
    axes = plots.records_to_scale(RECORDS)
    drawn = [bar for bar in axes.patches if isinstance(bar, Rectangle) and bar.get_width()]
    assert [(bar.get_x(), bar.get_width()) for bar in drawn] == [
        (0, 1024), (1024, 128), (0, 512), (512, 16), (528, 128),
    ]  # fmt: skip
    parts = ["latent", "rope key", "latent", "scales", "rope key"]
    assert [bar.get_facecolor()[:3] for bar in drawn] == [to_rgb(RECORD[part]) for part in parts]
    assert [text.get_text() for text in axes.texts] == ["1,024", "128", "1,152", "512", "128", "656"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(RECORD)


def test_losses_are_drawn_by_bits_and_a_gain_at_the_edge() -> None:
    axes = plots.bits_lost(CURVES)
    found = {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.get_lines()}
    assert found == {"latent": [(4, 0.008), (3, 0.03), (2, 0.34)], "rope key": [(8, 0.001), (4, 0.136)]}
    assert axes.get_yscale() == "log"
    assert np.array_equal(axes.get_xticks(), range(2, 9))


def test_the_text_stays_inside_the_figure() -> None:
    drawn: list[Axes] = [plots.records_to_scale(RECORDS), plots.bits_lost(CURVES)]
    drawn.append(plots.number_lines({"int4": [6, 7], "e4m3": [6, 6.5, 7], "bfloat16": np.arange(6, 8, 1 / 32)}, 6, 8))
    for axes in drawn:
        axes.figure.canvas.draw()
        frame = axes.figure.get_window_extent()
        legend = axes.get_legend()
        named = [*axes.texts, *axes.get_yticklabels(), *(legend.get_texts() if legend else [])]
        for text in named:
            extent = text.get_window_extent()
            assert frame.x0 <= extent.x0, text.get_text()
            assert extent.x1 <= frame.x1, text.get_text()
