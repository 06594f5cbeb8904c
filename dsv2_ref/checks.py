"""Refusing bad input: every error names the argument, the value given and the value wanted."""

from typing import Any

import torch
from torch import Tensor


def require(condition: bool, name: str, value: Any, wanted: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` naming the argument, what it was and what it should be, unless ``condition`` holds."""
    if not condition:
        raise error(f"{name} is {value!r}; wanted {wanted}")


def require_values(condition: Tensor, name: str, value: str, wanted: str) -> None:
    """`require` for a condition that depends on a tensor's values (a 0-d bool tensor).

    On the CPU it raises ValueError at once. On an accelerator, or while compiling, reading the condition would make
    the host wait for the device, so a device-side assertion with the same message is queued instead.
    """
    if condition.device.type == "meta":
        return
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool(condition), name, value, wanted)
    else:
        torch._assert_async(condition, f"{name} is {value}; wanted {wanted}")
