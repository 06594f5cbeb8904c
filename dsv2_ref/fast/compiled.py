"""One token through a layer in C++ (``layer.cpp``), for CPUs.

A step of decoding multiplies one row by many matrices, which costs what reading them costs, and between two products stand
operations that take longer to start than to run. `dsv2_ref.fast.packed.pack_weights` with ``compiled=True`` marks the modules
whose single tokens go this way: five or six operators, beside those of the gate, in place of some sixty.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv2_ref import ops
from dsv2_ref.attention import attend
from dsv2_ref.cache import LatentCache
from dsv2_ref.fast.cpu import HALF_ON_CPU
from dsv2_ref.fast.decode import attend_to_cache, format_of, serves
from dsv2_ref.fast.layer import absorbed, as_parts, attended, fed_forward, normalised_products
from dsv2_ref.fast.native import is_watched, why_not_built
from dsv2_ref.layer import DeepseekV2DecoderLayer
from dsv2_ref.masks import Visibility
from dsv2_ref.mla import DeepseekV2Attention
from dsv2_ref.moe import DeepseekV2MLP, DeepseekV2MoE, MoEGate, RoutedExperts
from dsv2_ref.quantize import is_plain
from dsv2_ref.quantized import QuantizedWeight
from dsv2_ref.quantized_modules import QuantizedExperts, QuantizedLinear
from dsv2_ref.records import QuantizedLatentCache, Record, attend_records
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from dsv2_ref.rope import position_tables


def _without_step(module: nn.Module, hidden_states: Tensor) -> str:
    made = getattr(module, "token_in_cpp", None)
    if made is None:
        return "not packed with compiled=True"
    if hidden_states.ndim == 0 or hidden_states.numel() != hidden_states.shape[-1]:
        return "for one token"
    if module.training or torch.is_autocast_enabled("cpu"):
        return "for inference without torch.autocast"
    if type(hidden_states) is not Tensor or is_watched():
        return "for plain tensors, whose operations nothing watches"
    if nn.modules.module._has_any_global_hook() or described(module) != made:
        return "a part of it has a hook, or became another"
    return why_not_built("layer.cpp")


STEPS = DeepseekV2DecoderLayer, DeepseekV2MLP, DeepseekV2MoE
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LINEAR: tuple[Any, ...] = nn.Linear, QuantizedLinear
PLACES: dict[str, tuple[Any, ...]] = {
    "self_attn": (DeepseekV2Attention,), "mlp": (DeepseekV2MLP, DeepseekV2MoE), "gate": (MoEGate,),
    "experts": (RoutedExperts, QuantizedExperts), "shared_experts": (DeepseekV2MLP,), "gate_up_proj": (QuantizedWeight,),
    "down_proj": (*LINEAR, QuantizedWeight), "kv_a_proj_with_mqa": LINEAR,
    **dict.fromkeys(("q_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj"), LINEAR),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm"), (DeepseekV2RMSNorm,)),
}  # fmt: skip
FORWARDS = {kind.forward for kind in (*STEPS, *sum(PLACES.values(), ()))}


def described(module: nn.Module) -> tuple[Any, ...] | None:
    """What a module is made of: its class, that of every part, and what tensors they hold. None if a part runs more than the
    ``forward`` of a known class."""
    own = module.__dict__
    kind = type(module)
    known = kind.forward in FORWARDS and kind.__module__.startswith(("dsv2_ref.", "torch."))
    changed = "forward" in own or own.get("_compiled_call_impl") is not None
    if changed or not known or any(own[hooks] for hooks in HOOKS):
        return None
    held = [
        x if x is None else (type(x), x.dtype, x.shape, x.device, x.is_contiguous())
        for x in (*own["_parameters"].values(), *own["_buffers"].values())
    ]
    parts = []
    for name, part in own["_modules"].items():
        found = None if part is None else described(part)
        if part is not None and found is None:
            return None
        parts.append((name, found))
    return kind, own.get("block_rows"), tuple(held), tuple(parts)


def _feed(mlp: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    if isinstance(mlp, DeepseekV2MLP):
        return fed_forward(x, residual, None, None, *as_parts(mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    chosen, weights, _ = MoEGate.forward.__wrapped__(mlp.gate, x)
    experts, shared = mlp.experts, mlp.shared_experts
    maps = [experts.gate_up_proj, experts.down_proj]
    if shared is not None:
        maps += shared.gate_proj, shared.up_proj, shared.down_proj
    return fed_forward(x, residual, chosen, weights.float(), *as_parts(*maps))


@ops.faster(DeepseekV2MLP.forward, "cpu compiled", why_not=_without_step, **HALF_ON_CPU)
@ops.faster(DeepseekV2MoE.forward, "cpu compiled", why_not=_without_step, **HALF_ON_CPU)
def _mlp_or_moe(mlp: Any, hidden_states: Tensor) -> Tensor:
    return _feed(mlp, hidden_states.reshape(1, 1, -1), None).view(*hidden_states.shape[:-1], -1)


class LinearByRow(nn.Linear):
    """A plain linear map outside of layers, such as a model's head, whose product with one row reads its weight as it lies."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(linear.__dict__)
        self.token_in_cpp = described(self)

    forward = ops.defines()(nn.Linear.forward)


