"""Refusing bad input: every error names the argument, the value given and the value wanted."""

from typing import Any

import torch
from torch import Tensor


def require(
    condition: bool, name: str, value: Any, wanted: str, *details: Any, error: type[Exception] = ValueError
) -> None:
    """Raise ``error`` naming the argument, what it was and what it should be, unless ``condition`` holds.

    A tensor is described by shape, dtype and device, a list or tuple by its length. ``details`` fill the braces of
    ``wanted``; nothing is formatted unless the error is raised, so that a check costs no time and a compiled layer
    keeps its sizes symbolic.
    """
    if not condition:
        raise error(f"{name} is {_describe(value)}; wanted {wanted.format(*details)}")


def require_tensor(value: object, name: str) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    require(isinstance(value, Tensor), name, value, "a tensor", error=TypeError)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, list | tuple) else repr(value)


def require_values(condition: Tensor, name: str, value: str, wanted: str) -> None:
    """`require` for a condition that depends on a tensor's values (a 0-d bool tensor).

    On the CPU it raises ValueError at once. On an accelerator, or while compiling, reading the condition would make
    the host wait for the device, so a device-side assertion with the same message is queued instead.
    """
    if condition.device.type == "meta":
        return
    message = f"{name} is {value}; wanted {wanted}"
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)
