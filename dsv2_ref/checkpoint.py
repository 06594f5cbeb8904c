"""Published names of weights that are stored otherwise: routed experts, which are stacked, and a head that is tied to
the embedding."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class StackedExperts(nn.Module):
    """Base of the routed experts: stacked parameters ``gate_up_proj`` (E, 2I, D) and ``down_proj`` (E, D, I), with a
    state dict in the published names, ``{expert}.gate_proj.weight``, ``{expert}.up_proj.weight``,
    ``{expert}.down_proj.weight``.

    Its values are views of the stacked parameters. What walks a module by the names of its state dict (distributed
    checkpoints, ``torch.func.functional_call``) finds each expert under its number, of which ``first`` is the lowest.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, number: int, first: int = 0) -> None:
        super().__init__()
        self.first = first
        # Not as submodules: the stack computes, and these only have names.
        self.__dict__.update({str(first + i): _Expert(self, i) for i in range(number)})

    def published(self) -> Iterator[tuple[str, Tensor]]:
        """Every published name, and its view of a stacked weight."""
        for expert in range(len(self.gate_up_proj)):
            for projection in PROJECTIONS:
                name = f"{self.first + expert}.{projection}.weight"
                yield name, self.view_of(expert, projection)

    def view_of(self, expert: int, projection: str) -> Float[Tensor, "outputs inputs"]:
        """One expert's ``gate_proj``, ``up_proj`` or ``down_proj``: gates lie above ups."""
        if projection == "down_proj":
            return self.down_proj[expert]
        return self.gate_up_proj[expert].chunk(2)[projection == "up_proj"]

    def _computed(self) -> bool:
        """Whether a stack is computed from other parameters, by a parametrization or by pruning. These are what is
        saved and loaded then, under the names that torch gives them, as for any module."""
        return not {"gate_up_proj", "down_proj"} <= self._parameters.keys()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._computed():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, weight in self.published():
            destination[prefix + name] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *reports: list[str]
    ) -> None:
        if self._computed():
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)
            return
        missing_keys, unexpected_keys, error_msgs = reports
        own = {prefix + name: weight.shape for name, weight in self.published()}
        given = {name: weight for name, weight in state_dict.items() if name.startswith(prefix)}
        missing_keys += [name for name in own if name not in given]
        if strict:
            unexpected_keys += [name for name in given if name not in own]
        known = {name: weight for name, weight in given.items() if name in own}
        fitting = {name: weight for name, weight in known.items() if weight.shape == own[name]}
        for name in known.keys() - fitting.keys():
            sizes = f"the checkpoint has {tuple(given[name].shape)}, the layer {tuple(own[name])}"
            error_msgs.append(f"size mismatch for {name}: {sizes}.")
        if fitting and local_metadata.get("assign_to_params_buffers", False):
            self._take_dtype_and_device(next(iter(fitting.values())))
        with torch.no_grad():
            for name, weight in self.published():
                if prefix + name in fitting:
                    weight.copy_(fitting[prefix + name])

    def _take_dtype_and_device(self, like: Tensor) -> None:
        """Make the stacks as ``load_state_dict(assign=True)`` makes a parameter. Experts that are still to come, as in
        a later shard, keep their values; without memory they are NaN until then."""
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(self, name)
            if (stack.dtype, stack.device) == (like.dtype, like.device):
                continue
            if stack.is_meta and not like.is_meta:
                new = torch.full_like(stack, float("nan"), dtype=like.dtype, device=like.device)
            else:
                new = stack.detach().to(like)
            setattr(self, name, nn.Parameter(new, requires_grad=stack.requires_grad))


class _Expert(nn.Module):
    """One expert of a stack, for code that looks weights up by their published names. It computes nothing."""

    def __init__(self, experts: StackedExperts, expert: int) -> None:
        super().__init__()
        for projection in PROJECTIONS:
            setattr(self, projection, _Projection(experts, expert, projection))


class _Projection(nn.Module):
    """``weight`` reads a view of the stacked weight. ``torch.func.functional_call`` puts another tensor in its place,
    and later the view again."""

    def __init__(self, experts: StackedExperts, expert: int, projection: str) -> None:
        super().__init__()
        self.__dict__["place"] = experts, (expert, projection)  # not as a submodule

    @property
    def weight(self) -> Tensor:
        """The view, or what stands in its place."""
        experts, place = self.__dict__["place"]
        swapped: dict[Any, Tensor] = experts.__dict__.get("_swapped", {})
        if place in swapped:
            return swapped[place]
        view: Tensor = experts.view_of(*place)
        view.__dict__["is_own"] = True  # by which it is known when it comes back
        return view

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
            return
        experts, place = self.__dict__["place"]
        held = experts.__dict__
        if "_swapped" not in held:
            held["_swapped"] = {}
            held["_assembling"] = experts.register_forward_pre_hook(_assemble)
        held["_swapped"][place] = value
        if "is_own" in value.__dict__:
            del held["_swapped"][place]
        if not held["_swapped"]:
            held["_assembling"].remove()
            for name in ("_swapped", "_assembling", "gate_up_proj", "down_proj"):
                held.pop(name, None)


def _assemble(experts: StackedExperts, _: Any) -> None:
    """Stack the weights that stand in the place of the parameters, before they are read."""
    held, numbers = experts.__dict__, range(len(experts.down_proj))
    gate, up, down = (
        torch.stack([held["_swapped"].get((i, name), experts.view_of(i, name)) for i in numbers])
        for name in PROJECTIONS
    )
    held["gate_up_proj"], held["down_proj"] = torch.cat((gate, up), dim=1), down


def tie_head(model: nn.Module) -> None:
    """Make ``lm_head.weight`` the embedding's own parameter and keep it so: a checkpoint may hold either name or both,
    and assigning a checkpoint does not part them."""
    model.register_load_state_dict_pre_hook(_complete_tied)
    model.register_load_state_dict_post_hook(_tie)
    _tie(model)


def _tie(model: Any, _: Any = None) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _complete_tied(
    model: Any, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any, strict: bool, *reports: list[str]
) -> None:
    names = [prefix + "model.embed_tokens.weight", prefix + "lm_head.weight"]
    for name, other in (names, names[::-1]):
        if name in state_dict and other not in state_dict:
            state_dict[other] = state_dict[name]
    embedding, head = (state_dict.get(name) for name in names)
    if embedding is None or head is None or embedding is head or embedding.is_meta:
        return
    if embedding.shape == head.shape and not torch.equal(embedding, head.to(embedding)):
        reason = "the head of this model is tied to its embedding, and these differ"
        reports[-1].append(f"{names[1]} and {names[0]}: {reason}.")
