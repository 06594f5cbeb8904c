"""One token through a layer in C++ (``layer.cpp``), for CPUs.

A step of decoding multiplies one row by many matrices, which costs what reading them costs, and between two products stand
operations that take longer to start than to run. `dsv2_ref.fast.packed.pack_weights` with ``compiled=True`` marks the modules
whose single tokens go this way: two operators for a layer, in place of some sixty.
"""

from operator import itemgetter
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
    if hidden_states.ndim == 0 or hidden_states.numel() != hidden_states.shape[-1]:
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
    """A module as it was packed: what it is made of, and where the norms and maps lie that the operators take."""

    def __init__(self, module: Any) -> None:
        self.description = _described(module)
        self.parts: list[Any] = []
        self._find(module)

    def __getstate__(self) -> dict[str, Any]:
        return {"description": self.description, "parts": []}  # copies find what is theirs

    def _find(self, module: Any) -> None:
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
        self.parts = [(x, type(x), x.__dict__.get("block_rows"), dict(x._modules)) for x in module.modules()]
        places = {
            id(x): (part.__dict__, kind, name)
            for part, *_ in self.parts
            for kind in HELD
            for name, x in part.__dict__[kind].items()
        }
        self.norms, self.gate = norms, getattr(mlp, "gate", None)
        self.gains = [places[id(norm.weight)] for norm in norms]
        tensors, self.attention_layout = as_parts(*maps)
        self.attention = [places[id(x)] for x in tensors]
        if isinstance(module, nn.Linear):
            maps = [module]
        elif self.gate is None:
            maps = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        else:
            maps, shared = [mlp.experts.gate_up_proj, mlp.experts.down_proj], mlp.shared_experts
            if shared is not None:
                maps += shared.gate_proj, shared.up_proj, shared.down_proj
        others, self.layout = as_parts(*maps)
        self.others = [places[id(x)] for x in others]
        self.layouts = _layouts(self.parts)
        use_large_pages(tensors + others)

    def gains_and_maps(self) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """The weights of the norms, and the maps of attention, as the operators take them."""
        return _at(self.gains), _at(self.attention), self.attention_layout

    def maps(self) -> tuple[list[Tensor], list[int]]:
        """The other maps."""
        return _at(self.others), self.layout

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is made as it was, and none of its parts runs more than the ``forward`` of a known class."""
        if not self._is_same(module):
            self.parts = []
            if _described(module) != self.description:
                return False
            self._find(module)
        numbers = [norm.variance_epsilon for norm in self.norms]
        if self.gate is not None:
            numbers += self.gate.routed_scaling_factor, self.gate.top_k, self.gate.n_group, self.gate.topk_group
            if any(type(x) is not int for x in numbers[-3:]):
                return False
        return all(type(x) in (float, int) for x in numbers)

    def _is_same(self, module: nn.Module) -> bool:
        if not self.parts or self.parts[0][0] is not module:
            return False
        for part, kind, block_rows, children in self.parts:
            own = part.__dict__
            if type(part) is not kind or not _runs_forward(kind, own) or own.get("block_rows") != block_rows:
                return False
            if own["_modules"] != children:
                return False
        return _layouts(self.parts) == self.layouts


HELD = "_parameters", "_buffers"


def _at(places: list[Any]) -> list[Tensor]:
    return [own[kind][name] for own, kind, name in places]


def _layouts(parts: list[Any]) -> list[Any]:
    held = [x for part, *_ in parts for kind in HELD for x in part.__dict__[kind].values()]
    return [None if x is None else (type(x), x.dtype, x.shape, x.is_cpu, x.is_contiguous()) for x in held]


def _runs_forward(kind: Any, own: dict[str, Any]) -> bool:
    """Whether a call of such a part runs the ``forward`` of a known class, and nothing else."""
    changed = "forward" in own or any(hooks_of(own)) or own.get("_compiled_call_impl") is not None
    return not changed and kind.forward in FORWARDS


def _held(own: dict[str, Any]) -> tuple[Tensor | None, ...]:
    return *own["_parameters"].values(), *own["_buffers"].values()


def _layout(x: Tensor) -> tuple[Any, ...]:
    return type(x), x.dtype, x.shape, x.is_cpu, x.is_contiguous()


def _described(module: nn.Module) -> list[Any]:
    """Of every part its class, whether that is all that runs, and what tensors it holds."""
    found: list[Any] = []
    for name, part in module.named_modules():
        own, kind = part.__dict__, type(part)
        found.append((name, kind, _runs_forward(kind, own), own.get("block_rows"), _layouts([(part,)])))
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
    return _feed(mlp, mlp.token_in_cpp.maps(), hidden_states, None).view(*hidden_states.shape[:-1], -1)


class LinearByRow(nn.Linear):
    """A plain linear map outside of layers, such as a model's head, whose product with one row reads its weight as it lies."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(linear.__dict__)
        self.token_in_cpp = AsPacked(self)

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
    return products_of_row(input, *linear.token_in_cpp.maps()).view(*input.shape[:-1], -1)


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
    attention, past, tables, made = layer.self_attn, past_key_value, position_embeddings, layer.token_in_cpp
    if tables is None:
        tables = position_tables(attention.config, hidden_states, position_ids, past)
    tables = [x.float().contiguous() for x in tables]
    room = past.stored.new_empty(1, 1, past.stored.shape[-1])
    present = past.append(room) if past.record is None else past.append_records(room)
    place = present.stored, *format_of(past, attention.kv_lora_rank)
    numbers = [*(norm.variance_epsilon for norm in made.norms), attention.softmax_scale]
    gains, *maps = made.gains_and_maps()
    hidden_states, x = attended(hidden_states, *tables, *place, *attention.up_matrices(), gains, numbers, *maps)
    hidden_states = _feed(layer.mlp, made.maps(), x, hidden_states)
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
        plain = all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.is_contiguous() for x in held)
        if isinstance(part, QuantizedWeight) and part.kind != "int8" and not part.block_rows:
            return False  # no kernel takes these codes
        return plain and all(x.dtype == torch.bfloat16 for x in weights)

    found: list[Any] = [part for part in module.modules() if isinstance(part, STEPS)]
    for part in found:
        part.token_in_cpp = AsPacked(part) if all(fits(*named) for named in part.named_modules()) else None
        if part.token_in_cpp and not _takes_zeros(part):
            part.token_in_cpp = None
    return [part for part in found if part.token_in_cpp]


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
