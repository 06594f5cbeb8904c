"""The figure of the chapter on published weights shows the data it was given, to scale, with labels."""

from collections.abc import Iterator

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from dsv2_ref import plots
from dsv2_ref.plots.weights import PARTS

BARS = {
    "a file": [("header", 100), ("attention, norms", 300), ("routed experts", 500), ("attention, norms", 100)],
    "a layer": [("attention, norms", 20), ("routed experts", 980)],
}
STRETCHES = {"a file": {"layer 0": (100, 400), "layer 1": (400, 1000)}}


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def drawn() -> list[Rectangle]:
    axes = plots.bytes_to_scale(BARS, STRETCHES)
    return [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_width()]


def test_parts_are_to_scale_and_in_order() -> None:
    places = [(round(part.get_x(), 3), round(part.get_width(), 3)) for part in drawn()]
    assert places == [(0, 0.1), (0.1, 0.3), (0.4, 0.5), (0.9, 0.1), (0, 0.02), (0.02, 0.98)]
    assert [part.get_facecolor()[:3] for part in drawn()[-2:]] == [
        to_rgb(PARTS[name][0]) for name in ("attention, norms", "routed experts")
    ]


def test_totals_brackets_and_the_parts_that_occur_are_named() -> None:
    axes = plots.bytes_to_scale(BARS, STRETCHES)
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["a file: 1,000 bytes", "layer 0", "layer 1", "a layer: 1,000 bytes"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "header", "attention, norms", "routed experts",
    ]  # fmt: skip
    first, second = axes.get_lines()
    assert first.get_xdata()[0] < first.get_xdata()[-1] < second.get_xdata()[0] < second.get_xdata()[-1] < 1


def test_the_text_stays_inside_the_figure() -> None:
    axes = plots.bytes_to_scale(BARS, STRETCHES)
    axes.figure.canvas.draw()
    frame = axes.figure.get_window_extent()
    for text in [*axes.texts, *axes.get_legend().get_texts()]:
        extent = text.get_window_extent()
        assert frame.x0 <= extent.x0, text.get_text()
        assert extent.x1 <= frame.x1, text.get_text()
        assert frame.y0 <= extent.y0, text.get_text()
        assert extent.y1 <= frame.y1, text.get_text()
