"""Which launch multiplies: that of few rows, which reads a matrix once for each; tiles of rows, which share what they read;
or torch's own product of groups.

Source: the definitions, `RoutedExperts.forward` and `dsv2_ref.quantized.quantized_product`.
"""

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dsv2_ref.fast.products import _grouped_product
from dsv2_ref.fast.triton import experts, few_rows
from dsv2_ref.fast.triton.few_rows import Matrices
from dsv2_ref.fast.triton.moe import experts_launch
from dsv2_ref.fast.triton.quantized import quantized_product_launch


def quantized_product(
    rows: Float[Tensor, "rows inputs"],
    codes: Shaped[Tensor, "*groups outputs stored"],
    scales: Float[Tensor, "*groups row_blocks column_blocks"],
    shared: int,
    group_ends: Int[Tensor, "groups"] | None,
) -> Float[Tensor, "rows outputs"]:
    """``rows @ weight.T`` by codes and scales, of one matrix or for consecutive groups of rows."""
    matrix = Matrices(codes, scales, shared)
    if group_ends is None and len(rows) <= few_rows.MOST_ROWS[matrix.kind] and matrix.fits:
        return few_rows.product_launch(rows, matrix)
    return quantized_product_launch(rows, codes, scales, shared, group_ends)


def routed_experts(
    x: Float[Tensor, "tokens hidden"],
    gate_up: Matrices,
    down: Matrices,
    topk_idx: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens hidden"]:
    """Σ weight · expert(token) over a token's choices, by weights as they are or by codes and scales."""
    if len(x) <= few_rows.MOST_TOKENS[gate_up.kind] and gate_up.fits and down.fits:
        return few_rows.experts_launch(x, gate_up, down, topk_idx, topk_weight)

    def first(rows: Tensor, group_ends: Tensor, order: Tensor, top_k: int) -> Tensor:
        weights, scales, shared = gate_up
        if scales is not None:
            return quantized_product_launch(rows, weights, scales, shared, group_ends, order, top_k)
        if experts.should_serve(rows, weights, len(order)):
            return experts.grouped_product_launch(rows, weights, group_ends, order, top_k)
        return _grouped_product(rows[order // top_k], weights, group_ends)

    def second(rows: Tensor, group_ends: Tensor) -> Tensor:
        weights, scales, shared = down
        if scales is not None:
            return quantized_product_launch(rows, weights, scales, shared, group_ends)
        return _grouped_product(rows, weights, group_ends)

    return experts_launch(x, topk_idx, topk_weight, len(down.codes), first, second)
