"""The one seam between the mathematics and the machine.

A *definition* is a function or a ``forward`` of the core: it says in plain PyTorch what
an operation means. A *way* computes the same faster for some arguments. Ways live in
`dsv2_ref.fast`, which the first call loads, and register here against a definition,
each with a rule. A call runs the first way whose rule fits its arguments, else the
definition. ``with plain():`` switches all ways off; ``python -m dsv2_ref ways`` lists
which way serves which call of a layer, and why.

The seam is also the door: a public definition names its check, which runs once per
public call and not again for the operations inside it.
"""

import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dsv2_ref import checks

if [int(part) for part in torch.__version__.split(".")[:2]] < [2, 11]:
    raise ImportError(f"torch {torch.__version__} is here; wanted 2.11 or newer")


@dataclass(frozen=True, kw_only=True)
class Way:
    """A faster way to compute a definition, and the rule that says when it may serve.

    Attributes:
        name: in listings, such as ``triton`` or ``cpu blocks``.
        run: takes and returns what the definition does.
        device: type of the device it is for; None for any.
        dtypes: of the first tensor argument; empty for any.
        gradients: whether it gives gradients.
        compiles: whether ``torch.compile`` and ``torch.export`` can trace it.
        transforms: whether ``torch.func`` and forward mode can differentiate it.
        where: values that keyword arguments of the call must have.
        why_not: says why it cannot take these arguments; an empty string if it can.
    """

    name: str
    run: Callable[..., Any]
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    gradients: bool = True
    compiles: bool = True
    transforms: bool = False
    where: dict[str, Any] = field(default_factory=dict)
    why_not: Callable[..., str] | None = None


@dataclass(frozen=True)
class Choice:
    """What served one call: the definition's name, the way's (or ``definition``), and
    for every way that was passed over its name and the reason."""

    definition: str
    way: str
    passed_over: tuple[tuple[str, str], ...]


class _State(threading.local):
    def __init__(self) -> None:  # in every thread; the compiler guards on these
        self.inside = False  # a public call is running: what it calls has been checked
        self.switched_off: tuple[str, ...] = ()
        self.choices: list[Choice] | None = None
        self.device: str | None = None  # as if all tensors were there


_state = _State()


def defines(
    check: Callable[..., None] | None = None, autocast: bool = True
) -> Callable[[Callable[..., Any]], Any]:
    """Make the decorated function a definition, for which ways can be registered.

    Args:
        check: takes the same arguments and raises for bad ones, before anything runs.
        autocast: False runs the definition outside of ``torch.autocast``.
    """

    def decorate(definition: Callable[..., Any]) -> Callable[..., Any]:
        ways: list[Way] = []
        served: set[Any] = set()  # devices and dtypes of ways; None: any

        @functools.wraps(definition)
        def run(*args: Any, **kwargs: Any) -> Any:
            at_the_door = False
            if check is not None and not _state.inside:
                check(*args, **kwargs)
                _state.inside = at_the_door = True
            try:
                if not _loaded:
                    _load_ways()
                first = None  # tensor of the call, by which ways are chosen
                for first in (*args, *kwargs.values()):
                    if isinstance(first, Tensor):
                        break
                device = first.device.type if isinstance(first, Tensor) else "cpu"
                device = _state.device or device
                dtype, chosen = getattr(first, "dtype", None), definition
                here = {(device, dtype), (device, None), (None, dtype), (None, None)}
                if here & served or _state.choices is not None:
                    chosen = _choose(definition, ways, device, first, args, kwargs)
                keeps_dtypes = (
                    not autocast and chosen is definition and device != "meta"
                )
                if keeps_dtypes and torch.is_autocast_enabled(device):
                    with torch.autocast(device, enabled=False):
                        return chosen(*args, **kwargs)
                return chosen(*args, **kwargs)
            finally:
                if at_the_door:
                    _state.inside = False

        def register(way: Way) -> None:
            ways.insert(0, way)
            served.update((way.device, dtype) for dtype in way.dtypes or (None,))

        run.register = register  # type: ignore[attr-defined]
        return run

    return decorate


def once_when_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, which imports the compiler to do no
    more than this: half of the time that importing the package would take."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_loaded = False


