"""One token through a layer as compiled graphs, for CPUs.

A step of decoding multiplies one row by many matrices, which costs what reading them costs, and between two products stand
operations that take longer to start than to run. `dsv2_ref.fast.packed.pack_weights` with ``compiled=True`` gives modules a
`Step`: graphs in which the products are those of `dsv2_ref.fast.rows`, and the compiler fuses the rest.
"""

import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from dsv2_ref import ops
from dsv2_ref.attention import attend
from dsv2_ref.fast.cpu import HALF_ON_CPU
from dsv2_ref.fast.decode import attend_to_cache, serves
from dsv2_ref.fast.native import cannot_build, row_products, takes
from dsv2_ref.fast.rows import linear_row, mlp_row
from dsv2_ref.layer import DeepseekV2DecoderLayer
from dsv2_ref.masks import Visibility
from dsv2_ref.mla import DeepseekV2Attention
from dsv2_ref.moe import DeepseekV2MLP, DeepseekV2MoE, MoEGate, RoutedExperts
from dsv2_ref.quantize import is_plain
from dsv2_ref.quantized import QuantizedWeight
from dsv2_ref.quantized_modules import QuantizedExperts, QuantizedLinear
from dsv2_ref.records import Record, attend_records
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from dsv2_ref.rope import apply_rotary, position_tables


def _may_change(guards: Any) -> list[bool]:
    """Which of the compiler's guards are asked at every token: for what the modules hold, and for torch's state, but not
    for this package's code."""
    return [not guard.is_global and "__closure__" not in guard.name for guard in guards]


GUARDS: dict[str, Any] = {"guard_filter_fn": _may_change}


