"""FLOPs of a layer by operation.

A *product* counts a multiplication and its addition as two FLOPs. Everything else is counted by `elementwise`, per
element: 4 for a norm (square, sum, two multiplications), 3 for a rotation (4 multiplications and 2 additions per pair),
6 for a softmax (scale, maximum, subtraction, exponential, sum, division), 5 for a SwiGLU (exponential, addition,
division, two multiplications) and 1 for a residual addition. What a fused kernel computes in addition is not counted:
zeros that pad values to the width of keys, and pairs that a mask hides.
"""

from dataclasses import replace

from dsv2_ref.accounting.call import Call, Counts, require_call, require_layer
from dsv2_ref.accounting.sizes import Sizes
from dsv2_ref.accounting.weights import parameters, projections
from dsv2_ref.checks import is_config
from dsv2_ref.config import DeepseekV2Config


def form_of(config: DeepseekV2Config, call: Call) -> str:
    """The form of latent attention that a call takes: the call's own, else the configuration's, else the one with fewer
    FLOPs, by causal pairs as the layer counts them, whatever ``call.causal`` and ``call.read`` say."""
    is_config(config)
    require_call(call)
    for form in (call.form, config.mla_form):
        if form != "auto":
            return form
    s, pairs = Sizes.of(config), replace(call, causal=True, read=None).pairs
    up = s.C * (s.N + s.V)  # of one head: W_UK and W_UV
    expanded = call.rows * up + pairs * (s.N + s.R + s.V)
    absorbed = call.seq * up + pairs * (2 * s.C + s.R)
    return "absorbed" if absorbed < expanded else "expanded"


# fmt: off
def _attention_products(config: DeepseekV2Config, call: Call) -> Counts:
    """Multiplications of the products in attention."""
    s, pairs = Sizes.of(config), call.batch * call.pairs
    counts = {
        name: call.tokens * inputs * outputs
        for name, (inputs, outputs) in projections(config).items()
    }
    if config.use_mla:
        del counts["kv_b_proj"]  # each form uses it in its own way
        if form_of(config, call) == "absorbed":
            # Queries come to the latents; keys and values of the heads are never made.
            counts["absorb_w_uk"] = call.tokens * s.H * s.N * s.C
            counts["absorb_w_uv"] = call.tokens * s.H * s.C * s.V
            counts["scores"] = pairs * s.H * (s.C + s.R)
            counts["values"] = pairs * s.H * s.C
            return counts
        # Every call expands all that it reads of the cache.
        counts["kv_b_proj"] = call.batch * call.rows_read * s.C * s.H * (s.N + s.V)
    counts["scores"] = pairs * s.H * (s.N + s.R)
    counts["values"] = pairs * s.H * s.V
    return counts
# fmt: on


def products(config: DeepseekV2Config, layer_idx: int, call: Call) -> Counts:
    """FLOPs of a layer's matrix products, by operation."""
    require_call(call)
    counts = {f"self_attn.{name}": 2 * n for name, n in _attention_products(config, call).items()}
    for name, n in parameters(config, layer_idx, active=True).items():
        if name.startswith("mlp"):
            counts[name.removesuffix(".weight")] = 2 * call.tokens * n
    return counts


def elementwise(config: DeepseekV2Config, layer_idx: int, call: Call) -> Counts:
    """FLOPs of everything else in a layer, by the convention of this module."""
    require_layer(config, layer_idx)
    require_call(call)
    s, tokens = Sizes.of(config), call.tokens
    counts = {
        "norms": 4 * tokens * (2 * s.D + s.Q + s.C),
        "rotary": 3 * tokens * s.rotated,
        "softmax": 6 * call.batch * s.H * call.pairs,
        "residual": 2 * tokens * s.D,
    }
    if config.is_moe_layer(layer_idx):
        counts["swiglu"] = 5 * tokens * (s.k + s.shared) * s.I
        counts["router_softmax"] = 6 * tokens * s.E
        counts["combine"] = 2 * tokens * s.k * s.D
    else:
        counts["swiglu"] = 5 * tokens * s.dense
    return counts
