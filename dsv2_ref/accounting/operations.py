"""FLOPs of a layer by operation.

A *product* counts a multiplication and its addition as two FLOPs. Everything else is counted by `elementwise`: per number a
norm takes 4 (square, sum, two multiplications), a rotation 3 (4 multiplications and 2 additions a pair), a softmax 6 (scale,
maximum, subtraction, exponential, sum, division), a SwiGLU 5 (exponential, addition, division, two multiplications), a
residual sum 1. What a fused kernel computes besides is not counted: zeros behind values that are narrower than keys, and
pairs that a mask hides.
"""

from dataclasses import replace

from dsv2_ref.accounting.call import Call, Counts, one_of
from dsv2_ref.accounting.weights import parameters, projections
from dsv2_ref.config import DeepseekV2Config


def form_of(config: DeepseekV2Config, call: Call) -> str:
    """The form of latent attention that a call takes: its own, or the configuration's, or the one with fewer FLOPs.

    The last is what the layer takes by itself, for which causal pairs decide whatever is counted.
    """
    for form in (call.form, config.mla_form):
        if form != "auto":
            return form
    pairs = replace(call, causal=True).pairs
    latent, rope, value = config.kv_lora_rank or 0, config.qk_rope_head_dim, config.v_head_dim
    expand = latent * (config.qk_nope_head_dim + value)
    expanded = call.kv * expand + pairs * (config.qk_nope_head_dim + rope + value)
    return "absorbed" if call.seq * expand + pairs * (2 * latent + rope) < expanded else "expanded"


def _attention_products(config: DeepseekV2Config, call: Call) -> Counts:
    """Multiplications of the attention's products."""
    counts = {name: call.tokens * inputs * outputs for name, (inputs, outputs) in projections(config).items()}
    heads, pairs = config.num_attention_heads, call.batch * call.pairs * config.num_attention_heads
    if not config.use_mla:
        width = config.hidden_size // heads
        return counts | {"scores": pairs * width, "values": pairs * width}
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    latent, up = config.kv_lora_rank or 0, counts.pop("kv_b_proj") // call.tokens
    if form_of(config, call) == "expanded":
        counts["kv_b_proj"] = call.batch * call.kv * up  # the whole cache is expanded, at every call
        return counts | {"scores": pairs * (nope + rope), "values": pairs * value}
    counts |= {"absorb_w_uk": call.tokens * latent * heads * nope, "absorb_w_uv": call.tokens * latent * heads * value}
    return counts | {"scores": pairs * (latent + rope), "values": pairs * latent}


def products(config: DeepseekV2Config, layer_idx: int, call: Call) -> Counts:
    """FLOPs of a layer's matrix products, by operation."""
    counts = {f"self_attn.{name}": n for name, n in _attention_products(config, call).items()}
    for name, n in parameters(config, layer_idx, active=True).items():
        if name.startswith("mlp"):
            counts[name.removesuffix(".weight")] = call.tokens * n
    return {name: 2 * n for name, n in counts.items()}


def elementwise(config: DeepseekV2Config, layer_idx: int, call: Call) -> Counts:
    """FLOPs of everything else in a layer, by the convention of this module."""
    hidden, heads, tokens = config.hidden_size, config.num_attention_heads, call.tokens
    if config.use_mla:
        inner_norms, rotated = (config.q_lora_rank or 0) + (config.kv_lora_rank or 0), config.qk_rope_head_dim
        rotated *= heads + 1
    else:
        inner_norms = 0
        rotated = (heads + (config.num_key_value_heads or heads)) * (hidden // heads)
    counts = {
        "norms": 4 * tokens * (2 * hidden + inner_norms),
        "rotary": 3 * tokens * rotated,
        "softmax": 6 * call.batch * heads * call.pairs,
        "residual": 2 * tokens * hidden,
    }
    if config.is_moe_layer(one_of(config, layer_idx)):
        through = (config.num_experts_per_tok or 0) + (config.n_shared_experts or 0)
        counts["swiglu"] = 5 * tokens * through * config.moe_intermediate_size
        counts["router_softmax"] = 6 * tokens * (config.n_routed_experts or 0)
        counts["combine"] = 2 * tokens * (config.num_experts_per_tok or 0) * hidden
    else:
        counts["swiglu"] = 5 * tokens * config.intermediate_size
    return counts
