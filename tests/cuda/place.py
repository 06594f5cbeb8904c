"""Where this suite runs, what the GPU there can do, and whatever of the package's insides the suite calls.

It runs on the GPU, or with ``DSV2_TEST_DEVICE=cpu`` on the CPU, where only its own logic is tried: definitions then stand
for the kernels.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import silu

from dsv2_ref import DeepseekV2RMSNorm, ops
from dsv2_ref.attention import attend
from dsv2_ref.cache import LatentCache
from dsv2_ref.fast import products, triton
from dsv2_ref.fast.triton import operators
from dsv2_ref.masks import Visibility
from dsv2_ref.quantize import KINDS, quantize
from dsv2_ref.quantized import QuantizedWeight, quantized_product
from dsv2_ref.records import Record
from dsv2_ref.rope import rotate_interleaved

__all__ = ["KINDS", "LatentCache", "Record", "ops", "quantize", "rotate_interleaved"]

DEVICE = os.environ.get("DSV2_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
GPU_FOUND = ON_GPU and torch.cuda.is_available()
MAJOR, MINOR = torch.cuda.get_device_capability() if GPU_FOUND else (0, 0)

FUSED = GPU_FOUND and not triton.cannot_run(torch.device(DEVICE))
"""Whether the package uses its fused kernels on this GPU."""

KERNELS = "triton"
"""What the names of their ways begin with, for `ops.without`."""

OLD = GPU_FOUND and MAJOR < 8
"""A GPU older than Ampere, such as a T4: without tensor cores for bfloat16, fused kernels and flash-attn."""

HALF = torch.float16 if OLD else torch.bfloat16


def add_rms_norm_definition(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + update
    return total, functional_call(DeepseekV2RMSNorm(len(weight), eps), {"weight": weight}, total)


def mla_decode_definition(
    query: Tensor, tokens: Tensor, latent: int, scale: float, padding: Tensor | None = None
) -> Tensor:
    visible = Visibility(query.shape[2], tokens.shape[1], query.device, padding)
    keys = tokens[:, None]
    with ops.plain():
        return attend(query, keys, keys[..., :latent], visible, scale)[0]


def grouped_product_definition(rows: Tensor, weights: Tensor, group_ends: Tensor) -> Tensor:
    ends = group_ends.tolist()
    groups = zip([0, *ends], ends, strict=False)
    return torch.cat([rows[start:end] @ weight.T for (start, end), weight in zip(groups, weights, strict=True)])


def mla_decode_records_definition(
    query: Tensor, records: Tensor, format: str, latent: int, scale: float, padding: Tensor | None = None
) -> Tensor:
    tokens = Record(format, latent, query.shape[-1] - latent, query.dtype).decode(records)
    return mla_decode_definition(query, tokens, latent, scale, padding)


def quantised(kind: str, *shape: int, dtype: torch.dtype) -> QuantizedWeight:
    """Normal weights in few bits, on the CPU."""
    weight = QuantizedWeight(kind, shape, 64, dtype, torch.device("cpu"))
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for place in range(len(dense)) if dense.ndim == 3 else (...,):
        weight.fill(dense[place], place)
    return weight


def by_codes(rows: Tensor, weight: QuantizedWeight, group_ends: Tensor | None = None) -> Tensor:
    """The product by the kernel, or by its definition."""
    if ON_GPU:
        return operators.quantized_product(rows, weight.codes, weight.scales, weight.group, group_ends)
    if group_ends is None:
        return quantized_product(rows, weight)
    return grouped_product_definition(rows, weight.dense(), group_ends)


def experts_definition(x: Tensor, gate_up: Tensor, down: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
    out = []
    for token, chosen, weights in zip(x, topk_idx, topk_weight, strict=True):
        gate, up = (gate_up[chosen] @ token).chunk(2, dim=-1)
        out.append(weights.to(x.dtype) @ torch.einsum("khw,kw->kh", down[chosen], silu(gate) * up))
    return torch.stack(out)


def routed_experts(x: Tensor, stacks: list[QuantizedWeight | Tensor], topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
    """By the kernels, of weights as they are or by codes, or by the definition."""
    first, second = stacks
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        kernel: Any = operators.routed_experts
    else:
        kernel = operators.quantized_experts
    if ON_GPU:
        out: Tensor = kernel(x, first, second, topk_idx, topk_weight)
        return out
    dense = (stack if isinstance(stack, Tensor) else stack.dense() for stack in stacks)
    return experts_definition(x, *dense, topk_idx, topk_weight)


grouped_product = products._grouped_product
add_rms_norm = operators.add_rms_norm if ON_GPU else add_rms_norm_definition
mla_decode = operators.mla_decode if ON_GPU else mla_decode_definition
mla_decode_records = operators.mla_decode_records if ON_GPU else mla_decode_records_definition
rotate = operators.rotate if ON_GPU else rotate_interleaved

device_needed = pytest.mark.skipif(ON_GPU and not GPU_FOUND, reason="no CUDA device")
gpu_only = pytest.mark.skipif(not GPU_FOUND, reason="only a GPU can tell")
no_bfloat16 = pytest.mark.skipif(
    OLD, reason=f"bfloat16 needs compute capability 8.0, this GPU has {MAJOR}.{MINOR}: float16 stands for it"
)
every_dtype = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16", marks=no_bfloat16),
    ],
)


half_only = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16", marks=no_bfloat16)]
)


NOT_FUSED = "the package uses no fused kernels here: they need Triton, a C compiler and compute capability 8.0"
fused_only = pytest.mark.skipif(GPU_FOUND and not FUSED, reason=NOT_FUSED)
