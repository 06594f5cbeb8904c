"""Products of consecutive groups of rows, each group with a matrix of its own: torch's grouped product, made whole.

`torch.nn.functional.grouped_mm` computes them without a Python loop, and on a GPU without waiting for the groups' sizes
(bfloat16 on sm_90 and sm_100; elsewhere torch itself falls back to a loop). It takes no float64 and no rows that are not
16-byte aligned, and its shapes are known to the compiler for bfloat16 alone. As a custom operator with a plain loop
where it does not serve, it works for all dtypes and sizes, under ``torch.compile`` and with gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsv2_ref import kernels


def _torch_can(*matrices: Tensor) -> bool:
    known = all(matrix.dtype in (torch.float32, torch.float16, torch.bfloat16) for matrix in matrices)
    return known and all(
        stride * matrix.element_size() % 16 == 0 for matrix in matrices for stride in sorted(matrix.stride())[1:]
    )


def _triton_should(rows: Tensor, weights: Tensor) -> bool:
    """On GPUs where torch would loop over the groups and wait for their sizes: all but bfloat16 on sm_90 and sm_100.

    Not for some four million rows and more, which are too many for one launch.
    """
    if not kernels.serve(rows, weights):
        return False
    from dsv2_ref.kernels.grouped_experts import MOST_TILES, most_tiles

    if most_tiles(len(rows), len(weights), rows.element_size()) > MOST_TILES:
        return False
    generation = torch.cuda.get_device_capability(rows.device)[0]
    return not (generation in (9, 10) and rows.dtype == torch.bfloat16 and _torch_can(rows, weights))


def _groups(group_ends: Tensor) -> list[slice]:
    ends = group_ends.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@torch.library.custom_op("dsv2_ref::grouped_product", mutates_args=())
def _grouped_product(rows: Tensor, weights: Tensor, group_ends: Tensor) -> Tensor:
    if _triton_should(rows, weights):
        from dsv2_ref.kernels.grouped_experts import grouped_product_launch

        return grouped_product_launch(rows, weights, group_ends)
    if _torch_can(rows, weights):
        return F.grouped_mm(rows, weights.mT, offs=group_ends).contiguous()  # it may leave gaps between rows
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    for weight, group in zip(weights, _groups(group_ends), strict=True):
        torch.mm(rows[group], weight.T, out=out[group])
    return out


@torch.library.custom_op("dsv2_ref::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, group_ends: Tensor) -> Tensor:
    if _torch_can(left, right):
        return F.grouped_mm(left.T, right, offs=group_ends).contiguous()
    return torch.stack([left[group].T @ right[group] for group in _groups(group_ends)])


@_grouped_product.register_fake
def _(rows: Tensor, weights: Tensor, group_ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[1])


@_grouped_outer.register_fake
def _(left: Tensor, right: Tensor, group_ends: Tensor) -> Tensor:
    return left.new_empty(group_ends.shape[0], left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weights, group_ends = ctx.saved_tensors
    grad = grad.contiguous()
    wants_rows, wants_weights, _ = ctx.needs_input_grad
    return (
        _grouped_product(grad, weights.mT, group_ends) if wants_rows else None,
        _grouped_outer(grad, rows, group_ends) if wants_weights else None,
        None,
    )


def _grouped_outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    left, right, group_ends = ctx.saved_tensors
    grad = grad.contiguous()
    return _grouped_product(right, grad, group_ends), _grouped_product(left, grad.mT, group_ends), None


_grouped_product.register_autograd(_grouped_product_backward, setup_context=_save)
_grouped_outer.register_autograd(_grouped_outer_backward, setup_context=_save)


def grouped_product(
    rows: Float[Tensor, "rows inputs"],
    weights: Float[Tensor, "groups outputs inputs"],
    group_ends: Int[Tensor, "groups"],
) -> Float[Tensor, "rows outputs"]:
    """``rows[i] @ weights[g].T`` where row i lies in group g, which ends before row ``group_ends[g]`` (int32).

    The last group ends with the rows. A group may be empty; its weight is then not read.
    """
    return _grouped_product(rows, weights, group_ends)
