"""Attention of one token to a long cache on CPUs, in C++ (``attend.cpp``): each key is read once, and records never stand
decoded in memory."""

from typing import Any

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from dsv2_ref import ops
from dsv2_ref.attention import attend
from dsv2_ref.cache import LatentCache
from dsv2_ref.fast.cpu import HALF_ON_CPU, begins
from dsv2_ref.fast.native import cannot_build, in_cpp, is_watched, why_not_built
from dsv2_ref.fast.processor import has_amx
from dsv2_ref.fast.quantized import not_one_query
from dsv2_ref.masks import Visibility
from dsv2_ref.records import CACHE_FORMATS, QuantizedLatentCache, Record, attend_records


def _empty(query: Tensor, keys: Tensor, latent: int, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:2], latent)


@in_cpp("attend.cpp", _empty)
def attend_to_keys(  # type: ignore[empty-body]
    query: Tensor, keys: Tensor, latent: int, scale: float, format: int, tile: int
) -> Tensor:
    """`dsv2_ref.attention.attend` of one token that sees every key, with sums in float32.

    Args:
        query: (batch, heads, features) bfloat16. keys: (batch, kv_seq, features) bfloat16, or records of bytes. latent: with
            how many of its features a key begins that are the value. format: of the records, by its place in
            `CACHE_FORMATS`; what is no record comes after these. tile: how many neighbours share a scale.

    Returns:
        (batch, heads, latent).
    """


def attend_to_cache(
    query: BFloat16[Tensor, "batch heads 1 features"], cache: LatentCache, latent: int, scale: float
) -> BFloat16[Tensor, "batch heads 1 latent"]:
    """`dsv2_ref.attention.attend` of one token to all of a cache, in whatever format."""
    return attend_to_keys(query[:, :, 0], cache.stored, latent, scale, *format_of(cache, latent))[:, :, None]


def format_of(cache: LatentCache, latent: int) -> tuple[int, int]:
    """The place of a cache's format in `CACHE_FORMATS`, behind them for what is as it is; and how many neighbours share a
    scale."""
    record = cache.record
    return (len(CACHE_FORMATS), latent) if record is None else (CACHE_FORMATS.index(record.format), record.tile)


NAME = "cpu one token"


def serves(record: Record | None) -> bool:
    """Whether this may run, and is the fastest for a cache of this kind: torch multiplies bfloat16 by tiles where the
    processor does."""
    return not ops.is_off(NAME) and (record is not None or not has_amx())


LONG = 1024
"""Keys from which it is worth seconds of a compiler, at the first use on a machine."""


def _not_long(query: Tensor, keys: Tensor, dtype: torch.dtype, visible: Visibility, dropout: float) -> str:
    if reason := not_one_query(query, keys, visible):
        return reason
    if dtype != query.dtype or len(keys) != len(query):
        return "for keys of every sequence in the dtype of the queries"
    if dropout:
        return "no dropout"
    if keys.shape[-2] < LONG:
        return f"for {LONG} keys or more"
    if keys.stride(-1) != 1:
        return "for keys whose features lie side by side"
    if is_watched():
        return "for tensors whose operations nothing watches"
    return cannot_build() if query.is_meta else why_not_built("attend.cpp")


def _not_long_keys(
    query: Tensor, key: Tensor, value: Tensor, visible: Visibility, scale: float, dropout: float = 0.0, **_: Any
) -> str:
    if not serves(None):
        return "this processor multiplies tiles of bfloat16"
    if key.shape[1] != 1 or not begins(key, value):
        return "the value is not the beginning of one key for all heads"
    return _not_long(query, key, key.dtype, visible, dropout)


@ops.faster(attend, NAME, where={"implementation": "products"}, why_not=_not_long_keys, **HALF_ON_CPU)
def attend_one(
    query: Float[Tensor, "batch heads 1 width"],
    key: Float[Tensor, "batch 1 kv_seq width"],
    value: Float[Tensor, "batch 1 kv_seq value_width"],
    visible: Visibility,
    scale: float,
    *_: Any,
    **__: Any,
) -> tuple[Float[Tensor, "batch heads 1 value_width"], None]:
    """`attend` of one query to the latent cache."""
    latent = value.shape[-1]
    return attend_to_keys(query[:, :, 0], key[:, 0], latent, scale, len(CACHE_FORMATS), latent)[:, :, None], None


def _not_long_cache(
    query: Tensor, cache: QuantizedLatentCache, visible: Visibility, scale: float, dropout: float = 0.0, **_: Any
) -> str:
    return _not_long(query, cache.stored, cache.record.dtype, visible, dropout)


@ops.faster(attend_records, NAME, where={"implementation": "products"}, why_not=_not_long_cache, **HALF_ON_CPU)
def attend_one_to_records(
    query: Float[Tensor, "batch heads 1 features"],
    cache: QuantizedLatentCache,
    visible: Visibility,
    scale: float,
    *_: Any,
    **__: Any,
) -> tuple[Float[Tensor, "batch heads 1 latent"], None]:
    """`attend_records` of one query."""
    return attend_to_cache(query, cache, cache.record.latent, scale), None
