"""nbval compares what a notebook prints, but no images. Here the figures are compared as well, so that none goes stale."""

import base64
import importlib.util
import io
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.font_manager  # noqa: F401  # the first import ever writes a cache and says so: not in a notebook's output
import numpy as np
import pytest
from nbval.plugin import IPyNbCell, NbCellError
from PIL import Image

# Triton is published for Linux alone.
collect_ignore = [] if importlib.util.find_spec("triton") else ["kernels.ipynb"]

# Another CPU may round a point of a curve to the other side of a pixel's edge. Then a few pixels of its smoothed border
# change, each by a part of the distance between ink and ground. A letter or a curve that moves changes hundreds.
CLEARLY_DIFFERENT = 64  # of the 255 steps of a colour
PIXELS_ALLOWED = 20


def pngs(outputs: Sequence[Any]) -> list[np.ndarray]:
    """The figures among a cell's outputs, decoded, so that compression and metadata do not count."""
    encoded = [
        output["data"]["image/png"]
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    images = [Image.open(io.BytesIO(base64.b64decode(png))) for png in encoded]
    return [np.asarray(image.convert("RGBA"), dtype=int) for image in images]


def difference(
    stored: Sequence[np.ndarray], fresh: Sequence[np.ndarray]
) -> str | None:
    """What sets the stored figures apart from fresh ones, or None."""
    if len(stored) != len(fresh):
        return f"{len(stored)} figures are stored, the cell draws {len(fresh)}"
    for old, new in zip(stored, fresh, strict=True):
        if old.shape != new.shape:
            return f"a stored figure has shape {old.shape}, a fresh one {new.shape}"
        pixels = int((abs(old - new) > CLEARLY_DIFFERENT).any(axis=-1).sum())
        if pixels > PIXELS_ALLOWED:
            return f"{pixels} pixels of a stored figure differ clearly from a fresh one"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """After nbval has run a cell and compared its text, compare its figures, as pixels alone."""
    for output in item.cell.outputs if isinstance(item, IPyNbCell) else []:
        output.get("data", {}).pop("image/svg+xml", None)
    yield
    if isinstance(item, IPyNbCell) and item.options["check"]:
        found = difference(pngs(item.cell.outputs), pngs(item.test_outputs))
        if found:
            raise NbCellError(
                item.cell_num,
                f"Stale figure: {found}. Run: make notebooks",
                item.cell.source,
            )
