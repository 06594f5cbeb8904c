"""The figures of the first chapter show the structure and the counts they were given."""

from collections.abc import Iterator

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyBboxPatch, Rectangle

from dsv2_ref import plots

FLOW = {
    "first norm": [["query", "key"], ["query latent", "key latent"], ["attention"]],
    "second norm": [["gate", "shared"], ["experts", ""], ["sum"]],
}


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def places(axes: Axes) -> dict[str, tuple[float, float]]:
    return {text.get_text(): text.get_position() for text in axes.texts}


def boxes(axes: Axes) -> dict[str, FancyBboxPatch]:
    """The box around each name."""
    found = [patch for patch in axes.patches if type(patch) is FancyBboxPatch]
    return {
        name: box
        for name, (x, y) in places(axes).items()
        for box in found
        if box.get_x() < x < box.get_x() + box.get_width() and box.get_y() < y < box.get_y() + box.get_height()
    }


def test_the_flow_runs_from_top_to_bottom_and_rows_stand_side_by_side() -> None:
    axes = plots.layer_flow(FLOW)
    where = places(axes)
    rows = [row for norm, behind in FLOW.items() for row in ([norm], *behind)]
    heights = [{where[name][1] for name in row if name} for row in rows]
    assert all(len(height) == 1 for height in heights)
    down = [height.pop() for height in heights]
    assert down == sorted(down, reverse=True)
    assert len(set(down)) == len(down)
    assert where["query"][0] == where["query latent"][0] < where["key"][0] == where["key latent"][0]
    assert where["token in"][1] > down[0]
    assert where["token out"][1] < down[-1]


def test_each_branch_is_added_to_the_stream_once_below_its_last_box() -> None:
    axes = plots.layer_flow(FLOW)
    where = places(axes)
    sums = [text.get_position() for text in axes.texts if text.get_text() == "+"]
    stream = next(text for text in axes.texts if text.get_text() == "" and text.arrow_patch.get_linewidth() > 3)
    assert [x for x, _ in sums] == [stream.xy[0]] * len(FLOW)
    assert where["attention"][1] > sums[0][1] > where["second norm"][1]
    assert where["sum"][1] > sums[1][1] > stream.xy[1]


def test_every_name_has_a_box_that_holds_it_and_an_empty_name_has_none() -> None:
    axes = plots.layer_flow(FLOW)
    names = {name for norm, behind in FLOW.items() for row in ([norm], *behind) for name in row if name}
    assert boxes(axes).keys() == names
    assert sum(type(patch) is FancyBboxPatch for patch in axes.patches) == len(names)
    axes.figure.canvas.draw()
    for name, box in boxes(axes).items():
        text = next(text for text in axes.texts if text.get_text() == name)
        assert text.get_window_extent().width < box.get_window_extent().width, name


WIDE = {"norm": [["query", "both", "both"], ["query latent", "key latent", "rope key"], ["up", "up too", ""], ["end"]]}


def test_a_name_given_to_neighbours_is_one_box_over_their_columns() -> None:
    axes = plots.layer_flow(WIDE)
    drawn = boxes(axes)
    assert [text.get_text() for text in axes.texts].count("both") == 1
    edges = {name: (box.get_x(), box.get_x() + box.get_width()) for name, box in drawn.items()}
    assert edges["both"] == pytest.approx((edges["key latent"][0], edges["rope key"][1]))
    assert edges["query"] == pytest.approx(edges["query latent"])
    assert edges["query latent"][1] < edges["key latent"][0]
    assert edges["key latent"][1] < edges["rope key"][0]


def test_a_line_leads_from_the_last_column_past_the_row_to_the_box_that_gathers() -> None:
    axes = plots.layer_flow(WIDE)
    where, drawn = places(axes), boxes(axes)
    x = where["rope key"][0]
    (past,) = (
        line.get_ydata()
        for line in axes.get_lines()
        if list(line.get_xdata()) == [x, x] and min(line.get_ydata()) < where["up"][1] < max(line.get_ydata())
    )
    assert max(past) == pytest.approx(drawn["rope key"].get_y())
    tips = [text.xy for text in axes.texts if text.get_text() == "" and text.arrow_patch.get_linewidth() < 3]
    into_end = [tip for tip in tips if tip[1] == pytest.approx(drawn["end"].get_y() + drawn["end"].get_height())]
    assert into_end == [pytest.approx((where["end"][0], into_end[0][1]))]


def test_only_what_is_remembered_is_marked() -> None:
    drawn = boxes(plots.layer_flow(FLOW, remembered=["key latent"]))
    colours = {name: box.get_facecolor() for name, box in drawn.items()}
    marked = colours.pop("key latent")
    assert marked not in colours.values()
    assert len(set(colours.values())) == 1


def test_layer_kinds_have_a_cell_for_each_layer() -> None:
    models = {"one": [False, True, True], "two": [False, False, True, False, True]}
    axes = plots.layer_kinds(models)
    dense, experts = (to_rgba(handle.get_facecolor()) for handle in axes.get_legend().get_patches())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense MLP", "experts"]
    cells = [patch for patch in axes.patches if type(patch) is Rectangle]
    shown = {
        (round(cell.get_y() + cell.get_height() / 2), round(cell.get_x() + cell.get_width() / 2)): cell.get_facecolor()
        for cell in cells
    }
    assert len(shown) == len(cells)
    assert shown == {
        (row, layer): experts if kind else dense
        for row, kinds in enumerate(models.values())
        for layer, kind in enumerate(kinds)
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    assert axes.get_xlabel()


def test_parameter_shares_are_percentages_of_each_count() -> None:
    counts = {
        "stored": {"attention": 10, "experts": 90, "norms": 0},
        "active": {"attention": 30, "experts": 9, "norms": 1},
    }
    axes = plots.parameter_shares(counts)
    stored, active = axes.containers
    assert [bar.get_width() for bar in stored] == [10, 90, 0]
    assert [bar.get_width() for bar in active] == [75, 22.5, 2.5]
    assert {bar.get_hatch() for bar in stored} != {bar.get_hatch() for bar in active}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["stored", "active"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["attention", "experts", "norms"]
    assert [text.get_text() for text in axes.texts] == ["10 %", "90 %", "below 0.5 %", "75 %", "22 %", "2 %"]
    assert axes.yaxis_inverted()
    assert "%" in axes.get_xlabel()
