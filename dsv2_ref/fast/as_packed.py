"""What a module was packed from, and by what one sees that it is still made so.

`dsv2_ref.fast.compiled` hands the tensors of a module's parts to operators without calling the parts. That is right as long as
none of them became another, got a hook, or runs more than the ``forward`` of its class.
"""

import weakref
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from dsv2_ref.fast.layer import as_parts
from dsv2_ref.layer import DeepseekV2DecoderLayer
from dsv2_ref.mla import DeepseekV2Attention
from dsv2_ref.moe import DeepseekV2MLP, DeepseekV2MoE, MoEGate, RoutedExperts
from dsv2_ref.quantized import QuantizedWeight
from dsv2_ref.quantized_modules import QuantizedExperts, QuantizedLinear
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm

STEPS = DeepseekV2DecoderLayer, DeepseekV2MLP, DeepseekV2MoE
hooks_of = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LINEAR: tuple[Any, ...] = nn.Linear, QuantizedLinear
PLACES: dict[str, tuple[Any, ...]] = {
    "self_attn": (DeepseekV2Attention,), "mlp": (DeepseekV2MLP, DeepseekV2MoE), "gate": (MoEGate,),
    "experts": (RoutedExperts, QuantizedExperts), "shared_experts": (DeepseekV2MLP,), "gate_up_proj": (QuantizedWeight,),
    "down_proj": (*LINEAR, QuantizedWeight), "kv_a_proj_with_mqa": LINEAR,
    **dict.fromkeys(("q_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj"), LINEAR),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm"), (DeepseekV2RMSNorm,)),
}  # fmt: skip
OURS = ("dsv2_ref.", "torch.nn.")
KINDS = (*STEPS, *sum(PLACES.values(), ()))
# not what somebody put in their place:
FORWARDS = {kind.forward for kind in KINDS if kind.forward.__module__.startswith(OURS)}


