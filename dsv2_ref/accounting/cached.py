"""Bytes of caches, of every kind a model of these sizes could have."""

import math

from dsv2_ref.accounting.call import DTYPE_BYTES
from dsv2_ref.config import DeepseekV2Config, is_int, require

CACHE_KINDS = ("own", "latent", "expanded", "mha", "gqa", "mqa")
"""What may be remembered of a token, as `cache_numbers` counts it."""


def cache_numbers(config: DeepseekV2Config, kind: str = "own") -> int:
    """Numbers that a layer remembers of a token.

    Args:
        kind: ``own``, what the package's cache holds; or what this model would hold as ``latent`` (MLA), ``expanded`` (keys and
            values of all MLA heads), ``mha``, ``gqa`` or ``mqa``, with heads as wide as its values. Groups of ``gqa`` are
            the model's ``num_key_value_heads`` where heads share keys, else as many up to 8 as divide the heads.
    """
    require(kind in CACHE_KINDS, "kind", kind, ", ".join(CACHE_KINDS))
    heads = config.num_attention_heads
    width = config.v_head_dim if config.use_mla else config.hidden_size // heads
    if kind == "own":
        kind = "latent" if config.use_mla else "kv"
    if kind in ("latent", "expanded"):
        require(config.use_mla, "kind", kind, "own, mha, gqa or mqa: this model has no latent")
        latent = (config.kv_lora_rank or 0) + config.qk_rope_head_dim
        return latent if kind == "latent" else heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + width)
    own = config.num_key_value_heads or heads
    groups = own if own < heads else max(n for n in range(1, 9) if heads % n == 0)
    shared = {"kv": own, "mha": heads, "gqa": groups, "mqa": 1}
    return 2 * shared[kind] * width


def possible_kinds(config: DeepseekV2Config) -> list[str]:
    """Kinds of cache that a model of these sizes could have."""
    return [kind for kind in CACHE_KINDS[1:] if config.use_mla or kind not in ("latent", "expanded")]


def cache_bytes(
    config: DeepseekV2Config, tokens: int, dtype: str = "bfloat16", kind: str = "own", layers: int | None = None
) -> int:
    """Bytes of the caches of ``layers`` layers (None: all) for so many tokens, of all sequences together.

    Raises:
        ValueError: for tokens or layers that are no integer of at least 0, an unknown dtype or kind, a latent that the
            model has not.
    """
    layers = config.num_hidden_layers if layers is None else layers
    require(is_int(tokens, 0, math.inf), "tokens", tokens, "an integer of at least 0")
    require(is_int(layers, 0, math.inf), "layers", layers, "an integer of at least 0")
    require(dtype in DTYPE_BYTES, "dtype", dtype, ", ".join(DTYPE_BYTES))
    return layers * tokens * cache_numbers(config, kind) * DTYPE_BYTES[dtype]
