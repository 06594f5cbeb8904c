"""Whether Triton's kernels can run here, and which tensors they take."""

import importlib.util
import os
import warnings
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from dsv2_ref import ops
from dsv2_ref.fast.triton.plan import INTERPRETED

HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = "cpu" if INTERPRETED else "cuda"  # whose tensors the kernels serve


@cache
def cannot_compile() -> str:
    """Why Triton cannot make kernels on this machine; an empty string if it can.

    Triton builds a small C library at its first launch, for which it needs a C compiler and Python's headers. This is
    tried once; where it fails, one warning says what is missing.
    """
    if os.environ.get("DSV2_KERNELS", "1") == "0":
        return "DSV2_KERNELS is 0"
    if torch.version.hip is not None:
        return "not for AMD GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if INTERPRETED or not torch.cuda.is_available():
        return ""  # no machine code; of fake CUDA tensors operators only tell shapes
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        first, *_ = f"{error}".strip().splitlines() or [type(error).__name__]
        needed = "it needs a C compiler and Python's headers (Debian: gcc python3-dev)"
        message = f"Triton cannot compile here, so plain PyTorch is used; {needed}: {first}"
        warnings.warn(message, stacklevel=2)
        return "Triton cannot compile here"
    return ""


@ops.once_when_compiling
def cannot_run(device: torch.device) -> str:
    """Why kernels cannot run on this GPU; an empty string if they can. A compiled step asks once and not in its graph."""
    reason = cannot_compile()
    if not reason and not INTERPRETED and torch.cuda.is_available():
        gpu = None if device.type == "meta" else device  # as `watch` pretends
        older = torch.cuda.get_device_capability(gpu) < (8, 0)
        reason = "for Ampere GPUs and newer" if older else ""
    return reason


def alike(*tensors: Float[Tensor, "..."]) -> str:
    """Why a kernel cannot take these together: they must share a dtype and a GPU."""
    first = tensors[0]
    if any(x.dtype != first.dtype or x.device != first.device for x in tensors):
        return "not all of one dtype on one GPU"
    return cannot_run(first.device)
