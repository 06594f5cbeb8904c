"""The routed experts of a few tokens in five launches: sort the choices by expert, multiply, SwiGLU, multiply, add up.

Of so few rows torch's operations around the two products, some forty, take longer than the products. Here one kernel each
sorts, computes SwiGLU and adds, and the first product gathers its rows. For one or two tokens see
`dsv2_ref.fast.triton.few_rows`.

Source: the definition, `RoutedExperts.forward`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv2_ref.fast.products import sort_by_expert
from dsv2_ref.fast.triton.language import jit, power_of_two, tl

MOST_SORTED = 2**12  # choices: each is compared with all others
BLOCK = 64  # choices of a program, and experts, compared with so many at a time


@jit
def sort_kernel(choices, order, group_ends, places, count, experts, BLOCK: tl.constexpr):
    """A program: the places of BLOCK choices among all, sorted by expert and then as they came; and the ends of BLOCK
    experts."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # a choice, and an expert
    mine = tl.load(choices + i, mask=i < count, other=experts).to(tl.int32)
    place = tl.zeros((BLOCK,), tl.int32)
    end = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK):
        j = first + tl.arange(0, BLOCK)
        theirs = tl.load(choices + j, mask=j < count, other=experts).to(tl.int32)[None, :]
        earlier = (theirs == mine[:, None]) & (j[None, :] < i[:, None])
        place += tl.sum(((theirs < mine[:, None]) | earlier).to(tl.int32), 1)
        end += tl.sum((theirs <= i[:, None]).to(tl.int32), 1)
    tl.store(places + i, place, mask=i < count)
    tl.store(order + place, i, mask=i < count)
    tl.store(group_ends + i, end, mask=i < experts)


@jit
def swiglu_kernel(both, out, wide, both_stride, COLUMNS: tl.constexpr):
    """A program: silu(gate) · up of one row, gates before ups, rounded twice as torch rounds it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = both + row * both_stride + column
    gate = tl.load(place, mask=column < wide, other=0.0).to(tl.float32)
    up = tl.load(place + wide, mask=column < wide, other=0.0)
    silu = (gate / (1 + tl.exp(-gate))).to(up.dtype).to(tl.float32)
    tl.store(out + row * wide + column, (silu * up.to(tl.float32)).to(up.dtype), mask=column < wide)


@jit
def combine_kernel(sorted_out, places, weights, out, hidden, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """A program: COLUMNS features of one token, the weighted sum of its choices in their order, in float32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + choice).to(tl.int64)
        x = tl.load(sorted_out + place * hidden + column, mask=column < hidden, other=0.0)
        total += x.to(tl.float32) * tl.load(weights + token * TOP_K + choice)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)


def sort_launch(
    topk_idx: Int[Tensor, "tokens top_k"], experts: int
) -> tuple[Int[Tensor, "choices"], Int[Tensor, "experts"], Int[Tensor, "tokens top_k"]]:
    """`sort_by_expert` in one kernel, in int32."""
    choices = topk_idx.contiguous()
    order, places = (torch.empty_like(choices, dtype=torch.int32) for _ in range(2))
    group_ends = torch.empty(experts, dtype=torch.int32, device=choices.device)
    programs = -(-max(choices.numel(), experts) // BLOCK)
    with torch.cuda.device_of(choices):
        sort_kernel[(programs,)](choices, order, group_ends, places, choices.numel(), experts, BLOCK=BLOCK, num_warps=4)
    return order.view(-1), group_ends, places


def swiglu_launch(both: Float[Tensor, "rows twice_wide"]) -> Float[Tensor, "rows wide"]:
    """``silu(gate) * up`` of rows that hold gates before ups, in one kernel."""
    wide = both.shape[1] // 2
    out = torch.empty(len(both), wide, dtype=both.dtype, device=both.device)
    if out.numel():
        columns = min(1024, power_of_two(wide))
        with torch.cuda.device_of(out):
            swiglu_kernel[(len(both), -(-wide // columns))](
                both, out, wide, both.stride(0), COLUMNS=columns, num_warps=4
            )
    return out


def combine_launch(
    sorted_out: Float[Tensor, "choices hidden"],
    places: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens hidden"]:
    """`dsv2_ref.fast.products.combine` in one kernel, rounded to the dtype of what is added up."""
    (tokens, top_k), hidden = places.shape, sorted_out.shape[1]
    out = torch.empty(tokens, hidden, dtype=sorted_out.dtype, device=sorted_out.device)
    if out.numel():
        columns = min(1024, power_of_two(hidden))
        with torch.cuda.device_of(out):
            combine_kernel[(tokens, -(-hidden // columns))](
                sorted_out, places, topk_weight.float().contiguous(), out, hidden,
                TOP_K=top_k, COLUMNS=columns, num_warps=4,
            )  # fmt: skip
    return out


def experts_launch(
    hidden_states: Float[Tensor, "tokens hidden"],
    topk_idx: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
    experts: int,
    first: Callable[..., Tensor],
    second: Callable[..., Tensor],
) -> Float[Tensor, "tokens hidden"]:
    """The experts of every token. ``first(rows, group_ends, order, top_k)`` multiplies the gathered rows by gates and ups,
    ``second(rows, group_ends)`` the rest."""
    choices, top_k = topk_idx.numel(), topk_idx.shape[1]
    if choices <= MOST_SORTED:
        order, group_ends, places = sort_launch(topk_idx, experts)
    else:
        order, group_ends, places = sort_by_expert(topk_idx, experts)
    both = first(hidden_states, group_ends, order, top_k)
    sorted_out = second(swiglu_launch(both), group_ends)
    del both  # not alive beside the sums
    return combine_launch(sorted_out, places, topk_weight)
