"""Ways made of torch's own products: attention of all heads to one key, and the experts sorted so that one product per
expert suffices.

On a GPU, `torch.nn.functional.grouped_mm` multiplies consecutive groups of rows by a matrix each without a Python loop,
and without waiting for the groups' sizes (bfloat16 on sm_90 and sm_100; elsewhere torch itself falls back to a loop). It
takes neither float64 nor rows that are not 16-byte aligned, and its shapes are known to the compiler for bfloat16 alone.
The custom operator ``dsv2_ref::grouped_product``, with a plain loop on CPUs and wherever torch cannot serve, works for
all dtypes and sizes, under ``torch.compile`` and with gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsv2_ref import ops
from dsv2_ref.attention import attend
from dsv2_ref.fast.processor import has_bfloat16
from dsv2_ref.fast.sdpa import blocks
from dsv2_ref.masks import Visibility, additive
from dsv2_ref.moe import RoutedExperts

# Attention of all heads to one key


def scaled_product(
    left: Float[Tensor, "batch m k"],
    right: Float[Tensor, "batch k n"],
    scale: float = 1.0,
    bias: Float[Tensor, "batch m n"] | None = None,
) -> Float[Tensor, "batch m n"]:
    """``scale · left @ right + bias``, rounded once.

    On the CPU one product per sequence, as batched bfloat16 products there copy a strided operand.
    """
    beta = 0 if bias is None else 1
    bias = left.new_zeros(1, 1, 1).expand(len(left), 1, 1) if bias is None else bias
    if left.device.type != "cpu" or len(left) == 0:
        return torch.baddbmm(bias, left, right, beta=beta, alpha=scale)
    parts = zip(bias.unbind(), left.unbind(), right.unbind(), strict=True)
    products = [torch.addmm(*part, beta=beta, alpha=scale) for part in parts]
    return products[0][None] if len(left) == 1 else torch.stack(products)


# Not float16, whose scores could overflow.
@ops.faster(
    attend, "products", where={"implementation": "products"}, dtypes=(torch.float32, torch.float64, torch.bfloat16)
)
def attend_products(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch 1 at_least_kv_seq width"],
    value: Float[Tensor, "batch 1 at_least_kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "batch heads seq value_width"], None]:
    """`attend` where all heads share one key and value: two plain products of heads · seq rows, made for a block of
    queries at a time.

    Scores are rounded once, after scale and mask; their softmax sums in float32. A single query may be given more keys
    than it sees; they must be finite.
    """
    batch, heads, seq = query.shape[:3]
    key, value = key[:, 0], value[:, 0]
    unseen = key.shape[1] - visible.kv_seq
    parts, end, mask, sees_any = [], visible.kv_seq, None, None
    for start, stop in [(0, 1)] if seq == 1 else blocks(seq, batch * heads * visible.kv_seq):
        if seq > 1 or visible.attention_mask is not None:  # else it sees every key
            end = visible.keys_until(stop)
            mask, sees_any = visible.block(start, stop)
        rows = query[:, :, start:stop].flatten(1, 2)
        bias = None
        if mask is not None:
            bias = additive(mask, query.dtype).expand(batch, heads, -1, -1)
            bias = F.pad(bias.flatten(1, 2), (0, unseen))
        scores = scaled_product(rows, key[:, : end + unseen].mT, scale, bias)
        if unseen:
            scores[..., end:] = float("-inf")
        weights = scores.softmax(dim=-1)  # (B, H · rows, keys)
        if sees_any is not None:
            weights = weights.unflatten(1, (heads, stop - start)).where(sees_any, 0).view_as(weights)
        if dropout:
            weights = F.dropout(weights, dropout)
        out = scaled_product(weights, value[:, : end + unseen])
        parts.append(out.unflatten(1, (heads, stop - start)))
    return torch.cat(parts, dim=2), None


# Experts


def sort_by_expert(
    topk_idx: Int[Tensor, "tokens top_k"], experts: int
) -> tuple[Int[Tensor, "choices"], Int[Tensor, "experts"], Int[Tensor, "tokens top_k"]]:
    """The order in which the choices lie sorted by expert, where the rows of each
    expert end, and the place of every choice in that order. The sizes stay on the
    device."""
    choices = topk_idx.flatten()
    order = choices.argsort(stable=True)
    counts = choices.new_zeros(experts)
    counts = counts.scatter_add(0, choices, torch.ones_like(choices))
    return order, counts.cumsum(0).to(torch.int32), order.argsort().view_as(topk_idx)


def combine(
    sorted_out: Float[Tensor, "choices hidden"],
    places: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens hidden"]:
    """Each token's weighted sum, in the order of its choices, so that the result does
    not vary from run to run. One choice at a time: all of them in float32 would leave
    the processor's caches."""
    out = sorted_out[places[:, 0]] * topk_weight[:, :1]
    for choice in range(1, places.shape[1]):
        out = out + sorted_out[places[:, choice]] * topk_weight[:, choice, None]
    return out


