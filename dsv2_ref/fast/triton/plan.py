"""How launches are laid out on a GPU.

The tiles and where they serve were measured on an H100 (torch 2.11, Triton 3.6); for other GPUs it was counted what fits.
"""

import os
from functools import cache, lru_cache
from typing import NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # by Triton, on the CPU

BLOCK_ROWS = 16
"""Rows of a narrow block, each the query of one head; tensor cores take no fewer."""

WIDE_FROM = 49
"""Rows of a sequence (heads · queries) from which a wide block of 64 takes less time than narrow ones, which read the
keys once for every 16 rows."""

NARROW_UP_TO = 64
"""Rows of a sequence up to which narrow blocks are faster than plain products. With 128 heads they took 1.1 to 1.3 times
as long, at 1 to 128 sequences of 8,192 keys."""

MAX_SHARES = 128  # of the keys: about one for each multiprocessor, so that adding them stays cheap
START_TILES = 4  # that a share costs besides its keys: its queries, the first tile's latency, its float32 result

MOST_ROWS = 512
"""Rows up to which a quantised product runs in its kernel. It computes each weight anew for every tile of rows; with more
rows a dense matrix is written once and multiplied by torch."""


class Gpu(NamedTuple):
    """What the launches of a GPU depend on."""

    processors: int
    """Multiprocessors."""
    shared: int
    """Bytes of shared memory of each."""
    major: int
    """Its generation, as 9 in sm_90, Hopper."""


H100 = Gpu(132, 228 * 1024, 9)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU of these tensors; an H100 where there is none (interpreted kernels, fake tensors)."""
    if INTERPRETED or not torch.cuda.is_available():
        return H100
    found = torch.cuda.get_device_properties(None if device.type == "meta" else device)
    return Gpu(found.multi_processor_count, found.shared_memory_per_multiprocessor, found.major)


class Tile(NamedTuple):
    """How blocks of the decoding kernel are laid out."""

    rows: int
    """Queries of a block, each of one head."""
    keys: int
    """Keys that it holds together."""
    warps: int
    """Of 32 threads each."""
    stages: int
    """Tiles of keys in use or on their way."""
    at_once: int
    """Blocks of a multiprocessor for which the keys are split."""


def has_wide_tile(gpu: Gpu, itemsize: int) -> bool:
    """Whether a block of 64 rows fits, and is right: in half precision on Hopper GPUs alone. Others have less shared
    memory, and on sm_100 Triton 3.7 computes two chained products of so many rows wrongly (triton issue 10821)."""
    return gpu.major == 9 and itemsize == 2


def decode_tile(rows: int, width: int, itemsize: int, gpu: Gpu, records: bool = False) -> Tile:
    """The tile for so many rows of a sequence, over tokens of ``width`` features or over records.

    A narrow block takes 32 keys in half precision, and 16 where that lets a second block fit (GPUs with 100 KB of
    shared memory: sm_86, sm_89, sm_120) and in float32. Where one block reads all keys of a share, memory is the limit:
    one block for each multiprocessor, with two tiles on their way, is fastest if two would fit.
    """
    if rows >= WIDE_FROM and has_wide_tile(gpu, itemsize):
        return Tile(64, 64, 8, 2, 1)
    keys = 32 if itemsize == 2 and gpu.shared > 128 * 1024 else 16
    if records:
        return Tile(BLOCK_ROWS, keys, 4, 2, 2) if gpu.major == 9 else Tile(BLOCK_ROWS, keys, 8, 2, 1)
    if rows <= BLOCK_ROWS and itemsize == 2 and blocks_at_once(2 * keys, width, itemsize, gpu.shared) > 1:
        return Tile(BLOCK_ROWS, keys, 4, 3, 1)
    return Tile(BLOCK_ROWS, keys, 4, 2, blocks_at_once(keys, width, itemsize, gpu.shared))


def blocks_at_once(keys: int, width: int, itemsize: int, shared: int) -> int:
    """Narrow blocks that a multiprocessor keeps together: as many as its shared memory holds, each with ``keys`` keys,
    its queries, their weights and 1 KB of its own, and by its registers four in half precision and two in float32."""
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


def decoding_pays(rows: int, itemsize: int, gpu: Gpu) -> bool:
    """Whether the decoding kernel is faster than plain products for so many rows of a sequence."""
    return rows <= NARROW_UP_TO or has_wide_tile(gpu, itemsize)
