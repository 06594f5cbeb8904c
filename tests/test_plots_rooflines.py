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


def test_intensity_over_batch_draws_every_part_and_every_machine() -> None:
    curves = {"experts": {1: 1.0, 8: 2.0}, "attention": {1: 240.0, 8: 240.0}}
    axes = plots.intensity_over_batch(curves, {"H100": 295.0, "laptop": 9.0})
    experts, attention, balance, slower = axes.get_lines()
    assert dict(zip(experts.get_xdata(), experts.get_ydata(), strict=True)) == curves["experts"]
    assert dict(zip(attention.get_xdata(), attention.get_ydata(), strict=True)) == curves["attention"]
    assert set(balance.get_ydata()) == {295.0}
    assert set(slower.get_ydata()) == {9.0}
    fast, slow = axes.texts
    assert (fast.get_text(), slow.get_text()) == ("H100", "laptop")
    assert fast.get_position()[1] > 295.0
    assert slow.get_position()[1] < 9.0
    assert list(axes.get_xticks()) == [1, 8]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["experts", "attention"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
