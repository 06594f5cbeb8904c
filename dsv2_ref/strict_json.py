"""JSON as every program reads it: in UTF-8, without NaN and infinities, and with each key of an object once."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from dsv2_ref.checks import describe


def load(path: str | Path) -> Any:
    """The JSON in a file; ValueError, naming the file, for what is none, or has a key twice."""
    try:
        return loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def loads(text: bytes) -> Any:
    """The JSON in these bytes; ValueError, which begins with "is not" or "says", for what is none, and for an object
    that has a key twice, of which programs take either."""
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.extend(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        return found

    try:
        content = json.loads(text.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("is not JSON that can be read: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not text in UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if twice:
        raise ValueError(f"says {describe(', '.join(twice))} twice")
    return content


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")
