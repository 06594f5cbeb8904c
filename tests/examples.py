"""How many examples of a property a test tries."""

from hypothesis import settings


def fewer(times: int) -> settings:
    """So many times fewer than usual, for a property that takes seconds with each of them."""
    return settings(max_examples=-(-settings.default.max_examples // times))
