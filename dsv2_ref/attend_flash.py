"""Attention through flash-attn 2, which is asked for by name and needed by nothing else."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dsv2_ref.attend import equally_wide
from dsv2_ref.checks import require
from dsv2_ref.masks import Visibility

FLASH_WIDTH = 256
"""Numbers of a head's key, or value, that flash-attn 2 takes at most."""

FLASH_ATTN_NEEDED = (
    "flash_attention_2 needs the flash-attn package and an NVIDIA GPU (Ampere or newer): "
    "pip install flash-attn --no-build-isolation. Or choose _attn_implementation='sdpa', which needs neither"
)


def load_flash_attn() -> Any:
    """The flash-attn package, or an ImportError that says how to get it."""
    try:
        import flash_attn
    except ImportError as error:
        raise ImportError(FLASH_ATTN_NEEDED) from error
    if getattr(flash_attn.__spec__, "origin", "") is None:  # a bare folder of that name, which flash-attn 4 makes
        raise ImportError(FLASH_ATTN_NEEDED)
    return flash_attn


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def require_flash_input(query: Float[Tensor, "..."], width: int, visible: Visibility) -> None:
    """Refuse what flash-attn cannot take; ``width`` is that of a head's keys or values, whichever is more.

    Raises:
        ValueError: for a dtype other than float16 and bfloat16, a tensor off CUDA, a mask for each query, and heads wider
            than `FLASH_WIDTH`.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    require(half, "hidden_states", query, "float16 or bfloat16 for flash-attn")
    require(_on_gpu(query), "hidden_states", query, "a CUDA tensor for flash-attn")
    require(visible.mask is None, "attention_mask", visible.mask, "None or (batch, kv_seq) for flash-attn")
    require(width <= FLASH_WIDTH, "the width of a head", width, "at most {} for flash-attn", FLASH_WIDTH)


class _Packing:
    """The rows of real tokens one after another, as flash-attn wants padded batches.

    Their number is not asked for, as the host would have to wait for it: rows of padding follow behind the last
    sequence, where flash-attn neither reads nor writes. So what it gives there, gradients included, is whatever lay in
    memory, and is replaced by zeros.
    """

    def __init__(self, kept: Bool[Tensor, "batch seq"]) -> None:
        self.kept = kept.flatten()
        self.order = (~self.kept).to(torch.uint8).argsort(stable=True)
        self.ends = F.pad(kept.sum(dim=1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))

    def pack(self, x: Float[Tensor, "batch seq heads width"]) -> Float[Tensor, "rows heads width"]:
        rows = x.flatten(0, 1).index_select(0, self.order)
        return rows.where(self.kept[self.order][:, None, None], 0) if rows.requires_grad else rows

    def unpack(self, rows: Float[Tensor, "rows heads width"]) -> Float[Tensor, "rows heads width"]:
        return rows.index_select(0, self.order.argsort()).where(self.kept[:, None, None], 0)


def attend_flash(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads seq value_width"]:
    """`attend_sdpa` through flash-attn 2, which aligns causal order bottom-right and takes padding as packed rows.

    Values narrower than keys get zeros behind them. Keys and values are cast to the queries' dtype, from which they
    differ under autocast. Queries that are padding give zeros.

    Raises:
        ValueError: for what `require_flash_input` refuses.
    """
    flash_attn = load_flash_attn()
    require_flash_input(query, max(query.shape[-1], value.shape[-1]), visible)
    batch, _, seq, _ = query.shape
    value_width = value.shape[-1]
    query, key, value = (x.to(query.dtype).transpose(1, 2) for x in equally_wide(query, key, value))
    options = {"dropout_p": dropout, "softmax_scale": scale, "causal": True}
    if visible.padding is None:
        return flash_attn.flash_attn_func(query, key, value, **options)[..., :value_width].transpose(1, 2)
    kept = visible.padding[:, visible.kv_seq - seq :]
    # One query a sequence must stay at its place: flash-attn then goes by the number of the row.
    queries, keys = _Packing(torch.ones_like(kept) if seq == 1 else kept), _Packing(visible.padding)
    packed = flash_attn.flash_attn_varlen_func(
        queries.pack(query),
        keys.pack(key),
        keys.pack(value),
        cu_seqlens_q=queries.ends,
        cu_seqlens_k=keys.ends,
        max_seqlen_q=seq,
        max_seqlen_k=visible.kv_seq,
        **options,
    )
    out = queries.unpack(packed).unflatten(0, (batch, seq)).where(kept[..., None, None], 0)
    return out[..., :value_width].transpose(1, 2)
