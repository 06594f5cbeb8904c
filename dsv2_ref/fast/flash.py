"""Attention through flash-attn 2, which is asked for by name and needed by nothing else."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dsv2_ref import checks, ops
from dsv2_ref.attention import attend
from dsv2_ref.fast.sdpa import equally_wide
from dsv2_ref.masks import Visibility


class _Rows:
    """The rows of real tokens one after another, as flash-attn wants padded batches.

    Their number is not asked for, as the host would have to wait for it: rows of padding come after the last sequence,
    where flash-attn neither reads nor writes. So what it gives there, gradients included, is whatever lay in memory,
    and is replaced by zeros.
    """

    def __init__(self, kept: Bool[Tensor, "batch seq"]) -> None:
        self.kept = kept.flatten()
        self.order = (~self.kept).to(torch.uint8).argsort(stable=True)
        lengths = kept.sum(dim=1, dtype=torch.int32)
        self.ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))

    def gather(self, x: Float[Tensor, "batch seq heads width"]) -> Float[Tensor, "rows heads width"]:
        rows = x.flatten(0, 1).index_select(0, self.order)
        return rows.where(self.kept[self.order][:, None, None], 0) if rows.requires_grad else rows

    def scatter(self, rows: Float[Tensor, "rows heads width"]) -> Float[Tensor, "rows heads width"]:
        return rows.index_select(0, self.order.argsort()).where(self.kept[:, None, None], 0)


@ops.faster(attend, "flash-attn", where={"implementation": "flash_attention_2"})
def attend_flash(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "batch heads seq value_width"], None]:
    """`attend` through flash-attn 2, which aligns causal order bottom-right and takes padding as rows without it.

    Values narrower than keys get zeros after them. Keys and values are cast to the queries' dtype, from which they
    differ under autocast. Queries that are padding give zeros.

    Raises:
        ImportError: where flash-attn is not installed, with what to do.
    """
    flash_attn = checks.flash_attn()
    batch, seq, value_width = query.shape[0], query.shape[2], value.shape[-1]
    same = equally_wide(query, key, value)
    query, key, value = (x.to(query.dtype).transpose(1, 2) for x in same)
    options = {"dropout_p": dropout, "softmax_scale": scale, "causal": True}
    if visible.padding is None:
        out = flash_attn.flash_attn_func(query, key, value, **options)
        return out[..., :value_width].transpose(1, 2), None
    kept = visible.padding[:, visible.kv_seq - seq :]
    # A single query per sequence must stay in its place: flash-attn then counts rows.
    queries, keys = _Rows(torch.ones_like(kept) if seq == 1 else kept), _Rows(visible.padding)
    rows = flash_attn.flash_attn_varlen_func(
        queries.gather(query),
        keys.gather(key),
        keys.gather(value),
        cu_seqlens_q=queries.ends,
        cu_seqlens_k=keys.ends,
        max_seqlen_q=seq,
        max_seqlen_k=visible.kv_seq,
        **options,
    )
    out = queries.scatter(rows).unflatten(0, (batch, seq)).where(kept[..., None, None], 0)
    return out[..., :value_width].transpose(1, 2), None
