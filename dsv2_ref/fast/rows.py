"""Ways for one row, which only the compiler makes fast: a sum over products, which it fuses with everything around it, and
with the choice of experts, whose matrices it then reads where they lie. They serve compiled graphs on CPUs alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dsv2_ref import ops
from dsv2_ref.fast.cpu import HALF_ON_CPU
from dsv2_ref.fast.products import as_operator
from dsv2_ref.mla import is_plain_linear
from dsv2_ref.moe import DeepseekV2MLP, RoutedExperts
from dsv2_ref.quantized import QuantizedWeight, quantized_product
from dsv2_ref.quantized_modules import QuantizedExperts

TRACED: dict[str, Any] = HALF_ON_CPU | {"compiles": True}


def row_product(
    row: Float[Tensor, "*batch inputs"], weight: Shaped[Tensor, "*stack outputs inputs"]
) -> Float[Tensor, "*products outputs"]:
    """``weight @ row`` in float32, of one row or one for each matrix; the weight may be int8 codes. A sum, which the compiler
    fuses with what makes the weight."""
    return (weight.float() * row.float()[..., None, :]).sum(dim=-1)


def _not_one_row(hidden_states: Tensor) -> str:
    if not torch.compiler.is_compiling():
        return "for compiled graphs"
    return "" if hidden_states.numel() == hidden_states.shape[-1] else "for one token"


def takes_rows(weight: nn.Module | None) -> bool:
    """Whether this is a plain linear map without a bias, or codes that can be multiplied as they are: int8, or four bits
    laid out for torch's kernel, which is faster than what the compiler writes."""
    if isinstance(weight, QuantizedWeight):
        return weight.kind == "int8" or weight.block_rows > 0
    return weight is not None and is_plain_linear(weight) and weight.bias is None


def _not_plain(mlp: DeepseekV2MLP, hidden_states: Tensor) -> str:
    plain = all(takes_rows(x) for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return _not_one_row(hidden_states) or ("" if plain else "for linear maps without more to them")


def linear_row(linear: Any, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
    """What a linear map, quantised or not, makes of one row. What a plain one would not take, it is left to reject."""
    plain = isinstance(linear, nn.Linear) and is_plain_linear(linear)
    if not plain or linear.weight.dtype != x.dtype or linear.in_features != x.shape[-1]:
        return linear(x)
    out = row_product(x, linear.weight)
    return (out if linear.bias is None else out + linear.bias).to(x.dtype)


@ops.faster(DeepseekV2MLP.forward, "cpu row", why_not=_not_plain, **TRACED)
def _mlp_row(mlp: DeepseekV2MLP, hidden_states: Tensor) -> Tensor:
    gate = F.silu(linear_row(mlp.gate_proj, hidden_states))
    return linear_row(mlp.down_proj, gate * linear_row(mlp.up_proj, hidden_states))


def _no_gradients(*_: Any) -> None:
    raise NotImplementedError("the product with laid-out codes of four bits gives no gradients")


def _four_bits(row: Tensor, codes: Tensor, scales: Tensor, group: int) -> Tensor:
    product: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
    return product(row, codes, group, scales)


@as_operator(lambda rows, chosen, codes, *_: rows.new_empty(len(chosen), codes.shape[1]), _no_gradients)
def _chosen_four_bits(rows: Tensor, chosen: Tensor, codes: Tensor, scales: Tensor, group: int) -> Tensor:
    parts = zip(rows.expand(len(chosen), -1).split(1), chosen.tolist(), strict=True)
    return torch.cat([_four_bits(row, codes[expert], scales[expert], group) for row, expert in parts])


def chosen_product(
    rows: Float[Tensor, "#choices inputs"], weight: Any, chosen: Int[Tensor, "choices"]
) -> Float[Tensor, "choices outputs"]:
    """The product of a row, or of one for each choice, with the matrices of the chosen experts, of a stack or of
    codes."""
    if not isinstance(weight, QuantizedWeight):
        return row_product(rows, weight[chosen]).to(rows.dtype)
    if weight.kind == "int8":
        return (row_product(rows, weight.codes[chosen]) * weight.scales[chosen][..., 0]).to(rows.dtype)
    return _chosen_four_bits(rows, chosen, weight.codes, weight.scales_and_zeros, weight.group)


def _not_one_choice(experts: Any, hidden_states: Tensor, *_: Any) -> str:
    quantised = isinstance(experts, QuantizedExperts)
    fits = not quantised or (takes_rows(experts.gate_up_proj) and takes_rows(experts.down_proj))
    return _not_one_row(hidden_states) or ("" if fits else "for int8")


@ops.faster(QuantizedExperts.forward, "cpu row", why_not=_not_one_choice, **TRACED)
@ops.faster(RoutedExperts.forward, "cpu row", why_not=_not_one_choice, **TRACED)
def _experts_row(experts: Any, hidden_states: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
    chosen = topk_idx[0]
    gate, up = chosen_product(hidden_states, experts.gate_up_proj, chosen).chunk(2, dim=-1)
    out = chosen_product(F.silu(gate) * up, experts.down_proj, chosen)
    return (out * topk_weight[0, :, None]).sum(dim=0, keepdim=True).to(hidden_states.dtype)


def _not_one_product(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> str:
    fits = takes_rows(weight) and place is ...
    return _not_one_row(rows) or ("" if fits else "for int8")


@ops.faster(quantized_product, "cpu row", why_not=_not_one_product, **TRACED)
def _quantized_row(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> Tensor:
    if weight.kind == "int8":
        return (row_product(rows, weight.codes) * weight.scales[:, 0]).to(rows.dtype)
    out = _four_bits(rows.flatten()[None], weight.codes, weight.scales_and_zeros, weight.group)
    return out.view(*rows.shape[:-1], -1)
