"""What the processor here can do, by which ways for the CPU are chosen."""

import functools

import torch


def has_amx() -> bool:
    """Whether the processor multiplies tiles (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


@functools.cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 numbers, and torch's products do."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
