"""Attention of a few queries to the latent cache, split over the keys so that a long context fills the GPU.

All heads share one key of C + R numbers whose first C are its value: a tile of keys is read once, and used twice, for the
scores and for the sum. The scores never leave the chip. A first kernel attends to one share of the keys for a block of
queries, a second adds the shares, weighted by their log-sum-exp.

K · (C + R) numbers of the cache move for each block of queries; plain products also write and read the scores four times
and read the values a second time.

Source: the running softmax of Milakov and Gimelshein (2018); the split over keys of Flash-Decoding (Dao et al., 2023);
DeepSeek-V2, section 2.1 and appendix C, for the absorbed form.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dsv2_ref.kernels.language import jit, power_of_two, tl

BLOCK_ROWS = 16
"""Rows of a block, each the query of a head; tensor cores take no fewer."""

MAX_SPLITS = 64
"""Shares of the keys at most, so that adding them stays cheap."""


def mla_decode_definition(
    query: Float[Tensor, "batch heads seq width"],
    remembered: Float[Tensor, "batch kv_seq width"],
    latent: int,
    scale: float,
    padding: Bool[Tensor, "batch kv_seq"] | None = None,
) -> Float[Tensor, "batch heads seq latent"]:
    """Softmax attention to one key for all heads, in float32, causal from the bottom right; unsighted rows are zero."""
    seq, kv_seq = query.shape[2], remembered.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys = remembered.to(dtype)[:, None]
    keep = torch.ones(seq, kv_seq, dtype=torch.bool, device=query.device).tril(kv_seq - seq)[None, None]
    if padding is not None:
        keep = keep & padding[:, None, None]
    scores = (query.to(dtype) @ keys.mT * scale).masked_fill(~keep, float("-inf"))
    weights = scores.softmax(-1).where(keep.any(-1, keepdim=True), 0)
    return (weights @ keys[..., :latent]).to(query.dtype)


@jit(do_not_specialize=["kv_seq", "p_batch"])  # these grow from step to step: one program for all
def mla_partial_kernel(
    query,
    keys,
    padding,
    sums,
    log_sums,
    heads,
    seq,
    kv_seq,
    split_size,
    latent,
    rope,
    scale,
    q_batch,  # strides, in numbers
    q_head,
    q_token,
    k_batch,
    k_token,
    p_batch,
    p_token,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
):
    """A program: one sequence, ROWS queries, one share of the keys, KEYS of them at a time."""
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    rows = heads * seq
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = row % seq
    c = tl.arange(0, LATENT)
    r = tl.arange(0, ROPE)

    q = query + batch * q_batch + (row // seq).to(tl.int64)[:, None] * q_head + token[:, None] * q_token
    real = (row < rows)[:, None]
    q_latent = tl.load(q + c[None, :], mask=real & (c < latent)[None, :], other=0.0)
    q_rope = tl.load(q + latent + r[None, :], mask=real & (r < rope)[None, :], other=0.0)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    attended = tl.zeros((ROWS, LATENT), tl.float32)
    start = split * split_size
    for first in range(start, tl.minimum(start + split_size, kv_seq), KEYS):
        place = first + tl.arange(0, KEYS)
        here = place < kv_seq
        k = keys + batch * k_batch + place.to(tl.int64)[:, None] * k_token
        k_latent = tl.load(k + c[None, :], mask=here[:, None] & (c < latent)[None, :], other=0.0)
        k_rope = tl.load(k + latent + r[None, :], mask=here[:, None] & (r < rope)[None, :], other=0.0)
        scores = tl.dot(q_latent, tl.trans(k_latent), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision="ieee") * scale
        keep = here[None, :] & (place[None, :] <= kv_seq - seq + token[:, None])
        if HAS_PADDING:
            kept = tl.load(padding + batch * p_batch + place.to(tl.int64) * p_token, mask=here, other=0)
            keep = keep & (kept != 0)[None, :]
        scores = tl.where(keep, scores, float("-inf"))

        # Running softmax; a row that has seen nothing yet keeps 0 as its highest, so that no infinities are subtracted.
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(highest - base)
        p = tl.exp(scores - base[:, None])
        weight = weight * shrink + tl.sum(p, 1)
        attended = attended * shrink[:, None]
        attended = tl.dot(p.to(k_latent.dtype), k_latent, attended, input_precision="ieee")
        highest = higher

    seen = weight > 0
    whole = tl.where(seen, weight, 1.0)
    part = (batch * rows + row) * tl.num_programs(2) + split
    tl.store(log_sums + part, tl.where(seen, highest + tl.log(whole), float("-inf")), mask=row < rows)
    tl.store(sums + part[:, None] * latent + c[None, :], attended / whole[:, None], mask=real & (c < latent)[None, :])


@jit(do_not_specialize=["splits"])
def mla_combine_kernel(sums, log_sums, out, latent, splits, LATENT: tl.constexpr, SPLITS: tl.constexpr):
    """A program a row: the shares, each weighted by exp(its log-sum - the highest)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, LATENT)
    share = tl.arange(0, SPLITS)
    logs = tl.load(log_sums + row * splits + share, mask=share < splits, other=float("-inf"))
    highest = tl.max(logs, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(logs - base), 0)
    result = tl.zeros((LATENT,), tl.float32)
    for split in range(0, splits):
        factor = tl.exp(tl.load(log_sums + row * splits + split) - base)
        result += factor * tl.load(sums + (row * splits + split) * latent + c, mask=c < latent, other=0.0)
    result = result / tl.where(total > 0, total, 1.0)
    tl.store(out + row * latent + c, result.to(out.dtype.element_ty), mask=c < latent)


