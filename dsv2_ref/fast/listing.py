"""Which way serves which call of a layer, and why: what ``python -m dsv2_ref ways`` prints."""

from collections import Counter

import torch

from dsv2_ref import ops
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.layer import DeepseekV2DecoderLayer
from dsv2_ref.quantize import quantize


def choices(
    config: DeepseekV2Config,
    layer_idx: int,
    device: str,
    dtype: str,
    batch: int = 1,
    seq: int = 1,
    kv: int = 1,
    training: bool = False,
    weights: str | None = None,
    group: int = 64,
    cache_format: str | None = None,
) -> Counter[ops.Choice]:
    """The choice for every call of a layer, and how often it is made, in the order of the layer.

    The layer runs without memory, as if it were on ``device``: a GPU counts as one of the Ampere generation or newer
    unless this machine has another.

    Args:
        device: ``cpu`` or ``cuda``. dtype: of weights and activations, such as ``bfloat16``.
        batch: sequences. seq: new tokens of each. kv: tokens attended to, the new ones included.
        training: with gradients, and without a cache.
        weights: what `dsv2_ref.quantize.quantize` makes of them, in groups of ``group``. cache_format: of a
            `QuantizedLatentCache`, which may be empty before the call.
    """
    with torch.device("meta"), torch.set_grad_enabled(training):
        layer = DeepseekV2DecoderLayer(config, layer_idx).to(getattr(torch, dtype)).train(training)
        layer = layer if weights is None else quantize(layer, weights, group)
        x = torch.empty(batch, seq, config.hidden_size, dtype=getattr(torch, dtype))
        cache = None
        if kv > seq or cache_format is not None:
            past = torch.empty(batch, kv - seq, *layer.self_attn.cache_features, dtype=x.dtype)
            form = {} if cache_format is None else {"format": cache_format}
            cache = layer.self_attn.empty_cache(batch, capacity=kv + 63, **form).append(past)
        with ops.watch(device) as made:
            layer(x, past_key_value=cache)
    return Counter(made)
