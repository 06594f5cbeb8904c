"""Ways for half precision on the CPU, where torch spends longer around its products than in them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from dsv2_ref import ops
from dsv2_ref.attention import attend
from dsv2_ref.fast.processor import has_amx, has_bfloat16
from dsv2_ref.fast.products import attend_products
from dsv2_ref.masks import Visibility, additive
from dsv2_ref.rope import apply_rotary

BLOCK_ROWS, BLOCK_SCORES = 256, 2**22  # queries of a block; scores of its heads that stay in the processor's cache
KEYS_MULTIPLE = 64  # one query's keys are rounded up to it, as oneDNN compiles a product for every size it has not met
# Not float16, whose scores could overflow.
HALF_ON_CPU: dict[str, Any] = {"device": "cpu", "dtypes": (torch.bfloat16,), "gradients": False, "compiles": False}


def _not_for_blocks(query: Tensor, *_: Any, **__: Any) -> str:
    if query.shape[2] == 1:
        return "one query fits a block of any kernel"
    if not has_bfloat16():
        return "this processor has no bfloat16 products; torch's fused attention does without"
    if has_amx():
        return "with AMX torch's fused attention is faster (318 ms against 513 for 2,048 tokens)"
    return ""


@ops.faster(attend, "cpu blocks", where={"implementation": "sdpa"}, why_not=_not_for_blocks, **HALF_ON_CPU)
def attend_blocks(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "batch heads seq value_width"], None]:
    """`attend` for a few heads and queries at a time, over the keys that these can see.

    Scores are rounded after they are scaled; their softmax sums in float32.
    """
    batch, heads, seq = query.shape[:3]
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    # Laid out as the output projection reads it: all heads of a token side by side.
    out = query.new_empty(batch, seq, heads, value.shape[-1]).transpose(1, 2)
    unused = query.new_zeros(1, 1, 1)
    for start in range(0, seq, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, seq)
        end = visible.keys_until(stop)
        bias, sees_any = None, None
        if visible.attention_mask is None:
            # Among the block's own tokens; those before them are all seen.
            future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        else:
            mask, sees_any = visible.block(start, stop)
            bias = query.new_zeros(1, 1, 1, 1) if mask is None else additive(mask, query.dtype)
            bias = bias.expand(batch, heads, -1, -1)
        step = max(1, BLOCK_SCORES // ((stop - start) * end))
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
        if sees_any is not None:
            out[:, :, start:stop].masked_fill_(~sees_any, 0)
    return out, None


def begins(key: Shaped[Tensor, "..."], value: Shaped[Tensor, "..."]) -> bool:
    """Whether the value is the beginning of the key, in the same memory."""
    same = StorageWeakRef(key.untyped_storage()) == StorageWeakRef(value.untyped_storage())
    return same and key.storage_offset() == value.storage_offset() and key.stride() == value.stride()


def _rounded_up(key: Float[Tensor, "batch 1 kv_seq width"]) -> Tensor | None:
    """The key and the rows after it in its storage, up to a multiple of their number, where there are such rows."""
    batch, _, kv_seq, width = key.shape
    rows = -(-kv_seq // KEYS_MULTIPLE) * KEYS_MULTIPLE
    per_batch, _, per_row, per_feature = key.stride()
    last = key.storage_offset() + (batch - 1) * per_batch + (rows - 1) * per_row + width
    fits = per_feature == 1 and per_row >= width and (batch == 1 or rows * per_row <= per_batch)
    if not fits or last * key.element_size() > key.untyped_storage().nbytes():
        return None
    return key.as_strided((batch, 1, rows, width), key.stride())


def _no_room_to_round_up(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> str:
    if query.shape[2] != 1:
        return "for one query at a time"
    if not begins(key, value):
        return "the value is not the beginning of the key"
    return "no room after the cached tokens" if _rounded_up(key) is None else ""


@ops.faster(
    attend, "cpu rounded keys", where={"implementation": "products"}, why_not=_no_room_to_round_up, **HALF_ON_CPU
)
def attend_rounded_up(
    query: Float[Tensor, "batch heads 1 width"],
    key: Float[Tensor, "batch 1 kv_seq width"],
    value: Float[Tensor, "batch 1 kv_seq value_width"],
    *rest: Any,
    **options: Any,
) -> tuple[Float[Tensor, "batch heads 1 value_width"], None]:
    """`attend` of one query to the latent cache, with a number of keys that few steps share."""
    longer = _rounded_up(key)
    assert longer is not None
    # Weights of 0 hide the rows after it only if they are numbers: then their sum is one, too.
    unknown = key.is_meta or isinstance(key, FakeTensor)
    if unknown or math.isfinite(longer[:, :, key.shape[2] :].sum(dtype=torch.float32)):
        key = longer
    return attend_products(query, key, key[..., : value.shape[-1]], *rest, **options)


def _has_bfloat16(*_: Any, **__: Any) -> str:
    return "this processor has bfloat16 products" if has_bfloat16() else ""


@ops.faster(attend, "cpu float32", where={"implementation": "products"}, why_not=_has_bfloat16, **HALF_ON_CPU)
def attend_in_float32(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch 1 kv_seq width"],
    value: Float[Tensor, "batch 1 kv_seq value_width"],
    *rest: Any,
    **options: Any,
) -> tuple[Float[Tensor, "batch heads seq value_width"], None]:
    """`attend` with products in float32, rounded once at the end. Where no instruction multiplies bfloat16, torch's own
    product does so one number at a time, 40 to 60 times slower."""
    wide = key.float()
    value = wide[..., : value.shape[-1]] if begins(key, value) else value.float()
    out, _ = attend_products(query.float(), wide, value, *rest, **options)
    return out.to(query.dtype), None


FEW_KEYS = 512
"""Keys up to which torch's fused attention is its fastest for one query. For 65 it took 78 µs against 218 with an EPYC's
AVX-512, for 1,000 366 against 356. Where no instruction multiplies bfloat16, it always is."""


def _not_fused(
    query: Tensor, key: Tensor, value: Tensor, visible: Visibility, scale: float, dropout: float = 0.0, **_: Any
) -> str:
    if query.shape[2] != 1:
        return "for one query at a time"
    if not begins(key, value):
        return "the value is not the beginning of the key"
    if has_bfloat16() and key.shape[2] > FEW_KEYS:
        return f"more than {FEW_KEYS} keys suit plain products better"
    if not torch.backends.cuda.flash_sdp_enabled():  # the switch of all devices
        return "torch.nn.attention.sdpa_kernel leaves that kernel out"
    return "no dropout" if dropout else ""


@ops.faster(attend, "cpu fused query", where={"implementation": "products"}, why_not=_not_fused, **HALF_ON_CPU)
def attend_fused(
    query: Float[Tensor, "batch heads 1 width"],
    key: Float[Tensor, "batch 1 kv_seq width"],
    value: Float[Tensor, "batch 1 kv_seq value_width"],
    visible: Visibility,
    scale: float,
    *_: Any,
    **__: Any,
) -> tuple[Float[Tensor, "batch heads 1 value_width"], None]:
    """`attend` of one query to the latent cache by torch's fused kernel: the heads are its queries, the keys, which begin
    with the values, its values as well."""
    mask, sees_any = visible.block(0, 1)
    if mask is not None:
        mask = additive(mask, query.dtype).transpose(1, 2).expand(-1, -1, query.shape[1], -1)
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key, key, attn_mask=mask, scale=scale)
    out = out[..., : value.shape[-1]].transpose(1, 2)
    return out if sees_any is None else out.where(sees_any, 0), None


def _not_complex(q_pe: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor) -> str:
    fits = cos.dtype == sin.dtype == torch.float32 and q_pe.dtype == k_pe.dtype
    return "" if fits else "for float32 tables, and queries and keys of one dtype"


@ops.faster(apply_rotary, "cpu complex", why_not=_not_complex, **HALF_ON_CPU)
def rotate(
    q_pe: Float[Tensor, "batch heads seq rope"],
    k_pe: Float[Tensor, "batch seq rope"],
    cos: Float[Tensor, "#batch seq pairs"],
    sin: Float[Tensor, "#batch seq pairs"],
) -> tuple[Float[Tensor, "batch heads seq rope"], Float[Tensor, "batch seq rope"]]:
    """`apply_rotary` by products of complex numbers, nine times as fast for 2,048 tokens; by one of them for one token."""
    turns = torch.complex(cos, sin)[:, None]

    def rotated(x: Tensor) -> Tensor:  # (B, heads, S, R)
        pairs = torch.view_as_complex(x.to(cos.dtype).contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)

    if q_pe.shape[2] > 1:
        return rotated(q_pe), rotated(k_pe[:, None])[:, 0]
    both = rotated(torch.cat((q_pe, k_pe[:, None]), dim=1))
    return both[:, :-1], both[:, -1]
