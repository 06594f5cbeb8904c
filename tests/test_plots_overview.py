"""The figures of the first chapter show the structure and the counts they were given."""

from collections.abc import Iterator
from math import sqrt

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyBboxPatch, Rectangle

from dsv2_ref import plots
from dsv2_ref.plots.overview import CACHED, EXPERT, LATENT, MADE, ORANGE, SAME

SHARED = "shared\nexperts"
LOOKS = (SAME, LATENT, CACHED, MADE, EXPERT)


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def boxes(axes: Axes) -> list[tuple[str, FancyBboxPatch]]:
    """The boxes, the smaller first, each with the name inside it; a name may be there twice."""
    drawn: list[tuple[str, FancyBboxPatch]] = []
    named = set()
    found = [patch for patch in axes.patches if type(patch) is FancyBboxPatch]
    for box in sorted(found, key=lambda box: box.get_width() * box.get_height()):
        for text in axes.texts:
            x, y = text.get_position()
            across = box.get_x() < x < box.get_x() + box.get_width()
            if text.get_text() and text not in named and across and 0 < y - box.get_y() < box.get_height():
                named.add(text)
                drawn.append((text.get_text(), box))
    return drawn


def arrows(axes: Axes) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Start and tip of each arrow."""
    return [(text.get_position(), text.xy) for text in axes.texts if text.get_text() == ""]


def test_what_v2_changed_is_coloured_and_what_llama_has_too_is_grey() -> None:
    drawn = boxes(plots.two_layers())
    by_look = {look: [name for name, box in drawn if box.get_facecolor() == to_rgba(look[0])] for look in LOOKS}
    assert by_look[LATENT] == ["latent attention (MLA)"]
    assert sorted(by_look[CACHED]) == ["cached latent", "cached rope key"]
    assert by_look[MADE] == ["keys and\nvalues of\nall heads"]
    assert sorted(by_look[EXPERT]) == ["gate", "routed\nexperts", SHARED, "weighted sum"]
    assert sorted(by_look[SAME]) == ["MLP", *["RMSNorm"] * 4, "attention\ncaches keys\nand values"]
    assert len(drawn) == sum(map(len, by_look.values()))


def test_every_name_fits_into_its_box() -> None:
    axes = plots.two_layers()
    axes.figure.canvas.draw()
    for name, box in boxes(axes):
        widths = [text.get_window_extent().width for text in axes.texts if text.get_text() == name]
        assert max(widths) < box.get_window_extent().width, name


def test_the_gate_and_the_experts_that_it_chooses_lead_to_the_sum_and_the_shared_bypass_it() -> None:
    axes = plots.two_layers()
    drawn = dict(boxes(axes))
    gate, shared, sum_ = drawn["gate"], drawn[SHARED], drawn["weighted sum"]
    into_sum = [
        start
        for start, (x, y) in arrows(axes)
        if sum_.get_x() < x < sum_.get_x() + sum_.get_width() and abs(y - sum_.get_y() - sum_.get_height()) < 0.05
    ]
    experts = [patch for patch in axes.patches if type(patch) is Rectangle]
    chosen = [expert for expert in experts if expert.get_facecolor() == to_rgba(ORANGE)]
    assert (len(experts), len(chosen)) == (4, 2)
    middles = [box.get_x() + box.get_width() / 2 for box in (gate, *chosen)]
    assert sorted(x for x, _ in into_sum) == pytest.approx(middles)
    assert all(x < shared.get_x() for x, _ in into_sum)


def test_each_branch_is_added_to_its_stream() -> None:
    axes = plots.two_layers()
    sums = [text.get_position() for text in axes.texts if text.get_text() == "+"]
    streams = {text.xy[0] for text in axes.texts if text.get_text() == "" and text.arrow_patch.get_linewidth() > 3}
    assert len(streams) == 2
    for stream in streams:
        assert sum(x == stream for x, _ in sums) == 2
    assert len(sums) == 5  # and that of the experts


def test_attention_by_hand_draws_weights_to_scale_and_hides_the_future() -> None:
    axes = plots.attention_by_hand(["a", "b", "c"], ["ln 1", "ln 3"], [0.25, 0.75], [4, 8], 7)
    bars = [patch.get_height() for patch in axes.patches if type(patch) is Rectangle]
    assert bars == [0.25, 0.75]
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("hidden") == 1
    assert "7 = 0.25 · 4 + 0.75 · 8" in texts


def test_heads_have_a_cell_for_each_byte_and_write_their_largest_weight() -> None:
    axes = plots.what_heads_read("1+\n", {"one": [0.1, 0.7, 0.2], "two": [0.9, 0.1, 0.0]})
    shades = [patch.get_alpha() for patch in axes.patches if patch.get_fill()]
    assert shades == [0.1, 0.7, 0.2, 0.9, 0.1, 0.0]
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [(".70", (1, 0)), (".90", (0, 1))]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "+", "⏎"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]


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


def test_areas_are_weights_stored_and_used() -> None:
    counts = {
        "small": (9_000_000, {"attention": 3_000_000, "rest": 6_000_000}),
        "large": (100_000_000, {"attention": 4_000_000, "rest": 12_000_000}),
    }
    axes = plots.stored_and_used(counts)
    assert axes.get_aspect() == 1
    areas = [patch.get_width() * patch.get_height() for patch in axes.patches if type(patch) is Rectangle]
    assert areas == pytest.approx([9e6, 3e6, 6e6, 100e6, 4e6, 12e6])
    assert axes.patches[3].get_width() == pytest.approx(sqrt(100e6))
    assert [text.get_text() for text in axes.texts] == ["small\nstored 9\nused 9", "large\nstored 100\nused 16"]
