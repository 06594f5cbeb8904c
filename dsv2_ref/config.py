"""The configuration of a DeepSeek-V2 layer: what it may hold, and what is refused."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

# What the published configuration class assumes for a key that a config.json leaves out, where that differs from ours.
PUBLISHED_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "num_experts_per_tok": None,
    "n_group": None,
    "topk_group": None,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
}

MOST = 10**15
"""The largest size that is read; more is a slip, and products of sizes stay within what a float holds."""


def require(condition: bool, name: str, value: object, wanted: str) -> None:
    """Raise ValueError naming the argument, what it was and what was wanted, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; wanted {wanted}")


def is_int(value: object, least: int, most: float = MOST) -> bool:
    """Whether this is an integer between these, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _require_object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}; wanted a JSON object")
    return value


def require_ints(holder: object, names: str, least: int, optional: bool = False) -> None:
    """`require` that the attributes of these names, with spaces between, are integers of a size, or None where ``optional``."""
    for name in names.split():
        value = getattr(holder, name)
        allowed = is_int(value, least) or (optional and value is None)
        require(allowed, name, value, f"an integer of at least {least}{' or None' * optional}, and at most 10^15")


def _require_numbers(holder: object, names: str, least: float, below: float = math.inf) -> None:
    for name in names.split():
        value = getattr(holder, name)
        end = f", below {below:g}" if below < math.inf else ""
        require(_is_number(value) and least <= value < below, name, value, f"a finite number, at least {least:g}{end}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions are stretched beyond the length the model was trained on.

    ``factor`` s stretches all types. The other fields belong to YaRN (arXiv 2309.00071): ``beta_fast`` and
    ``beta_slow`` are turns over the original length, between which frequencies go from kept to divided by s;
    ``mscale`` and ``mscale_all_dim`` set the temperature. Defaults are the published ones.
    """

    type: str
    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        require(self.type in ("linear", "dynamic", "yarn"), "rope_scaling type", self.type, "linear, dynamic or yarn")
        _require_numbers(self, "factor", 1)
        require_ints(self, "original_max_position_embeddings", 1)
        _require_numbers(self, "beta_slow mscale mscale_all_dim", 0)
        _require_numbers(self, "beta_fast", self.beta_slow)
        require(0 < self.beta_slow < self.beta_fast, "beta_slow", self.beta_slow, "between 0 and beta_fast")
        for field in fields(self)[2:] if self.type != "yarn" else ():
            value = getattr(self, field.name)
            require(value == field.default, field.name, value, f"nothing: {self.type} scaling has no such setting")

    @classmethod
    def from_dict(cls, scaling: Mapping[str, Any]) -> Self | None:
        """Read a published ``rope_scaling`` (key ``type`` or ``rope_type``); ``default`` gives None."""
        given = {key: value for key, value in scaling.items() if value is not None and key != "rope_theta"}
        kind, *others = [given.pop(key) for key in ("type", "rope_type") if key in given] or [None]
        one = kind is not None and all(other == kind for other in others)
        require(one, "rope_scaling", dict(scaling), "one type (linear, dynamic or yarn)")
        if kind == "default":
            require(not given, "rope_scaling", dict(scaling), "no further keys beside type default")
            return None
        known = {f.name for f in fields(cls)} - {"type"}
        require(given.keys() <= known, "rope_scaling", dict(scaling), f"beside the type only {sorted(known)}")
        require("factor" in given, "rope_scaling", dict(scaling), "a factor")
        return cls(type=kind, **given)


