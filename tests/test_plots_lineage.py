"""The figures of the chapter on later models show the data they were given, with labels."""

from collections.abc import Iterator

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.patches import FancyBboxPatch

from dsv2_ref import plots
from dsv2_ref.plots.lineage import CHANGED, INDEXER
from dsv2_ref.plots.mla import LATENT, ROPE
from dsv2_ref.plots.overview import SAME

ROWS = {"what is cached": "attention", "how many experts": "experts", "stream": "stream"}
MODELS = {
    "one": ["latent\nrope key", "160", "one"],
    "two": ["latent\nrope key", "256", "one"],
    "three": ["entry", "256", "four"],
}


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_boxes_are_coloured_where_a_model_differs_from_the_one_before() -> None:
    axes = plots.layer_changes(MODELS, ROWS)
    boxes = [patch for patch in axes.patches if type(patch) is FancyBboxPatch]
    assert [box.get_label() for box in boxes] == [text for texts in MODELS.values() for text in texts]
    same, attention, experts, stream = (to_rgba(SAME[0]), *(to_rgba(CHANGED[part][0]) for part in ROWS.values()))
    colours = [box.get_facecolor() for box in boxes]
    assert colours == [same, same, same, same, experts, same, attention, same, stream]


def test_boxes_hold_their_texts_and_do_not_overlap() -> None:
    axes = plots.layer_changes(MODELS, ROWS)
    axes.figure.canvas.draw()
    boxes = [patch for patch in axes.patches if type(patch) is FancyBboxPatch]
    frames = [box.get_window_extent() for box in boxes]
    for box, frame in zip(boxes, frames, strict=True):
        x, y = box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2
        (text,) = (text for text in axes.texts if text.get_position() == pytest.approx((x, y)))
        inside = text.get_window_extent()
        assert text.get_text() == box.get_label()
        assert frame.x0 < inside.x0 < inside.x1 < frame.x1
        assert frame.y0 < inside.y0 < inside.y1 < frame.y1
    assert not any(one.overlaps(other) for place, one in enumerate(frames) for other in frames[:place])
    labels = [text for text in axes.texts if text.get_text() in ROWS]
    assert len(labels) == len(ROWS)
    assert not any(label.get_window_extent().overlaps(frame) for label in labels for frame in frames)


def test_cached_bytes_are_bars_of_parts_from_the_top_with_their_sums() -> None:
    rows = {
        "one": {"latent or entry": 62_000, "rope key": 8_000},
        "two": {"latent or entry": 4_000, "indexer's key": 480.5},
    }
    axes = plots.cached_per_token(rows)
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths == {"latent or entry": [62_000, 4_000], "rope key": [8_000, 0], "indexer's key": [0, 480.5]}
    colours = [bars[0].get_facecolor()[:3] for bars in axes.containers]
    assert colours == [to_rgb(LATENT), to_rgb(ROPE), to_rgb(INDEXER)]
    assert [text.get_text() for text in axes.texts] == ["70,000", "4,480"]
    assert axes.yaxis_inverted()
    assert axes.get_xlabel()
    axes.figure.canvas.draw()
    assert all(text.get_window_extent().x1 <= axes.figure.get_window_extent().x1 for text in axes.texts)
