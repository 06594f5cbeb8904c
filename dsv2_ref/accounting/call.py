"""One pass through a layer or a model, as it is counted, and layers that cost the same."""

from dataclasses import dataclass

from dsv2_ref.config import DeepseekV2Config, is_int, require, require_ints

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of a number, by the name of its dtype."""

FORMS = ("auto", "expanded", "absorbed")
"""Ways to compute latent attention."""

Counts = dict[str, int]
"""How many, by name."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One pass through a layer or a model.

    Attributes:
        batch: sequences B. seq: new tokens S of each. kv: tokens K that the last of them attends to, itself included.
        form: of latent attention: ``expanded``, ``absorbed`` or ``auto``: the configuration's ``mla_form``, and where that
            is ``auto`` as well, the one with fewer FLOPs.
        causal: count the pairs that see each other, not all S · K.
        dtype: of weights, activations and cache, one of `DTYPE_BYTES`.

    Raises:
        ValueError: for a size below 1 or above 10^15 or no integer, more new tokens than tokens attended to, an unknown
            form or dtype.
    """

    batch: int = 1
    seq: int = 1
    kv: int = 1
    form: str = "auto"
    causal: bool = True
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        require_ints(self, "batch seq kv", 1)
        require(self.kv >= self.seq, "kv", self.kv, f"at least the {self.seq} new tokens")
        require(isinstance(self.causal, bool), "causal", self.causal, "True or False")
        require(self.form in FORMS, "form", self.form, ", ".join(FORMS))
        require(self.dtype in DTYPE_BYTES, "dtype", self.dtype, ", ".join(DTYPE_BYTES))

    @property
    def tokens(self) -> int:
        """New tokens T of all sequences."""
        return self.batch * self.seq

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it is compared with, in one sequence and head."""
        unseen = self.seq * (self.seq - 1) // 2 if self.causal else 0
        return self.seq * self.kv - unseen

    @property
    def bytes_each(self) -> int:
        """Bytes of a number."""
        return DTYPE_BYTES[self.dtype]


def one_of(config: DeepseekV2Config, layer_idx: int) -> int:
    """``layer_idx``, if the model has such a layer; else ValueError."""
    layers = config.num_hidden_layers
    require(is_int(layer_idx, 0, layers - 1), "layer", layer_idx, f"from 0 to {layers - 1}")
    return layer_idx


def moe_layers(config: DeepseekV2Config, end: int) -> int:
    """How many of the first ``end`` layers hold experts."""
    if config.n_routed_experts is None:
        return 0
    every = config.moe_layer_freq
    return -(-end // every) - -(-min(config.first_k_dense_replace, end) // every)


def layers_alike(config: DeepseekV2Config) -> list[tuple[int, int]]:
    """The last dense layer and the last with experts, as far as there are any, in order; and how many there are like it."""
    end, every = config.num_hidden_layers, config.moe_layer_freq
    mixed = moe_layers(config, end)
    last: dict[bool, int] = {}
    # Two neighbours with experts mean that all have them from ``first_k_dense_replace`` on.
    for layer_idx in (min(config.first_k_dense_replace, end) - 1, end - 2, (end - 1) // every * every, end - 1):
        if layer_idx >= 0:
            kind = config.is_moe_layer(layer_idx)
            last[kind] = max(layer_idx, last.get(kind, 0))
    return sorted((layer_idx, mixed if kind else end - mixed) for kind, layer_idx in last.items())
