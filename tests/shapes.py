"""The checker of signatures that the tests switch on for the whole package."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from beartype import beartype

_checking = True


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype` for the functions whose signatures hold shapes, while `unchecked` is not in force.

    The other signatures are left to the static checker. beartype can read ``Self`` only where it is given the whole
    class, so it stands for anything here.
    """
    hints = function.__annotations__
    if "jaxtyping" not in str(hints):
        return function
    function.__annotations__ = {name: Any if "typing.Self" in str(hint) else hint for name, hint in hints.items()}
    strict = beartype(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return strict(*args, **kwargs) if _checking else function(*args, **kwargs)

    return call


@contextmanager
def unchecked() -> Iterator[None]:
    """The package as it is shipped: what it says itself of bad input is not said by the checker before."""
    global _checking
    _checking = False
    try:
        yield
    finally:
        _checking = True
