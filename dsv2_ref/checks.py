"""Refusing bad input: every error names the argument, the value given and the value wanted."""

from typing import Any

import torch
from torch import Tensor


def require(
    condition: bool, name: str, value: Any, wanted: str, *details: Any, error: type[Exception] = ValueError
) -> None:
    """Raise ``error`` naming the argument, what it was and what it should be, unless ``condition`` holds.

    A tensor is described by shape, dtype and device. ``details`` fill the braces of ``wanted``; nothing is formatted
    unless the error is raised, so that a check costs no time and a compiled layer keeps its sizes symbolic.
    """
    if not condition:
        shown = f"{tuple(value.shape)} {value.dtype} on {value.device}" if isinstance(value, Tensor) else repr(value)
        raise error(f"{name} is {shown}; wanted {wanted.format(*details)}")


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
