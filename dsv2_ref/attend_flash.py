"""Attention through flash-attn 2, which is asked for by name and needed by nothing else."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv2_ref.attend import equally_wide
from dsv2_ref.checks import require
from dsv2_ref.masks import Visibility

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
    query, key, value = (x.transpose(1, 2) for x in equally_wide(query, key, value))
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
