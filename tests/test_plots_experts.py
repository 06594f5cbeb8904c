"""The figures of experts and routing show the data they were given."""

from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.collections import QuadMesh
from matplotlib.patches import Rectangle

from dsv2_ref.plots import experts as plots

SCORES = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.7, 0.1]]


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_a_routing_map_colours_scores_and_numbers_choices() -> None:
    axes = plots.routing_map(SCORES, [[0, 1], [2, 0]])
    (cells,) = (child for child in axes.get_children() if isinstance(child, QuadMesh))
    assert np.array_equal(np.ma.getdata(cells.get_array()).reshape(2, 4), SCORES)
    marked = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines()]
    assert marked == [(0.5, 0.5), (1.5, 0.5), (2.5, 1.5), (0.5, 1.5)]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "1", "2"]
    assert axes.get_ylim() == (2, 0), "the first token is on top"
    assert axes.get_xlabel() == "expert"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert axes.get_ylabel() == "token"
    assert axes.figure.axes[1].get_ylabel() == "score"


def test_groups_are_separated_and_closed_ones_hatched() -> None:
    axes = plots.routing_map(SCORES, [[0], [2]], groups=2, closed=[[1], [0]])
    border, *_ = axes.get_lines()
    assert list(border.get_xdata()) == [2, 2]
    hatched = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
    corners = [(patch.get_x(), int(patch.get_y()), patch.get_width()) for patch in hatched]
    assert corners == [(2, 0, 2), (0, 1, 2)]
    assert [text.get_text() for text in axes.texts[-2:]] == ["device 0", "device 1"]


def test_rows_of_a_routing_map_may_be_named() -> None:
    axes = plots.routing_map(SCORES, [[0], [2]], names=["=", "5"])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["=", "5"]


def test_a_wide_network_and_its_pieces_are_drawn_to_one_scale() -> None:
    axes = plots.narrow_networks(hidden=64, pieces=3, piece=32)
    areas = [round(patch.get_width() * patch.get_height()) for patch in axes.patches]
    assert areas.count(64 * 32) == 2 * 3 * 3, "three matrices of three pieces, once together and once apart"
    assert sum(area for area in areas if area == 64 * 32) == 2 * 3 * 64 * 96
    assert [text.get_text() for text in axes.texts[-3:]] == ["=", "+", "+"]
    assert {"$\\odot$", "FFN($u$)"} < {text.get_text() for text in axes.texts}


def test_sorted_choices_keep_every_pair_and_lead_it_to_its_row() -> None:
    axes = plots.sorted_choices([[2, 0], [0, 1]], order=[1, 2, 3, 0], ends=[2, 3, 4, 4])
    boxes = {
        (round(text.get_position()[0], 2), int(text.get_position()[1])): text.get_text() for text in axes.texts[3:]
    }
    left = [boxes[2.2, row] for row in range(4)]
    right = [boxes[7.8, row] for row in range(5)]
    assert left == ["token 0: expert 2", "token 0: expert 0", "token 1: expert 0", "token 1: expert 1"]
    *full, empty = right
    assert full == ["expert 0: token 0", "expert 0: token 1", "expert 1: token 1", "expert 2: token 0"]
    assert empty == "expert 3: none"
    assert [boxes[0.25, row] for row in range(4)] == ["0", "1", "2", "3"]
    assert [boxes[9.75, row] for row in range(4)] == ["1", "2", "3", "0"], "the order"
    assert [boxes[10.6, row] for row in (1, 2, 3, 4)] == ["2", "3", "4", "4"], "the ends"
    lines = [tuple(int(y) for y in line.get_ydata()) for line in axes.get_lines()]
    assert lines == [(1, 0), (2, 1), (3, 2), (0, 3)]