class AsPacked:
    """A module as it was packed. What the operators take of it is found at the first token, and again in copies."""

    def __init__(self, module: Any) -> None:
        self.description = _described(module)
        self.found: Found | None = Found(module)

    def __getstate__(self) -> dict[str, Any]:
        return {"description": self.description, "found": None}

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is made as it was, none of its parts runs more than the ``forward`` of a known class, and its
        settings are plain numbers."""
        found = self.found
        if found is None or not found.is_made_of(module):
            self.found = found = Found(module) if _described(module) == self.description else None
        return found is not None and found.runs_forward_only() and found.has_plain_numbers()

    def of(self, module: nn.Module) -> "Found":
        """What was found of a module that `holds`."""
        found = self.found
        return found if found is not None and found.module() is module else Found(module)


Place = tuple[Any, str, str]
"""A weak reference to a module, whether it is a parameter or a buffer of it, and the name of a tensor."""


class Found:
    """Where the norms and maps of a module lie that the operators take, and by what one sees that it is still made so. Its
    modules are referred to weakly: it keeps none alive."""

    def __init__(self, module: Any) -> None:
        attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", module)
        norms: list[Any] = []
        maps: list[Any] = []
        if attention is not None:
            norms = [module.input_layernorm, attention.kv_a_layernorm, module.post_attention_layernorm]
            if attention.config.q_lora_rank is None:
                maps = [attention.q_proj, attention.kv_a_proj_with_mqa, attention.o_proj]
            else:
                norms.append(attention.q_a_layernorm)
                maps = [attention.q_a_proj, attention.kv_a_proj_with_mqa, attention.q_b_proj, attention.o_proj]
        self.attention, self.attention_layout = _places(*maps)
        gate = getattr(mlp, "gate", None)
        if isinstance(module, nn.Linear):
            maps = [module]
        elif gate is None:
            maps = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        else:
            experts, shared = mlp.experts, mlp.shared_experts
            quantised = isinstance(experts.gate_up_proj, QuantizedWeight)
            names = "gate_up_proj", "down_proj"
            maps = [getattr(experts, name) if quantised else (experts, name) for name in names]
            if shared is not None:
                maps += shared.gate_proj, shared.up_proj, shared.down_proj
        self.others, self.layout = _places(*maps)
        self.module, self.norms = weakref.ref(module), [weakref.ref(norm) for norm in norms]
        self.gains: list[Place] = [(norm, "_parameters", "weight") for norm in self.norms]
        self.gate = None if gate is None else weakref.ref(gate)
        parts: list[Any] = list(module.modules())
        self.parts, self.made = [weakref.ref(part) for part in parts], _made(parts)
        places = {part: place for place, part in enumerate(parts)}
        self.children = [places.get(child) for child in _children(parts)]

    def gains_and_maps(self) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """The weights of the norms, and the maps of attention, as the operators take them."""
        return _at(self.gains), _at(self.attention), self.attention_layout

    def maps(self) -> tuple[list[Tensor], list[int]]:
        """The other maps."""
        return _at(self.others), self.layout

    def epsilons(self) -> list[Any]:
        """Of the norms."""
        return [norm().variance_epsilon for norm in self.norms]  # type: ignore[union-attr]

    def has_plain_numbers(self) -> bool:
        """Whether its settings are numbers that the operators take."""
        numbers = self.epsilons()
        gate: Any = self.gate and self.gate()
        if gate is not None:
            numbers.append(gate.routed_scaling_factor)
            if any(type(x) is not int for x in (gate.top_k, gate.n_group, gate.topk_group)):
                return False
        return all(type(x) in (float, int) for x in numbers)

    def is_made_of(self, module: nn.Module) -> bool:
        """Whether these are the parts of the module, and as they were."""
        parts: list[Any] = [part() for part in self.parts]
        if parts[0] is not module or None in parts:
            return False
        children = [None if place is None else parts[place] for place in self.children]
        return _children(parts) == children and _made(parts) == self.made

    def runs_forward_only(self) -> bool:
        """Whether a call of any part runs the ``forward`` of a known class over what it holds, and nothing else."""
        return all(runs_forward(part()) for part in self.parts)


def _places(*linear: Any) -> tuple[list[Place], list[int]]:
    """Where the tensors lie that `as_parts` gives of linear maps, or of stacks, each a module and a name; and its numbers."""
    places: list[Place] = []
    for one in linear:
        if isinstance(one, tuple):
            places.append((weakref.ref(one[0]), "_parameters", one[1]))
            continue
        kind, names = "_parameters", ["weight"]
        if isinstance(one, QuantizedWeight):
            kind, names = "_buffers", ["codes", "scales" if one.kind == "int8" else "scales_and_zeros"]
        places += [(weakref.ref(one), kind, name) for name in names]
        if getattr(one, "bias", None) is not None:
            places.append((weakref.ref(one), "_parameters", "bias"))
    return places, as_parts(*(getattr(*one) if isinstance(one, tuple) else one for one in linear))[1]


def _at(places: list[Place]) -> list[Tensor]:
    return [module().__dict__[kind][name] for module, kind, name in places]


def runs_forward(part: Any) -> bool:
    """Whether a call of such a part runs the ``forward`` of a known class over the tensors that it holds, and nothing else."""
    own = part.__dict__
    changed = "forward" in own or any(hooks_of(own)) or own.get("_compiled_call_impl") is not None
    shadowed = "weight" in own or own.get("bias") is not None
    return not changed and not shadowed and type(part).forward in FORWARDS


def _described(module: nn.Module) -> list[Any]:
    return [[name for name, _ in module.named_modules()], *_made(list(module.modules()))]


def _children(parts: list[nn.Module]) -> list[nn.Module | None]:
    return [child for part in parts for child in part.__dict__["_modules"].values()]


def _made(parts: list[nn.Module]) -> list[Any]:
    """Of what classes the parts are, what they hold by which names, and how tensors lie. At every token: one list for each
    is made faster than one for each part."""
    own = [part.__dict__ for part in parts]
    held = [x[kind] for x in own for kind in ("_parameters", "_buffers")]
    names = [sorted(some) for some in held]
    places = [some[name] for some, in_order in zip(held, names, strict=True) for name in in_order]
    tensors = [x for x in places if x is not None]
    return [
        [type(part) for part in parts],
        [x.get("block_rows") for x in own],
        [[*x["_modules"]] for x in own],
        names,
        [type(x) for x in places],
        layouts := [x.layout for x in tensors],
        [x.dtype for x in tensors],
        [x.shape for x in tensors],
        [x.is_cpu for x in tensors],
        [x.is_contiguous() for x in tensors] if all(x is torch.strided for x in layouts) else None,
    ]
