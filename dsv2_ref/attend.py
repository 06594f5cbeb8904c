"""Softmax attention over given queries, keys and values: one meaning, five ways to compute it.

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

CPU_BLOCK_ROWS, CPU_BLOCK_SCORES = 256, 2**22
"""Queries of a block on the CPU, and scores of its heads that stay in the processor's cache together."""

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


def _equally_wide(*tensors: Tensor) -> list[Tensor]:
    """Zeros behind the narrower ones: they add nothing to scores, and nothing that is kept to values."""
    width = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


CPU_SIZES = 64
"""One query's keys are rounded up to a multiple of this, as oneDNN compiles a product for every size it has not met."""


def suits_cpu_products(*tensors: Float[Tensor, "..."]) -> bool:
    """Whether these are for the ways made for half precision on the CPU, which give no gradients."""
    half_on_cpu = all(x.device.type == "cpu" and x.dtype.itemsize == 2 for x in tensors)
    wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return half_on_cpu and not wants_gradients and not torch.compiler.is_compiling()


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
    query, key, value = _equally_wide(query, key, value)
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
            mask = _additive(mask, query.dtype)
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


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the scores for ``mask``: minus infinity where a bool one drops.

    A floating one stays finite, so that a query whose keys all have a bias beyond ``dtype`` does not turn to NaN.
    """
    if mask.dtype != torch.bool:
        return mask.to(dtype).clamp(min=torch.finfo(dtype).min / 2)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def attend_blocks(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads seq value_width"]:
    """`attend_eager` without the weights, by a few heads and queries at a time, over the keys these can see.

    For half precision on the CPU, where torch's fused kernel spends longer around its products than in them. Scores
    are rounded after they are scaled, their softmax sums in float32.
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
            bias = query.new_zeros(1, 1, 1, 1) if mask is None else _additive(mask, query.dtype)
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
    unseen = remembered.shape[1] - visible.kv_seq
    parts, all_weights = [], []
    for start, stop in _blocks(seq, batch * heads * visible.kv_seq):
        end = visible.keys_until(stop)
        keys = remembered[:, : end + unseen]
        rows = query[:, :, start:stop].reshape(batch, -1, width)
        mask, sighted = visible.block(start, stop)
        bias = mask
        if mask is not None:
            bias = _additive(mask, query.dtype).expand(batch, heads, -1, -1).reshape(batch, -1, end)
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


def load_flash_attn() -> Any:
    """The flash-attn package, or an ImportError that says how to get it."""
    try:
        import flash_attn
    except ImportError as error:
        raise ImportError(FLASH_ATTN_NEEDED) from error
    return flash_attn


def require_flash_input(query: Float[Tensor, "..."], visible: Visibility) -> None:
    """Refuse what flash-attn cannot take.

    Raises:
        ValueError: for a dtype other than float16 and bfloat16, a tensor off CUDA, and a mask for each query.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    require(half, "hidden_states", query, "float16 or bfloat16 for flash-attn")
    require(query.is_cuda, "hidden_states", query, "a CUDA tensor for flash-attn")
    require(visible.mask is None, "attention_mask", visible.mask, "None or (batch, kv_seq) for flash-attn")


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
        ValueError: for what `require_flash_input` refuses.
    """
    flash_attn = load_flash_attn()
    require_flash_input(query, visible)
    value_width = value.shape[-1]
    query, key, value = (x.transpose(1, 2) for x in _equally_wide(query, key, value))
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
