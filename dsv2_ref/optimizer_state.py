"""An optimizer in a checkpoint of all ranks, each of which trains experts of its own."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from dsv2_ref import checks
from dsv2_ref.checkpoint import StackedExperts


class OptimizerState(Stateful):
    """What ``torch.distributed.checkpoint`` saves of an optimizer, and loads into it.

    The experts of a layer are stacked, and the stacks of all ranks have the same names.
    A checkpoint of the optimizer itself would keep those of one rank and give them to
    all. Here every expert has an entry of its own, under its number in the layer, as in
    the model's state dict. So another number of ranks, or one process, can go on::

        whole = {"model": model.state_dict(), "optimizer": OptimizerState(model, adamw)}
        torch.distributed.checkpoint.save(whole, checkpoint_id=folder)
        torch.distributed.checkpoint.load(whole, checkpoint_id=folder)

    Args:
        model: with all of its experts, or with a share of them
            (`dsv2_ref.parallel.parallelize_experts`).
        optimizer: of that model's parameters.

    Raises:
        ValueError: for what is no module or no optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        checks.is_module(model, "model")
        fits = isinstance(optimizer, Optimizer)
        checks.require(fits, "optimizer", optimizer, "a torch.optim.Optimizer")
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """The state by the names of the parameters, with experts one by one: theirs are
        views of what the optimizer holds."""
        whole = get_optimizer_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = dict(whole["state"])  # type: ignore[arg-type]
        for stack, experts in self._stacks():
            for key, value in state.pop(stack, {}).items():
                parted = isinstance(value, Tensor) and value.shape[:1] == (
                    len(experts),
                )
                for i, expert in enumerate(experts):
                    state.setdefault(expert, {})[key] = value[i] if parted else value
        return {**whole, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, here or where others had the experts."""
        held: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizer)[
            "state"
        ]  # type: ignore[assignment]
        state = dict(state_dict["state"])
        for stack, experts in self._stacks():
            for key, value in held.get(stack, {}).items():
                parted = isinstance(value, Tensor) and value.shape[:1] == (
                    len(experts),
                )
                each = [state[expert][key] for expert in experts]
                state.setdefault(stack, {})[key] = (
                    torch.stack(each) if parted else each[0]
                )
        set_optimizer_state_dict(
            self.model, self.optimizer, {**state_dict, "state": state}
        )

    def _stacks(self) -> Iterator[tuple[str, list[str]]]:
        """The name of every stacked weight, and a name for each of its experts."""
        for name, part in self.model.named_modules():
            if isinstance(part, StackedExperts):
                prefix = f"{name}." if name else ""
                for stack, weight in part.named_parameters():
                    numbers = range(part.first, part.first + len(weight))
                    yield prefix + stack, [f"{prefix}{i}.{stack}" for i in numbers]
