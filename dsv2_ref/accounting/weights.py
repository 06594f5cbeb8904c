"""Parameters of a layer and of a model, by name."""

from dsv2_ref.accounting.call import Counts, one_of
from dsv2_ref.config import DeepseekV2Config


def projections(config: DeepseekV2Config) -> dict[str, tuple[int, int]]:
    """How many numbers each projection of attention takes and gives."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if not config.use_mla:
        kv = (config.num_key_value_heads or heads) * (hidden // heads)
        return {"q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden)}
    latent, rope = config.kv_lora_rank or 0, config.qk_rope_head_dim
    query = heads * (config.qk_nope_head_dim + rope)
    sizes = {"q_proj": (hidden, query)}
    if config.q_lora_rank is not None:
        sizes = {"q_a_proj": (hidden, config.q_lora_rank), "q_b_proj": (config.q_lora_rank, query)}
    return sizes | {
        "kv_a_proj_with_mqa": (hidden, latent + rope),
        "kv_b_proj": (latent, heads * (config.qk_nope_head_dim + config.v_head_dim)),
        "o_proj": (heads * config.v_head_dim, hidden),
    }


def _attention_parameters(config: DeepseekV2Config) -> Counts:
    sizes = projections(config)
    counts = {f"{name}.weight": inputs * outputs for name, (inputs, outputs) in sizes.items()}
    if config.use_mla:
        if config.q_lora_rank is not None:
            counts["q_a_layernorm.weight"] = config.q_lora_rank
        counts["kv_a_layernorm.weight"] = config.kv_lora_rank or 0
    if config.attention_bias:
        biased = {"q_a_proj", "kv_a_proj_with_mqa", "o_proj"} if config.use_mla else set(sizes)
        counts |= {f"{name}.bias": outputs for name, (_, outputs) in sizes.items() if name in biased}
    return counts


def parameters(config: DeepseekV2Config, layer_idx: int, active: bool = False) -> Counts:
    """Parameters of a layer by name; all routed experts together as ``mlp.experts``.

    Args:
        active: only those that a token passes through: ``num_experts_per_tok`` of the routed experts.
    """
    layer_idx = one_of(config, layer_idx)
    hidden = config.hidden_size
    counts = {f"self_attn.{name}": count for name, count in _attention_parameters(config).items()}
    if config.is_moe_layer(layer_idx):
        experts = (config.num_experts_per_tok if active else config.n_routed_experts) or 0
        one = 3 * hidden * config.moe_intermediate_size
        counts["mlp.gate.weight"] = (config.n_routed_experts or 0) * hidden
        counts["mlp.experts"] = experts * one
        if config.n_shared_experts is not None:
            counts["mlp.shared_experts"] = config.n_shared_experts * one
    else:
        counts["mlp"] = 3 * hidden * config.intermediate_size
    return counts | {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}


def model_parameters(config: DeepseekV2Config, active: bool = False) -> Counts:
    """Parameters of a whole model: of all layers together by name, embedding, last norm and head.

    A head tied to the embedding is not counted again. Of the embedding a token uses one row, of the head all.
    """
    counts: Counts = {"embed_tokens.weight": config.hidden_size * (1 if active else config.vocab_size)}
    for layer_idx in range(config.num_hidden_layers):
        for name, count in parameters(config, layer_idx, active).items():
            counts[f"layers.{name}"] = counts.get(f"layers.{name}", 0) + count
    counts["norm.weight"] = config.hidden_size
    if not config.tie_word_embeddings or active:
        counts["lm_head.weight"] = config.hidden_size * config.vocab_size
    return counts
