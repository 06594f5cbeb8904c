"""The figures of the chapter on keeping experts busy show the data they were given, with labels."""

from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from dsv2_ref import plots


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_load_over_steps_draws_the_busiest_and_the_idle_of_every_run_and_the_even_share() -> None:
    busiest = {"none": {0: 3.0, 25: 4.0}, "all three": {0: 2.0, 25: 1.2}}
    idle = {"none": {0: 1, 25: 21}, "all three": {0: 1, 25: 0}}
    above, below = plots.load_over_steps(busiest, idle)
    *runs, even = above.get_lines()
    for lines, curves in ((runs, busiest), (below.get_lines(), idle)):
        assert [dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines] == list(curves.values())
    assert [line.get_color() for line in runs] == [line.get_color() for line in below.get_lines()]
    assert set(even.get_ydata()) == {1}
    assert [text.get_text() for text in above.get_legend().get_texts()] == list(busiest)
    assert above.get_ylim()[0] == below.get_ylim()[0] == 0
    assert "step" in below.get_xlabel()
    assert "even share" in above.get_ylabel()
    assert "idle" in below.get_ylabel()


def test_load_maps_show_a_row_for_each_label_on_one_scale() -> None:
    panels = {"none": {"code": [0.0, 4.0], "sums": [2.0, 2.0]}, "expert loss": {"code": [1.0, 3.0]}}
    maps = plots.load_maps(panels)
    assert [axes.get_title(loc="left") for axes in maps] == list(panels)
    for axes, rows in zip(maps, panels.values(), strict=True):
        (image,) = axes.get_images()
        assert image.get_array().tolist() == list(rows.values())
        assert image.get_clim() == (0, 4)
        assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)
    assert maps[-1].get_xlabel() == "expert"
    assert maps[0].figure.axes[-1].get_ylabel() == "load over an even share"


def test_co_activation_hides_the_diagonal_and_parts_the_devices() -> None:
    axes = plots.co_activation(
        [[1.0, 2.0, 0.5, 0.5], [2.0, 1.0, 0.5, 0.5], [0.5, 0.5, 1.0, 3.0], [0.5, 0.5, 3.0, 1.0]], 2
    )
    shown = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
    assert np.isnan(np.diag(shown)).all()
    assert shown[0, 1] == 2.0
    assert shown[2, 3] == 3.0
    assert len(axes.get_lines()) == 2
    assert list(axes.get_xticks()) == [0, 2]
    assert "chance" in axes.figure.axes[-1].get_ylabel()
