"""How much a test tries always, and how much with what is thorough."""

from typing import Any

import pytest
from hypothesis import settings


def fewer(times: int) -> settings:
    """So many times fewer examples than usual, for a property that takes seconds with each of them."""
    return settings(max_examples=-(-settings.default.max_examples // times))


def thorough(*values: Any) -> list[Any]:
    """Parameters that `make test-thorough` tries, beside those that are tried always; tuples are several each."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.thorough) for value in values
    ]
