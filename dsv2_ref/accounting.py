"""What a layer and a model cost: parameters, FLOPs and bytes, counted from the configuration in exact integers.

Nothing here needs torch. Letters are those of the book: B sequences of S new tokens each, attending to K tokens (the new
ones included); T = B · S. A *product* counts a multiplication and its addition as two FLOPs. Everything else is counted by
`elementwise`: per number a norm takes 4 (square, sum, two multiplications), a rotation 3 (4 multiplications and 2 additions a
pair), a softmax 6 (scale, maximum, subtraction, exponential, sum, division), a SwiGLU 5 (exponential, addition, division, two
multiplications), a residual sum 1.
"""

from dataclasses import dataclass
from typing import Any

from dsv2_ref import memory
from dsv2_ref.config import DeepseekV2Config

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of a number, by the name of its dtype."""

CACHE_KINDS = ("own", "latent", "expanded", "mha", "gqa", "mqa")
FORMS = ("auto", "expanded", "absorbed")

Counts = dict[str, int]


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; wanted {wanted}")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One pass through a layer or a model.

    Attributes:
        batch: sequences B. seq: new tokens S of each. kv: tokens K that the last of them attends to, itself included.
        form: of latent attention: ``expanded``, ``absorbed`` or ``auto``, the one with fewer FLOPs.
        causal: count the pairs that see each other, not all S · K.
        dtype: of weights, activations and cache, one of `DTYPE_BYTES`.

    Raises:
        ValueError: for a size below 1, more new tokens than tokens attended to, an unknown form or dtype.
    """

    batch: int = 1
    seq: int = 1
    kv: int = 1
    form: str = "auto"
    causal: bool = True
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("batch", "seq", "kv"):
            value = getattr(self, name)
            good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            _require(good, name, value, "an integer of at least 1")
        _require(self.kv >= self.seq, "kv", self.kv, f"at least the {self.seq} new tokens")
        _require(self.form in FORMS, "form", self.form, ", ".join(FORMS))
        _require(self.dtype in DTYPE_BYTES, "dtype", self.dtype, ", ".join(DTYPE_BYTES))

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


def _layer(config: DeepseekV2Config, layer_idx: int) -> int:
    layers = config.num_hidden_layers
    _require(isinstance(layer_idx, int) and 0 <= layer_idx < layers, "layer", layer_idx, f"from 0 to {layers - 1}")
    return layer_idx


