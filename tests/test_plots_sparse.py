"""The figures of the chapter on forgetting and choosing show the data they were given, with labels."""

from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb

from dsv2_ref import plots
from dsv2_ref.plots.lineage import INDEXER
from dsv2_ref.plots.mla import LATENT
from dsv2_ref.plots.sparse import HIDDEN

WEIGHTS = [[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.25, 0.25]]
ALL = [[True] * 3] * 3
FIRST = [[True, False, False]] * 3


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_what_policies_hide_is_grey_and_the_rest_is_the_attention() -> None:
    first = plots.hidden_by(WEIGHTS, {"all": ALL, "first": FIRST, "third": ALL}, "a\nc", query=2)
    panels = [axes for axes in first.figure.axes if axes.axison]
    assert [axes.get_title() for axes in panels] == ["all", "first", "third"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["a", "⏎", "c"]
    assert (first.get_xlabel(), first.get_ylabel()) == ("key", "query")
    seen, hidden = (np.ma.filled(image.get_array(), np.nan) for image in panels[1].images)
    past = np.tri(3, dtype=bool)
    assert np.array_equal(~np.isnan(seen), past & np.array(FIRST))
    assert np.allclose(seen[past & np.array(FIRST)] ** 2, [1, 0.25, 0.5])
    assert np.array_equal(~np.isnan(hidden), past & ~np.array(FIRST))
    assert panels[1].images[1].cmap(0.5)[:3] == to_rgb(HIDDEN)
    assert np.isnan(np.ma.filled(panels[0].images[1].get_array(), np.nan)).all()
    for axes in panels:
        (frame,) = axes.patches
        assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((-0.5, 1.5), 3, 1)


def test_lost_bits_are_curves_over_budgets() -> None:
    lost = {"window": [0.3, 0.07, 0.01], "indexer": [0.2, 0.1, 0.02]}
    axes = plots.lost_by_budget([4, 8, 32], lost)
    assert {line.get_label(): line.get_ydata().tolist() for line in axes.lines} == lost
    assert all(line.get_xdata().tolist() == [4, 8, 32] for line in axes.lines)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "8", "32"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.01", "0.02", "0.05", "0.1", "0.2"]
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_kept_and_read_are_bars_from_the_top_with_their_sums() -> None:
    rows = {"all, kept": {"latent and rope key": 80}, "V3.2, read": {"latent and rope key": 1.5, "indexer's key": 17}}
    axes = plots.kept_and_read(rows)
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths == {"latent and rope key": [80, 1.5], "indexer's key": [0, 17]}
    assert [bars[0].get_facecolor()[:3] for bars in axes.containers] == [to_rgb(LATENT), to_rgb(INDEXER)]
    assert [text.get_text() for text in axes.texts] == ["80.0", "18.5"]
    assert axes.yaxis_inverted()
    axes.figure.canvas.draw()
    assert all(text.get_window_extent().x1 <= axes.figure.get_window_extent().x1 for text in axes.texts)