@once_when_compiling
def _load_ways() -> None:
    """Let `dsv2_ref.fast` register its ways, at the first call of a definition."""
    global _loaded
    importlib.import_module("dsv2_ref.fast")
    _loaded = True  # not before: another thread would find no ways


def faster(definition: Any, name: str, **rule: Any) -> Callable[..., Any]:
    """Register the decorated function as a way to compute ``definition``, to be tried
    before those already there; ``rule`` holds the other attributes of the `Way`. Import
    `dsv2_ref.fast` first, or its ways, loaded at the first call, are tried before."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        definition.register(Way(name=name, run=run, **rule))
        return run

    return register


def _choose(
    definition: Any, ways: list[Way], device: str, first: Any, args: Any, kwargs: Any
) -> Callable[..., Any]:
    """The first way that fits the arguments, or the definition."""
    compiling = torch.compiler.is_compiling()
    # Only plain operations may run then: others would silently drop tangents, batches.
    derived = not compiling and (
        torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    passed_over, chosen, name = [], definition, "definition"
    switched_off = _state.switched_off
    for way in ways:
        reason = unmet = ""
        for argument, value in way.where.items():
            if kwargs.get(argument) != value:
                unmet = f"{argument} is {kwargs.get(argument)!r}, not {value!r}"
        if switched_off and way.name.startswith(switched_off):
            reason = "switched off"
        elif way.device not in (None, device):
            reason = f"for {way.device}, not {device}"
        elif unmet:
            reason = unmet
        elif compiling and not way.compiles:
            reason = "cannot be compiled"
        elif derived and not way.transforms:
            reason = "torch.func or forward-mode differentiation is on"
        elif way.dtypes and first.dtype not in way.dtypes:
            reason = f"not for {first.dtype}"
        elif not way.gradients and torch.is_grad_enabled():
            given = (*args, *kwargs.values())
            modules = [x for x in given if isinstance(x, nn.Module)]
            weights = [x for module in modules for x in module.parameters()]
            others = [x for module in modules for x in module.buffers()]
            for x in (*given, *weights, *others):
                if isinstance(x, Tensor) and x.requires_grad:
                    reason = "gives no gradients"
        if not reason and way.why_not is not None:
            reason = way.why_not(*args, **kwargs)
        if not reason:
            chosen, name = way.run, way.name
            break
        passed_over.append((way.name, reason))
    if _state.choices is not None:
        choice = Choice(definition.__qualname__, name, tuple(passed_over))
        _state.choices.append(choice)
    return chosen


def plain() -> AbstractContextManager[None]:
    """Run definitions only inside the ``with`` block."""
    return without("")


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Leave out the ways whose names begin so, as in ``without("triton", "cpu")``."""
    for name in names:
        checks.require(isinstance(name, str), "the name of a way", name, "a string")
    before = _state.switched_off
    _state.switched_off = (*before, *names)
    try:
        yield
    finally:
        _state.switched_off = before


def is_off(name: str) -> bool:
    """Whether a way of this name is switched off here."""
    return bool(_state.switched_off) and name.startswith(_state.switched_off)


def as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in the state of this moment, for calls that come later or in another
    thread, as in a backward pass: the same ways are off and the same is checked."""
    names = ("inside", "switched_off", "device")
    now = {name: getattr(_state, name) for name in names}

    def run(*args: Any, **kwargs: Any) -> Any:
        before = {name: getattr(_state, name) for name in names}
        try:
            vars(_state).update(now)
            return function(*args, **kwargs)
        finally:
            vars(_state).update(before)

    return run


def unwatched(function: Callable[..., Any], *args: Any) -> Any:
    """Call a compiled function: what it notes while it is traced, it would note ever
    after."""
    choices, _state.choices = _state.choices, None
    try:
        return function(*args)
    finally:
        _state.choices = choices


@contextmanager
def watch(device: str | None = None) -> Iterator[list[Choice]]:
    """Note the choice of every call inside the ``with`` block, in order.

    ``device``, such as ``"cuda"``, chooses as if all tensors were there: a layer on the
    meta device then tells what would serve it.

    Raises:
        ValueError: for what is no type of device.
    """
    if device is not None:
        checks.device_type(device)
    before = _state.choices, _state.device
    choices: list[Choice] = []
    _state.choices, _state.device = choices, device
    try:
        yield choices
    finally:
        _state.choices, _state.device = before