@dataclass(frozen=True, kw_only=True)
class DeepseekV2Config:
    """Hyperparameters under their published names; the defaults are the book's worked example.

    ``num_key_value_heads=None`` means one per attention head. ``q_lora_rank=None`` drops query compression,
    ``n_routed_experts=None`` makes every layer dense, ``n_shared_experts=None`` drops the shared experts.
    ``_attn_implementation`` is ``eager``, ``sdpa`` or ``flash_attention_2``; ``mla_form`` is ``expanded``, ``absorbed``
    or ``auto`` (the one with fewer operations for the call at hand). ``device_aux_loss_alpha`` and
    ``communication_aux_loss_alpha`` weigh the paper's two losses that no published code has, over ``n_group`` devices.
    `dataclasses.replace` derives a variant.

    Raises:
        ValueError: for a value no layer can be built from, naming the field, the value and what was wanted.

    Source: ``DeepseekV2Config`` of the published code; ``_attn_implementation``, ``mla_form`` and the two weights of
    losses are not stored there.
    """

    vocab_size: int = 102400
    hidden_size: int = 1280
    intermediate_size: int = 3584
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 40
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = 2
    n_routed_experts: int | None = 160
    routed_scaling_factor: float = 1.0
    kv_lora_rank: int | None = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    topk_method: str = "greedy"
    n_group: int | None = 1
    topk_group: int | None = 1
    num_experts_per_tok: int | None = 2
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    device_aux_loss_alpha: float = 0.0
    communication_aux_loss_alpha: float = 0.0
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 163840
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_mla: bool = True
    _attn_implementation: str = "sdpa"
    mla_form: str = "auto"

    def __post_init__(self) -> None:
        scaling: object = self.rope_scaling
        if isinstance(scaling, Mapping):
            scaling = RopeScaling.from_dict(scaling)
            object.__setattr__(self, "rope_scaling", scaling)
        if self.topk_method == "gready":
            warnings.warn(
                "topk_method 'gready' is a misspelling in published configurations; read as 'greedy'", stacklevel=3
            )
            object.__setattr__(self, "topk_method", "greedy")
        require(scaling is None or isinstance(scaling, RopeScaling), "rope_scaling", scaling, "a dict or None")
        sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
        require_ints(self, f"{sizes} moe_layer_freq", 1)
        require_ints(self, "first_k_dense_replace", 0)
        require_ints(self, "num_key_value_heads n_shared_experts n_routed_experts q_lora_rank", 1, optional=True)
        _require_numbers(self, "routed_scaling_factor aux_loss_alpha initializer_range", 0)
        _require_numbers(self, "device_aux_loss_alpha communication_aux_loss_alpha", 0)
        _require_numbers(self, "attention_dropout", 0, below=1)
        _require_numbers(self, "rms_norm_eps", 2**-84)  # eps**-1.5, in the gradient, is below 2**128
        _require_numbers(self, "rope_theta", math.nextafter(1, 2))
        for name in ("norm_topk_prob", "seq_aux", "tie_word_embeddings", "attention_bias", "use_mla"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        require(self.hidden_act == "silu", "hidden_act", self.hidden_act, "silu, as in every published model")
        implementations = ("eager", "sdpa", "flash_attention_2")
        implementation = self._attn_implementation
        require(implementation in implementations, "_attn_implementation", implementation, ", ".join(implementations))
        require(
            self.mla_form in ("auto", "expanded", "absorbed"), "mla_form", self.mla_form, "auto, expanded, absorbed"
        )
        self._check_heads()
        self._check_experts()

    def _check_heads(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.use_mla:
            require(kv_heads in (None, heads), "num_key_value_heads", kv_heads, f"{heads} or None: MLA has no KV heads")
            require_ints(self, "kv_lora_rank qk_rope_head_dim v_head_dim qk_nope_head_dim", 1)
            require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", self.qk_rope_head_dim, "an even number")
        else:
            wanted = f"a multiple of twice num_attention_heads={heads}, for heads that rotate in pairs"
            require(self.hidden_size % (2 * heads) == 0, "hidden_size", self.hidden_size, wanted)
            require(heads % (kv_heads or heads) == 0, "num_key_value_heads", kv_heads, f"a divisor of {heads}")

    def _check_experts(self) -> None:
        experts, method = self.n_routed_experts, self.topk_method
        if experts is None:
            return
        require_ints(self, "moe_intermediate_size num_experts_per_tok", 1)
        require(self.scoring_func == "softmax", "scoring_func", self.scoring_func, "softmax")
        require(method in ("greedy", "group_limited_greedy"), "topk_method", method, "greedy or group_limited_greedy")
        for name in ("device_aux_loss_alpha", "communication_aux_loss_alpha"):
            alone = getattr(self, name) > 0 and method == "greedy"
            require(
                not alone, name, getattr(self, name), "0 without group_limited_greedy, whose groups are the devices"
            )
        allowed, wanted = experts, f"at most n_routed_experts={experts}"
        if method == "group_limited_greedy":
            require_ints(self, "n_group topk_group", 1)
            groups, kept = self.n_group or 1, self.topk_group or 1
            require(experts % groups == 0, "n_group", groups, f"a divisor of n_routed_experts={experts}")
            require(kept <= groups, "topk_group", kept, f"at most n_group={groups}")
            allowed = kept * experts // groups
            wanted = f"at most {allowed}, the experts in topk_group={kept} of n_group={groups} groups"
        chosen = self.num_experts_per_tok or 0
        require(chosen <= allowed, "num_experts_per_tok", chosen, wanted)

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether the layer of this index holds experts rather than a dense MLP (the published rule)."""
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    @classmethod
    def from_published(cls, source: Mapping[str, Any] | str | Path) -> Self:
        """Read a published ``config.json``, given as a dict or a path.

        Keys left out take the published defaults; keys that no layer reads (``architectures``, ``auto_map``, …) are
        ignored. A model with vision keeps its decoder under ``language_config``, which is then read. Both
        ``rope_scaling`` with ``rope_theta`` and the newer ``rope_parameters`` are understood.

        Raises:
            ValueError: for what is no JSON object in UTF-8, or not a model that can be built; it names the file.
        """
        if not isinstance(source, str | Path):
            return cls._from_object(source)
        try:
            return cls._from_object(json.loads(Path(source).read_text(encoding="utf-8")))
        except RecursionError:
            raise ValueError(f"{source} is no JSON that can be read: nested too deeply") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is no text in UTF-8: {error}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is no JSON: {error}") from error
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def _from_object(cls, source: object) -> Self:
        published = _require_object(source, "the configuration")
        published = _require_object(published.get("language_config", published), "language_config")
        require(
            not published.get("mlp_bias"), "mlp_bias", published.get("mlp_bias"), "False: the layer has no such bias"
        )
        values = {**PUBLISHED_DEFAULTS, **{f.name: published[f.name] for f in fields(cls) if f.name in published}}
        parameters = published.get("rope_parameters")
        if parameters is not None and _require_object(parameters, "rope_parameters"):
            values["rope_theta"] = parameters.get("rope_theta", values.get("rope_theta", 10000.0))
            values["rope_scaling"] = RopeScaling.from_dict(parameters)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values: JSON, and `from_published` of it, give the same configuration."""
        return asdict(self)

    @classmethod
    def card(cls) -> Self:
        """The worked example of the book: all defaults."""
        return cls()

    @classmethod
    def tiny(cls) -> Self:
        """A layer small enough to print, with every part of a real one."""
        return cls(
            vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=4,
            num_attention_heads=4, kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=8, qk_nope_head_dim=16,
            v_head_dim=16, n_routed_experts=8, max_position_embeddings=256,
        )  # fmt: skip

    @classmethod
    def deepseek_v2(cls) -> Self:
        """DeepSeek-V2, 236B parameters (arXiv 2405.04434, section 3.1.2, and its config.json)."""
        return cls(
            hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=60,
            num_experts_per_tok=6, topk_method="group_limited_greedy", n_group=8, topk_group=3,
            routed_scaling_factor=16.0, rope_scaling=_V2_YARN,
        )  # fmt: skip

    @classmethod
    def deepseek_v2_lite(cls) -> Self:
        """DeepSeek-V2-Lite, 15.7B parameters (arXiv 2405.04434, appendix B, and its config.json)."""
        return cls(
            hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None,
            n_routed_experts=64, num_experts_per_tok=6, rope_scaling=_V2_YARN,
        )  # fmt: skip

    @classmethod
    def deepseek_ocr(cls) -> Self:
        """The decoder of DeepSeek-OCR, 12 layers of plain multi-head attention (its config.json)."""
        return cls(
            vocab_size=129280, intermediate_size=6848, moe_intermediate_size=896, num_hidden_layers=12,
            num_attention_heads=10, use_mla=False, kv_lora_rank=None, q_lora_rank=None, qk_rope_head_dim=0,
            qk_nope_head_dim=0, v_head_dim=0, n_routed_experts=64, num_experts_per_tok=6, max_position_embeddings=8192,
        )  # fmt: skip


_V2_YARN = RopeScaling(type="yarn", factor=40, mscale=0.707, mscale_all_dim=0.707)
