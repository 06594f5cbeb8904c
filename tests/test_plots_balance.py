"""The figures of the chapter on keeping experts busy show the data they were given, with labels."""

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


def test_load_over_steps_draws_the_busiest_and_the_idle_of_every_run_and_the_even_share() -> None:
    busiest = {"none": {0: 3.0, 25: 4.0}, "all three": {0: 2.0, 25: 1.2}}
    idle = {"none": {0: 1, 25: 21}, "all three": {0: 1, 25: 0}}
    above, below = plots.load_over_steps(busiest, idle)
    *runs, even = above.get_lines()
    for lines, curves in ((runs, busiest), (below.get_lines(), idle)):
        assert [dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines] == list(curves.values())
    assert [line.get_color() for line in runs] == [line.get_color() for line in below.get_lines()]
    assert set(even.get_ydata()) == {1}
    assert even.get_color() not in {line.get_color() for line in runs}
    assert [text.get_text() for text in above.get_legend().get_texts()] == [*busiest, "even share"]
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


def test_loads_are_sorted_beside_an_even_share() -> None:
    axes = plots.expert_loads({"gate": [1, 5, 0], "chance": [2, 2, 2]})
    gate, chance, even = axes.get_lines()
    assert list(gate.get_xdata()) == [1, 2, 3]
    assert list(gate.get_ydata()) == [5, 1, 0]
    assert list(chance.get_ydata()) == [2, 2, 2]
    assert list(even.get_ydata()) == [2, 2]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["gate", "chance", "even share"]
    assert axes.get_ylim()[0] == 0


def test_three_counts_box_and_count_the_same_dots_three_ways() -> None:
    panels = plots.three_counts([[0, 1], [0, 3]], experts=4, devices=2)
    dots = [
        {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines() if line.get_marker() == "o"}
        for axes in panels
    ]
    assert dots == 3 * [{(0.5, 0.5), (1.5, 0.5), (0.5, 1.5), (3.5, 1.5)}]
    assert [len(axes.patches) for axes in panels] == [4, 2, 3]
    below = [[text.get_text() for text in axes.texts if text.get_fontsize() == 15] for axes in panels]
    assert below == [["2", "1", "0", "1"], ["3", "1"], ["2", "1"]]
    for axes, counted in zip(panels, ("each expert", "each device", "sent to each device"), strict=True):
        assert axes.get_title(loc="left").endswith(counted)
    assert [text.get_text() for text in panels[-1].texts[-4:]] == [f"expert {expert}" for expert in range(4)]


def test_load_over_steps_takes_four_runs_and_says_so_of_a_fifth() -> None:
    curves = {f"run {number}": {0: 2.0, 25: 1.0} for number in range(5)}
    four = dict(list(curves.items())[:4])
    above, _ = plots.load_over_steps(four, four)
    assert len({(line.get_color(), line.get_linestyle()) for line in above.get_lines()}) == len(four) + 1
    with pytest.raises(ValueError, match="5 curves; wanted at most 4"):
        plots.load_over_steps(curves, curves)


def test_load_maps_compare_kinds_with_all_of_them_together() -> None:
    rows = {"code": [2.0, 0.0], "sums": [0.0, 2.0], "together": [1.0, 1.0]}
    maps = plots.load_maps({"expert loss": rows, "bias": rows})
    for axes in maps:
        (image,) = axes.get_images()
        code, _, together = image.cmap(image.norm(image.get_array()))
        assert together[0].tolist() == together[1].tolist()
        assert together[0].tolist() == pytest.approx([1, 1, 1, 1], abs=0.05), "an even share is white"
        assert code[0][0] > code[0][2], "above it is red"
        assert code[1][2] > code[1][0], "below it is blue"