class Step:
    """Compiles what modules do to one token, at the first token. Modules that share a `Step` share graphs; a copy compiles
    its own."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._seen: set[Any] = set()  # of which modules there are graphs
        self._lock = threading.RLock()

    def __call__(self, definition: Any, module: nn.Module, *others: Any) -> Any:
        """What the function, or the definition behind it, gives."""
        tensors = (x.flatten().view(x.shape) if isinstance(x, Tensor) else x for x in others)
        args = module, *tensors  # else strides of sizes of 1 would count
        constants = [x for x in others if not isinstance(x, Tensor)]
        # A graph keeps the ways that it was made of, and is made for a number of threads.
        key = definition, ops.is_off("cpu row"), torch.get_num_threads(), *constants
        if (key, id(module)) in self._seen:
            return ops.unwatched(self._compiled[key], *args)
        with self._lock:  # else every thread that waits for the compiler compiles once more
            if key not in self._compiled:
                plain = getattr(definition, "__wrapped__", definition)
                code = plain.__code__.replace()  # the compiler counts the graphs of a code, and stops at the eighth
                own = types.FunctionType(code, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
                self._compiled[key] = torch.compile(own, dynamic=False, options=GUARDS)
            out = ops.unwatched(self._compiled[key], *args)
            self._seen.add((key, id(module)))
            return out

    def __reduce__(self) -> Any:
        return Step, ()


def _without_step(module: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> str:
    if not hasattr(module, "step"):
        return "not packed with compiled=True"
    if hidden_states.numel() != hidden_states.shape[-1]:
        return "for one token"
    if module.training or torch.is_autocast_enabled("cpu"):
        return "for inference without torch.autocast"
    if type(hidden_states) is not Tensor or torch._C._len_torch_dispatch_stack():
        return "for plain tensors, whose operations nothing watches"
    if nn.modules.module._has_any_global_hook() or not runs_as_made(module):
        return "a part of it has a hook, or became another"
    return cannot_build()


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KNOWN: tuple[Any, ...] = (
    DeepseekV2DecoderLayer, DeepseekV2RMSNorm, DeepseekV2Attention, DeepseekV2MLP, DeepseekV2MoE, MoEGate,
    RoutedExperts, QuantizedExperts, QuantizedLinear, QuantizedWeight, nn.Linear,
)  # fmt: skip
FORWARDS = {kind.forward for kind in KNOWN}


def runs_as_made(module: nn.Module) -> bool:
    """Whether no part runs more than the ``forward`` of a known class, over weights that the ways for one row take. The compiler
    has no guards for hooks."""
    own = module.__dict__
    kind = type(module)
    known = kind.forward in FORWARDS and kind.__module__.startswith(("dsv2_ref.", "torch."))
    if "forward" in own or not known or any(own[hooks] for hooks in HOOKS):
        return False
    if own.get("kind", "int8") != "int8" and not own.get("block_rows"):
        return False
    return all(runs_as_made(part) for part in own["_modules"].values() if part is not None)


@ops.faster(DeepseekV2MLP.forward, "cpu compiled", why_not=_without_step, **HALF_ON_CPU)
def _mlp_step(mlp: Any, hidden_states: Tensor) -> Tensor:
    return mlp.step(mlp_row, mlp, hidden_states)


@ops.faster(DeepseekV2MoE.forward, "cpu compiled", why_not=_without_step, **HALF_ON_CPU)
def _moe_step(moe: Any, hidden_states: Tensor) -> Tensor:
    return moe.step(DeepseekV2MoE.forward, moe, hidden_states)


# A whole layer: its attention is between two graphs, as the number of its keys varies


def _not_absorbed(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool | None = False,
    *_: Any,
    **__: Any,
) -> str:
    if reason := _without_step(layer, hidden_states):
        return reason
    if past_key_value is None or attention_mask is not None or output_attentions:
        return "for one token after others, without a mask, that returns no attention weights"
    attention, past = layer.self_attn, past_key_value
    if past.like != ((1, *attention.cache_features), hidden_states.dtype, hidden_states.device):
        return "for a cache of such tokens"
    if attention.training or (torch.is_grad_enabled() and past.stored.requires_grad):
        return "for inference"
    if layer.input_layernorm.weight.dtype != hidden_states.dtype:
        return "for weights in the dtype of the token"
    form = attention.form if attention.form != "auto" else attention.cheaper_form(1, past.length + 1)
    return "" if form == "absorbed" else "for the absorbed form"


def before_attention(
    layer: Any,
    hidden_states: Float[Tensor, "1 1 hidden"],
    cos: Float[Tensor, "1 1 pairs"],
    sin: Float[Tensor, "1 1 pairs"],
    record: Record | None,
) -> tuple[Float[Tensor, "1 heads 1 features"], Shaped[Tensor, "1 1 stored"]]:
    """The absorbed query of every head, and what is cached of the token, as `DeepseekV2Attention.forward` makes them."""
    attention: Any = layer.self_attn
    H, C, R, N = attention.num_heads, attention.kv_lora_rank, attention.rotary_dim, attention.qk_nope_head_dim
    x = layer.input_layernorm(hidden_states)
    if attention.config.q_lora_rank is None:
        query = linear_row(attention.q_proj, x)
    else:
        query = linear_row(attention.q_b_proj, attention.q_a_layernorm(linear_row(attention.q_a_proj, x)))
    q_nope, q_pe = query.view(1, 1, H, N + R).transpose(1, 2).split((N, R), dim=-1)
    compressed_kv, k_pe = linear_row(attention.kv_a_proj_with_mqa, x).split((C, R), dim=-1)
    q_pe, k_pe = apply_rotary(q_pe, k_pe, cos, sin)
    w_uk, _ = attention.up_matrices()  # (H, N, C)
    absorbed = (q_nope[0].mT.float() * w_uk.float()).sum(dim=1)[None, :, None].to(q_pe.dtype)  # (1, H, 1, C)
    new = torch.cat((attention.kv_a_layernorm(compressed_kv), k_pe), dim=-1)
    return torch.cat((absorbed, q_pe), dim=-1), new if record is None else record.encode(new)


def after_attention(
    layer: Any,
    hidden_states: Float[Tensor, "1 1 hidden"],
    out: Float[Tensor, "1 heads 1 latent"],
) -> Float[Tensor, "1 1 hidden"]:
    """The rest of the layer, from the mixed latents of every head on."""
    attention: Any = layer.self_attn
    _, w_uv = attention.up_matrices()  # (H, V, C)
    mixed = out[0, :, 0]  # (H, C)
    out = row_products(mixed, w_uv) if takes(w_uv) else (w_uv.float() * mixed[:, None].float()).sum(dim=-1)
    out = out.to(hidden_states.dtype)
    hidden_states = hidden_states + linear_row(attention.o_proj, out.view(1, 1, -1))
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def attend_to_all(
    query: Float[Tensor, "1 heads 1 features"], cache: Any, attention: Any
) -> Float[Tensor, "1 heads 1 latent"]:
    """The mixed latents of every head, from all that is cached."""
    latent, scale = attention.kv_lora_rank, attention.softmax_scale
    how = "eager" if attention.implementation == "eager" else "products"
    if how == "products" and query.dtype == torch.bfloat16 and serves(cache.record) and cache.stored.stride(-1) == 1:
        return attend_to_cache(query, cache, latent, scale)
    rest = Visibility(1, cache.length, query.device), scale
    if cache.record is not None:
        return attend_records(query, cache, *rest, implementation=how)[0]
    key = cache.tokens[:, None]
    return attend(query, key, key[..., :latent], *rest, implementation=how)[0]


@ops.faster(DeepseekV2DecoderLayer.forward, "cpu compiled", why_not=_not_absorbed, **HALF_ON_CPU)
def _layer_step(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool | None = False,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
) -> tuple[Any, ...]:
    attention, tables = layer.self_attn, position_embeddings
    if tables is None:
        tables = position_tables(attention.config, hidden_states, position_ids, past_key_value)
    record = past_key_value.record
    query, new = layer.step(before_attention, layer, hidden_states, *tables, record)
    present = past_key_value.append(new) if record is None else past_key_value.append_records(new)
    out = attend_to_all(query, present, attention)
    hidden_states = layer.step(after_attention, layer, hidden_states, out)
    return (hidden_states, present) if use_cache else (hidden_states,)


def steps_of(module: nn.Module) -> list[Any]:
    """The layers, MLPs and MoE in it that the compiler can make into graphs for one token: with plain bfloat16 weights, or
    codes over it that the ways for one row take, on the CPU, that run no more than was made of them."""

    def fits(part: nn.Module) -> bool:
        if isinstance(part, RoutedExperts | nn.Linear) and not is_plain(part):
            return False
        weights: list[Tensor] = list(part.parameters(recurse=False))
        if isinstance(part, MoEGate):
            weights = []  # widened in any case
        elif isinstance(part, QuantizedWeight):
            weights.append(part.like)  # of the dtype that the codes stand for
        return all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in weights)

    kinds = DeepseekV2DecoderLayer | DeepseekV2MLP | DeepseekV2MoE
    found = (part for part in module.modules() if isinstance(part, kinds))
    return [part for part in found if runs_as_made(part) and all(fits(x) for x in part.modules())]
