"""Attention by torch's own fused kernels, a block of queries at a time where it needs a mask.

Letters as in `dsv2_ref.attention`.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv2_ref import ops
from dsv2_ref.attention import attend
from dsv2_ref.masks import Visibility, additive

SCORES_AT_ONCE = 2**24
"""Scores of a block of queries in memory together, over sequences and heads."""


def blocks(rows: int, scores_per_row: int) -> list[tuple[int, int]]:
    """Split rows of scores into blocks of at most `SCORES_AT_ONCE` scores, so that
    memory grows with the context and not with its square."""
    if rows == 1 or rows * scores_per_row <= SCORES_AT_ONCE:
        return [(0, rows)]
    size = max(1, SCORES_AT_ONCE // scores_per_row)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def equally_wide(*tensors: Float[Tensor, "..."]) -> list[Tensor]:
    """Append zeros to the narrower tensors: zeros in keys add nothing to the scores,
    and those in values are cut off again."""
    width = max(x.shape[-1] for x in tensors)
    missing = [width - x.shape[-1] for x in tensors]
    return [F.pad(x, (0, n)) if n else x for x, n in zip(tensors, missing, strict=True)]


FEW_QUERIES = 8
"""Queries up to which cuDNN is left out, as it plans anew for each number of keys."""

FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
NOT_CUDNN = [FLASH, EFFICIENT, SDPBackend.MATH]


@ops.faster(attend, "sdpa", where={"implementation": "sdpa"})
def attend_sdpa(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
    widen: bool = True,
    **ignored: Any,
) -> tuple[Float[Tensor, "batch heads seq value_width"], None]:
    """`attend` through torch's fused kernels; most want values as wide as keys."""
    (batch, heads, seq, _), value_width = query.shape, value.shape[-1]
    if widen:
        query, key, value = equally_wide(query, key, value)
    how: Any = {"dropout_p": dropout, "scale": scale}
    how["enable_gqa"] = key.shape[1] != heads
    fused: Any = partial(F.scaled_dot_product_attention, **how)
    parts = []
    whole = visible.attention_mask is None and seq == visible.kv_seq
    # Gradients with a mask were NaN there for some lengths (pytorch issue 196678).
    skip = query.is_cuda and (seq <= FEW_QUERIES or (query.requires_grad and not whole))
    with sdpa_kernel(NOT_CUDNN) if skip else nullcontext():
        if whole:
            return fused(query, key, value, is_causal=True)[..., :value_width], None
        for start, stop in blocks(seq, batch * visible.kv_seq):
            end = visible.keys_until(stop)
            mask, sees_any = visible.block(start, stop)
            if mask is not None and mask.dtype != torch.bool:
                mask = additive(mask, query.dtype)
            keys, values = key[:, :, :end], value[:, :, :end]
            part = fused(query[:, :, start:stop], keys, values, attn_mask=mask)
            part = part[..., :value_width]
            parts.append(part if sees_any is None else part.where(sees_any, 0))
    return torch.cat(parts, dim=2), None
