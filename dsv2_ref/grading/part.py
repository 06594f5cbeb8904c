"""What a graded part is: the names a submission defines, the cases it is run on, and the
mistakes that are known by what they return.

A *subject* is what a case runs: a module with the case's weights or, where a part asks
for functions, a namespace that holds them. It is made of the submission, of the
reference, and of the reference with a mistake planted.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dsv2_ref import ops
from dsv2_ref.grading.answers import Answers, WrongError, call

Plant = Callable[[Any], AbstractContextManager[Any] | None]
"""Changes a subject of the reference, and may return a context manager for what it changes elsewhere."""


@dataclass(frozen=True)
class Case:
    """One check: what the subject is built from, and what it is given.

    Attributes:
        name: what the report calls it.
        points: given whole or not at all.
        inputs: makes the arguments, tensors in float64, the same at each call.
        args: of the constructor, where the part is a class.
        at_most: 0 compares results. Else the answer is a cost, and may be so many times
            that of the reference.
    """

    name: str
    points: int
    inputs: Callable[[], dict[str, Any]]
    args: tuple[Any, ...] = ()
    at_most: float = 0.0


@dataclass(frozen=True)
class Mistake:
    """A known mistake, the chapter and the section that explain it, and how to make it."""

    name: str
    chapter: str
    section: str
    plant: Plant


@dataclass(frozen=True)
class Part:
    """A part that can be graded.

    Attributes:
        name: on the command line.
        module: of the package, where the reference of the names is.
        defines: the public class, or the functions, that a submission defines.
        answer: runs a subject on a case's inputs.
        cases: all points are theirs.
        mistakes: what is recognised.
        takes: names of the constructor's arguments, where the part is a class.
        yours: further names, ``module.name``, that a submission may not take from the
            package; all it ``defines`` are.
    """

    name: str
    module: str
    defines: tuple[str, ...]
    answer: Callable[[Any, dict[str, Any]], Answers]
    cases: tuple[Case, ...]
    mistakes: tuple[Mistake, ...]
    takes: tuple[str, ...] = ()
    yours: tuple[str, ...] = ()

    @property
    def points(self) -> int:
        """All that can be had."""
        return sum(case.points for case in self.cases)

    @cached_property
    def reference(self) -> SimpleNamespace:
        """The names that a submission defines, as the package has them."""
        module = import_module(f"dsv2_ref.{self.module}")
        return SimpleNamespace(**{name: getattr(module, name) for name in self.defines})

    @property
    def is_class(self) -> bool:
        """Whether a submission defines a class, and not functions."""
        return isinstance(getattr(self.reference, self.defines[0]), type)

    @property
    def forbidden(self) -> list[tuple[str, str]]:
        """Modules and names that a submission may not take from the package."""
        own = [f"{self.module}.{name}" for name in self.defines]
        parts = (name.rpartition(".") for name in [*own, *self.yours])
        return [(f"dsv2_ref.{module}", name) for module, _, name in parts]

    def state(self, case: Case) -> dict[str, Tensor]:
        """The weights of a case under their published names; none for functions."""
        if not self.is_class:
            return {}
        module = getattr(self.reference, self.defines[0])(*case.args).double()
        generator = torch.Generator().manual_seed(len(case.name))
        named = (*module.named_parameters(), *module.named_buffers())
        with torch.no_grad():
            for _, weight in named:
                drawn = torch.randn(weight.shape, generator=generator)
                if weight.ndim > 1:  # outputs about as large as inputs, or twice
                    weight.copy_(drawn * 2 / weight.shape[-1] ** 0.5)
                else:  # of a norm; or the bias of a gate, where a common part changes nothing
                    weight.copy_(0.3 * drawn + (1 if weight.mean() > 0.5 else -1))
        return {name: weight.clone() for name, weight in module.state_dict().items()}

    def subject(self, made: Any, case: Case, state: Mapping[str, Tensor]) -> Any:
        """The class of a namespace, built and loaded; or a copy of its functions."""
        if not self.is_class:
            return SimpleNamespace(**{name: getattr(made, name) for name in self.defines})
        module = call(getattr(made, self.defines[0]), dict(zip(self.takes, case.args, strict=True)))
        if not isinstance(module, nn.Module):
            raise WrongError(f"{self.defines[0]} makes no torch.nn.Module; wanted a subclass of that")
        module.double().eval()
        load(module, state)
        return module

    def reference_answers(self, case: Case, *mistakes: Mistake) -> Answers:
        """What the reference returns, with these mistakes planted."""
        with ExitStack() as undo, torch.no_grad():
            undo.enter_context(ops.plain())
            subject = self.subject(self.reference, case, self.state(case))
            for mistake in mistakes:
                planted = mistake.plant(subject)
                if planted is not None:
                    undo.enter_context(planted)
            return self.answer(subject, case.inputs())


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into a module by their published names; experts may be stacked.

    Weights that the module does not have are left out: what it returns will tell.

    Raises:
        WrongError: for a parameter without a published weight, and for other sizes.
    """
    given = dict(state)
    for name in [name for name in given if ".0.gate_proj." in name]:
        prefix, end = name.split("0.gate_proj")
        each = {
            kind: torch.stack(list(_experts(given, prefix, kind + end)))
            for kind in ("gate_proj", "up_proj", "down_proj")
        }
        given[f"{prefix}gate_up_proj"] = torch.cat(list(each.values())[:2], dim=1)
        given[f"{prefix}down_proj"] = each["down_proj"]
    own = module.state_dict()
    named = {name: value for name, value in module.named_parameters(remove_duplicate=False) if name in own}
    filled = {id(value) for name, value in named.items() if name in given}  # perhaps under a second name, too
    unknown = sorted(name for name, value in named.items() if name not in given and id(value) not in filled)
    absent = sorted(state.keys() - own.keys())
    if unknown:
        there = f"; not used: {_some(absent)}" if absent else ""
        raise WrongError(f"no published weight has the name {_some(unknown)}{there}")
    for name in own.keys() & given.keys():
        if own[name].shape != given[name].shape:
            said = f"{name} is {tuple(own[name].shape)}"
            raise WrongError(f"{said}; wanted {tuple(given[name].shape)}")
    module.load_state_dict({n: w for n, w in given.items() if n in own}, strict=False)


def absent(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Published names that a module has no weights for, in one line."""
    own = module.state_dict()
    stacked = {name.removesuffix("gate_up_proj") for name in own}
    missing = [
        name for name in state if name not in own and not any(s and name.startswith(s) for s in stacked - own.keys())
    ]
    return _some(missing)


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _experts(given: Mapping[str, Tensor], prefix: str, name: str) -> Iterator[Tensor]:
    expert = 0
    while (weight := given.get(f"{prefix}{expert}.{name}")) is not None:
        yield weight
        expert += 1


def has(name: str, value: Callable[..., Any]) -> Plant:
    """Another function of this name."""
    return lambda functions: setattr(functions, name, value)
