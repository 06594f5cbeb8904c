"""Attention of a few queries to the latent cache, split over the keys so that a long context fills the GPU.

All heads share one key of C + R features whose first C are its value: a tile of keys is read once, and used twice, for
the scores and for the sum. The scores never leave the chip. The first kernel attends to one share of the keys for a
block of queries; the second adds the shares, weighted by their log-sum-exp. With a single share the first writes the
output itself.

The blocks of queries of one sequence are launched side by side, so that all but the first may find the keys in the
second-level cache. Plain products also write and read the scores, and read the values again.

Source: the running softmax of Milakov and Gimelshein (2018); the split over keys of Flash-Decoding (Dao et al., 2023);
DeepSeek-V2, section 2.1 and appendix C, for the absorbed form.
"""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from dsv2_ref.fast.triton import plan
from dsv2_ref.fast.triton.language import jit, power_of_two, tl
from dsv2_ref.fast.triton.quantized import from_float8
from dsv2_ref.records import Record


# fmt: off
@jit
def attend_tile(
    q_latent, q_rope, k_latent, k_rope, keep, scale,  # ROWS queries, KEYS cached tokens
    highest, weight, attended,  # so far: largest score, sums of weights and of values
):
    """One tile of the cache more: its latents are keys and, weighted, the values."""
    scores = tl.dot(q_latent, tl.trans(k_latent), input_precision="ieee")
    scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision="ieee")
    scores = tl.where(keep, scores * scale, float("-inf"))

    higher = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # 0 if nothing was seen yet
    shrink = tl.exp(highest - base)
    p = tl.exp(scores - base[:, None])
    weight = weight * shrink + tl.sum(p, 1)
    attended = attended * shrink[:, None]
    p = p.to(k_latent.dtype)
    attended = tl.dot(p, k_latent, attended, input_precision="ieee")
    return higher, weight, attended


