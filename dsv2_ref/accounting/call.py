"""The call whose costs are counted, and which layers of a model cost the same."""

from dataclasses import dataclass

from dsv2_ref.checks import WrongTypeError, group_size, is_config, is_int, reject, require, require_ints
from dsv2_ref.config import DeepseekV2Config

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes per element, by the name of the dtype."""

FORMS = ("auto", "expanded", "absorbed")
"""Ways to compute latent attention."""

WEIGHTS = ("int8", "int4", "fp8")
"""What `dsv2_ref.quantize` makes of weights."""

CACHES = ("fp8", "int8", "int4")
"""What a quantised cache makes of latents."""

Counts = dict[str, int]
"""Amounts by name."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One forward pass through a layer or a model.

    Form ``auto`` is the configuration's ``mla_form``; where that is ``auto`` too, the form with fewer FLOPs.

    With ``kept`` everything is counted as for a cache of so many rows: bytes, FLOPs, and the form that is taken; ``kv``
    then only says how many tokens have passed. With ``read`` the cache takes as much memory as before, but scores and
    values are counted for so many rows per query (all that it sees where those are fewer). S queries read at most S
    times as many different rows, as they do where no two choose the same. What chooses the rows, an indexer and its own
    cache, is not counted. Not every way saves what is counted: a mask over unread rows still computes their products.

    Raises:
        ValueError: unless the sizes are integers from 1 to 10^15, for more new tokens than tokens attended to, for an
            unknown form, dtype or kind of weights or cache, for fewer bits than int8 has without scales, for a group
            that is not even, and for more rows kept than attended to, or read than kept.
    """

    batch: int = 1  #: number of sequences B
    seq: int = 1  #: new tokens S of each sequence
    kv: int = 1  #: tokens K that the last new token attends to, itself included
    form: str = "auto"  #: of latent attention, one of `FORMS`
    causal: bool = True  #: count only pairs of a query and a key that it sees, not all S · K
    dtype: str = "bfloat16"  #: of weights, activations and cache, one of `DTYPE_BYTES`
    weights: str | None = None  #: what quantised weights are stored as, one of `WEIGHTS`, or None for the dtype
    group: int = 64  #: neighbours in a row that share a scale, for weights in ``int4``
    cache: str | None = None  #: what cached latents are stored as, one of `CACHES`, or None for the dtype
    kept: int | None = (
        None  #: rows per sequence that the cache holds, new ones included, as a window leaves them; None for all K
    )
    read: int | None = None  #: rows of them that each query reads, as an indexer chooses; None for all that it sees

    def __post_init__(self) -> None:
        require_ints(self, ("batch", "seq", "kv"), 1)
        require(self.kv >= self.seq, "kv", self.kv, "at least the {} new tokens", self.seq)
        require(isinstance(self.causal, bool), "causal", self.causal, "True or False")
        require(self.form in FORMS, "form", self.form, ", ".join(FORMS))
        require(self.dtype in tuple(DTYPE_BYTES), "dtype", self.dtype, ", ".join(DTYPE_BYTES))
        require_kind("weights", self.weights, WEIGHTS, self.dtype)
        require_kind("cache", self.cache, CACHES, self.dtype)
        group_size(self.group)
        fits, wanted = self.kept is None or is_int(self.kept, self.seq, self.kv), "None, or from seq={} to kv={}"
        require(fits, "kept", self.kept, wanted, self.seq, self.kv)
        fits, wanted = (
            self.read is None or is_int(self.read, 1, self.rows),
            "None, or from 1 to the {} rows in the cache",
        )
        require(fits, "read", self.read, wanted, self.rows)

    @property
    def tokens(self) -> int:
        """New tokens T of all sequences."""
        return self.batch * self.seq

    @property
    def rows(self) -> int:
        """Rows of each sequence in the cache after the call."""
        return self.kv if self.kept is None else self.kept

    @property
    def rows_per_query(self) -> int:
        """Rows that a query reads where none is hidden from it."""
        return self.rows if self.read is None else self.read

    @property
    def rows_read(self) -> int:
        """Different rows of each sequence that its queries read, at most."""
        return min(self.rows, self.seq * self.rows_per_query)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are counted, per sequence and head."""
        most, first = self.rows_per_query, self.rows - self.seq + 1  # the first query sees the fewest rows
        fewer = min(max(most - first, 0), self.seq) if self.causal else 0  # queries that see fewer than ``most``
        return fewer * first + fewer * (fewer - 1) // 2 + (self.seq - fewer) * most

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPE_BYTES[self.dtype]


def require_call(call: object) -> None:
    """Raise `WrongTypeError` for what is not a call, such as its fields in a dict."""
    if not isinstance(call, Call):
        reject("call", call, "a Call of dsv2_ref.accounting", WrongTypeError)


def require_kind(name: str, kind: str | None, known: tuple[str, ...], dtype: str) -> None:
    """Raise ValueError for an unknown kind of weights or of a cache, and for one whose scales int8 could not hold."""
    require(kind is None or kind in known, name, kind, f"None or one of {', '.join(known)}")
    require(kind is None or dtype != "int8", name, kind, "None for the dtype int8, which has no scales")


def require_layer(config: DeepseekV2Config, layer_idx: int) -> None:
    """Raise ValueError unless the model has a layer of this index."""
    is_config(config)
    last = config.num_hidden_layers - 1
    require(is_int(layer_idx, 0, last), "layer", layer_idx, "from 0 to {}", last)


def moe_layers(config: DeepseekV2Config, end: int) -> int:
    """Number of layers with experts among the first ``end`` layers."""
    every, dense = config.moe_layer_freq, min(config.first_k_dense_replace, end)
    return 0 if config.n_routed_experts is None else -(-end // every) - -(-dense // every)


def layers_alike(config: DeepseekV2Config) -> list[tuple[int, int]]:
    """The kinds of layers that a model has, dense or with experts: the index of the last layer and the number of layers
    of each, ordered by index."""
    is_config(config)
    end, every = config.num_hidden_layers, config.moe_layer_freq
    first, mixed = min(config.first_k_dense_replace, end), moe_layers(config, end)
    # The last layer of each kind is one of these: two neighbours with experts mean that every layer from ``first`` on
    # has them.
    candidates = sorted((first - 1, end - 2, (end - 1) // every * every, end - 1))
    last = {config.is_moe_layer(i): i for i in candidates if i >= 0}
    return sorted((i, mixed if moe else end - mixed) for moe, i in last.items())
