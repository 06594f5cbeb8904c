"""The checker of signatures that the tests switch on."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype`, which can read ``Self`` only where it is given the whole class."""
    hints = function.__annotations__
    function.__annotations__ = {name: Any if "typing.Self" in str(hint) else hint for name, hint in hints.items()}
    return beartype(function)
