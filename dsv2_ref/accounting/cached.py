"""Bytes of caches, of every kind a model of these sizes could have."""

from dsv2_ref.accounting.call import DTYPE_BYTES, require
from dsv2_ref.config import DeepseekV2Config

CACHE_KINDS = ("own", "latent", "expanded", "mha", "gqa", "mqa")
"""What may be remembered of a token, as `cache_numbers` counts it."""


def cache_numbers(config: DeepseekV2Config, kind: str = "own") -> int:
    """Numbers that a layer remembers of a token.

    Args:
        kind: ``own``, what the package's cache holds; or what this model would hold as ``latent`` (MLA), ``expanded`` (keys and
            values of all MLA heads), ``mha``, ``gqa`` (8 groups) or ``mqa``, with heads as wide as its values.
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
    shared = {"kv": config.num_key_value_heads or heads, "mha": heads, "gqa": min(8, heads), "mqa": 1}
    return 2 * shared[kind] * width


def cache_bytes(
    config: DeepseekV2Config, tokens: int, dtype: str = "bfloat16", kind: str = "own", layers: int | None = None
) -> int:
    """Bytes of the caches of ``layers`` layers (None: all) for so many tokens, of all sequences together."""
    layers = config.num_hidden_layers if layers is None else layers
    return layers * tokens * cache_numbers(config, kind) * DTYPE_BYTES[dtype]
