"""What a GPU can do, and how its work is timed."""

import subprocess
from collections.abc import Callable
from typing import Any

import torch

from bench.machine import median
from bench.machine import once as called

Clock = Callable[[Callable[[], Any]], float]

FLUSHED_BYTES = 2**28
"""Written before each sample, so that nothing is found in the second-level cache: more than any GPU has there."""

AHEAD_CYCLES = 20_000_000
"""For so many cycles (some 10 ms) the GPU waits before each sample, so that Python is done queueing when it begins.

Work that takes longer to queue, or that makes the host wait on its way, is timed with Python in it."""


class GpuClock:
    """Seconds that the GPU works on a call: from an empty cache, and without waiting for Python."""

    def __init__(self) -> None:
        self._scratch = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, work: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._scratch.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def from_python(work: Callable[[], Any]) -> float:
    """Seconds from calling to having the result, what Python and the launches take included."""

    def whole() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return called(whole)


def samples(work: Callable[[], Any], clock: Clock, rounds: int) -> float:
    """The median of ``rounds`` samples, after two that do not count."""
    return median([clock(work) for _ in range(rounds + 2)][2:])


def product_rate(dtype: torch.dtype, clock: Clock, size: int = 8192) -> float:
    """FLOPs a second of a large square matrix product."""
    left, right = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / samples(lambda: left @ right, clock, rounds=7)


def bandwidth(clock: Clock, nbytes: int = 2**30) -> float:
    """Bytes a second of a large copy, each read once and written once."""
    source = torch.zeros(nbytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * nbytes / samples(lambda: target.copy_(source), clock, rounds=7)


def driver() -> str | None:
    """The version of NVIDIA's driver, where ``nvidia-smi`` says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None
