"""What a subject is asked and what it answers: inputs that are always the same, calls of
what a submission defines, and their results, or counts of operations and elements.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import MemberDescriptorType
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref.cache import LayerCache

Values = Shaped[Tensor, "..."]
"""A tensor of any shape: a mistake is planted in many."""

Answers = dict[str, Tensor]
"""What a subject returned in one case, by name."""


LARGEST_ANSWER = 2**22
"""Elements of a result; the right ones have fewer than a thousandth of it."""


class WrongError(Exception):
    """What a submission is or returns cannot be graded: one line says what was wanted."""


def unusable(value: Values) -> str:
    """Why a tensor cannot be compared, or an empty string."""
    if value.is_nested:
        return "a nested tensor; wanted a dense one"
    if value.layout != torch.strided or value.is_quantized:
        return f"a tensor of layout {value.layout}; wanted a dense one"
    if value.dtype.itemsize == 1 and value.dtype not in (torch.bool, torch.int8, torch.uint8):  # of 8 bits or fewer
        return f"{value.dtype}; wanted the dtype of the input"
    if value.numel() > LARGEST_ANSWER:
        return f"{tuple(value.shape)}: far too large"
    return ""


def normal(*shape: int, seed: int, size: float = 1.0) -> Float[Tensor, "..."]:
    """Normal random values in float64, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(shape, generator=generator).double()


def given(**makers: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """Arguments of a case, made anew for each subject."""
    return lambda: {name: make() for name, make in makers.items()}


def tokens(*shape: int, seed: int, size: float = 1.0, mean: float = 0.0) -> Callable[[], dict[str, Any]]:
    """The arguments of a module that takes tokens alone."""
    return given(hidden_states=lambda: normal(*shape, seed=seed, size=size) + mean)


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What a class or a function makes of arguments: by their names, or in this order if it has other names."""
    try:
        known = inspect.signature(function)
    except ValueError:  # one that is not written in Python
        return function(*arguments.values())
    named = not isinstance(function, type) or arguments.keys() <= known.parameters.keys()
    ways: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = [((), arguments), (tuple(arguments.values()), {})]
    said = ""
    for args, kwargs in ways if named else reversed(ways):
        try:
            known.bind(*args, **kwargs)
        except TypeError as error:
            said = said or str(error)
        else:
            return function(*args, **kwargs)
    raise WrongError(f"{getattr(function, '__name__', 'it')} cannot be called with ({', '.join(arguments)}): {said}")


def returned(result: Any, name: str) -> str:
    """What a call returned, for people."""
    inner = (
        f" of {', '.join(type(one).__name__ for one in result) or 'nothing'}"
        if isinstance(result, tuple | list)
        else ""
    )
    return f"{name} returned a {type(result).__name__}{inner}"


def first(result: Any, name: str = "forward") -> Float[Tensor, "..."]:
    """The tensor that a call returned, or the first entry of its tuple."""
    found = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(found, Tensor):
        raise WrongError(f"{returned(result, name)}; wanted a tensor, or a tuple that begins with one")
    return found


def pair(result: Any, name: str, wanted: str) -> tuple[Values, Values]:
    """The first two of the tensors that a call returned."""
    two = list(result[:2]) if isinstance(result, tuple | list) else []
    if len(two) < 2 or not all(isinstance(one, Tensor) for one in two):
        raise WrongError(f"{returned(result, name)}; wanted {wanted}")
    return two[0], two[1]


def output(module: nn.Module, inputs: dict[str, Any]) -> Answers:
    """What a module makes of its tokens."""
    return {"output": first(module(inputs["hidden_states"]))}


def operations(run: Callable[[], Any]) -> Float[Tensor, ""]:
    """FLOPs of the matrix products of a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return torch.tensor(float(counter.get_total_flops()), dtype=torch.float64)


def elements(*things: Any) -> int:
    """Elements of all tensors and arrays that can be reached from these objects. What shares
    memory counts at most as often as there is room."""
    held: dict[int, dict[Any, int]] = {}
    room: dict[int, int] = {}
    seen: dict[int, Any] = {}  # holds what it has seen, so that no id is used twice
    waiting = list(things)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            place = thing.storage_offset(), tuple(thing.shape)
            held.setdefault(storage.data_ptr(), {})[place] = thing.numel()
            room[storage.data_ptr()] = storage.nbytes() // thing.element_size()
        elif isinstance(thing, LayerCache):  # may reserve room for later tokens
            waiting += [x for name, x in vars(thing).items() if name != "_storage"]
        elif isinstance(thing, Mapping):
            waiting += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset | deque):
            waiting += thing
        elif hasattr(type(thing), "__array_interface__"):  # an array or a number of NumPy
            waiting.append(torch.as_tensor(thing))
        elif not isinstance(thing, type):
            waiting += [*getattr(thing, "__dict__", {}).values(), *_slots(thing)]
    return sum(min(sum(each.values()), room[at]) for at, each in held.items())


def _slots(thing: object) -> Iterator[Any]:
    """What an object holds in slots of its class, as with ``dataclass(slots=True)``."""
    for kind in (kind for kind in type(thing).__mro__ if "__slots__" in vars(kind)):
        for name, member in vars(kind).items():
            if isinstance(member, MemberDescriptorType):
                yield getattr(thing, name, None)