def keys_at_once(itemsize: int) -> int:
    """Keys of a tile: 32 in half precision, 16 in float32, so that a tile fits 99 KB of shared memory (sm_89)."""
    return 32 if itemsize == 2 else 16


def split_keys(kv_seq: int, programs: int, processors: int, block: int) -> tuple[int, int]:
    """How many shares of the keys, and how many keys each has, a multiple of ``block``.

    ``programs`` run for each share; shares are added until two programs a multiprocessor are there, or a share would
    have fewer than four tiles.
    """
    tiles = -(-kv_seq // block)
    wanted = min(-(-2 * processors // programs), -(-tiles // 4), MAX_SPLITS)
    size = -(-tiles // max(wanted, 1)) * block
    return max(1, -(-kv_seq // size)) if size else 1, max(size, block)


def mla_decode_launch(
    query: Float[Tensor, "batch heads seq width"],
    remembered: Float[Tensor, "batch kv_seq width"],
    latent: int,
    scale: float,
    padding: Bool[Tensor, "batch kv_seq"] | None = None,
    splits: int | None = None,
) -> Float[Tensor, "batch heads seq latent"]:
    """`mla_decode_definition` in the kernels; ``splits`` shares of the keys, or as many as fill the GPU."""
    batch, heads, seq, width = query.shape
    kv_seq, rows = remembered.shape[1], heads * seq
    query = query if query.stride(-1) == 1 else query.contiguous()
    remembered = remembered if remembered.stride(-1) == 1 else remembered.contiguous()
    out = torch.empty(batch, heads, seq, latent, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    block, row_blocks = keys_at_once(query.element_size()), -(-rows // BLOCK_ROWS)
    if splits is None:
        cuda = query.device.type == "cuda"
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count if cuda else 1
        splits, split_size = split_keys(kv_seq, batch * row_blocks, processors, block)
    else:
        share = -(-kv_seq // splits)
        split_size = max(1, -(-share // block)) * block
    sums = torch.empty(batch, rows, splits, latent, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(batch, rows, splits, dtype=torch.float32, device=query.device)
    mask = query if padding is None else padding.to(torch.uint8)
    with torch.cuda.device_of(query):
        mla_partial_kernel[(batch, row_blocks, splits)](
            query,
            remembered,
            mask,
            sums,
            log_sums,
            heads,
            seq,
            kv_seq,
            split_size,
            latent,
            width - latent,
            scale,
            *query.stride()[:3],
            *remembered.stride()[:2],
            *mask.stride()[:2],
            HAS_PADDING=padding is not None,
            ROWS=BLOCK_ROWS,
            KEYS=block,
            LATENT=max(16, power_of_two(latent)),
            ROPE=max(16, power_of_two(width - latent)),
            num_warps=4,
            num_stages=3 if query.element_size() == 2 else 1,
        )
        mla_combine_kernel[(batch * rows,)](
            sums,
            log_sums,
            out,
            latent,
            splits,
            LATENT=max(16, power_of_two(latent)),
            SPLITS=max(MAX_SPLITS, power_of_two(splits)),
            num_warps=4,
        )
    return out
