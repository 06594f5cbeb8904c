"""Bytes of the cache, in every kind that a model of these sizes could have."""

from dsv2_ref.accounting.call import CACHES, DTYPE_BYTES, Counts, require_kind
from dsv2_ref.accounting.sizes import Sizes
from dsv2_ref.checks import cache_format, is_config, is_int, require
from dsv2_ref.config import DeepseekV2Config

CACHE_KINDS = ("own", "latent", "expanded", "mha", "gqa", "mqa")
"""What could be cached of a token, as `cache_numbers` counts it."""


TILE = 128


def record_bytes(config: DeepseekV2Config, dtype: str, cache: str | None) -> tuple[int, int]:
    """Bytes of a latent and of a rotated key in the cache of a model with latent attention: of codes with a float32 scale
    for each 128 of them (one for all where 128 does not divide the latent), and of a key in the dtype."""
    s, size = Sizes.of(config), DTYPE_BYTES[dtype]
    if cache is None:
        return s.C * size, s.R * size
    require_kind("cache", cache, CACHES, dtype)
    require(config.use_mla, "cache", cache, "None: this model has no latent")
    cache_format(cache, CACHES, s.C, "cache")
    scales = 1 if s.C % TILE else s.C // TILE
    return (s.C // 2 if cache == "int4" else s.C) + 4 * scales, s.R * size


def numbers_by_kind(config: DeepseekV2Config) -> Counts:
    """`cache_numbers` of every kind that a model of these sizes could have."""
    s = Sizes.of(config)
    groups = s.G if s.G < s.H else max(n for n in range(1, 9) if s.H % n == 0)
    shared = {"mha": 2 * s.H * s.V, "gqa": 2 * groups * s.V, "mqa": 2 * s.V}
    if not config.use_mla:
        return {"own": 2 * s.G * s.V} | shared
    return {"own": s.C + s.R, "latent": s.C + s.R, "expanded": s.H * (s.N + s.R + s.V)} | shared


def cache_numbers(config: DeepseekV2Config, kind: str = "own") -> int:
    """Values that a layer caches per token.

    Args:
        kind: ``own``, what the package's cache holds; or what this model would hold as ``latent`` (MLA), as
            ``expanded`` (keys and values of all MLA heads), as ``mha``, ``gqa`` or ``mqa``, with heads as wide as its
            values. ``gqa`` has the model's ``num_key_value_heads`` groups where heads share keys, else the largest
            number of groups up to 8 that divides the heads.
    """
    numbers = numbers_by_kind(config)
    require(kind in CACHE_KINDS, "kind", kind, ", ".join(CACHE_KINDS))
    require(kind in numbers, "kind", kind, "own, mha, gqa or mqa: this model has no latent")
    return numbers[kind]


def cache_bytes(
    config: DeepseekV2Config,
    tokens: int,
    dtype: str = "bfloat16",
    kind: str = "own",
    layers: int | None = None,
    cache: str | None = None,
) -> int:
    """Bytes of the caches of ``layers`` layers (None: all of the model's).

    Args:
        tokens: cached tokens, of all sequences together.
        cache: what latents are stored as, one of `CACHES`, with a float32 scale for each 128 elements (for all where
            128 does not divide them); rotated keys keep the dtype. None: all is in the dtype.

    Raises:
        ValueError: unless tokens and layers are integers of at least 0, for an unknown dtype or kind, for a latent where
            the model has none, and for ``int4`` where its width is odd.
    """
    is_config(config)
    layers = config.num_hidden_layers if layers is None else layers
    require(is_int(tokens, 0), "tokens", tokens, "an integer of at least 0")
    require(is_int(layers, 0), "layers", layers, "an integer of at least 0")
    require(dtype in tuple(DTYPE_BYTES), "dtype", dtype, ", ".join(DTYPE_BYTES))
    numbers = cache_numbers(config, kind)
    if cache is None:
        return layers * tokens * numbers * DTYPE_BYTES[dtype]
    require(kind in ("own", "latent"), "kind", kind, f"own or latent for a cache in {cache}")
    return layers * tokens * sum(record_bytes(config, dtype, cache))
