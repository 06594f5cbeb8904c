"""The figure of the chapter on counting shows the data it was given, with labels."""

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from dsv2_ref import plots


def test_shares_fill_a_bar_for_each_row_in_the_order_of_the_parts() -> None:
    axes = plots.shares({"stored": {"attention": 1.0, "experts": 3.0}, "active": {"attention": 98.0, "experts": 2.0}})
    attention, experts = axes.containers
    assert [bar.get_width() for bar in attention] == pytest.approx([25, 98])
    assert [bar.get_width() for bar in experts] == pytest.approx([75, 2])
    assert [bar.get_x() for bar in experts] == pytest.approx([25, 98])
    assert [text.get_text() for text in axes.texts] == ["25", "98", "75"]  # too narrow for a number: the last
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["attention", "experts"]
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bars in axes.containers for bar in bars}) == 2
    assert axes.yaxis_inverted()
    assert "%" in axes.get_xlabel()
    plt.close("all")
