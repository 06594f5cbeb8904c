"""How a decoding launch is laid out on a GPU, and when it beats plain products.

The counts come from the compiler's machine code and from data sheets. Nothing here was measured on a GPU.
"""

import os
from functools import cache, lru_cache
from typing import NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # by Triton, on the CPU

BLOCK_ROWS = 16
"""Rows of a block, each the query of one head; tensor cores take no fewer. With 64 or more, Triton 3.7 computes two
chained products wrongly on sm_100 (triton issue 10821)."""

STAGES = 2  # of the pipeline: one tile of keys is in use while the next is on its way
MAX_SHARES = 128  # of the keys: about one for each multiprocessor, so that adding them stays cheap
RECORD_WARPS = 8  # of a block that reads records: with four, their values would not fit the registers beside the sums
START_TILES = 4  # that a share costs besides its keys: its queries, the first tile's latency, its float32 result

MOST_ROWS = 512
"""Rows up to which a quantised product runs in its kernel. It computes each weight anew for every tile of rows; written
once as a dense matrix, 4 bytes pass memory per weight. If the kernel has half the rate of torch's products, 300 of an
H100's 600 TFLOP/s, which was not measured, it loses as much time as those bytes take at 3 TB/s with some 400 rows."""

FLOPS_PER_CYCLE, BYTES_PER_CYCLE = 2458, 14.5
"""For each multiprocessor of an H100, 60 % of its tensor cores' peak, and its share of the memory's bandwidth."""


class Gpu(NamedTuple):
    """The multiprocessors of a GPU, and the bytes of shared memory that each of them has."""

    processors: int
    """Multiprocessors."""
    shared: int
    """Bytes of shared memory of each."""


H100 = Gpu(132, 228 * 1024)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU of these tensors; an H100 where there is none (interpreted kernels, fake tensors)."""
    if INTERPRETED or not torch.cuda.is_available():
        return H100
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.multi_processor_count, found.shared_memory_per_multiprocessor)


def keys_at_once(itemsize: int, shared: int = H100.shared) -> int:
    """Keys of a tile: 32 in half precision, and 16 where that lets a second block fit (GPUs with 100 KB of shared
    memory: sm_86, sm_89, sm_120) and in float32."""
    return 32 if itemsize == 2 and shared > 128 * 1024 else 16


def blocks_at_once(keys: int, width: int, itemsize: int, shared: int) -> int:
    """Blocks that a multiprocessor keeps together: as many as its shared memory holds, each with one tile of keys, its
    queries, their weights and 1 KB of its own, and by its registers four in half precision and two in float32."""
    used = (keys * width + BLOCK_ROWS * (width + keys)) * itemsize + 1024
    return max(1, min(4 if itemsize == 2 else 2, shared // used))


@lru_cache
def _shares(tiles: int, programs: int, slots: int) -> int:
    def cost(shares: int) -> int:
        return -(-programs * shares // slots) * (-(-tiles // shares) + START_TILES)

    return min(range(1, min(tiles, MAX_SHARES) + 1), key=cost, default=1)


def split_keys(kv_seq: int, programs: int, slots: int, keys: int) -> tuple[int, int]:
    """Into how many shares to split the keys, and how many keys each has, a multiple of ``keys``.

    Each share takes ``programs`` blocks, of which the GPU runs ``slots`` at a time: one wave. Chosen is what ends
    first, by waves times the tiles of a share and its own cost. That fills one wave as far as it goes; where one
    share of each sequence is more than half a wave, it spreads several waves evenly.
    """
    tiles = -(-kv_seq // keys)
    size = max(1, -(-tiles // _shares(tiles, programs, slots))) * keys
    return max(1, -(-kv_seq // size)), size


def kernel_cycles(batch: int, rows: int, width: int, latent: int, processors: int) -> float:
    """Cycles per cached key that the decoding kernel takes at least, on an H100.

    Its limit is shared memory, 128 bytes per cycle. For each key and block of rows every element of a token passes
    four times, as it arrives, for the scores and, twice as many bytes, as the queries that four warps read again; the
    latent passes once more as the value. With few rows the limit is the cache's way from memory.
    """
    blocks = batch * -(-rows // BLOCK_ROWS)
    return max(blocks * (4 * width + latent) / 64, batch * width * 2 / BYTES_PER_CYCLE) / processors


def plain_cycles(batch: int, rows: int, width: int, latent: int, processors: int) -> float:
    """Cycles per cached key of plain products: scores, softmax, values, one after the other.

    Each product takes the longer of its FLOPs and its bytes. The second has few results, 128 × 128 of them to a
    multiprocessor, so that a small batch leaves most of the GPU idle. Scores are written and read twice.
    """
    busy = min(processors, batch * -(-rows // 128) * -(-latent // 128))
    scores = max(2 * rows * width / FLOPS_PER_CYCLE, 2 * width / BYTES_PER_CYCLE) / processors
    softmax = 4 * 2 * rows / BYTES_PER_CYCLE / processors
    values = max(2 * rows * latent / FLOPS_PER_CYCLE / busy, 2 * latent / BYTES_PER_CYCLE / processors)
    return batch * (scores + softmax + values)


def decoding_pays(batch: int, heads: int, seq: int, width: int, latent: int, processors: int) -> bool:
    """Whether the decoding kernel needs fewer cycles than plain products, by count, at any number of keys.

    On an H100 it does for up to 64 rows (heads · seq) at any batch, and with 128 heads for up to 8 sequences. Launches,
    of which plain products have more, are left out.
    """
    sizes = batch, heads * seq, width, latent, processors
    return kernel_cycles(*sizes) <= plain_cycles(*sizes)


CONVERSION = 8  # instructions that make a value of a float8: five on bits, a change of dtype, two products


def records_pay(batch: int, heads: int, seq: int, width: int, latent: int, record: int, processors: int) -> bool:
    """`decoding_pays` for a cache of records of so many bytes: every block of queries makes values of the codes, 128
    instructions per cycle; before plain products they are written to memory, and read from there."""
    sizes = batch, heads * seq, width, latent, processors
    blocks = batch * -(-heads * seq // BLOCK_ROWS)
    converting = blocks * CONVERSION * latent / 128 / processors
    writing = batch * (record + 2 * width) / BYTES_PER_CYCLE / processors
    return kernel_cycles(*sizes) + converting <= plain_cycles(*sizes) + writing
