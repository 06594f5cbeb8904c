"""Attention in half precision on the CPU, where torch's fused kernel spends longer around its products than in them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv2_ref.masks import Visibility, additive

CPU_BLOCK_ROWS, CPU_BLOCK_SCORES = 256, 2**22
"""Queries of a block on the CPU, and scores of its heads that stay in the processor's cache together."""

CPU_SIZES = 64
"""One query's keys are rounded up to a multiple of this, as oneDNN compiles a product for every size it has not met."""


def suits_cpu_products(*tensors: Float[Tensor, "..."]) -> bool:
    """Whether these are for the ways made for half precision on the CPU, which give no gradients."""
    half_on_cpu = all(x.device.type == "cpu" and x.dtype.itemsize == 2 for x in tensors)
    wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return half_on_cpu and not wants_gradients and not torch.compiler.is_compiling()


def attend_blocks(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads seq value_width"]:
    """`attend_eager` without the weights, by a few heads and queries at a time, over the keys these can see.

    Scores are rounded after they are scaled, their softmax sums in float32. It gives no gradients.
    """
    batch, heads, seq, _ = query.shape
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    # Laid out as what reads it wants it: all heads of a token side by side.
    out = query.new_empty(batch, seq, heads, value.shape[-1]).transpose(1, 2)
    unused = query.new_zeros(1, 1, 1)
    for start in range(0, seq, CPU_BLOCK_ROWS):
        stop = min(start + CPU_BLOCK_ROWS, seq)
        end = visible.keys_until(stop)
        if visible.plainly_causal:
            bias, sighted = None, None
            future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)  # of the block's own tokens
        else:
            mask, sighted = visible.block(start, stop)
            bias = query.new_zeros(1, 1, 1, 1) if mask is None else additive(mask, query.dtype)
            bias = bias.expand(batch, heads, -1, -1)
        step = max(1, CPU_BLOCK_SCORES // ((stop - start) * end))
        for sequence in range(batch):
            for first in range(0, heads, step):
                part = sequence, slice(first, first + step)
                rows, keys = query[part][:, start:stop], key[part][:, :end]
                scores = torch.baddbmm(unused, rows, keys.mT, beta=0, alpha=scale)
                if bias is None:
                    scores[..., start - stop :].masked_fill_(future, float("-inf"))
                else:
                    scores += bias[part]
                weights = F.dropout(scores.softmax(dim=-1), dropout)
                out[part][:, start:stop] = weights @ value[part][:, :end]
        if sighted is not None:
            out[:, :, start:stop].masked_fill_(~sighted, 0)
    return out