@jit(do_not_specialize=["kv_seq", "p_batch"])  # these grow with every step
def mla_partial_kernel(
    query, latents, scales, ropes, padding, sums, log_sums,
    heads, seq, kv_seq, share_size, latent, rope, scale,
    q_batch, q_head, q_token,  # strides, in elements
    k_batch, k_token, s_batch, s_token, r_batch, r_token, p_batch, p_token,
    FORMAT: tl.constexpr, TILE: tl.constexpr,  # of latents: "" as they are, or codes
    HAS_PADDING: tl.constexpr, ONE_SHARE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
):
    """A program: ROWS queries of one sequence, one share of the keys, KEYS at a time.

    The blocks of queries of one sequence are neighbours, so that they read the same
    keys at the same time.
    """
    rows = heads * seq
    batch = tl.program_id(1).to(tl.int64)
    share = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row % seq
    c = tl.arange(0, LATENT)
    r = tl.arange(0, ROPE)
    real = (row < rows)[:, None]
    in_latent = (c < latent)[None, :]
    in_rope = (r < rope)[None, :]

    head = (row // seq).to(tl.int64)[:, None]
    q = query + batch * q_batch + head * q_head + token[:, None] * q_token
    q_latent = tl.load(q + c[None, :], mask=real & in_latent, other=0.0)
    q_rope = tl.load(q + latent + r[None, :], mask=real & in_rope, other=0.0)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    attended = tl.zeros((ROWS, LATENT), tl.float32)
    start = share * share_size
    for first in range(start, tl.minimum(start + share_size, kv_seq), KEYS):
        place = first + tl.arange(0, KEYS)
        here = place < kv_seq
        at = place.to(tl.int64)[:, None]
        k = latents + batch * k_batch + at * k_token + c[None, :]
        k_latent = tl.load(k, mask=here[:, None] & in_latent, other=0)
        k = ropes + batch * r_batch + at * r_token + r[None, :]
        k_rope = tl.load(k, mask=here[:, None] & in_rope, other=0.0)
        if FORMAT != "":
            tile = tl.arange(0, LATENT // TILE)[None, :]
            k = scales + batch * s_batch + at * s_token + tile
            in_tile = here[:, None] & (tile * TILE < latent)
            k_scale = tl.load(k, mask=in_tile, other=0.0)[:, :, None]
            codes = from_float8(k_latent) if FORMAT == "fp8" else k_latent.to(tl.float32)
            codes = tl.reshape(codes, (KEYS, LATENT // TILE, TILE)) * k_scale
            k_latent = tl.reshape(codes, (KEYS, LATENT)).to(q_latent.dtype)
        keep = here[None, :] & (place[None, :] <= kv_seq - seq + token[:, None])
        if HAS_PADDING:
            flag = padding + batch * p_batch + place.to(tl.int64) * p_token
            kept = tl.load(flag, mask=here, other=0)
            keep = keep & (kept != 0)[None, :]
        highest, weight, attended = attend_tile(
            q_latent, q_rope, k_latent, k_rope, keep, scale, highest, weight, attended
        )

    seen = weight > 0
    whole = tl.where(seen, weight, 1.0)
    mean = (attended / whole[:, None]).to(sums.dtype.element_ty)
    part = (batch * rows + row) * tl.num_programs(2) + share
    if not ONE_SHARE:
        log_sum = tl.where(seen, highest + tl.log(whole), float("-inf"))
        tl.store(log_sums + part, log_sum, mask=row < rows)
    # Stored in halves: 128 registers per thread instead of 200, so twice the blocks.
    halves = tl.reshape(mean, (ROWS, 2, LATENT // 2))
    left, right = tl.split(tl.trans(halves, 0, 2, 1))
    c = tl.arange(0, LATENT // 2)[None, :]
    out = sums + part[:, None] * latent + c
    tl.store(out, left, mask=real & (c < latent))
    tl.store(out + LATENT // 2, right, mask=real & (c + LATENT // 2 < latent))
# fmt: on


@jit(do_not_specialize=["shares"])
def mla_combine_kernel(
    sums, log_sums, out, latent, shares, SHARES: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr
):
    """A program: COLUMNS features of one row, the sum of its shares, AT_ONCE at a time.

    Each share is weighted by exp(its log-sum - the highest).
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.arange(0, SHARES)
    logs = tl.load(log_sums + row * shares + share, mask=share < shares, other=float("-inf"))
    highest = tl.max(logs, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(logs - base), 0)
    result = tl.zeros((AT_ONCE, COLUMNS), tl.float32)
    for first in range(0, shares, AT_ONCE):
        some = first + tl.arange(0, AT_ONCE)
        factor = tl.exp(tl.load(log_sums + row * shares + some, mask=some < shares, other=float("-inf")) - base)
        part = sums + (row * shares + some)[:, None] * latent + c[None, :]
        inside = (some < shares)[:, None] & (c < latent)[None, :]
        result += factor[:, None] * tl.load(part, mask=inside, other=0.0)
    mean = tl.sum(result, 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * latent + c, mean.to(out.dtype.element_ty), mask=c < latent)


def mla_decode_launch(
    query: Float[Tensor, "batch heads seq width"],
    tokens: Float[Tensor, "batch kv_seq width"],
    latent: int,
    scale: float,
    padding: Bool[Tensor, "batch kv_seq"] | None = None,
    splits: int | None = None,
) -> Float[Tensor, "batch heads seq latent"]:
    """`attend` to one key for all heads, causal from the bottom right, in the kernels; with ``splits`` shares of the
    keys, or as many as fill the GPU."""
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    latents, ropes = tokens[..., :latent], tokens[..., latent:]
    return _launch(query, "", latents, latents, ropes, scale, padding, splits)


def mla_records_launch(
    query: Float[Tensor, "batch heads seq width"],
    records: UInt8[Tensor, "batch kv_seq bytes"],
    record: Record,
    scale: float,
    padding: Bool[Tensor, "batch kv_seq"] | None = None,
    splits: int | None = None,
) -> Float[Tensor, "batch heads seq latent"]:
    """The same attention to what records of bytes stand for, which the kernel computes on the way: each key is read as
    codes and never written as anything else.

    Triton 3.7 pipelines the scales and rotated keys, but not the codes, for which a block waits at every tile."""
    latents, scales, ropes = float_views(records, record)
    return _launch(query, record.format, latents, scales, ropes, scale, padding, splits, record.tile)


def float_views(
    records: UInt8[Tensor, "batch kv_seq bytes"], record: Record
) -> tuple[Tensor, Float[Tensor, "batch kv_seq tiles"], Float[Tensor, "batch kv_seq rope"]]:
    """Views of the codes, scales and rotated keys of records, each in its dtype, float8 as bytes (``from_float8``)."""
    codes, scales, _ = record.parts
    by_scale, by_feature = records.view(torch.float32), records.view(record.dtype)
    first = (codes + scales) // record.dtype.itemsize
    codes_dtype = torch.uint8 if record.format == "fp8" else torch.int8
    return (
        records[..., :codes].view(codes_dtype),
        by_scale[..., codes // 4 : (codes + scales) // 4],
        by_feature[..., first:],
    )


def _launch(
    query: Tensor,
    format: str,
    latents: Tensor,
    scales: Tensor,
    ropes: Tensor,
    scale: float,
    padding: Tensor | None,
    splits: int | None,
    scaled: int = 1,  # codes of a record that share a scale
) -> Tensor:
    batch, heads, seq, _ = query.shape
    kv_seq, latent, rope, rows = latents.shape[1], latents.shape[2], ropes.shape[2], heads * seq
    query = query if query.stride(-1) == 1 else query.contiguous()
    out = torch.empty(batch, heads, seq, latent, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    wide, narrow = max(16, power_of_two(latent)), max(16, power_of_two(rope))
    gpu = plan.gpu_of(query.device)
    tile = plan.decode_tile(rows, wide + narrow, query.element_size(), gpu, bool(format))
    row_blocks = -(-rows // tile.rows)
    if splits is None:
        slots = gpu.processors * tile.at_once
        splits, size = plan.split_keys(kv_seq, batch * row_blocks, slots, tile.keys)
    else:
        size = max(1, -(-kv_seq // (splits * tile.keys))) * tile.keys
    sums = log_sums = out
    if splits > 1:
        sums = torch.empty(batch, rows, splits, latent, dtype=torch.float32, device=query.device)
        log_sums = torch.empty(batch, rows, splits, dtype=torch.float32, device=query.device)
    mask = query if padding is None else padding.to(torch.uint8)
    with torch.cuda.device_of(query):
        mla_partial_kernel[(row_blocks, batch, splits)](
            query, latents, scales, ropes, mask, sums, log_sums, heads, seq, kv_seq, size, latent, rope, scale,
            *query.stride()[:3], *latents.stride()[:2], *scales.stride()[:2], *ropes.stride()[:2], *mask.stride()[:2],
            FORMAT=format, TILE=wide if scaled == latent else scaled,
            HAS_PADDING=padding is not None, ONE_SHARE=splits == 1,
            ROWS=tile.rows, KEYS=tile.keys, LATENT=wide, ROPE=narrow,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            columns = min(128, wide)
            mla_combine_kernel[(batch * rows, wide // columns)](
                sums, log_sums, out, latent, splits,
                SHARES=max(plan.MAX_SHARES, power_of_two(splits)), AT_ONCE=16, COLUMNS=columns, num_warps=4,
            )  # fmt: skip
    return out
