"""The decoder layer in NumPy and float64, read from the papers and from nothing of this package.

Equation numbers are those of DeepSeek-V2 (arXiv 2405.04434). Every function takes the whole sequence at once, without a
cache, works head by head and token by token where that is plainer, and takes ``config`` for its published field names
alone. ``weights`` maps the published names to arrays. One batch is a list of sequences: tokens are rows, (seq, hidden).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, Array]

LATENT_NORM_EPS = 1e-6
"""The published code gives the norms of the latents this epsilon, whatever ``rms_norm_eps`` is."""


def part_of(weights: Weights, prefix: str) -> dict[str, Array]:
    """The weights of one submodule, under their names inside it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Zhang and Sennrich (2019), equation 4."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def linear(x: Array, weights: Weights, name: str) -> Array:
    """W x + b for every row; most projections have no b."""
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def softmax(x: Array) -> Array:
    """Over the last axis; a row of minus infinity everywhere gives zeros."""
    highest = x.max(axis=-1, keepdims=True)
    powers = np.exp(x - np.where(np.isfinite(highest), highest, 0.0))
    total = powers.sum(axis=-1, keepdims=True)
    return powers / np.where(total > 0, total, 1.0)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


# Rotary positions


def yarn_m(factor: float, mscale: float) -> float:
    """Peng et al. (2023), section 3.4, with a weight on the logarithm; 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def radians_per_step(config: Any, dim: int, context: int) -> Array:
    """How far each pair turns from one position to the next, in a call that sees ``context`` tokens."""
    scaling, theta = config.rope_scaling, config.rope_theta
    pair = np.arange(dim // 2)
    if scaling is None:
        return theta ** (-2 * pair / dim)
    if scaling.type == "linear":
        return theta ** (-2 * pair / dim) / scaling.factor
    if scaling.type == "dynamic":
        # Beyond the trained length the base grows, such that the slowest pair is stretched by all of the excess.
        trained = config.max_position_embeddings
        excess = scaling.factor * context / trained - (scaling.factor - 1) if context > trained else 1.0
        return (theta * excess ** (dim / (dim - 2))) ** (-2 * pair / dim)

    # YaRN: pair i turns L θ^(-2i/dim) / 2π times over the original length L. Solving for i gives the pair that turns so
    # many times; pairs before beta_fast's are kept, those after beta_slow's are stretched, linearly blended between.
    def pair_turning(times: float) -> float:
        return dim / 2 * math.log(scaling.original_max_position_embeddings / (2 * math.pi * times), theta)

    first, last = max(math.floor(pair_turning(scaling.beta_fast)), 0), math.ceil(pair_turning(scaling.beta_slow))
    stretched = np.interp(pair, [first, min(last, dim - 1)], [0.0, 1.0])
    return theta ** (-2 * pair / dim) * ((1 - stretched) + stretched / scaling.factor)


def magnitude(config: Any) -> float:
    """What YaRN multiplies rotated features by (published code); 1 where its two mscales are alike."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return yarn_m(scaling.factor, scaling.mscale) / yarn_m(scaling.factor, scaling.mscale_all_dim)


