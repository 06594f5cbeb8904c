"""One token through a layer in C++ (``layer.cpp``), for CPUs.

A step of decoding multiplies one row by many matrices, which costs what reading them costs, and between two products stand
operations that take longer to start than to run. `dsv2_ref.fast.packed.pack_weights` with ``compiled=True`` marks the modules
whose single tokens go this way: two operators for a layer, in place of some sixty.
"""

import weakref
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from dsv2_ref import ops
from dsv2_ref.cache import LatentCache
from dsv2_ref.fast.cpu import HALF_ON_CPU
from dsv2_ref.fast.decode import NAME, format_of
from dsv2_ref.fast.layer import as_parts, attended, fed_forward, products_of_row, use_large_pages
from dsv2_ref.fast.native import is_watched, why_not_built
from dsv2_ref.layer import DeepseekV2DecoderLayer
from dsv2_ref.mla import DeepseekV2Attention
from dsv2_ref.moe import DeepseekV2MLP, DeepseekV2MoE, MoEGate, RoutedExperts
from dsv2_ref.quantize import is_plain
from dsv2_ref.quantized import QuantizedWeight
from dsv2_ref.quantized_modules import QuantizedExperts, QuantizedLinear
from dsv2_ref.records import QuantizedLatentCache, Record
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from dsv2_ref.rope import position_tables


def _without_step(module: nn.Module, hidden_states: Tensor) -> str:
    made = module.__dict__.get("token_in_cpp")
    if not isinstance(made, AsPacked):
        return "not packed with compiled=True"
    if hidden_states.ndim == 0 or not 0 < hidden_states.numel() == hidden_states.shape[-1]:
        return "for one token"
    if module.training or torch.is_autocast_enabled("cpu"):
        return "for inference without torch.autocast"
    if type(hidden_states) is not Tensor or hidden_states.layout is not torch.strided or is_watched():
        return "for plain tensors, whose operations nothing watches"
    if nn.modules.module._has_any_global_hook() or not made.holds(module):
        return "a part of it has a hook, or became another"
    return why_not_built("layer.cpp")


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
FORWARDS = {kind.forward for kind in (*STEPS, *sum(PLACES.values(), ()))}
FORWARDS = {
    forward for forward in FORWARDS if forward.__module__.startswith(OURS)
}  # not what somebody put in its place


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
        return found is not None and found.has_plain_numbers()

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
        parts = list(module.modules())
        self.parts = [
            (weakref.ref(x), type(x), x.__dict__.get("block_rows"), [*x._modules], [*map(_weakly, x._modules.values())])
            for x in parts
        ]
        self.layouts = _layouts(parts)

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
        if self.module() is not module:
            return False
        parts = []
        for reference, kind, block_rows, names, children in self.parts:
            part = reference()
            if part is None or type(part) is not kind:
                return False
            own = part.__dict__
            held = own["_modules"]
            if not _runs_forward(kind, own) or own.get("block_rows") != block_rows or [*held] != names:
                return False
            if not all(map(is_, held.values(), [child and child() for child in children])):
                return False
            parts.append(part)
        return _layouts(parts) == self.layouts


def _weakly(module: nn.Module | None) -> Any:
    return None if module is None else weakref.ref(module)


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


HELD = "_parameters", "_buffers"


def _at(places: list[Place]) -> list[Tensor]:
    return [module().__dict__[kind][name] for module, kind, name in places]


def _layouts(parts: list[nn.Module]) -> list[Any]:
    """How the tensors of each part lie, by name."""
    return [
        {name: x if x is None else _layout(x) for name, x in part.__dict__[kind].items()}
        for part in parts
        for kind in HELD
    ]


def _layout(x: Tensor) -> tuple[Any, ...]:
    in_rows = x.layout is torch.strided and x.is_contiguous()
    return type(x), x.dtype, x.shape, x.is_cpu, in_rows


def _runs_forward(kind: Any, own: dict[str, Any]) -> bool:
    """Whether a call of such a part runs the ``forward`` of a known class over the tensors that it holds, and nothing else."""
    changed = "forward" in own or any(hooks_of(own)) or own.get("_compiled_call_impl") is not None
    shadowed = "weight" in own or own.get("bias") is not None
    return not changed and not shadowed and kind.forward in FORWARDS


def _described(module: nn.Module) -> list[Any]:
    """Of every part its class, whether that is all that runs, and what tensors it holds."""
    found: list[Any] = []
    for name, part in module.named_modules():
        own, kind = part.__dict__, type(part)
        found.append((name, kind, _runs_forward(kind, own), own.get("block_rows"), _layouts([part])))
    return found


def _feed(mlp: Any, maps: tuple[list[Tensor], list[int]], x: Tensor, residual: Tensor | None) -> Tensor:
    if isinstance(mlp, DeepseekV2MLP):
        return fed_forward(x, residual, None, None, [], 1.0, *maps)
    gate = mlp.gate
    yes_or_no = gate.scoring_func == "sigmoid", bool(gate.norm_topk_prob)
    settings = [gate.top_k, gate.n_group, gate.topk_group, *map(int, yes_or_no)]
    bias = gate.e_score_correction_bias
    bias = None if bias is None else bias.float()
    return fed_forward(x, residual, gate.weight, bias, settings, gate.routed_scaling_factor, *maps)


@ops.faster(DeepseekV2MLP.forward, "cpu compiled", why_not=_without_step, **HALF_ON_CPU)
@ops.faster(DeepseekV2MoE.forward, "cpu compiled", why_not=_without_step, **HALF_ON_CPU)
def _mlp_or_moe(mlp: Any, hidden_states: Tensor) -> Tensor:
    return _feed(mlp, mlp.token_in_cpp.of(mlp).maps(), hidden_states, None).view(*hidden_states.shape[:-1], -1)


