"""Fused kernels for CUDA, each beside the plain PyTorch that defines it, in Triton.

The reference calls them by itself for CUDA tensors in float32, float16 and bfloat16 where Triton is installed and the
GPU is NVIDIA's, of the Ampere generation or newer; everywhere else it goes on as on a CPU. `enabled` turns them off for
a comparison, and so does the environment variable ``DSV2_KERNELS=0``.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Shaped
from torch import Tensor

# AMD's GPUs are "cuda" as well.
_installed = importlib.util.find_spec("triton") is not None and torch.version.hip is None
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _from_ampere_on(device: torch.device) -> bool:
    """A compiled step asks once and not in its graph."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def serve(*tensors: Shaped[Tensor, "..."]) -> bool:
    """Whether the kernels are to be used for these: on one GPU they were made for, all of one dtype that they know.

    True of fake CUDA tensors as well, for which the operators only tell shapes. False where they are turned off.
    """
    if not (_enabled and _installed):
        return False
    dtype, device = tensors[0].dtype, tensors[0].device
    known = dtype in (torch.float32, torch.float16, torch.bfloat16)
    alike = device.type == "cuda" and all(x.device == device and x.dtype == dtype for x in tensors)
    return known and alike and _from_ampere_on(device)