FORWARDS.add(LinearByRow.forward)


def _not_one_row(linear: nn.Linear, input: Tensor) -> str:
    return _without_step(linear, input)


@ops.faster(LinearByRow.forward, "cpu compiled", why_not=_not_one_row, **HALF_ON_CPU)
def _linear(linear: nn.Linear, input: Tensor) -> Tensor:
    return normalised_products(input, None, 0.0, *as_parts(linear)).view(*input.shape[:-1], -1)


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
    form = attention.form if attention.form != "auto" else attention.cheaper_form(1, past.length + 1)
    return "" if form == "absorbed" else "for the absorbed form"


def attend_to_all(
    query: Float[Tensor, "1 heads 1 features"], cache: Any, attention: Any
) -> Float[Tensor, "1 heads 1 latent"]:
    """The mixed latents of every head, from all that is cached."""
    latent, scale = attention.kv_lora_rank, attention.softmax_scale
    how = "eager" if attention.implementation == "eager" else "products"
    in_cpp = how == "products" and serves(cache.record) and cache.stored.stride(-1) == 1
    if in_cpp and not why_not_built("attend.cpp"):
        return attend_to_cache(query, cache, latent, scale)
    rest = Visibility(1, cache.length, query.device), scale
    if cache.record is not None:
        return attend_records(query, cache, *rest, implementation=how)[0]
    key = cache.tokens[:, None]
    return attend(query, key, key[..., :latent], *rest, implementation=how)[0]


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
    attention, past, tables = layer.self_attn, past_key_value, position_embeddings
    if tables is None:
        tables = position_tables(attention.config, hidden_states, position_ids, past)
    tables = [x.float().contiguous() for x in tables]
    before, between, after = layer.input_layernorm, attention.kv_a_layernorm, layer.post_attention_layernorm
    w_uk, w_uv = attention.up_matrices()

    compressed = attention.config.q_lora_rank is not None
    first = attention.q_a_proj if compressed else attention.q_proj
    maps = as_parts(first, attention.kv_a_proj_with_mqa)
    both = normalised_products(hidden_states, before.weight, before.variance_epsilon, *maps)
    query, compressed_kv = both.split((first.out_features, *attention.cache_features), dim=-1)
    if compressed:
        norm, maps = attention.q_a_layernorm, as_parts(attention.q_b_proj)
        query = normalised_products(query, norm.weight, norm.variance_epsilon, *maps)
    format = format_of(past, attention.kv_lora_rank)
    query, new = absorbed(query, compressed_kv, between.weight, between.variance_epsilon, *tables, w_uk, *format)
    present = past.append(new) if past.record is None else past.append_records(new)
    out = attend_to_all(query, present, attention)
    maps = as_parts(attention.o_proj)
    hidden_states, x = attended(hidden_states, out, w_uv, *maps, after.weight, after.variance_epsilon)
    hidden_states = _feed(layer.mlp, x, hidden_states)
    return (hidden_states, present) if use_cache else (hidden_states,)


def steps_of(module: nn.Module) -> list[Any]:
    """The layers, MLPs and MoE in it of which one token can run in C++: with plain bfloat16 weights, or codes over it, int8
    or four bits that are laid out, on the CPU, that run no more than was made of them."""

    def fits(name: str, part: nn.Module) -> bool:
        place = name.rpartition(".")[2]
        if name and not isinstance(part, PLACES[place]):
            return False
        if isinstance(part, RoutedExperts | nn.Linear) and not (is_plain(part) or type(part) is LinearByRow):
            return False
        weights: list[Tensor] = list(part.parameters(recurse=False))
        if isinstance(part, MoEGate):
            weights = []  # widened in any case
        elif isinstance(part, QuantizedWeight):
            weights += part.like, part.scales  # the dtype that the codes stand for, and that of the kernels' scales
        held = (*part.parameters(recurse=False), *part.buffers(recurse=False))
        plain = all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.is_contiguous() for x in held)
        if isinstance(part, QuantizedWeight) and part.kind != "int8" and not part.block_rows:
            return False  # no kernel takes these codes
        return plain and all(x.dtype == torch.bfloat16 for x in weights)

    found = (part for part in module.modules() if isinstance(part, STEPS))
    known = (part for part in found if described(part) and all(fits(*named) for named in part.named_modules()))
    return [part for part in known if _takes_zeros(part)]


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
    except (RuntimeError, IndexError):  # of the operators, or of the gate
        return False
    return True
