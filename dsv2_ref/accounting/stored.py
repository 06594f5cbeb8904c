"""Bytes of weights as they are stored: in the dtype of a call or, quantised, as codes and scales.

What `dsv2_ref.quantize` makes of them: projections of attention, dense, shared and routed networks become codes, with one
scale per row (``int8``), per group of a row (``int4``) or per block of 128 x 128 weights, cut ones at the edges included
(``fp8``). Gates, norms, biases, embeddings and the head keep the dtype. Scales have it too, except that they are float32
for float16 and for ``fp8``.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping

from dsv2_ref.accounting.call import Call, Counts, require_call
from dsv2_ref.accounting.weights import NETWORK, Matrix, matrices, model_matrices
from dsv2_ref.checks import expert_blocks, width_in_groups
from dsv2_ref.config import DeepseekV2Config

QUANTIZED = re.compile(r"_proj(_with_mqa)?\.weight$")
FP8_BLOCK = 128


def bytes_of(name: str, shape: tuple[int, ...], call: Call) -> int:
    """Bytes of one weight of this name and shape.

    Raises:
        ValueError: for ``int4`` where the group does not divide the inputs, and for ``fp8`` where blocks would hold rows
            of two matrices of an expert.
    """
    elements = math.prod(shape)
    if call.weights is None or not QUANTIZED.search(name):
        return elements * call.itemsize
    outputs, inputs = shape
    if call.weights == "fp8":
        if re.search(r"\.\*\.(gate|up)_", name):
            expert_blocks(outputs, FP8_BLOCK)
        return elements + 4 * math.prod(-(-size // FP8_BLOCK) for size in shape)
    scale = 4 if call.dtype == "float16" else call.itemsize
    if call.weights == "int8":
        return elements + outputs * scale
    width_in_groups("experts" if ".*." in name else name.split(".")[-2], inputs, call.weights, call.group)
    return elements // 2 + elements // call.group * scale


def bytes_by_module(found: Mapping[str, Matrix], call: Call, active: bool = False) -> Counts:
    """Bytes of weights; those of one feed-forward network, or of all routed experts together, under one name."""
    require_call(call)
    counts: Counter[str] = Counter()
    for name, matrix in found.items():
        one = bytes_of(name, matrix.shape, call)
        number = one * matrix.active // math.prod(matrix.shape) if active else one * matrix.number
        counts[NETWORK.sub(r"\1", name)] += number
    return dict(counts)


def weight_bytes(config: DeepseekV2Config, layer_idx: int, call: Call, active: bool = False) -> Counts:
    """Bytes of a layer's weights by name, as `parameters` counts them.

    Args:
        active: only those that a token passes through.

    Raises:
        ValueError: for a layer that the model does not have, and weights that cannot be quantised so.
    """
    return bytes_by_module(matrices(config, layer_idx), call, active)


def model_weight_bytes(config: DeepseekV2Config, call: Call, active: bool = False) -> Counts:
    """`weight_bytes` of a whole model, those of all layers together (see `model_matrices`)."""
    return bytes_by_module(model_matrices(config), call, active)
