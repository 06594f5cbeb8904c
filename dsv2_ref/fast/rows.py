"""Ways for one row in graphs that ``torch.compile`` makes for CPUs, with the products of `dsv2_ref.fast.native`. What stands
between the products the compiler fuses.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsv2_ref import ops
from dsv2_ref.fast.cpu import HALF_ON_CPU
from dsv2_ref.fast.native import cannot_build, row_products, row_products_of_int4, takes
from dsv2_ref.mla import is_plain_linear
from dsv2_ref.moe import DeepseekV2MLP, RoutedExperts
from dsv2_ref.quantized import QuantizedWeight, quantized_product
from dsv2_ref.quantized_modules import QuantizedExperts

TRACED: dict[str, Any] = HALF_ON_CPU | {"compiles": True}


def _not_one_row(hidden_states: Tensor) -> str:
    exporting = torch.compiler._is_exporting_flag  # torch 2.11 compiles `is_exporting` as if it were always so
    if not torch.compiler.is_compiling() or exporting:
        return "for compiled graphs"
    return cannot_build() if hidden_states.numel() == hidden_states.shape[-1] else "for one token"


def takes_rows(linear: Any) -> bool:
    """Whether this is a plain linear map without a bias, or codes that can be multiplied as they are: int8, or four bits
    laid out for torch's kernel."""
    if isinstance(linear, QuantizedWeight):
        return linear.codes.is_contiguous() and (linear.kind == "int8" or linear.block_rows > 0)
    return linear is not None and is_plain_linear(linear) and linear.bias is None and takes(linear.weight)


def _not_plain(mlp: DeepseekV2MLP, hidden_states: Tensor) -> str:
    plain = all(takes_rows(x) for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return _not_one_row(hidden_states) or ("" if plain else "for linear maps without more to them")


def linear_row(linear: Any, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
    """What a linear map, quantised or not, makes of one row. What a plain one would not take, it is left to reject."""
    plain = isinstance(linear, nn.Linear) and is_plain_linear(linear) and takes(linear.weight)
    if not plain or linear.weight.dtype != x.dtype or linear.in_features != x.shape[-1]:
        return linear(x)
    out = row_products(x.view(1, -1), linear.weight[None]).view(*x.shape[:-1], -1)
    return (out if linear.bias is None else out + linear.bias).to(x.dtype)


@ops.faster(DeepseekV2MLP.forward, "cpu row", why_not=_not_plain, **TRACED)
def mlp_row(mlp: Any, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
    """`DeepseekV2MLP.forward` of one row."""
    gate = F.silu(linear_row(mlp.gate_proj, hidden_states))
    return linear_row(mlp.down_proj, gate * linear_row(mlp.up_proj, hidden_states))


def _products(rows: Tensor, weight: Any, chosen: Tensor | None) -> Tensor:
    """Of a row, or of one for each choice, with matrices of a stack or of codes."""
    if not isinstance(weight, QuantizedWeight):
        return row_products(rows, weight, chosen).to(rows.dtype)
    codes, scales = (x if x.ndim == 3 else x[None] for x in (weight.codes, weight.scales))
    if weight.kind == "int8":
        scales = scales if chosen is None else scales[chosen]
        return (row_products(rows, codes, chosen) * scales[..., 0]).to(rows.dtype)
    layout = weight.scales_and_zeros, weight.group, weight.block_rows
    return row_products_of_int4(rows, codes, chosen, *layout).to(rows.dtype)


def _not_one_choice(experts: Any, hidden_states: Tensor, *_: Any) -> str:
    stacks = experts.gate_up_proj, experts.down_proj
    fits = all(takes_rows(x) if isinstance(x, QuantizedWeight) else takes(x) for x in stacks)
    return _not_one_row(hidden_states) or ("" if fits else "for matrices as they are, int8, and int4 laid out")


@ops.faster(QuantizedExperts.forward, "cpu row", why_not=_not_one_choice, **TRACED)
@ops.faster(RoutedExperts.forward, "cpu row", why_not=_not_one_choice, **TRACED)
def _experts_row(experts: Any, hidden_states: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
    chosen = topk_idx[0]
    gate, up = _products(hidden_states, experts.gate_up_proj, chosen).chunk(2, dim=-1)
    out = _products(F.silu(gate) * up, experts.down_proj, chosen)
    return (out * topk_weight[0, :, None]).sum(dim=0, keepdim=True).to(hidden_states.dtype)


def _not_one_product(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> str:
    fits = takes_rows(weight) and place is ...
    return _not_one_row(rows) or ("" if fits else "for int8, and int4 laid out")


@ops.faster(quantized_product, "cpu row", why_not=_not_one_product, **TRACED)
def _quantized_row(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> Tensor:
    return _products(rows.view(1, -1), weight, None).view(*rows.shape[:-1], -1)
