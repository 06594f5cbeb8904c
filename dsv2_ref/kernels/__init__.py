"""Fused kernels for CUDA, each beside the plain PyTorch that defines it, in Triton.

The reference calls them by itself for CUDA tensors in float32, float16 and bfloat16 where Triton is installed and the
GPU is of the Ampere generation or newer; everywhere else the definitions run. `enabled` turns them off for a
comparison, and so does the environment variable ``DSV2_KERNELS=0``.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Shaped
from torch import Tensor

_installed = importlib.util.find_spec("triton") is not None
_enabled = os.environ.get("DSV2_KERNELS", "1") != "0"


@contextmanager
def enabled(on: bool = True) -> Iterator[None]:
    """Use the fused kernels inside the ``with`` block, or do not, whatever was said outside."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


def serve(*tensors: Shaped[Tensor, "..."]) -> bool:
    """Whether the kernels are to be used for these: on CUDA, all of one dtype that the kernels know, and not turned off.

    True of fake CUDA tensors as well, for which the operators only tell shapes.
    """
    if not (_enabled and _installed):
        return False
    known = tensors[0].dtype in (torch.float32, torch.float16, torch.bfloat16)
    return known and all(x.is_cuda and x.dtype == tensors[0].dtype for x in tensors)
