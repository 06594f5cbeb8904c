"""What a submission may not do: call or read the package's own version of what it should
have written, or leave torch's settings changed.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv2_ref import fast, model  # noqa: F401  # all that holds guarded names
from dsv2_ref.grading.answers import WrongError
from dsv2_ref.grading.part import Part

CLOSED: set[str] = set()
"""Files that cannot be read at this moment."""


class BorrowedError(WrongError):
    """A submission called what it should have written."""


class ReadingError(PermissionError):
    """A submission reads what it should have written. As any file that cannot be read, it stops no warning that would
    show a line of that file."""


def guard(part: Part) -> None:
    """Let nobody call the package's own version of what the part asks for."""
    for module, name in part.forbidden:
        own = getattr(sys.modules[module], name, None)
        stand_in = borrowed(f"{module}.{name}")
        if isinstance(own, type):
            own.__init__ = stand_in  # type: ignore[misc]
            own.forward = stand_in  # type: ignore[attr-defined]
        for other in [m for n, m in sys.modules.items() if n.startswith("dsv2_ref.")]:
            for attribute, value in list(vars(other).items()):
                if own is not None and value is own and not isinstance(own, type):
                    setattr(other, attribute, stand_in)


def sources(part: Part) -> set[str]:
    """Files with the package's own version of what a part asks for, as text and compiled; and the assignment's
    solution and the layer in NumPy, where the package is run from a copy of the repository."""
    root = Path(__file__).resolve().parents[2]
    others = [str(root / "assignments" / "solutions" / f"{part.name}.py"), str(root / "tests" / "oracle.py")]
    paths = {*others, *map(importlib.util.cache_from_source, others)}
    for module, _ in part.forbidden:
        paths |= {str(sys.modules[module].__file__), str(sys.modules[module].__cached__)}
    return {os.path.realpath(path) for path in paths}


def keep_closed(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: let nobody open the files of `CLOSED`."""
    if event == "open" and CLOSED and isinstance(arguments[0], str | bytes):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path in CLOSED:
            raise ReadingError(f"it reads {'/'.join(Path(path).parts[-2:])}; wanted code of your own")


def borrowed(name: str) -> Any:
    """What stands in for a function of the package."""

    def stand_in(*_: Any, **__: Any) -> None:
        raise BorrowedError(f"it calls {name}; wanted code of your own")

    stand_in.__module__ = name.rpartition(".")[0]
    return stand_in


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
}
"""The state of torch that a submission should leave as it is: how it is read and set."""


def settings() -> dict[str, Any]:
    """The state of torch now."""
    return {name: read() for name, (read, _) in SETTINGS.items()}


def restore(before: dict[str, Any], usual: dict[str, Any]) -> str:
    """Undo what has changed, and say what it was, unless it is as usual now.

    Only that: setting deterministic algorithms imports torch's compiler, which takes two seconds.
    """
    after = settings()
    changed = [name for name in before if after[name] != before[name]]
    for name in changed:
        SETTINGS[name][1](before[name])
    said = [f"{name} to {after[name]}" for name in changed if after[name] != usual[name]]
    return f"it changes torch's {', '.join(said)}, for all code that runs after it" if said else ""
