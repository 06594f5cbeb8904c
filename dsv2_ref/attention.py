"""Softmax attention: its definition, and torch's fused kernels.

Letters: B sequences, S queries, K keys, H heads, G key heads (each serves H / G heads),
W width of queries and keys, V width of values.
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
from dsv2_ref.masks import Visibility, additive


@ops.defines(autocast=False)
def attend(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
    *,
    implementation: str = "eager",
) -> tuple[Float[Tensor, "batch heads seq value_width"], Tensor | None]:
    """softmax(scale · query · keyᵀ) · value, and the weights (B, H, S, K).

    Scores and softmax are computed in at least float32, so that scores beyond 65504
    stay finite in float16. Ways other than this definition are chosen by
    ``implementation``, and return None for the weights, which they never hold.

    Source: Vaswani et al. (2017), equation 1; DeepSeek-V2, equation 18.
    """
    B, H, S, W = query.shape
    (G, K), wide = key.shape[1:3], torch.promote_types(query.dtype, torch.float32)
    # Heads that share a key head are rows of one product: (B, G, H / G * S, W).
    scores = query.reshape(B, G, H // G * S, W).to(wide) @ key.to(wide).mT * scale
    scores = scores.view(B, H, S, K)
    mask, sees_any = visible.block(0, S)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1).to(query.dtype)
    if sees_any is not None:
        weights = weights.where(sees_any, 0)  # not NaN where everything is masked
    if dropout:
        weights = F.dropout(weights, dropout)
    out = weights.view(B, G, H // G * S, K) @ value.to(query.dtype)
    return out.view(B, H, S, value.shape[-1]), weights


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
