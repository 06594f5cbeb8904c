"""Parameters of a layer and of a model, by name."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsv2_ref.accounting.call import Counts, layers_alike, require_layer
from dsv2_ref.accounting.sizes import Sizes
from dsv2_ref.config import DeepseekV2Config


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A weight, or all weights that share a name across experts and layers."""

    shape: tuple[int, ...]  #: (outputs, inputs) or (features,) of one such weight, as it is stored
    active: int  #: parameters that a token passes through
    number: int = 1  #: how many such weights there are

    @property
    def stored(self) -> int:
        """Parameters of all of them."""
        return self.number * math.prod(self.shape)


def _weight(*shape: int) -> Matrix:
    """One weight, which every token passes through."""
    return Matrix(shape=shape, active=math.prod(shape))


def projections(config: DeepseekV2Config) -> dict[str, tuple[int, int]]:
    """The projections of attention: the number of inputs and of outputs of each."""
    s = Sizes.of(config)
    if not config.use_mla:
        keys = (s.D, s.G * s.V)
        return {
            "q_proj": (s.D, s.D), "k_proj": keys, "v_proj": keys, "o_proj": (s.D, s.D)
        }  # fmt: skip
    query = s.H * (s.N + s.R)
    queries = {"q_proj": (s.D, query)}
    if s.Q:
        queries = {"q_a_proj": (s.D, s.Q), "q_b_proj": (s.Q, query)}
    return queries | {
        "kv_a_proj_with_mqa": (s.D, s.C + s.R),
        "kv_b_proj": (s.C, s.H * (s.N + s.V)),
        "o_proj": (s.H * s.V, s.D),
    }


def _attention(config: DeepseekV2Config) -> dict[str, Matrix]:
    s, sizes = Sizes.of(config), projections(config)
    found = {f"{name}.weight": _weight(outputs, inputs) for name, (inputs, outputs) in sizes.items()}
    for name, width in (("q_a_layernorm", s.Q), ("kv_a_layernorm", s.C)):
        if width:
            found[f"{name}.weight"] = _weight(width)
    if config.attention_bias:
        without = {"q_proj", "q_b_proj", "kv_b_proj"} if config.use_mla else set()
        found |= {f"{name}.bias": _weight(sizes[name][1]) for name in sizes if name not in without}
    return found


def _feed_forward(name: str, hidden: int, width: int) -> dict[str, Matrix]:
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {f"{name}.{part}_proj.weight": _weight(*shape) for part, shape in shapes.items()}


def matrices(config: DeepseekV2Config, layer_idx: int) -> dict[str, Matrix]:
    """Every weight of a layer under its published name, with ``*`` in place of the index of a routed expert.

    A token passes through ``num_experts_per_tok`` of the routed experts, and through all other weights. The bias by which
    ``noaux_tc`` chooses experts, a number for each, is no parameter and is not counted.
    """
    require_layer(config, layer_idx)
    s = Sizes.of(config)
    found = {f"self_attn.{name}": matrix for name, matrix in _attention(config).items()}
    if config.is_moe_layer(layer_idx):
        found["mlp.gate.weight"] = _weight(s.E, s.D)
        for name, one in _feed_forward("mlp.experts.*", s.D, s.I).items():
            found[name] = replace(one, number=s.E, active=s.k * one.active)
        if s.shared:
            found |= _feed_forward("mlp.shared_experts", s.D, s.shared * s.I)
    else:
        found |= _feed_forward("mlp", s.D, s.dense)
    return found | {f"{name}.weight": _weight(s.D) for name in ("input_layernorm", "post_attention_layernorm")}


def model_matrices(config: DeepseekV2Config) -> dict[str, Matrix]:
    """Every weight of a whole model, those of all layers together: embedding, layers, last norm and head.

    A token uses one row of an embedding. A head that is tied to the embedding is the same matrix, and a token passes
    through all of it.
    """
    s, tied = Sizes.of(config), config.tie_word_embeddings
    found = {"embed_tokens.weight": Matrix(shape=(s.vocab, s.D), active=s.D * (s.vocab if tied else 1))}
    for layer_idx, layers in layers_alike(config):
        for name, one in matrices(config, layer_idx).items():
            others = found.get(f"layers.{name}", replace(one, number=0, active=0))
            number, active = others.number + layers * one.number, others.active + layers * one.active
            found[f"layers.{name}"] = replace(one, number=number, active=active)
    found["norm.weight"] = _weight(s.D)
    return found if tied else found | {"lm_head.weight": _weight(s.vocab, s.D)}


NETWORK = re.compile(r"(mlp(\.experts|\.shared_experts)?)(\.\*)?\.(gate|up|down)_proj\.weight$")


def by_module(found: Mapping[str, Matrix], active: bool = False) -> Counts:
    """Parameters of weights; those of one feed-forward network, or of all routed experts together, under one name."""
    counts: Counter[str] = Counter()
    for name, matrix in found.items():
        counts[NETWORK.sub(r"\1", name)] += matrix.active if active else matrix.stored
    return dict(counts)


def parameters(config: DeepseekV2Config, layer_idx: int, active: bool = False) -> Counts:
    """Parameters of a layer by name; all routed experts together are ``mlp.experts``.

    Args:
        active: only those that a token passes through: ``num_experts_per_tok`` of the routed experts.
    """
    return by_module(matrices(config, layer_idx), active)


def model_parameters(config: DeepseekV2Config, active: bool = False) -> Counts:
    """`parameters` of a whole model, those of all layers together (see `model_matrices`)."""
    return by_module(model_matrices(config), active)
