"""What the machine at hand can do, and how it is timed."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Samples = dict[str, list[float]]


def once(work: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of one call, as the mean of ``repeats`` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def in_turn(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> Samples:
    """Seconds of every contestant in every round; a round runs all of them, so that a slow moment meets all alike.

    Quick work is repeated until a sample takes about 50 ms. The first call of each is not counted.
    """
    repeats = {}
    for name, work in contestants.items():
        work()
        repeats[name] = max(1, min(50, round(0.05 / once(work))))
    samples: Samples = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            samples[name].append(once(work, repeats[name]))
    return samples


def median(seconds: list[float]) -> float:
    """The middle one."""
    return statistics.median(seconds)


def read_bandwidth() -> float:
    """Bytes a second at which numbers arrive from memory: half a gigabyte summed."""
    numbers = torch.ones(2**27)
    return numbers.numel() * numbers.element_size() / median(in_turn({"sum": numbers.sum}, rounds=7)["sum"])


def product_rate(dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product, a multiply-add counted as two."""
    size = 2048
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / median(in_turn({"mm": lambda: left @ right}, rounds=7)["mm"])
