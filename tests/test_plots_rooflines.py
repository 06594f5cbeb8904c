"""The figures of the chapter on rooflines show the data they were given, with labels."""

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


def test_roofs_rise_with_the_bandwidth_and_end_at_the_peak() -> None:
    axes = plots.roofline({"fast": (1e15, 1e12), "slow": (1e12, 1e11)}, {"decode": 1.0, "prompt": 500.0})
    fast, slow, *marks = axes.get_lines()
    for line, peak, bandwidth in ((fast, 1e15, 1e12), (slow, 1e12, 1e11)):
        left, corner, right = line.get_xdata()
        assert corner == pytest.approx(peak / bandwidth)
        assert list(line.get_ydata()) == pytest.approx([left * bandwidth, peak, peak])
        assert right > corner
    assert [mark.get_xdata()[0] for mark in marks] == [1.0, 500.0]
    assert [text.get_text() for text in axes.texts] == ["decode", "prompt"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "byte" in axes.get_xlabel()
    assert "FLOP/s" in axes.get_ylabel()


def test_measured_operations_are_points_under_the_roof() -> None:
    axes = plots.roofline({"here": (1e11, 1e10)}, measured={"copy": (0.1, 5e8), "product": (100.0, 9e10)})
    _, *points = axes.get_lines()
    assert [(*point.get_xdata(), *point.get_ydata()) for point in points] == [(0.1, 5e8), (100.0, 9e10)]
    assert [text.get_text() for text in axes.texts] == ["copy", "product"]
    assert axes.get_xlim()[0] < 0.1
    assert axes.get_ylim()[0] < 5e8


def test_step_times_are_stacked_by_part() -> None:
    axes = plots.step_times(
        {
            "1": {"projections": 200.0, "routed experts": 800.0, "gate": 2.0, "head": 98.0},
            "8": {"projections": 25.0, "scores and values": 75.0, "routed experts": 600.0},
        }
    )
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == ["projections", "scores and values", "shared experts", "routed experts", "the rest"]
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[200, 25], [0, 75], [0, 0], [800, 600], [100, 0]]
    assert [text.get_text() for text in axes.texts] == ["1,100", "700"]
    assert "µs" in axes.get_xlabel()
