"""The call whose costs are counted, and which layers of a model cost the same."""

from dataclasses import dataclass

from dsv2_ref.checks import is_int, require, require_ints
from dsv2_ref.config import DeepseekV2Config

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes per element, by the name of the dtype."""

FORMS = ("auto", "expanded", "absorbed")
"""Ways to compute latent attention."""

Counts = dict[str, int]
"""Amounts by name."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One forward pass through a layer or a model.

    Form ``auto`` is the configuration's ``mla_form``; where that is ``auto`` too, the form with fewer FLOPs.

    Raises:
        ValueError: unless the sizes are integers from 1 to 10^15, for more new tokens than tokens attended to, and for
            an unknown form or dtype.
    """

    batch: int = 1  #: number of sequences B
    seq: int = 1  #: new tokens S of each sequence
    kv: int = 1  #: tokens K that the last new token attends to, itself included
    form: str = "auto"  #: of latent attention, one of `FORMS`
    causal: bool = True  #: count only pairs of a query and a key that it sees, not all S · K
    dtype: str = "bfloat16"  #: of weights, activations and cache, one of `DTYPE_BYTES`

    def __post_init__(self) -> None:
        require_ints(self, ("batch", "seq", "kv"), 1)
        require(self.kv >= self.seq, "kv", self.kv, "at least the {} new tokens", self.seq)
        require(isinstance(self.causal, bool), "causal", self.causal, "True or False")
        require(self.form in FORMS, "form", self.form, ", ".join(FORMS))
        require(self.dtype in DTYPE_BYTES, "dtype", self.dtype, ", ".join(DTYPE_BYTES))

    @property
    def tokens(self) -> int:
        """New tokens T of all sequences."""
        return self.batch * self.seq

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are counted, per sequence and head."""
        hidden = self.seq * (self.seq - 1) // 2 if self.causal else 0
        return self.seq * self.kv - hidden

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPE_BYTES[self.dtype]


def require_layer(config: DeepseekV2Config, layer_idx: int) -> None:
    """Raise ValueError unless the model has a layer of this index."""
    last = config.num_hidden_layers - 1
    require(is_int(layer_idx, 0, last), "layer", layer_idx, "from 0 to {}", last)


def moe_layers(config: DeepseekV2Config, end: int) -> int:
    """Number of layers with experts among the first ``end`` layers."""
    every, dense = config.moe_layer_freq, min(config.first_k_dense_replace, end)
    return 0 if config.n_routed_experts is None else -(-end // every) - -(-dense // every)


def layers_alike(config: DeepseekV2Config) -> list[tuple[int, int]]:
    """The kinds of layers that a model has, dense or with experts: the index of the last layer and the number of layers
    of each, ordered by index."""
    end, every = config.num_hidden_layers, config.moe_layer_freq
    first, mixed = min(config.first_k_dense_replace, end), moe_layers(config, end)
    # The last layer of each kind is one of these: two neighbours with experts mean that every layer from ``first`` on
    # has them.
    candidates = sorted((first - 1, end - 2, (end - 1) // every * every, end - 1))
    last = {config.is_moe_layer(i): i for i in candidates if i >= 0}
    return sorted((i, mixed if moe else end - mixed) for moe, i in last.items())
