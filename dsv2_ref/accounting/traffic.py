"""Bytes that a call moves: of weights, and of activations by operation.

Every operation stands alone here: it reads what it needs once and writes its result once, in the dtype of the call.
Kernels that fuse operations move less, which is why they are written. The scores of fused attention (``sdpa``,
``flash_attention_2``) are never written.
"""

from collections.abc import Mapping

from dsv2_ref.accounting.cached import cache_bytes, record_bytes
from dsv2_ref.accounting.call import Call, Counts, require_call, require_layer
from dsv2_ref.accounting.operations import form_of, products
from dsv2_ref.accounting.sizes import Sizes
from dsv2_ref.accounting.stored import weight_bytes
from dsv2_ref.accounting.weights import projections
from dsv2_ref.checks import require
from dsv2_ref.config import DeepseekV2Config

Moved = dict[str, tuple[int, int]]
"""What each operation reads, and what it writes."""


def experts_read(config: DeepseekV2Config, tokens: int) -> float:
    """Number of different routed experts that ``tokens`` tokens choose on average, if
    each chooses at random and independently of the others."""
    require(tokens >= 0, "tokens", tokens, "0 or more")
    s = Sizes.of(config)
    return s.E * (1 - (1 - s.k / s.E) ** tokens) if s.E else 0.0


def _read_by_name(config: DeepseekV2Config, layer_idx: int, call: Call) -> Counts:
    """Bytes of a layer's weights that a call reads, each once; of the routed experts, as many as `experts_read`."""
    s, sizes = Sizes.of(config), weight_bytes(config, layer_idx, call)
    if "mlp.experts" in sizes:
        per_expert = sizes["mlp.experts"] // s.E
        sizes["mlp.experts"] = round(experts_read(config, call.tokens) * per_expert)
    return sizes


def weights_read(config: DeepseekV2Config, layer_idx: int, call: Call) -> int:
    """Bytes of a layer's weights that a call reads, each once; of the routed experts, as many as `experts_read`."""
    return sum(_read_by_name(config, layer_idx, call).values())


PARTS = {
    "self_attn.scores": "scores and values",
    "self_attn.values": "scores and values",
    "self_attn": "projections",
    "mlp.gate": "gate",
    "mlp.shared_experts": "shared experts",
    "mlp.experts": "routed experts",
    "mlp": "MLP",
}
"""The part of a layer that a name of the accounting belongs to, by the first of these with which the name starts."""


def by_part(counts: Mapping[str, int]) -> Counts:
    """Sums by part of a layer (see `PARTS`). What stands between the parts, as the norms of the stream, is left out."""
    sums: Counts = {}
    for name, count in counts.items():
        part = next((part for start, part in PARTS.items() if name.startswith(start)), None)
        if part is not None:
            sums[part] = sums.get(part, 0) + count
    return sums


def cache_read(config: DeepseekV2Config, call: Call, layers: int) -> int:
    """Bytes of the cache that a call of so many layers reads, each once."""
    tokens = call.batch * call.rows_read
    return cache_bytes(config, tokens, call.dtype, layers=layers, cache=call.cache)


# fmt: off
def read_by_part(config: DeepseekV2Config, layer_idx: int, call: Call) -> Counts:
    """Bytes of weights and cache that each part of a layer reads, each once.

    The batch shares the weights, and each sequence has a cache of its own. Expanded
    MLA reads keys and values that it has just made: they are no part of this count.
    """
    read = by_part(_read_by_name(config, layer_idx, call))
    if not config.use_mla or form_of(config, call) == "absorbed":
        read["scores and values"] = cache_read(config, call, layers=1)
    return read


def intensities(
    config: DeepseekV2Config, layer_idx: int, call: Call
) -> dict[str, float]:
    """FLOPs per byte of weights and cache read, for each part of a layer that reads."""
    flops = by_part(products(config, layer_idx, call))
    read = read_by_part(config, layer_idx, call)
    return {part: flops[part] / read[part] for part in read}
# fmt: on


def _attention(config: DeepseekV2Config, call: Call) -> Moved:
    """Bytes that attention moves."""
    s, sizes, size = Sizes.of(config), projections(config), call.itemsize
    queries, keys = call.tokens * s.H, call.batch * call.rows_read
    pairs = call.batch * s.H * call.seq * call.rows_per_query * size
    moved = {
        name: (call.tokens * inputs * size, call.tokens * outputs * size) for name, (inputs, outputs) in sizes.items()
    }
    if config.use_mla:
        latent, rope = record_bytes(config, call.dtype, call.cache)
        del moved["kv_b_proj"]
        if form_of(config, call) == "absorbed":
            return moved | {
                "absorb_w_uk": (queries * s.N * size, queries * s.C * size),
                "scores": (queries * (s.C + s.R) * size + keys * (latent + rope), pairs),
                "softmax": (pairs, pairs),
                "values": (pairs + keys * latent, queries * s.C * size),
                "absorb_w_uv": (queries * s.C * size, queries * s.V * size),
            }
        moved["kv_b_proj"] = keys * latent, keys * sizes["kv_b_proj"][1] * size  # each call expands what it reads
    written = pairs if config._attn_implementation == "eager" else 0
    return moved | {
        "scores": ((queries + keys * s.G) * (s.N + s.R) * size, written),
        "softmax": (written, written),
        "values": (written + keys * s.G * s.V * size, queries * s.V * size),
    }


def _feed_forward(tokens: int, hidden: int, width: int, reads: int = 2) -> tuple[int, int]:
    """The products of a SwiGLU. Its first two read the input once each (``reads`` is 2), or once together."""
    return tokens * (reads * hidden + width), tokens * (2 * width + hidden)


def _experts(config: DeepseekV2Config, tokens: int) -> Moved:
    s = Sizes.of(config)
    width = (s.k + s.shared) * s.I
    moved = {
        "mlp.gate": (tokens * s.D, tokens * s.E),
        "mlp.experts": _feed_forward(tokens * s.k, s.D, s.I, reads=1),
        "router_softmax": (tokens * s.E, tokens * s.E),
        "swiglu": (2 * tokens * width, tokens * width),
        "combine": (tokens * (s.k + bool(s.shared)) * s.D, tokens * s.D),
    }
    if s.shared:
        moved["mlp.shared_experts"] = _feed_forward(tokens, s.D, s.shared * s.I)
    return moved


def activations_moved(config: DeepseekV2Config, layer_idx: int, call: Call) -> Moved:
    """Bytes of activations and cache that each operation of a layer reads and writes, under the names of its FLOPs.

    An expert's rows are read where they are needed. Sorting them by expert moves them once more, which is not counted.
    What reads a quantised cache reads its codes and scales; everything else is in the dtype.
    """
    require_layer(config, layer_idx)
    require_call(call)
    s, tokens = Sizes.of(config), call.tokens
    moved: Moved = {}
    moved["norms"] = (tokens * (2 * s.D + s.Q + s.C),) * 2
    moved["rotary"] = (tokens * s.rotated,) * 2
    moved["residual"] = 4 * tokens * s.D, 2 * tokens * s.D
    if config.is_moe_layer(layer_idx):
        moved |= _experts(config, tokens)
    else:
        moved["mlp"] = _feed_forward(tokens, s.D, s.dense)
        moved["swiglu"] = 2 * tokens * s.dense, tokens * s.dense
    attention = _attention(config, call).items()
    return {name if name == "softmax" else f"self_attn.{name}": moved_ for name, moved_ in attention} | {
        name: (read * call.itemsize, written * call.itemsize) for name, (read, written) in moved.items()
    }