def _attention_parameters(config: DeepseekV2Config) -> Counts:
    hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
    if not config.use_mla:
        kv = (config.num_key_value_heads or heads) * (hidden // heads)
        widths = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
        counts = {f"{name}.weight": width * hidden for name, width in widths.items()}
        return counts | ({f"{name}.bias": width for name, width in widths.items()} if bias else {})
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    latent, q_latent = config.kv_lora_rank or 0, config.q_lora_rank
    counts = {}
    if q_latent is None:
        counts["q_proj.weight"] = hidden * heads * (nope + rope)
    else:
        counts["q_a_proj.weight"] = hidden * q_latent
        counts["q_a_layernorm.weight"] = q_latent
        counts["q_b_proj.weight"] = q_latent * heads * (nope + rope)
    counts["kv_a_proj_with_mqa.weight"] = hidden * (latent + rope)
    counts["kv_a_layernorm.weight"] = latent
    counts["kv_b_proj.weight"] = latent * heads * (nope + value)
    counts["o_proj.weight"] = heads * value * hidden
    if bias:
        counts |= {"q_a_proj.bias": q_latent} if q_latent is not None else {}
        counts |= {"kv_a_proj_with_mqa.bias": latent + rope, "o_proj.bias": hidden}
    return counts


def parameters(config: DeepseekV2Config, layer_idx: int, active: bool = False) -> Counts:
    """Parameters of a layer by name; all routed experts together as ``mlp.experts``.

    Args:
        active: only those that a token passes through: ``num_experts_per_tok`` of the routed experts.
    """
    layer_idx = _layer(config, layer_idx)
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


def _form(config: DeepseekV2Config, call: Call) -> str:
    if call.form != "auto":
        return call.form
    latent, rope, value = config.kv_lora_rank or 0, config.qk_rope_head_dim, config.v_head_dim
    expand = latent * (config.qk_nope_head_dim + value)
    expanded = call.kv * expand + call.pairs * (config.qk_nope_head_dim + rope + value)
    return "absorbed" if call.seq * expand + call.pairs * (2 * latent + rope) < expanded else "expanded"


def _attention_products(config: DeepseekV2Config, call: Call) -> Counts:
    """Multiplications of the attention's products."""
    weights = {name.removesuffix(".weight"): n for name, n in _attention_parameters(config).items() if "proj" in name}
    counts = {name: call.tokens * n for name, n in weights.items() if not name.endswith(".bias")}
    heads, pairs = config.num_attention_heads, call.batch * call.pairs * config.num_attention_heads
    if not config.use_mla:
        width = config.hidden_size // heads
        return counts | {"scores": pairs * width, "values": pairs * width}
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    latent, up = config.kv_lora_rank or 0, counts.pop("kv_b_proj") // call.tokens
    if _form(config, call) == "expanded":
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
    if config.is_moe_layer(_layer(config, layer_idx)):
        through = (config.num_experts_per_tok or 0) + (config.n_shared_experts or 0)
        counts["swiglu"] = 5 * tokens * through * config.moe_intermediate_size
        counts["router_softmax"] = 6 * tokens * (config.n_routed_experts or 0)
        counts["combine"] = 2 * tokens * (config.num_experts_per_tok or 0) * hidden
    else:
        counts["swiglu"] = 5 * tokens * config.intermediate_size
    return counts


def cache_numbers(config: DeepseekV2Config, kind: str = "own") -> int:
    """Numbers that a layer remembers of a token.

    Args:
        kind: ``own``, what the package's cache holds; or what this model would hold as ``latent`` (MLA), ``expanded`` (keys and
            values of all MLA heads), ``mha``, ``gqa`` (8 groups) or ``mqa``, with heads as wide as its values.
    """
    _require(kind in CACHE_KINDS, "kind", kind, ", ".join(CACHE_KINDS))
    heads = config.num_attention_heads
    width = config.v_head_dim if config.use_mla else config.hidden_size // heads
    if kind == "own":
        kind = "latent" if config.use_mla else "kv"
    if kind in ("latent", "expanded"):
        _require(config.use_mla, "kind", kind, "own, mha, gqa or mqa: this model has no latent")
        latent = (config.kv_lora_rank or 0) + config.qk_rope_head_dim
        return latent if kind == "latent" else heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + width)
    shared = {"kv": config.num_key_value_heads or heads, "mha": heads, "gqa": min(8, heads), "mqa": 1}
    return 2 * shared[kind] * width


def cache_bytes(
    config: DeepseekV2Config, tokens: int, dtype: str = "bfloat16", kind: str = "own", layers: int | None = None
) -> int:
    """Bytes of the caches of ``layers`` layers (None: all) for so many tokens, of all sequences together."""
    layers = config.num_hidden_layers if layers is None else layers
    return layers * tokens * cache_numbers(config, kind) * DTYPE_BYTES[dtype]


def experts_read(config: DeepseekV2Config, tokens: int) -> float:
    """Different routed experts that so many tokens visit, on average, if they choose evenly and by themselves."""
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    return experts * (1 - (1 - chosen / experts) ** tokens) if experts else 0.0


def weights_read(config: DeepseekV2Config, layer_idx: int, call: Call) -> int:
    """Bytes of a layer's weights that a call reads, each once; of the experts as many as `experts_read` expects."""
    counts = parameters(config, layer_idx)
    if "mlp.experts" in counts:
        one = counts["mlp.experts"] // (config.n_routed_experts or 1)
        counts["mlp.experts"] = round(experts_read(config, call.tokens) * one)
    return sum(counts.values()) * call.bytes_each


