"""Published ``config.json`` files, transcribed, and what those of the family have as parameters.

``native_*`` is what transformers 5.23.0 writes for the defaults of a class; the others are files beside published
weights. Totals count the decoder with embedding and head, without the correction biases of the gates, vision, and
further prediction layers. They are those of the tensors in the published checkpoints, where these have been counted
(V2-Lite, OCR), of the papers to their last digit given, and of the model's own code.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _text() -> str:
    return (Path(__file__).parent / "data" / "published_configs.json").read_text(encoding="utf-8")


def configs() -> dict[str, dict[str, Any]]:
    """The files, by name: new objects at each call, as transformers writes into those that it is given."""
    read: dict[str, dict[str, Any]] = json.loads(_text())
    return read


TOTALS = {
    "v2": 235_741_434_880,
    "v2_5": 235_741_434_880,
    "v2_lite": 15_706_484_224,
    "v2_lite_transformers5": 15_706_484_224,
    "ocr": 2_934_734_080,
    "vl2_tiny": 2_934_734_080,
    "vl2_small": 15_816_584_704,
    "vl2": 27_033_546_240,
    "deepseek_moe_16b": 16_375_728_128,
    "native_youtu": 1_961_560_064,
    "v3": 671_026_404_352,
    "moonlight": 15_960_108_544,
    "kimi_k2": 1_026_408_209_408,
    "kimi_k2_5": 1_026_408_209_408,
    "glm_4_7_flash": 29_943_390_976,
}
BIASES = {"v3": 14_848, "moonlight": 1_664, "kimi_k2": 23_040}
OTHERS = {
    "glm_5_1": "glm_moe_dsa",
    "kimi_linear": "kimi_linear",
    "llama": "llama",
    "longcat_flash": "longcat_flash",
    "native_bailing_hybrid": "bailing_hybrid",
    "native_deepseek_v4": "deepseek_v4",
    "native_deepseek_vl": "deepseek_vl",
    "native_glm_moe_dsa": "glm_moe_dsa",
    "native_kimi_linear": "kimi_linear",
    "native_minicpm3": "minicpm3",
    "native_mistral4": "mistral4",
    "native_mixtral": "mixtral",
    "native_qwen3_moe": "qwen3_moe",
    "v3_2": "deepseek_v32",
}
"""Models of other kinds, and the ``model_type`` by which they are refused."""
