"""Parameters of a layer and of a model, by name."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsv2_ref.accounting.call import Counts, layers_alike, one_of
from dsv2_ref.config import DeepseekV2Config


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A weight, or those that go by one name in all experts and layers.

    Attributes:
        shape: of one of them, as it is stored: (outputs, inputs) or (features,).
        active: parameters that a token passes through. number: how many such weights there are.
    """

    shape: tuple[int, ...]
    active: int
    number: int = 1

    @property
    def stored(self) -> int:
        """Parameters of all of them."""
        return self.number * math.prod(self.shape)


def _used(*shape: int) -> Matrix:
    """One weight that every token passes through."""
    return Matrix(shape=shape, active=math.prod(shape))


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


def _attention(config: DeepseekV2Config) -> dict[str, Matrix]:
    sizes = projections(config)
    found = {f"{name}.weight": _used(outputs, inputs) for name, (inputs, outputs) in sizes.items()}
    if config.use_mla:
        if config.q_lora_rank is not None:
            found["q_a_layernorm.weight"] = _used(config.q_lora_rank)
        found["kv_a_layernorm.weight"] = _used(config.kv_lora_rank or 0)
    if config.attention_bias:
        biased = {"q_a_proj", "kv_a_proj_with_mqa", "o_proj"} if config.use_mla else set(sizes)
        found |= {f"{name}.bias": _used(outputs) for name, (_, outputs) in sizes.items() if name in biased}
    return found


def _feed_forward(name: str, hidden: int, wide: int) -> dict[str, Matrix]:
    up, down = _used(wide, hidden), _used(hidden, wide)
    return {f"{name}.gate_proj.weight": up, f"{name}.up_proj.weight": up, f"{name}.down_proj.weight": down}


def matrices(config: DeepseekV2Config, layer_idx: int) -> dict[str, Matrix]:
    """Every weight of a layer under its published name, with ``*`` for the number of a routed expert.

    A token passes through ``num_experts_per_tok`` of the routed experts, and through all else.
    """
    hidden, wide = config.hidden_size, config.moe_intermediate_size
    found = {f"self_attn.{name}": matrix for name, matrix in _attention(config).items()}
    if config.is_moe_layer(one_of(config, layer_idx)):
        experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok or 0
        found["mlp.gate.weight"] = _used(experts, hidden)
        for name, one in _feed_forward("mlp.experts.*", hidden, wide).items():
            found[name] = replace(one, number=experts, active=chosen * one.active)
        if config.n_shared_experts is not None:
            found |= _feed_forward("mlp.shared_experts", hidden, config.n_shared_experts * wide)
    else:
        found |= _feed_forward("mlp", hidden, config.intermediate_size)
    return found | {"input_layernorm.weight": _used(hidden), "post_attention_layernorm.weight": _used(hidden)}


def model_matrices(config: DeepseekV2Config) -> dict[str, Matrix]:
    """Every weight of a whole model, of all layers together: embedding, layers, last norm and head.

    A head tied to the embedding is that matrix, and a token passes through all of it; of an embedding apart it uses one
    row.
    """
    hidden, vocab, tied = config.hidden_size, config.vocab_size, config.tie_word_embeddings
    found = {"embed_tokens.weight": Matrix(shape=(vocab, hidden), active=hidden * (vocab if tied else 1))}
    for layer_idx, layers in layers_alike(config):
        for name, one in matrices(config, layer_idx).items():
            before = found.get(f"layers.{name}", Matrix(shape=one.shape, active=0, number=0))
            number, active = before.number + layers * one.number, before.active + layers * one.active
            found[f"layers.{name}"] = Matrix(shape=one.shape, number=number, active=active)
    found["norm.weight"] = _used(hidden)
    return found if tied else found | {"lm_head.weight": _used(vocab, hidden)}


def by_module(found: Mapping[str, Matrix], active: bool = False) -> Counts:
    """Parameters of weights, those of one feed-forward network or of all routed experts together."""
    counts: Counts = {}
    for name, matrix in found.items():
        module = re.sub(r"(mlp(\.experts|\.shared_experts)?)(\.\*)?\.(gate|up|down)_proj\.weight$", r"\1", name)
        counts[module] = counts.get(module, 0) + (matrix.active if active else matrix.stored)
    return counts


def parameters(config: DeepseekV2Config, layer_idx: int, active: bool = False) -> Counts:
    """Parameters of a layer by name; all routed experts together as ``mlp.experts``.

    Args:
        active: only those that a token passes through: ``num_experts_per_tok`` of the routed experts.
    """
    return by_module(matrices(config, layer_idx), active)


def model_parameters(config: DeepseekV2Config, active: bool = False) -> Counts:
    """Parameters of a whole model, or only the ``active`` ones: of all layers together by name (see `model_matrices`)."""
    return by_module(model_matrices(config), active)