def temperature(config: Any) -> float:
    """What YaRN multiplies the scores of latent attention by (published code)."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return yarn_m(scaling.factor, scaling.mscale_all_dim) ** 2


def turned(x: Array, angles: Array, config: Any, interleaved: bool) -> Array:
    """Multiply each pair, read as a complex number, by e^(i angle): RoPE(x) of equations 14 and 15.

    Pairs are neighbours (0, 1), (2, 3), … in latent attention, and (0, dim/2), (1, dim/2 + 1), … in plain attention.
    """
    half = x.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    z = (x[:, first] + 1j * x[:, second]) * np.exp(1j * angles) * magnitude(config)
    out = np.empty_like(x)
    out[:, first], out[:, second] = z.real, z.imag
    return out


def angles_of(config: Any, dim: int, positions: NDArray[np.int64], contexts: NDArray[np.int64]) -> Array:
    """(seq, pairs): position times radians a step, the latter as of the call that brought the token."""
    return np.stack(
        [p * radians_per_step(config, dim, context) for p, context in zip(positions, contexts, strict=True)]
    )


# Attention


def latent_attention(
    x: Array, weights: Weights, config: Any, bias: Array, positions: NDArray[np.int64], contexts: NDArray[np.int64]
) -> Array:
    """Multi-head latent attention, equations 9 to 19, keys and values made in full for every head.

    ``bias`` (heads, seq, seq) is added to the scores: 0 where a query sees a key and minus infinity where not.
    """
    heads, nope, rope, wide = (
        config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim,
    )  # fmt: skip
    angles = angles_of(config, rope, positions, contexts)
    if config.q_lora_rank is None:
        q = linear(x, weights, "q_proj")
    else:
        c_q = rms_norm(linear(x, weights, "q_a_proj"), weights["q_a_layernorm.weight"], LATENT_NORM_EPS)  # (12)
        q = linear(c_q, weights, "q_b_proj")  # (13) and (14), stored together head by head
    compressed = linear(x, weights, "kv_a_proj_with_mqa")
    c_kv = rms_norm(compressed[:, : config.kv_lora_rank], weights["kv_a_layernorm.weight"], LATENT_NORM_EPS)  # (9)
    k_r = turned(compressed[:, config.kv_lora_rank :], angles, config, interleaved=True)  # (15)
    kv = linear(c_kv, weights, "kv_b_proj")  # (10) and (11), stored together head by head

    scale = temperature(config) / math.sqrt(nope + rope)
    outputs = []
    for head in range(heads):
        q_head = q[:, head * (nope + rope) :][:, : nope + rope]
        kv_head = kv[:, head * (nope + wide) :][:, : nope + wide]
        q_r = turned(q_head[:, nope:], angles, config, interleaved=True)
        query = np.concatenate((q_head[:, :nope], q_r), axis=1)  # (16)
        key = np.concatenate((kv_head[:, :nope], k_r), axis=1)  # (17)
        outputs.append(softmax(query @ key.T * scale + bias[head]) @ kv_head[:, nope:])  # (18)
    return linear(np.concatenate(outputs, axis=1), weights, "o_proj")  # (19)


def multi_head_attention(
    x: Array, weights: Weights, config: Any, bias: Array, positions: NDArray[np.int64], contexts: NDArray[np.int64]
) -> Array:
    """Plain attention, equations 1 to 8, with rotated queries and keys; several heads may share a key-value head."""
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    shared_by = heads // (config.num_key_value_heads or heads)
    angles = angles_of(config, width, positions, contexts)
    q, k, v = (linear(x, weights, name) for name in ("q_proj", "k_proj", "v_proj"))  # (1) to (3)
    outputs = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        shared = slice(head // shared_by * width, (head // shared_by + 1) * width)
        query, key = (turned(features, angles, config, interleaved=False) for features in (q[:, own], k[:, shared]))
        outputs.append(softmax(query @ key.T / math.sqrt(width) + bias[head]) @ v[:, shared])  # (7)
    return linear(np.concatenate(outputs, axis=1), weights, "o_proj")  # (8)


def causal_bias(heads: int, seq: int) -> Array:
    """Each token sees itself and those before it."""
    places = np.arange(seq)
    return np.broadcast_to(np.where(places <= places[:, None], 0.0, -np.inf), (heads, seq, seq))


def attention(
    x: Array,
    weights: Weights,
    config: Any,
    bias: Array | None = None,
    positions: NDArray[np.int64] | None = None,
    contexts: NDArray[np.int64] | None = None,
) -> Array:
    """Either kind. By default causal, at positions 0, 1, …, in one call that sees the whole sequence."""
    seq = len(x)
    kind = latent_attention if config.use_mla else multi_head_attention
    return kind(
        x,
        weights,
        config,
        causal_bias(config.num_attention_heads, seq) if bias is None else bias,
        np.arange(seq) if positions is None else positions,
        np.full(seq, seq) if contexts is None else contexts,
    )


# Experts


def mlp(x: Array, weights: Weights) -> Array:
    """SwiGLU: Shazeer (2020), equation 6."""
    return linear(silu(linear(x, weights, "gate_proj")) * linear(x, weights, "up_proj"), weights, "down_proj")


def affinities(x: Array, weights: Weights, config: Any) -> Array:
    """s of every token for every expert: V2's (22) or V3's (15)."""
    logits = x @ weights["gate.weight"].T
    return 1 / (1 + np.exp(-logits)) if config.scoring_func == "sigmoid" else softmax(logits)


def chosen_experts(s: Array, weights: Weights, config: Any) -> list[int]:
    """The best experts of one token, where only the groups with the best experts may send any (V2's section 2.2.2).

    V3 adds a bias to what is compared (16), and judges a group by its two best experts (its published code; the paper's
    section 2.1.2 says k over the number of groups, two for its own sizes).
    """
    s = s + weights.get("gate.e_score_correction_bias", 0)
    allowed = list(range(config.n_routed_experts))
    if config.topk_method != "greedy":
        best = 2 if config.topk_method == "noaux_tc" else 1
        groups = np.split(np.arange(config.n_routed_experts), config.n_group)
        groups = sorted(groups, key=lambda group: -np.sort(s[group])[-best:].sum())[: config.topk_group]
        allowed = np.concatenate(groups).tolist()
    return sorted(allowed, key=lambda expert: -s[expert])[: config.num_experts_per_tok]


def moe(x: Array, weights: Weights, config: Any) -> Array:
    """Σ shared experts + Σ g · chosen experts: equations 20 and 21, without the residual.

    V2's paper takes g = s, V3's normalises them (13); published configurations may have the chosen s sum to 1, and may scale them.
    """
    out = np.zeros_like(x)
    for token, s in enumerate(affinities(x, weights, config)):
        experts = chosen_experts(s, weights, config)
        g = s[experts]
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            g = g / g.sum()
        for expert, counts in zip(experts, g * config.routed_scaling_factor, strict=True):
            out[token] += counts * mlp(x[token : token + 1], part_of(weights, f"experts.{expert}."))[0]
    if config.n_shared_experts is not None:
        out += mlp(x, part_of(weights, "shared_experts."))
    return out


def balance_loss(sequences: list[Array], weights: Weights, config: Any) -> float:
    """Equations 23 to 25 for every sequence, averaged; or with all tokens as one sequence, if not ``seq_aux``.

    V3's (17) to (20) divide sigmoid scores by their sum, and count the best of the scores themselves, without bias and
    groups.
    """
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    losses = []
    for x in sequences if config.seq_aux else [np.concatenate(sequences)]:
        s = affinities(x, weights, config)
        if config.scoring_func == "sigmoid":
            s = s / s.sum(axis=1, keepdims=True)
        unbiased = config.topk_method == "noaux_tc"
        best = [sorted(range(experts), key=lambda expert, of=token: -of[expert])[:chosen] for token in s]
        choices = best if unbiased else [chosen_experts(token, weights, config) for token in s]
        f = [experts / (chosen * len(x)) * sum(i in choice for choice in choices) for i in range(experts)]  # (24)
        p = s.mean(axis=0)  # (25)
        losses.append(config.aux_loss_alpha * float(np.dot(f, p)))  # (23)
    return float(np.mean(losses))


# The layer


def is_moe_layer(config: Any, layer_idx: int) -> bool:
    has_experts = config.n_routed_experts is not None and layer_idx >= config.first_k_dense_replace
    return has_experts and layer_idx % config.moe_layer_freq == 0


def layer(x: Array, weights: Weights, config: Any, layer_idx: int, **attention_options: Any) -> Array:
    """Pre-norm residual blocks (figure 2)."""
    normed = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
    h = x + attention(normed, part_of(weights, "self_attn."), config, **attention_options)
    normed = rms_norm(h, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    feed_forward = part_of(weights, "mlp.")
    return h + (moe(normed, feed_forward, config) if is_moe_layer(config, layer_idx) else mlp(normed, feed_forward))
