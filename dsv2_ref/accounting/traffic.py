"""Bytes that a call moves: of weights, and of activations by operation.

Every operation stands alone here: it reads what it needs once and writes its result once, in the dtype of the call.
Kernels that fuse operations move less, which is why they are written. The scores of fused attention (``sdpa``,
``flash_attention_2``) are never written.
"""

from collections.abc import Mapping

from dsv2_ref.accounting.cached import cache_bytes
from dsv2_ref.accounting.call import Call, Counts, require_layer
from dsv2_ref.accounting.operations import form_of, products
from dsv2_ref.accounting.sizes import Sizes
from dsv2_ref.accounting.weights import parameters, projections
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
    s, counts = Sizes.of(config), parameters(config, layer_idx)
    if "mlp.experts" in counts:
        per_expert = counts["mlp.experts"] // s.E
        counts["mlp.experts"] = round(experts_read(config, call.tokens) * per_expert)
    return {name: n * call.itemsize for name, n in counts.items()}


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


# fmt: off
def read_by_part(config: DeepseekV2Config, layer_idx: int, call: Call) -> Counts:
    """Bytes of weights and cache that each part of a layer reads, each once.

    The batch shares the weights, and each sequence has a cache of its own. Expanded
    MLA reads keys and values that it has just made: they are no part of this count.
    """
    read = by_part(_read_by_name(config, layer_idx, call))
    if not config.use_mla or form_of(config, call) == "absorbed":
        tokens = call.batch * call.kv
        read["scores and values"] = cache_bytes(config, tokens, call.dtype, layers=1)
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
    """Elements that attention moves."""
    s, sizes = Sizes.of(config), projections(config)
    queries, keys = call.tokens * s.H, call.batch * call.kv
    pairs = call.batch * s.H * call.seq * call.kv
    moved = {name: (call.tokens * inputs, call.tokens * outputs) for name, (inputs, outputs) in sizes.items()}
    if config.use_mla:
        del moved["kv_b_proj"]
        if form_of(config, call) == "absorbed":
            return moved | {
                "absorb_w_uk": (queries * s.N, queries * s.C),
                "scores": ((queries + keys) * (s.C + s.R), pairs),
                "softmax": (pairs, pairs),
                "values": (pairs + keys * s.C, queries * s.C),
                "absorb_w_uv": (queries * s.C, queries * s.V),
            }
        latent, expanded = sizes["kv_b_proj"]
        moved["kv_b_proj"] = keys * latent, keys * expanded  # each call expands the whole cache
    written = pairs if config._attn_implementation == "eager" else 0
    return moved | {
        "scores": ((queries + keys * s.G) * (s.N + s.R), written),
        "softmax": (written, written),
        "values": (written + keys * s.G * s.V, queries * s.V),
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
    """
    require_layer(config, layer_idx)
    s, tokens = Sizes.of(config), call.tokens
    attention = _attention(config, call).items()
    moved = {name if name == "softmax" else f"self_attn.{name}": elements for name, elements in attention}
    moved["norms"] = (tokens * (2 * s.D + s.Q + s.C),) * 2
    moved["rotary"] = (tokens * s.rotated,) * 2
    moved["residual"] = 4 * tokens * s.D, 2 * tokens * s.D
    if config.is_moe_layer(layer_idx):
        moved |= _experts(config, tokens)
    else:
        moved["mlp"] = _feed_forward(tokens, s.D, s.dense)
        moved["swiglu"] = 2 * tokens * s.dense, tokens * s.dense
    return {name: (read * call.itemsize, written * call.itemsize) for name, (read, written) in moved.items()}
