"""Triton where it is installed, and stand-ins by which the kernels' modules can be imported and read without it."""

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=int)

__all__ = ["jit", "power_of_two", "tl"]


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``triton.jit``, with its options; the function itself without Triton.

    Triton compiles a function's source and looks names up in its module, so wrappers around it are taken off.
    """
    if function is None:
        return partial(jit, **options)
    return function if triton is None else triton.jit(inspect.unwrap(function), **options)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``: the only sizes that Triton's blocks have."""
    return 1 << max(0, size - 1).bit_length()