def needs_vmap(*_: Any) -> str:
    """Only a vmap must not ask which tokens chose an expert."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    batched = any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)
    return "" if batched else "computes every expert for every token; for torch.vmap alone"


@ops.faster(RoutedExperts.forward, "all experts", transforms=True, compiles=False, why_not=needs_vmap)
def all_experts(
    experts: Any,
    hidden_states: Float[Tensor, "tokens hidden"],
    topk_idx: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens hidden"]:
    """Every expert for every token, weighted by 0 where it was not chosen; quantised ones, too."""
    out = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    for expert in range(len(experts.down_proj)):
        weight = topk_weight.where(topk_idx == expert, 0).sum(dim=-1, keepdim=True)
        gate, up = F.linear(hidden_states, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        out = out + F.linear(F.silu(gate) * up, experts.down_proj[expert]) * weight
    return out.to(hidden_states.dtype)


@ops.faster(RoutedExperts.forward, "grouped")
def grouped_experts(
    experts: RoutedExperts,
    hidden_states: Float[Tensor, "tokens hidden"],
    topk_idx: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens hidden"]:
    """Sort the choices by expert, multiply all groups at once, sort back. Only the
    weights of chosen experts are read."""
    gate_up_proj: Tensor = experts.gate_up_proj
    down_proj: Tensor = experts.down_proj
    device = hidden_states.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states = hidden_states.to(dtype)
        gate_up_proj, down_proj = gate_up_proj.to(dtype), down_proj.to(dtype)
    plain = device == "cpu" and type(topk_idx) is Tensor and not torch.compiler.is_compiling()
    if plain and len(hidden_states) == 1 and not torch.is_grad_enabled():
        out = []  # nothing to sort
        for expert in topk_idx[0].tolist():
            gate, up = F.linear(hidden_states, gate_up_proj[expert]).chunk(2, dim=-1)
            out.append(F.linear(F.silu(gate) * up, down_proj[expert]))
        return (torch.cat(out) * topk_weight.T).sum(dim=0, keepdim=True).to(hidden_states.dtype)
    order, group_ends, places = sort_by_expert(topk_idx, len(down_proj))
    rows = hidden_states[order // topk_idx.shape[1]]
    gate, up = _grouped_product(rows, gate_up_proj, group_ends).chunk(2, dim=-1)
    sorted_out = _grouped_product(F.silu(gate) * up, down_proj, group_ends)
    del rows, gate, up  # where no gradient needs them: not alive beside the sums
    return combine(sorted_out, places, topk_weight).to(hidden_states.dtype)


# The grouped product

MOST_GROUPS = 1023  # that ``F.grouped_mm`` takes on a GPU
MANY_ROWS = 8  # from which CPUs without bfloat16 instructions multiply bfloat16 faster in float32: 192 rows 5 times
ROWS_AT_ONCE = 256  # of a matrix, widened together to stay in the processor's cache (2 MB of 2,048 inputs in float32)
FEW_ROWS = 16  # up to which CPUs multiply float32 faster with the matrix on the left, reading it once: 1.7 times


def torch_can_group(*matrices: Float[Tensor, "..."], groups: int) -> bool:
    """Whether ``F.grouped_mm`` takes these: by dtype, alignment of rows and first element, and number of groups."""
    for matrix in matrices:
        size = matrix.element_size()
        if matrix.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return False
        if any(stride * size % 16 for stride in sorted(matrix.stride())[1:]):
            return False
        if matrix.is_cuda and (groups > MOST_GROUPS or matrix.storage_offset() * size % 16):
            return False
    return True


def in_float32(
    rows: Float[Tensor, "*batch inputs"], outputs: int, matrix: Callable[[slice], Float[Tensor, "some inputs"]]
) -> Float[Tensor, "*batch outputs"]:
    """``rows`` times a transposed matrix, of which some rows at a time are asked for and widened; rounded once."""
    wide, starts = rows.float(), range(0, outputs, ROWS_AT_ONCE)
    with torch.autocast("cpu", enabled=False):  # which would round the products to bfloat16
        pieces = [F.linear(wide, matrix(slice(start, start + ROWS_AT_ONCE)).float()) for start in starts]
    return torch.cat(pieces, dim=-1).to(rows.dtype)


def grouped_product(
    rows: Float[Tensor, "rows inputs"],
    weights: Float[Tensor, "groups outputs inputs"],
    group_ends: Int[Tensor, "groups"],
) -> Float[Tensor, "rows outputs"]:
    """``rows[i] @ weights[g].T`` where row i lies in group g, which ends before row ``group_ends[g]`` (int32), group by
    group.

    The last group ends with the rows. A group may be empty; its weight is then not read.
    """
    ends = group_ends.tolist()
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    widen = rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and not has_bfloat16()
    for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        few = rows.dtype == torch.float32 and end - start <= FEW_ROWS
        if few and end > start:
            out[start:end] = (weights[group] @ rows[start:end].T).T
        elif widen and end - start >= MANY_ROWS:
            out[start:end] = in_float32(rows[start:end], weights.shape[1], weights[group].__getitem__)
        elif end > start:
            torch.mm(rows[start:end], weights[group].T, out=out[start:end])
    return out


def as_operator(
    fake: Callable[..., Any] | None,
    backward: Callable[..., Any] | None,
    save: Callable[..., None] | None = None,
    writes: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Any]:
    """Make the decorated ``_name`` the operator ``dsv2_ref::name`` of torch, which the compiler does not look into.

    Args:
        fake: makes empty outputs of the right shapes, for graphs. backward: gives the gradients. save: keeps what they need.
        writes: the arguments that it changes; then there is no ``backward``.
    """

    def declare(run: Callable[..., Any]) -> Any:
        # `torch.library.custom_op` does this too, but imports the compiler and takes longer per call.
        name = run.__name__.lstrip("_")
        library = torch.library
        library.define(f"dsv2_ref::{name}", library.infer_schema(run, mutates_args=writes))
        library.impl(f"dsv2_ref::{name}", "default", run)
        if fake is not None:
            library.register_fake(f"dsv2_ref::{name}", fake)
        if backward is not None:
            library.register_autograd(f"dsv2_ref::{name}", backward, setup_context=save)
        operator = getattr(torch.ops.dsv2_ref, name).default
        operator.__wrapped__ = run
        return operator

    return declare


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weights, group_ends = ctx.saved_tensors
    grad, (wants_rows, wants_weights, _) = grad.contiguous(), ctx.needs_input_grad
    by_rows = _grouped_product(grad, weights.mT, group_ends) if wants_rows else None
    return by_rows, _grouped_outer(grad, rows, group_ends) if wants_weights else None, None


@as_operator(lambda rows, weights, _: rows.new_empty(rows.shape[0], weights.shape[1]), _product_backward, _save)
def _grouped_product(rows: Tensor, weights: Tensor, group_ends: Tensor) -> Tensor:
    from dsv2_ref.fast.triton import available

    if rows.device.type == available.DEVICE:
        from dsv2_ref.fast.triton import experts

        if experts.should_serve(rows, weights):
            return experts.grouped_product_launch(rows, weights, group_ends)
    # On a CPU `F.grouped_mm` is a loop as well, and visits the empty groups.
    if rows.device.type != "cpu" and torch_can_group(rows, weights, groups=len(weights)):
        # The result may have gaps between its rows.
        return F.grouped_mm(rows, weights.mT, offs=group_ends).contiguous()
    return grouped_product(rows, weights, group_ends)


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    left, right, group_ends = ctx.saved_tensors
    grad = grad.contiguous()
    return _grouped_product(right, grad, group_ends), _grouped_product(left, grad.mT, group_ends), None


@as_operator(lambda x, y, ends: x.new_empty(ends.shape[0], x.shape[1], y.shape[1]), _outer_backward, _save)
def _grouped_outer(left: Tensor, right: Tensor, group_ends: Tensor) -> Tensor:
    if torch_can_group(left, right, groups=len(group_ends)):
        return F.grouped_mm(left.T, right, offs=group_ends).contiguous()
    ends = group_ends.tolist()
    return torch.stack([left[start:end].T @ right[start:end] for start, end in zip([0, *ends], ends, strict=False)])