class LinearByRow(nn.Linear):
    """A plain linear map outside of layers, such as a model's head, whose product with one row reads its weight as it lies."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(linear.__dict__)
        self.token_in_cpp = AsPacked(self)
        use_large_pages([self.weight])

    forward = ops.defines()(nn.Linear.forward)

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Whether its weight is in bfloat16, and it lies row by row."""
        in_rows = all(x.is_contiguous() for x in linear.parameters())
        return in_rows and linear.weight.dtype == torch.bfloat16


FORWARDS.add(LinearByRow.forward)


def _not_one_row(linear: nn.Linear, input: Tensor) -> str:
    return _without_step(linear, input)


@ops.faster(LinearByRow.forward, "cpu compiled", why_not=_not_one_row, **HALF_ON_CPU)
def _linear(linear: Any, input: Tensor) -> Tensor:
    return products_of_row(input, *linear.token_in_cpp.of(linear).maps()).view(*input.shape[:-1], -1)


# A whole layer


def _not_absorbed(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool | None = False,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
) -> str:
    if reason := _without_step(layer, hidden_states):
        return reason
    if past_key_value is None or attention_mask is not None or output_attentions:
        return "for one token after others, without a mask, that returns no attention weights"
    attention, past = layer.self_attn, past_key_value
    if type(past) not in (LatentCache, QuantizedLatentCache) or type(past.record) not in (type(None), Record):
        return "for caches of the package's own"
    if past.like != ((1, *attention.cache_features), hidden_states.dtype, hidden_states.device):
        return "for a cache of such tokens"
    tables = position_embeddings or ()
    if attention.training or (torch.is_grad_enabled() and any(x.requires_grad for x in (past.stored, *tables))):
        return "for inference"
    if type(attention.softmax_scale) not in (float, int):
        return "for a softmax_scale that is a number"
    if ops.is_off(NAME):
        return "attention in C++ is switched off"
    form = attention.form if attention.form != "auto" else attention.cheaper_form(1, past.length + 1)
    return "" if form == "absorbed" else "for the absorbed form"


@ops.faster(DeepseekV2DecoderLayer.forward, "cpu compiled", why_not=_not_absorbed, **HALF_ON_CPU)
def _layer(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool | None = False,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
) -> tuple[Any, ...]:
    attention, past, tables, found = layer.self_attn, past_key_value, position_embeddings, layer.token_in_cpp.of(layer)
    if tables is None:
        tables = position_tables(attention.config, hidden_states, position_ids, past)
    tables = [x.float().contiguous() for x in tables]
    room = past.stored.new_empty(1, 1, past.stored.shape[-1])
    present = past.append(room) if past.record is None else past.append_records(room)
    place = present.stored, *format_of(past, attention.kv_lora_rank)
    numbers = [*found.epsilons(), attention.softmax_scale]
    gains, *maps = found.gains_and_maps()
    hidden_states, x = attended(hidden_states, *tables, *place, *attention.up_matrices(), gains, numbers, *maps)
    hidden_states = _feed(layer.mlp, found.maps(), x, hidden_states)
    return (hidden_states, present) if use_cache else (hidden_states,)


def mark_steps(module: nn.Module) -> list[Any]:
    """Mark and return the layers, MLPs and MoE in it of which one token can run in C++: with plain bfloat16 weights, or codes
    over it, int8 or four bits that are laid out, on the CPU, that run no more than was made of them."""

    def fits(name: str, part: nn.Module) -> bool:
        place = name.rpartition(".")[2]
        if name and not isinstance(part, PLACES.get(place, ())):
            return False
        if not type(part).__module__.startswith(OURS) or not _runs_forward(type(part), part.__dict__):
            return False
        if isinstance(part, RoutedExperts | nn.Linear) and not (is_plain(part) or type(part) is LinearByRow):
            return False
        weights: list[Tensor] = list(part.parameters(recurse=False))
        if isinstance(part, DeepseekV2RMSNorm) and not weights:
            return False
        if isinstance(part, MoEGate):
            weights = []  # widened in any case
        elif isinstance(part, QuantizedWeight):
            weights += part.like, part.scales  # the dtype that the codes stand for, and that of the kernels' scales
        held = (*part.parameters(recurse=False), *part.buffers(recurse=False))
        kinds = Tensor, nn.Parameter
        plain = all(type(x) in kinds and x.layout is torch.strided and x.is_cpu and x.is_contiguous() for x in held)
        if isinstance(part, QuantizedWeight) and part.kind != "int8" and not part.block_rows:
            return False  # no kernel takes these codes
        return plain and all(x.dtype == torch.bfloat16 for x in weights)

    steps: list[Any] = [part for part in module.modules() if isinstance(part, STEPS)]
    for part in steps:
        part.token_in_cpp = AsPacked(part) if all(fits(*named) for named in part.named_modules()) else None
        if part.token_in_cpp and not _takes_zeros(part):
            part.token_in_cpp = None
    marked = [part for part in steps if part.token_in_cpp]
    for part in marked:
        found = part.token_in_cpp.of(part)
        use_large_pages(_at(found.attention + found.others))
    return marked


@torch.no_grad()
def _takes_zeros(part: Any) -> bool:
    """Whether the operators take what the part holds. Sizes that do not belong together are left to the usual ways."""
    features = part.gate.weight.shape[1] if isinstance(part, DeepseekV2MoE) else part.hidden_size
    token = torch.zeros(1, 1, features, dtype=torch.bfloat16, device="cpu")
    try:
        if isinstance(part, DeepseekV2DecoderLayer):
            _layer(part, token, past_key_value=part.self_attn.empty_cache(1))
        else:
            _mlp_or_moe(part, token)
    except (RuntimeError, TypeError):  # of the operators
        return False
    return True
