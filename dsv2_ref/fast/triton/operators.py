"""The kernels as operators of torch (``dsv2_ref::…``): with shapes for the compiler, and gradients. Their meaning is
the core's: `DeepseekV2RMSNorm`, `rotate_interleaved`, `attend`, `attend_records`, `RoutedExperts`, and `quantized_product`
and `dense_weight` of quantised weights.

The kernels' modules are imported when an operator first runs, so that importing the package never imports Triton.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from dsv2_ref.fast.products import as_operator
from dsv2_ref.quantized import QuantizedWeight
from dsv2_ref.records import Record


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _save_norm(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_of_norm(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    return *_rms_norm_backward(grad, *ctx.saved_tensors), None


@as_operator(lambda x, *_: (x.new_empty(x.shape), _statistics(x)), _backward_of_norm, _save_norm)
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from dsv2_ref.fast.triton import norm

    return norm.rms_norm_launch(x, weight, eps)


def _save_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    total, _, inverse_rms = output
    ctx.save_for_backward(total, inputs[2], inverse_rms)
    ctx.mark_non_differentiable(inverse_rms)


def _backward_of_add_norm(ctx: Any, grad_total: Tensor, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    by_total, by_weight = _rms_norm_backward(grad, *ctx.saved_tensors)
    by_both = by_total + grad_total
    return by_both, by_both, by_weight, None


@as_operator(
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape), _statistics(x)), _backward_of_add_norm, _save_add_norm
)
def _add_rms_norm(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from dsv2_ref.fast.triton import norm

    return norm.add_rms_norm_launch(update, residual, weight, eps)


def _once_only(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("the gradient of a fused norm gives no gradients in turn; run within ops.plain()")


@as_operator(lambda _, total, weight, *__: (total.new_empty(total.shape), weight.new_empty(weight.shape)), _once_only)
def _rms_norm_backward(grad: Tensor, total: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    from dsv2_ref.fast.triton import norm

    return norm.rms_norm_backward_launch(grad, total, weight, inverse_rms)


def _save_tables(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.was_backward = inputs[3]


def _backward_of_rotation(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    if any(ctx.needs_input_grad[1:3]):
        raise RuntimeError("rotate gives its tables no gradients; run within ops.plain()")
    return _rotate(grad, *ctx.saved_tensors, not ctx.was_backward), None, None, None


@as_operator(lambda x, *_: x.new_empty(x.shape), _backward_of_rotation, _save_tables)
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    from dsv2_ref.fast.triton.rotate import rotate_launch

    return rotate_launch(x, cos, sin, backward)


def _no_gradients(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError("mla_decode gives no gradients; run under torch.no_grad, or within ops.plain()")


@as_operator(lambda query, _, latent, *__: query.new_empty(*query.shape[:3], latent), _no_gradients)
def _mla_decode(query: Tensor, tokens: Tensor, latent: int, scale: float, padding: Tensor | None) -> Tensor:
    from dsv2_ref.fast.triton.decode import mla_decode_launch

    return mla_decode_launch(query, tokens, latent, scale, padding)


@as_operator(lambda query, records, format, latent, *_: query.new_empty(*query.shape[:3], latent), _no_gradients)
def _mla_decode_records(
    query: Tensor, records: Tensor, format: str, latent: int, scale: float, padding: Tensor | None
) -> Tensor:
    from dsv2_ref.fast.triton.decode import mla_records_launch

    record = Record(format, latent, query.shape[-1] - latent, query.dtype)
    return mla_records_launch(query, records, record, scale, padding)


def _no_gradients_of_products(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError("quantized_product gives no gradients; run under torch.no_grad, or within ops.plain()")


@as_operator(lambda rows, codes, *_: rows.new_empty(rows.shape[0], codes.shape[-2]), _no_gradients_of_products)
def _quantized_product(rows: Tensor, codes: Tensor, scales: Tensor, shared: int, group_ends: Tensor | None) -> Tensor:
    from dsv2_ref.fast.triton.products import quantized_product as product

    return product(rows, codes, scales, shared, group_ends)


def _dense_fake(codes: Tensor, scales: Tensor, _: int, dtype: torch.dtype) -> Tensor:
    inputs = codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1)
    return scales.new_empty(*codes.shape[:-1], inputs, dtype=dtype)


def _no_gradients_of_scales(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError("dense_weight gives no gradients; run under torch.no_grad, or within ops.plain()")


@as_operator(_dense_fake, _no_gradients_of_scales)
def _dense_weight(codes: Tensor, scales: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    from dsv2_ref.fast.triton.quantized import dense_launch

    return dense_launch(codes, scales, shared, dtype)


def _no_gradients_of_experts(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError("the experts' kernels give no gradients; run under torch.no_grad, or within ops.plain()")


@as_operator(lambda x, *_: x.new_empty(x.shape), _no_gradients_of_experts)
def _routed_experts(x: Tensor, gate_up: Tensor, down: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
    from dsv2_ref.fast.triton.few_rows import Matrices
    from dsv2_ref.fast.triton.products import routed_experts

    return routed_experts(x, Matrices(gate_up), Matrices(down), topk_idx, topk_weight)


@as_operator(lambda x, *_: x.new_empty(x.shape), _no_gradients_of_experts)
def _quantized_experts(
    x: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor, down_scales: Tensor,
    shared: list[int], topk_idx: Tensor, topk_weight: Tensor,
) -> Tensor:  # fmt: skip
    from dsv2_ref.fast.triton.few_rows import Matrices
    from dsv2_ref.fast.triton.products import routed_experts

    stacks = Matrices(gate_up, gate_up_scales, shared[0]), Matrices(down, down_scales, shared[1])
    return routed_experts(x, *stacks, topk_idx, topk_weight)


def rms_norm(
    x: Float[Tensor, "*batch hidden"], weight: Float[Tensor, "hidden"], eps: float
) -> Float[Tensor, "*batch hidden"]:
    """``weight * round(x / rms(x))``, as `DeepseekV2RMSNorm`; differentiable by ``x`` and ``weight``, once.

    Raises:
        RuntimeError: when a gradient's gradient is asked for.
    """
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(
    update: Float[Tensor, "*batch hidden"],
    residual: Float[Tensor, "*batch hidden"],
    weight: Float[Tensor, "hidden"],
    eps: float,
) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"]]:
    """``total = residual + update`` and ``rms_norm(total)``; differentiable by all three tensors, once.

    Raises:
        RuntimeError: when a gradient's gradient is asked for.
    """
    return _add_rms_norm(update, residual, weight, eps)[:2]


def rotate(
    x: Float[Tensor, "*batch dim"], cos: Float[Tensor, "*table pairs"], sin: Float[Tensor, "*table pairs"]
) -> Float[Tensor, "*batch dim"]:
    """Rotate the pairs (0, 1), (2, 3), … of at most four axes; differentiable by ``x``, not by the tables.

    Raises:
        RuntimeError: when the tables' gradients are asked for.
    """
    return _rotate(x, cos, sin, False)


def mla_decode(
    query: Float[Tensor, "batch heads seq width"],
    tokens: Float[Tensor, "batch kv_seq width"],
    latent: int,
    scale: float,
    padding: Bool[Tensor, "batch kv_seq"] | None = None,
) -> Float[Tensor, "batch heads seq latent"]:
    """Attention to one key for all heads, causal from the bottom right; a query that sees no key gives zeros.

    Raises:
        RuntimeError: when a gradient is asked for.
    """
    return _mla_decode(query, tokens, latent, scale, padding)


def mla_decode_records(
    query: Float[Tensor, "batch heads seq width"],
    records: UInt8[Tensor, "batch kv_seq bytes"],
    format: str,
    latent: int,
    scale: float,
    padding: Bool[Tensor, "batch kv_seq"] | None = None,
) -> Float[Tensor, "batch heads seq latent"]:
    """`mla_decode` over the records of a `QuantizedLatentCache` of the dtype of the query, in ``fp8`` or ``int8``.

    Raises:
        RuntimeError: when a gradient is asked for.
    """
    return _mla_decode_records(query, records, format, latent, scale, padding)


def quantized_product(
    rows: Float[Tensor, "rows inputs"],
    codes: Shaped[Tensor, "*groups outputs stored"],
    scales: Float[Tensor, "*groups row_blocks column_blocks"],
    shared: int,
    group_ends: Int[Tensor, "groups"] | None = None,
) -> Float[Tensor, "rows outputs"]:
    """``rows @ weight.T`` for the codes and scales of a `QuantizedWeight`, of which ``shared`` neighbours in a row have
    one scale; with ``group_ends``, of a stack of them for consecutive groups of rows.

    Raises:
        RuntimeError: when a gradient is asked for.
    """
    return _quantized_product(rows, codes, scales, shared, group_ends)


def dense_weight(
    codes: Shaped[Tensor, "*stack outputs stored"],
    scales: Float[Tensor, "*stack row_blocks column_blocks"],
    shared: int,
    dtype: torch.dtype,
) -> Float[Tensor, "*stack outputs inputs"]:
    """The matrices that codes and scales of a `QuantizedWeight` stand for, in one pass over memory."""
    return _dense_weight(codes, scales, shared, dtype)


def routed_experts(
    x: Float[Tensor, "tokens hidden"],
    gate_up: Float[Tensor, "experts twice_wide hidden"],
    down: Float[Tensor, "experts hidden wide"],
    topk_idx: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens hidden"]:
    """Σ weight · expert(token) over a token's choices, as `RoutedExperts`: of one or two tokens in two launches, and of some
    more in five.

    Raises:
        RuntimeError: when a gradient is asked for.
    """
    return _routed_experts(x, gate_up, down, topk_idx, topk_weight)


def quantized_experts(
    x: Float[Tensor, "tokens hidden"],
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    topk_idx: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens hidden"]:
    """`routed_experts` by codes and scales: those of chosen experts alone are read.

    Raises:
        RuntimeError: when a gradient is asked for.
    """
    weights = gate_up.codes, gate_up.scales, down.codes, down.scales
    return _quantized_experts(x, *weights, [gate_up.group, down.group], topk_idx, topk_weight)
