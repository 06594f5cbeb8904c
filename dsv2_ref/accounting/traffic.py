"""Bytes that a call moves: of weights, and of activations by operation.

Every operation is taken by itself: it reads what it needs once and writes its result once, in the call's dtype. Kernels that
fuse operations move less, and that is why they are written; the scores of fused attention (``sdpa``, ``flash_attention_2``)
are never written at all.
"""

from dsv2_ref.accounting.call import Call, one_of
from dsv2_ref.accounting.operations import form_of
from dsv2_ref.accounting.weights import parameters, projections
from dsv2_ref.config import DeepseekV2Config, require

Moved = dict[str, tuple[int, int]]
"""What each operation reads and writes."""


def experts_read(config: DeepseekV2Config, tokens: int) -> float:
    """Different routed experts that so many tokens visit, on average, if they choose evenly and by themselves."""
    require(tokens >= 0, "tokens", tokens, "0 or more")
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    return experts * (1 - (1 - chosen / experts) ** tokens) if experts else 0.0


def weights_read(config: DeepseekV2Config, layer_idx: int, call: Call) -> int:
    """Bytes of a layer's weights that a call reads, each once; of the experts as many as `experts_read` expects."""
    counts = parameters(config, layer_idx)
    if "mlp.experts" in counts:
        one = counts["mlp.experts"] // (config.n_routed_experts or 1)
        counts["mlp.experts"] = round(experts_read(config, call.tokens) * one)
    return sum(counts.values()) * call.bytes_each


def _attended(config: DeepseekV2Config, call: Call) -> Moved:
    """Numbers that scores, softmax and values move."""
    heads, batch = config.num_attention_heads, call.batch
    queries, keys, pairs = call.tokens * heads, batch * call.kv, batch * heads * call.seq * call.kv
    if config.use_mla and form_of(config, call) == "absorbed":
        latent, rope = config.kv_lora_rank or 0, config.qk_rope_head_dim
        return {
            "absorb_w_uk": (queries * config.qk_nope_head_dim, queries * latent),
            "scores": ((queries + keys) * (latent + rope), pairs),
            "softmax": (pairs, pairs),
            "values": (pairs + keys * latent, queries * latent),
            "absorb_w_uv": (queries * latent, queries * config.v_head_dim),
        }
    if config.use_mla:
        width, value, kv_heads = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim, heads
    else:
        width = value = config.hidden_size // heads
        kv_heads = config.num_key_value_heads or heads
    seen = pairs if config._attn_implementation == "eager" else 0
    return {
        "scores": (queries * width + keys * kv_heads * width, seen),
        "softmax": (seen, seen),
        "values": (seen + keys * kv_heads * value, queries * value),
    }


def _attention(config: DeepseekV2Config, call: Call) -> Moved:
    moved = {
        name: (call.tokens * inputs, call.tokens * outputs) for name, (inputs, outputs) in projections(config).items()
    }
    if config.use_mla:
        latent, width = moved.pop("kv_b_proj")
        if form_of(config, call) == "expanded":  # the whole cache, at every call
            moved["kv_b_proj"] = latent // call.seq * call.kv, width // call.seq * call.kv
    return moved | _attended(config, call)


def _feed_forward(tokens: int, hidden: int, wide: int, inputs: int = 2) -> tuple[int, int]:
    """Products of SwiGLU, whose first two read the input once each, or once together."""
    return tokens * (inputs * hidden + wide), tokens * (2 * wide + hidden)


def _experts(config: DeepseekV2Config, tokens: int) -> Moved:
    hidden, wide = config.hidden_size, config.moe_intermediate_size
    experts, chosen, shared = (
        config.n_routed_experts or 0,
        config.num_experts_per_tok or 0,
        config.n_shared_experts or 0,
    )
    moved = {
        "mlp.gate": (tokens * hidden, tokens * experts),
        "mlp.experts": _feed_forward(tokens * chosen, hidden, wide, inputs=1),
        "router_softmax": (tokens * experts, tokens * experts),
        "swiglu": (2 * tokens * (chosen + shared) * wide, tokens * (chosen + shared) * wide),
        "combine": (tokens * (chosen + bool(shared)) * hidden, tokens * hidden),
    }
    return moved | ({"mlp.shared_experts": _feed_forward(tokens, hidden, shared * wide)} if shared else {})


def activations_moved(config: DeepseekV2Config, layer_idx: int, call: Call) -> Moved:
    """Bytes of activations and cache that each operation of a layer reads and writes, by the names of the FLOPs.

    An expert's rows are read where they are needed; what sorting them moves besides is left out.
    """
    tokens, hidden = call.tokens, config.hidden_size
    inner = (config.q_lora_rank or 0) + (config.kv_lora_rank or 0) if config.use_mla else 0
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    turned = (config.num_attention_heads + kv_heads) * (hidden // config.num_attention_heads)
    if config.use_mla:
        turned = (config.num_attention_heads + 1) * config.qk_rope_head_dim
    moved = {name if name == "softmax" else f"self_attn.{name}": n for name, n in _attention(config, call).items()}
    moved["norms"] = (tokens * (2 * hidden + inner),) * 2
    moved["rotary"] = (tokens * turned,) * 2
    moved["residual"] = 4 * tokens * hidden, 2 * tokens * hidden
    if config.is_moe_layer(one_of(config, layer_idx)):
        moved |= _experts(config, tokens)
    else:
        moved["mlp"] = _feed_forward(tokens, hidden, config.intermediate_size)
        moved["swiglu"] = 2 * tokens * config.intermediate_size, tokens * config.intermediate_size
    return {name: (read * call.bytes_each, written * call.bytes_each) for name, (read, written) in moved.items()}
