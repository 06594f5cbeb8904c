"""Fused kernels for CUDA in Triton, registered as ways of what the core defines.

They serve CUDA tensors in float32, float16 and bfloat16 where Triton is installed and can compile, on NVIDIA GPUs of the
Ampere generation or newer; everywhere else the layer runs in plain PyTorch. The environment variable ``DSV2_KERNELS=0``
leaves them out, and so does ``with ops.without("triton"):``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dsv2_ref import ops
from dsv2_ref.attention import attend
from dsv2_ref.fast.triton import operators, plan
from dsv2_ref.fast.triton.available import DEVICE, HALF_AND_SINGLE, alike, cannot_run
from dsv2_ref.layer import DeepseekV2DecoderLayer
from dsv2_ref.masks import Visibility
from dsv2_ref.moe import RoutedExperts
from dsv2_ref.quantized import QuantizedWeight, dense_weight, quantized_product
from dsv2_ref.quantized_modules import QuantizedExperts
from dsv2_ref.records import QuantizedLatentCache, attend_records
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from dsv2_ref.rope import apply_rotary

ON_GPU: dict[str, Any] = {"device": DEVICE, "dtypes": HALF_AND_SINGLE}

LARGEST_ROW = 8192  # features of a norm with a gradient: more do not fit the registers

# Up to which the decoding kernel serves: sizes of a cached token, by the shared memory of a multiprocessor; queries of
# a sequence, as keys that causal order hides are read, too; and sequences, by the second axis of a launch.
LARGEST_LATENT, LARGEST_ROPE, DECODED_AT_ONCE, MOST_SEQUENCES = 512, 64, 8, 2**16 - 1

MOST_MATRICES = 2**16 - 1  # that are written out, by the third axis of a launch
MOST_CHOICES = 2**21  # of quantised experts: half of the tiles of 64 rows that a launch's second axis takes


def _not_for_norms(*tensors: Tensor) -> str:
    wide = tensors[0].shape[-1]
    if wide > LARGEST_ROW and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return f"the gradient of {wide} features does not fit the registers"
    return alike(*tensors)


def _not_the_norm(norm: DeepseekV2RMSNorm, hidden_states: Tensor) -> str:
    return _not_for_norms(hidden_states, norm.weight)


@ops.faster(DeepseekV2RMSNorm.forward, "triton norm", why_not=_not_the_norm, **ON_GPU)
def _norm(norm: DeepseekV2RMSNorm, hidden_states: Tensor) -> Tensor:
    return operators.rms_norm(hidden_states, norm.weight, norm.variance_epsilon)


def _not_the_rotation(q_pe: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor) -> str:
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        return "for float32 tables"
    if cos.requires_grad or sin.requires_grad:
        return "gives the tables no gradients"
    return alike(q_pe, k_pe)


@ops.faster(apply_rotary, "triton rotation", why_not=_not_the_rotation, **ON_GPU)
def _rotate(q_pe: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return operators.rotate(q_pe, cos[:, None], sin[:, None]), operators.rotate(k_pe, cos, sin)


@ops.once_when_compiling
def _gpu(device: torch.device) -> plan.Gpu:
    return plan.gpu_of(device)


def _not_a_step(query: Tensor, latent: int, visible: Visibility, dropout: float) -> str:
    """Why these are not the few queries of a decoding step that the kernel takes."""
    batch, _, seq, width = query.shape
    if visible.mask is not None or dropout:
        return "no masks per query and no dropout"
    if latent > LARGEST_LATENT or width - latent > LARGEST_ROPE:
        return f"tokens of {latent} + {width - latent} features do not fit a tile"
    if seq > DECODED_AT_ONCE or batch > MOST_SEQUENCES:
        return f"for up to {DECODED_AT_ONCE} queries of {MOST_SEQUENCES} sequences"
    return ""


def _not_decoding(
    query: Tensor, key: Tensor, value: Tensor, visible: Visibility, scale: float, dropout: float = 0.0, **_: Any
) -> str:
    heads, seq = query.shape[1:3]
    if reason := _not_a_step(query, value.shape[-1], visible, dropout) or alike(query, key):
        return reason
    plain = query.dtype != torch.float16  # whose scores plain products could not hold
    if plain and not plan.decoding_pays(heads * seq, query.element_size(), _gpu(query.device)):
        return f"{heads} · {seq} queries of a sequence suit plain products better"
    return ""


@ops.faster(
    attend, "triton decoding", where={"implementation": "products"}, gradients=False, why_not=_not_decoding, **ON_GPU
)
def _decode(
    query: Tensor, key: Tensor, value: Tensor, visible: Visibility, scale: float, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    return operators.mla_decode(query, key[:, 0], value.shape[-1], scale, visible.padding), None


def _not_the_records(
    query: Tensor, cache: QuantizedLatentCache, visible: Visibility, scale: float, dropout: float = 0.0, **_: Any
) -> str:
    record, stored = cache.record, cache.stored
    if record.format not in ("fp8", "int8") or record.dtype != query.dtype:
        return f"no records in {record.format} of {record.dtype} for queries in {query.dtype}"
    if record.latent % 4 or stored.shape[-1] % 4:
        return f"records of {record.latent} codes in {stored.shape[-1]} bytes hold no aligned float32"
    if reason := _not_a_step(query, record.latent, visible, dropout):
        return reason
    if query.device != stored.device:
        return "not all on one GPU"
    return cannot_run(query.device)


@ops.faster(
    attend_records,
    "triton decoding of records",
    where={"implementation": "products"},
    gradients=False,
    why_not=_not_the_records,
    device=DEVICE,
    dtypes=(torch.float16, torch.bfloat16),  # in float32 a token does not fit the registers
)
def _decode_records(
    query: Tensor, cache: QuantizedLatentCache, visible: Visibility, scale: float, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    record = cache.record
    padding = visible.padding
    out = operators.mla_decode_records(query, cache.stored, record.format, record.latent, scale, padding)
    return out, None


def _not_by_codes(rows: Tensor, *weights: QuantizedWeight) -> str:
    if not rows.is_meta and torch.is_autocast_enabled(rows.device.type):
        return "torch.autocast chooses the dtype"
    if torch.is_grad_enabled() and any(weight.scales.requires_grad for weight in weights):
        return "gives no gradients"
    return alike(rows, *(weight.like for weight in weights))


def _not_the_product(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> str:
    if weight.codes[place].ndim != 2:
        return "for one matrix"
    if rows.shape[-1] != weight.shape[-1]:
        return f"not for rows of {rows.shape[-1]}"
    if rows[..., 0].numel() > plan.MOST_ROWS:
        return f"more than {plan.MOST_ROWS} rows suit a dense matrix better"
    return _not_by_codes(rows, weight)


@ops.faster(quantized_product, "triton codes", gradients=False, why_not=_not_the_product, **ON_GPU)
def _quantized_product(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> Tensor:
    flat = rows.reshape(-1, rows.shape[-1])
    out = operators.quantized_product(flat, weight.codes[place], weight.scales[place], weight.group)
    return out.view(*rows.shape[:-1], weight.shape[-2])


def _not_dense(codes: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> str:
    if dtype not in HALF_AND_SINGLE:
        return f"not for {dtype}"
    if math.prod(codes.shape[:-2]) > MOST_MATRICES:
        return f"for up to {MOST_MATRICES} matrices"
    return cannot_run(codes.device) if codes.device == scales.device else "not all on one GPU"


@ops.faster(dense_weight, "triton dense", gradients=False, device=DEVICE, why_not=_not_dense)
def _dense_weight(codes: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    return operators.dense_weight(codes, scales, group, dtype)


def _shapes_differ(x: Tensor, hidden: int, topk_idx: Tensor, topk_weight: Tensor) -> str:
    """What the definition refuses, or takes as one number for all."""
    fit = x.shape[-1] == hidden and topk_idx.shape == topk_weight.shape and len(topk_idx) == len(x)
    return "" if fit else "shapes do not fit"


def _not_the_routed(experts: RoutedExperts, hidden_states: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> str:
    if reason := _shapes_differ(hidden_states, experts.gate_up_proj.shape[-1], topk_idx, topk_weight):
        return reason
    if not hidden_states.is_meta and torch.is_autocast_enabled(hidden_states.device.type):
        return "torch.autocast chooses the dtype"
    return alike(hidden_states, experts.gate_up_proj, experts.down_proj)


@ops.faster(RoutedExperts.forward, "triton experts", gradients=False, why_not=_not_the_routed, **ON_GPU)
def _routed_experts(experts: RoutedExperts, hidden_states: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
    return operators.routed_experts(hidden_states, experts.gate_up_proj, experts.down_proj, topk_idx, topk_weight)


def _not_the_experts(experts: QuantizedExperts, hidden_states: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> str:
    if reason := _shapes_differ(hidden_states, experts.gate_up_proj.shape[-1], topk_idx, topk_weight):
        return reason
    if topk_idx.numel() > MOST_CHOICES:
        return f"for up to {MOST_CHOICES} choices"
    return _not_by_codes(hidden_states, experts.gate_up_proj, experts.down_proj)


@ops.faster(QuantizedExperts.forward, "triton grouped codes", gradients=False, why_not=_not_the_experts, **ON_GPU)
def _quantized_experts(
    experts: QuantizedExperts, hidden_states: Tensor, topk_idx: Tensor, topk_weight: Tensor
) -> Tensor:
    return operators.quantized_experts(hidden_states, experts.gate_up_proj, experts.down_proj, topk_idx, topk_weight)


def _not_the_layer(layer: DeepseekV2DecoderLayer, hidden_states: Tensor, *_: Any, **__: Any) -> str:
    norm = layer.post_attention_layernorm
    hooks = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    if type(norm) is not DeepseekV2RMSNorm or hooks:
        return "the second norm is replaced or has hooks"
    return _not_for_norms(hidden_states, norm.weight)


@ops.faster(DeepseekV2DecoderLayer.forward, "triton add and norm", why_not=_not_the_layer, **ON_GPU)
def _layer(
    layer: DeepseekV2DecoderLayer,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool | None = False,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
) -> tuple[Any, ...]:
    """The layer with its first addition and its second norm in one pass over memory."""
    tables = {} if position_embeddings is None else {"position_embeddings": position_embeddings}
    attn_output, attn_weights, present = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_value=past_key_value,
        output_attentions=bool(output_attentions),
        use_cache=bool(use_cache),
        **tables,
    )
    norm = layer.post_attention_layernorm
    if _not_for_norms(attn_output, hidden_states, norm.weight) or attn_output.shape != hidden_states.shape:
        total = hidden_states + attn_output
        normed = norm(total)
    else:
        total, normed = operators.add_rms_norm(attn_output, hidden_states, norm.weight, norm.variance_epsilon)
    outputs = (total + layer.mlp(normed),)
    outputs += (attn_weights,) if output_attentions else ()
    return outputs + ((present,) if use_cache else ())
