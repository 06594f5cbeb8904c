"""The figures of the chapter on counting show the data they were given, with labels."""

from collections.abc import Iterator

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from dsv2_ref import plots


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_shares_fill_a_bar_for_each_row() -> None:
    axes = plots.shares(
        {
            "stored": {"routed experts": 3.0, "projections": 1.0},
            "used": {"projections": 98.0, "scores and values": 1.0, "routed experts": 1.0},
        }
    )
    attention, scores, experts = axes.containers
    assert [bar.get_width() for bar in attention] == pytest.approx([25, 98])
    assert [bar.get_width() for bar in scores] == pytest.approx([0, 1])
    assert [bar.get_x() for bar in experts] == pytest.approx([25, 99])
    assert [text.get_text() for text in axes.texts] == ["25", "98", "75"]  # too narrow for a number: the last
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == ["projections", "scores and values", "routed experts"]
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bars in axes.containers for bar in bars}) == 3
    assert axes.yaxis_inverted()
    assert "%" in axes.get_xlabel()


def test_weights_are_drawn_to_scale_and_what_a_token_uses_is_filled() -> None:
    axes = plots.weights_to_scale(attention=[(40, 30), (10, 80)], expert=(40, 12), routed=16, used=3, shared=2)
    areas = [patch.get_width() * patch.get_height() for patch in axes.patches]
    assert areas[:2] == [40 * 30, 10 * 80]
    assert areas[2:] == [40 * 12] * 3 * (16 + 2)
    white = [patch.get_facecolor()[:3] == (1, 1, 1) for patch in axes.patches]
    assert sum(white) == 3 * (16 - 3)
    boxes = [(patch.get_x(), patch.get_y()) for patch in axes.patches]
    assert len(set(boxes)) == len(boxes)
    assert axes.get_aspect() == 1
    texts = " ".join(text.get_text() for text in axes.texts)
    assert "2 shared experts" in texts
    assert "one token uses 3" in texts
