"""What the chapters need around the layer, so that a page shows the layer and not its harness."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dsv2_ref.plots.source import show

__all__ = [
    "Peak",
    "build",
    "device",
    "equal",
    "error",
    "milliseconds",
    "normal",
    "show",
]

# Stored outputs must not depend on the order in which threads add.
torch.set_num_threads(1)
device = "cuda" if torch.cuda.is_available() else "cpu"


def normal(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "..."]:
    """Normal random values of this shape, drawn on the CPU so that every device sees the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(
        device, dtype
    )


def build(
    kind: Callable[..., nn.Module],
    *args: Any,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """``kind(*args, **kwargs)`` with random weights, the same on every device, ready for inference."""
    torch.manual_seed(seed)
    return kind(*args, **kwargs).to(device, dtype).eval().requires_grad_(False)


def error(actual: Float[Tensor, "..."], expected: Float[Tensor, "..."]) -> float:
    """Size of the difference over the size of what is expected."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def equal(
    actual: Float[Tensor, "..."], expected: Float[Tensor, "..."], digits: int = 9
) -> bool:
    """Whether two results agree to so many digits, measured over all of their elements."""
    return actual.shape == expected.shape and error(actual, expected) < 10.0**-digits


def milliseconds(
    calls: Mapping[str, Callable[[], Any]], repeats: int = 7
) -> dict[str, float]:
    """The fastest of some runs of each call, made in turn so that all meet the same noise."""
    fastest = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            fastest[name] = min(fastest[name], 1e3 * (time.perf_counter() - start))
    return fastest


class Peak(TorchDispatchMode):
    """The most bytes that were alive together inside the ``with`` block, beyond those of the inputs."""

    def __init__(self, *inputs: Shaped[Tensor, "..."]) -> None:
        super().__init__()
        self.inputs = {StorageWeakRef(x.untyped_storage()) for x in inputs}
        self.alive: dict[StorageWeakRef, int] = {}
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            held = StorageWeakRef(out.untyped_storage())
            if held not in self.inputs:  # a view of them holds nothing more
                self.alive[held] = out.untyped_storage().nbytes()
        self.alive = {
            storage: size
            for storage, size in self.alive.items()
            if not storage.expired()
        }
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return out
