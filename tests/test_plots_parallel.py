"""The figures of the chapter on experts on many devices show the data they were given, to scale, with labels."""

from collections.abc import Iterator

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from dsv2_ref import plots
from dsv2_ref.plots.parallel import HOMES, STAYS, STEPS, TRAVELS

BY_HAND = {"tokens sent": [[2, 1], [2, 2]], "rows computed": [[3, 1], [2, 2]]}
STAGES = {
    "as they come": [{"": [0, 1]}, {"": [2, 3]}],
    "by expert": [{"expert 0": [0, 1, 2, 3], "expert 1": [1]}, {"expert 2": [0, 2, 3], "expert 3": []}],
}
TIMES = {"device 0": [("send", 1), ("compute", 5)], "device 1": [("send", 1), ("compute", 3), ("wait", 2)]}


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def bars_of(axes: Axes) -> list[Rectangle]:
    return [bar for bar in axes.patches if isinstance(bar, Rectangle) and bar.get_width()]


def test_bars_of_weights_are_in_billions_with_their_sums() -> None:
    rows = {
        "one": {"projections": 1e9, "routed experts": 4e9},
        "each of 8": {"projections": 1e9, "routed experts": 5e8},
    }
    axes = plots.device_weights(rows)
    assert [(bar.get_x(), bar.get_width()) for bar in bars_of(axes)] == [(0, 1), (0, 1), (1, 4), (1, 0.5)]
    assert [text.get_text() for text in axes.texts] == ["5.00", "1.50"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["projections", "routed experts"]


def test_grids_have_a_bar_for_each_pair_on_one_scale_and_the_sums_of_columns() -> None:
    panels = plots.exchange_grids(BY_HAND)
    for axes, (title, amounts) in zip(panels, BY_HAND.items(), strict=True):
        assert axes.get_title(loc="left") == title
        filled = [bar for bar in bars_of(axes) if bar.get_facecolor()[3]]
        heights = [bar.get_height() / 0.62 * 3 for bar in filled]
        assert heights == pytest.approx([amount for row in amounts for amount in row])
        colours = [STAYS, TRAVELS, TRAVELS, STAYS]
        assert [bar.get_facecolor()[:3] for bar in filled] == [to_rgb(colour) for colour in colours]
        written = [text.get_text() for text in axes.texts]
        assert written[:4] == [f"{amount}" for row in amounts for amount in row]
        assert written[4:] == [f"{sum(column)}" for column in zip(*amounts, strict=True)]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["from 0", "from 1"]


def test_three_grids_leave_no_empty_one() -> None:
    panels = plots.exchange_grids({f"{n}": [[1, 2], [3, 4]] for n in range(3)}, names=["code", "sums"])
    assert len(panels) == len(panels[0].figure.axes) == 3
    assert [label.get_text() for label in panels[2].get_yticklabels()] == ["code", "sums"]


def test_time_lines_put_one_step_after_another() -> None:
    axes = plots.time_lines(TIMES, "rows")
    drawn = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in bars_of(axes)]
    steps = [(0, 0, 1), (0, 1, 5), (1, 0, 1), (1, 1, 3), (1, 4, 2)]
    assert sum(drawn, ()) == pytest.approx(sum(steps, ()))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(STEPS)


def test_a_token_keeps_the_colour_of_its_device_at_each_step() -> None:
    axes = plots.journey(STAGES, homes=[0, 0, 1, 1])
    boxes = [bar for bar in bars_of(axes) if bar.get_facecolor()[3]]
    tokens = [0, 1, 2, 3, 0, 1, 2, 3, 1, 0, 2, 3]
    assert [bar.get_facecolor()[:3] for bar in boxes] == [to_rgb(HOMES[token // 2]) for token in tokens]
    numbers = [text.get_text() for text in axes.texts if text.get_text().isdigit()]
    assert numbers == [f"{token}" for token in tokens]
    assert {"device 0", "device 1", *STAGES, "expert 3"} <= {text.get_text() for text in axes.texts}
    empty = [bar for bar in bars_of(axes) if not bar.get_facecolor()[3]]
    assert len(empty) == 1, "an expert without tokens has a dashed box"


def test_links_are_lines_at_their_balance() -> None:
    axes = plots.hidden_behind({"experts": 4608, "shared": 1536}, {"NVLink": 2198, "InfiniBand": 19780})
    assert [bar.get_width() for bar in bars_of(axes)] == [4608, 1536]
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [2198, 19780]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["NVLink", "InfiniBand"]


def test_the_text_stays_inside_the_figure() -> None:
    whole = {"layer": {"projections": 2e9, "routed experts": 4e9}}
    links = {"NVLink, 450 GB/s": 2198, "InfiniBand, 50 GB/s": 19780}
    drawn = [plots.device_weights(whole), plots.time_lines(TIMES, "rows"), plots.journey(STAGES, [0, 0, 1, 1])]
    drawn += [*plots.exchange_grids(BY_HAND), plots.hidden_behind({"routed experts": 4608}, links)]
    for axes in drawn:
        axes.figure.canvas.draw()
        frame, legend = axes.figure.get_window_extent(), axes.get_legend()
        names = axes.get_yticklabels() if axes.axison else []
        for text in [*axes.texts, *names, *(legend.get_texts() if legend else [])]:
            extent = text.get_window_extent()
            assert frame.x0 <= extent.x0, text.get_text()
            assert extent.x1 <= frame.x1, text.get_text()
