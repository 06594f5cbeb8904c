"""The figures of the chapter on training show the data they were given, to scale, with labels."""

from collections.abc import Iterator

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from dsv2_ref import plots
from dsv2_ref.plots.training import PARTS

ROWS = {
    "use it": {"weights": 31.4},
    "train it": {
        "weights": 31.4, "gradients": 31.4, "master weights": 62.8, "optimizer": 125.7, "activations": 3.25,
    },
}  # fmt: skip
CURVES = {"keep all": {0.0: 0.0, 22.0: 26.0, 69.0: 1.7}, "full": {0.0: 0.0, 22.0: 3.0, 88.0: 1.7}}


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_bytes_are_to_scale_one_after_the_other_with_their_totals() -> None:
    axes = plots.bytes_of_training(ROWS, {"one H100: 80": 80})
    drawn = [bar for bar in axes.patches if isinstance(bar, Rectangle) and bar.get_width()]
    found = sorted((round(bar.get_y()), bar.get_x(), bar.get_width(), bar.get_facecolor()[:3]) for bar in drawn)
    expected = []
    for place, parts in enumerate(ROWS.values()):
        left = 0.0
        for part, size in parts.items():
            expected.append((place, pytest.approx(left), pytest.approx(size), to_rgb(PARTS[part][0])))
            left += size
    assert found == expected
    assert {text.get_text() for text in axes.texts} == {"31", "255", "one H100: 80"}
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [80]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(PARTS)


def test_memory_is_drawn_by_the_work_done_with_the_turn_marked() -> None:
    axes = plots.memory_over_step(CURVES, turn=22.4)
    *curves, turn = axes.get_lines()
    found = {line.get_label(): dict(zip(*map(list, line.get_data()), strict=True)) for line in curves}
    assert found == CURVES
    assert list(turn.get_xdata()) == [22.4, 22.4]
    assert [text.get_text() for text in axes.texts] == ["forward", "backward"]
    assert axes.get_xlim()[1] > 88
    assert axes.get_ylim()[1] > 26


def test_the_text_stays_inside_the_figure() -> None:
    for axes in (plots.bytes_of_training(ROWS, {"one H100: 80": 80}), plots.memory_over_step(CURVES, turn=22.4)):
        axes.figure.canvas.draw()
        frame = axes.figure.get_window_extent()
        for text in [*axes.texts, *axes.get_yticklabels(), *axes.get_legend().get_texts()]:
            extent = text.get_window_extent()
            assert frame.x0 <= extent.x0, text.get_text()
            assert extent.x1 <= frame.x1, text.get_text()
