"""What one H100 took, by ``make bench-cuda`` and by a sweep over the tiles of the decoding kernel."""

import json
from pathlib import Path
from typing import Any


def h100() -> dict[str, Any]:
    """The figures of ``book/data/h100.json``.

    ``rows`` are those of ``bench.cuda``. ``decoding_us``: microseconds of attention to the latent cache in bfloat16, by
    plain products, by narrow blocks of 16 queries and by wide ones of 64, each with the number of shares that was
    fastest. ``whole_v2_lite``: a model with random weights, timed before SwiGLU had a kernel of its own.
    """
    found: dict[str, Any] = json.loads((Path(__file__).parents[1] / "book" / "data" / "h100.json").read_text())
    return found
