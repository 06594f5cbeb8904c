"""Softmax attention over given queries, keys and values: one meaning, and the ways torch offers to compute it.

All take queries (batch, heads, seq, width) and a `Visibility`, and return (batch, heads, seq, value width). Where
scores are held in memory they are made for a block of queries at a time, so that memory grows with the
context and not with its square. The softmax runs in at least float32, as in the published code.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv2_ref import kernels
from dsv2_ref.attend_cpu import attend_blocks, suits_cpu_products
from dsv2_ref.kernels import ops
from dsv2_ref.masks import Visibility, additive

DECODED_AT_ONCE = 8
"""Queries of a sequence up to which the decoding kernel is used on a GPU; more of them suit plain products."""

LARGEST_LATENT, LARGEST_ROPE = 512, 64
"""Sizes of a cached token up to which the decoding kernel is used; larger tiles leave the memory of a multiprocessor."""

SCORES_AT_ONCE = 2**24
"""Scores of a block of queries that may be in memory together, over all sequences and heads."""


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


def equally_wide(*tensors: Float[Tensor, "..."]) -> list[Tensor]:
    """Zeros behind the narrower ones: they add nothing to scores, and nothing that is kept to values."""
    width = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


def attend_sdpa(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads seq value_width"]:
    """`attend_eager` without the weights, through torch's fused kernels, which want values as wide as keys."""
    batch, heads, seq, _ = query.shape
    if seq > 1 and suits_cpu_products(query, key, value):
        return attend_blocks(query, key, value, visible, scale, dropout)
    value_width = value.shape[-1]
    query, key, value = equally_wide(query, key, value)
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
            mask = additive(mask, query.dtype)
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


def _scaled_product(
    left: Float[Tensor, "batch m k"],
    right: Float[Tensor, "batch k n"],
    scale: float = 1.0,
    bias: Float[Tensor, "batch m n"] | None = None,
) -> Float[Tensor, "batch m n"]:
    """``scale · left @ right + bias``, rounded once.

    On the CPU, one product a sequence, as batched bfloat16 products there copy a strided operand.
    """
    beta = 0 if bias is None else 1
    bias = left.new_zeros(1, 1, 1).expand(len(left), 1, 1) if bias is None else bias
    if left.device.type != "cpu":
        return torch.baddbmm(bias, left, right, beta=beta, alpha=scale)
    parts = zip(bias.unbind(), left.unbind(), right.unbind(), strict=True)
    products = [torch.addmm(*part, beta=beta, alpha=scale) for part in parts]
    return products[0][None] if len(products) == 1 else torch.stack(products)


def attend_latent(
    query: Float[Tensor, "batch heads seq width"],
    remembered: Float[Tensor, "batch at_least_kv_seq width"],
    latent: int,
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
    want_weights: bool = False,
) -> tuple[Float[Tensor, "batch heads seq latent"], Float[Tensor, "batch heads seq kv_seq"] | None]:
    """Attention of all heads to one shared key, whose first ``latent`` numbers are also its value.

    This is multi-query attention, and so two plain products of (heads · seq) rows: no fused kernel of torch takes keys
    as wide as 576. Scores are rounded once, after scale and mask; their softmax sums in float32. For one query, zeros
    may follow the remembered tokens (`LayerCache.rounded_up`); it does not see them.
    """
    batch, heads, seq, width = query.shape
    wants_gradients = torch.is_grad_enabled() and (query.requires_grad or remembered.requires_grad)
    plain = visible.mask is None and not (dropout or want_weights or wants_gradients)
    plain = plain and latent <= LARGEST_LATENT and width - latent <= LARGEST_ROPE
    if plain and seq <= DECODED_AT_ONCE and kernels.serve(query, remembered):
        return ops.mla_decode(query, remembered[:, : visible.kv_seq], latent, scale, visible.padding), None
    unseen = remembered.shape[1] - visible.kv_seq
    parts, all_weights = [], []
    for start, stop in _blocks(seq, batch * heads * visible.kv_seq):
        end = visible.keys_until(stop)
        keys = remembered[:, : end + unseen]
        rows = query[:, :, start:stop].reshape(batch, -1, width)
        mask, sighted = visible.block(start, stop)
        bias = mask
        if mask is not None:
            bias = additive(mask, query.dtype).expand(batch, heads, -1, -1).reshape(batch, -1, end)
            bias = F.pad(bias, (0, unseen))
        scores = _scaled_product(rows, keys.mT, scale, bias)
        if unseen:
            scores[..., end:] = float("-inf")
        weights = scores.softmax(dim=-1).view(batch, heads, stop - start, -1)
        if sighted is not None:
            weights = weights.where(sighted, 0)
        if dropout:
            weights = F.dropout(weights, dropout)
        attended = _scaled_product(weights.view(batch, -1, end + unseen), keys[..., :latent])
        parts.append(attended.view(batch, heads, stop - start, latent))
        if want_weights:
            all_weights.append(F.pad(weights[..., :end], (0, visible.kv_seq - end)))
    return torch.cat(parts, dim=2), torch.cat(all_weights, dim=2) if want_weights else None