def activation_peak(
    config: DeepseekV2Config,
    call: Call,
    layer_idx: int | None = None,
    training: bool = False,
    checkpointing: bool = False,
) -> int:
    """The most bytes of activations that are alive together in a call of a layer, or of a model (None).

    ``config._attn_implementation`` decides whether attention is ``eager`` or fused. See `dsv2_ref.memory` for what is counted.
    The masks of the reference are causal, whatever ``call.causal`` says of the FLOPs.

    Args:
        training: with what gradients need, and the way back. checkpointing: keep the inputs of layers only, and compute a
            layer once more when its gradient is due.

    Raises:
        ValueError: in training, for a call over a cache or in the absorbed form; for checkpointing without training.
    """
    absorbed = config.use_mla and _form(config, call) == "absorbed"
    _require(training or not checkpointing, "checkpointing", checkpointing, "False where nothing is trained")
    _require(not training or call.kv == call.seq, "kv", call.kv, f"the {call.seq} new tokens: training has no cache")
    _require(
        not (training and absorbed), "form", "absorbed", "expanded: the absorbed form is counted in inference only"
    )
    sizes = memory.Pass(
        config=config, batch=call.batch, seq=call.seq, kv=call.kv, width=call.bytes_each, absorbed=absorbed
    )
    return memory.peak(sizes, None if layer_idx is None else _layer(config, layer_idx), training, checkpointing)


def report(
    config: DeepseekV2Config,
    call: Call,
    layer_idx: int | None = None,
    training: bool = False,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """All of it for one layer, or for the whole model with embedding and head, ready for JSON.

    ``parameters`` has ``total``, ``active_per_token`` and ``by_module``; ``flops`` has ``total``, ``products`` and ``by_operation``;
    ``bytes`` has ``weights``, ``weights_read`` (see `weights_read`), ``kv_cache`` (all tokens, after the call), ``kv_cache_written`` (the new ones) and
    ``activations_peak`` (see `activation_peak`, also for ``training`` and ``checkpointing``); ``intensity`` is FLOPs over
    the bytes of weights and cache that are read. All but the peak of a training are those of the way forward.
    """
    layers = range(config.num_hidden_layers) if layer_idx is None else [_layer(config, layer_idx)]
    if layer_idx is None:
        stored, active = model_parameters(config), model_parameters(config, active=True)
        operations: Counts = {"lm_head": 2 * call.tokens * config.hidden_size * config.vocab_size}
        others: Counts = {"last_norm": 4 * call.tokens * config.hidden_size}
        read = (config.hidden_size * (config.vocab_size + call.tokens + 1)) * call.bytes_each
    else:
        stored, active = parameters(config, layer_idx), parameters(config, layer_idx, active=True)
        operations, others, read = {}, {}, 0
    for index in layers:
        for total, part in ((operations, products(config, index, call)), (others, elementwise(config, index, call))):
            for name, count in part.items():
                total[name] = total.get(name, 0) + count
        read += weights_read(config, index, call)
    cache = cache_bytes(config, call.batch * call.kv, call.dtype, layers=len(layers))
    flops = sum(operations.values()) + sum(others.values())
    return {
        "config": config.to_dict(),
        "call": {name: getattr(call, name) for name in ("batch", "seq", "kv", "form", "causal", "dtype")}
        | {
            "form": _form(config, call) if config.use_mla else None,
            "layer": layer_idx,
            "training": training,
            "checkpointing": checkpointing,
        },
        "parameters": {
            "total": sum(stored.values()),
            "active_per_token": sum(active.values()),
            "by_module": stored,
        },
        "flops": {"total": flops, "products": sum(operations.values()), "by_operation": operations | others},
        "bytes": {
            "weights": sum(stored.values()) * call.bytes_each,
            "weights_read": read,
            "kv_cache": cache,
            "kv_cache_written": cache // call.kv * call.seq,
            "activations_peak": activation_peak(config, call, layer_idx, training, checkpointing),
        },
        "intensity": round(flops / (read + cache), 3),
    }
