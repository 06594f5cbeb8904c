"""Softmax attention over given queries, keys and values: one meaning, four ways to compute it.

All take queries (batch, heads, seq, width) and a `Visibility`, and return (batch, heads, seq, value width). Where
scores are held in memory they are made for a block of queries at a time, so that memory grows with the
context and not with its square. The softmax runs in at least float32, as in the published code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv2_ref.checks import require
from dsv2_ref.masks import Visibility

SCORES_AT_ONCE = 2**24
"""Scores of a block of queries that may be in memory together, over all sequences and heads."""

FLASH_ATTN_NEEDED = (
    "flash_attention_2 needs the flash-attn package and an NVIDIA GPU (Ampere or newer): "
    "pip install flash-attn --no-build-isolation. Or choose _attn_implementation='sdpa', which needs neither"
)


def _blocks(rows: int, scores_per_row: int) -> list[tuple[int, int]]:
    if rows == 1 or rows * scores_per_row <= SCORES_AT_ONCE:
        return [(0, rows)]
    size = max(1, SCORES_AT_ONCE // scores_per_row)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _softmax(
    scores: Float[Tensor, "batch heads rows kv_seq"],
    mask: Tensor | None,
    sighted: Tensor | None,
    scale: float,
    dropout: float,
) -> Float[Tensor, "batch heads rows kv_seq"]:
    """Weights in the dtype of the scores; rows of a query that sees nothing are zero."""
    dtype = scores.dtype
    scores = scores.to(torch.promote_types(dtype, torch.float32)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1).to(dtype)
    if sighted is not None:
        weights = weights.where(sighted, 0)
    return F.dropout(weights, dropout) if dropout else weights


def attend_eager(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "batch heads seq value_width"], Float[Tensor, "batch heads seq kv_seq"]]:
    """The definition: softmax(scale · query · keyᵀ) · value; also returns the weights, seq · kv_seq of them a head."""
    shared_by = query.shape[1] // key.shape[1]
    if shared_by > 1:
        key, value = (x.repeat_interleave(shared_by, dim=1) for x in (key, value))
    weights = _softmax(query @ key.mT, *visible.block(0, visible.seq), scale, dropout)
    return weights @ value, weights


def attend_sdpa(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads seq value_width"]:
    """`attend_eager` without the weights, through torch's fused kernels, which want values as wide as keys."""
    batch, heads, seq, width = query.shape
    value_width = value.shape[-1]
    value = F.pad(value, (0, width - value_width))
    grouped = key.shape[1] != heads
    if visible.plainly_causal and seq == visible.kv_seq:
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out[..., :value_width]
    parts = []
    for start, stop in _blocks(seq, batch * visible.kv_seq):
        end = visible.keys_until(stop)
        mask, sighted = visible.block(start, stop)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        part = F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, :end],
            value[:, :, :end],
            attn_mask=mask,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=grouped,
        )[..., :value_width]
        parts.append(part if sighted is None else part.where(sighted, 0))
    return torch.cat(parts, dim=2)


def _by_sequence(left: Float[Tensor, "batch m k"], right: Float[Tensor, "batch k n"]) -> Float[Tensor, "batch m n"]:
    """``left @ right``; on the CPU, one product a sequence, as batched bfloat16 products there copy a strided operand."""
    if left.device.type != "cpu":
        return left @ right
    products = [a @ b for a, b in zip(left.unbind(), right.unbind(), strict=True)]
    return products[0][None] if len(products) == 1 else torch.stack(products)


def attend_latent(
    query: Float[Tensor, "batch heads seq width"],
    remembered: Float[Tensor, "batch kv_seq width"],
    latent: int,
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
    want_weights: bool = False,
) -> tuple[Float[Tensor, "batch heads seq latent"], Float[Tensor, "batch heads seq kv_seq"] | None]:
    """Attention of all heads to one shared key, whose first ``latent`` numbers are also its value.

    This is multi-query attention, and so two plain products of (heads · seq) rows: no fused kernel of torch takes keys
    as wide as 576.
    """
    batch, heads, seq, width = query.shape
    parts, all_weights = [], []
    for start, stop in _blocks(seq, batch * heads * visible.kv_seq):
        end = visible.keys_until(stop)
        keys = remembered[:, :end]
        rows = query[:, :, start:stop].reshape(batch, -1, width)
        scores = _by_sequence(rows, keys.mT).view(batch, heads, stop - start, end)
        weights = _softmax(scores, *visible.block(start, stop), scale, dropout)
        attended = _by_sequence(weights.view(batch, -1, end), keys[..., :latent])
        parts.append(attended.view(batch, heads, stop - start, latent))
        if want_weights:
            all_weights.append(F.pad(weights, (0, visible.kv_seq - end)))
    return torch.cat(parts, dim=2), torch.cat(all_weights, dim=2) if want_weights else None


def load_flash_attn() -> Any:
    """The flash-attn package, or an ImportError that says how to get it."""
    try:
        import flash_attn
    except ImportError as error:
        raise ImportError(FLASH_ATTN_NEEDED) from error
    return flash_attn


def attend_flash(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads seq value_width"]:
    """`attend_sdpa` through flash-attn 2, which aligns causal order bottom-right and takes padding as packed rows.

    Queries that are padding give zeros.

    Raises:
        ValueError: for a dtype other than float16 and bfloat16, a tensor off CUDA, and a mask for each query.
    """
    flash_attn = load_flash_attn()
    require(
        query.dtype in (torch.float16, torch.bfloat16), "hidden_states", query, "float16 or bfloat16 for flash-attn"
    )
    require(query.is_cuda, "hidden_states", query, "a CUDA tensor for flash-attn")
    require(visible.mask is None, "attention_mask", visible.mask, "None or (batch, kv_seq) for flash-attn")
    value_width = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - value_width))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    options = {"dropout_p": dropout, "softmax_scale": scale, "causal": True}
    if visible.padding is None:
        return flash_attn.flash_attn_func(query, key, value, **options)[..., :value_width].transpose(1, 2)
    kept, kept_queries = visible.padding, visible.padding[:, visible.kv_seq - visible.seq :]
    lengths, query_lengths = (keep.sum(dim=1, dtype=torch.int32) for keep in (kept, kept_queries))
    packed = flash_attn.flash_attn_varlen_func(
        query[kept_queries],
        key[kept],
        value[kept],
        cu_seqlens_q=F.pad(query_lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        cu_seqlens_k=F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        max_seqlen_q=visible.seq,
        max_seqlen_k=visible.kv_seq,
        **options,
    )
    out = torch.zeros_like(query)
    out[kept_queries] = packed
    return out[..., :value_width].transpose(1, 2)
