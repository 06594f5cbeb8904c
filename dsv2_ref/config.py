"""The configuration of a DeepSeek-V2 layer: its fields, the presets, and how a
published ``config.json`` is read. `dsv2_ref.checks` says what is rejected."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from dsv2_ref import checks, config_checks, published, strict_json


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions are stretched beyond the length the model was trained on.

    ``factor`` s stretches all types. The other fields belong to YaRN (arXiv
    2309.00071): ``beta_fast`` and ``beta_slow`` are turns over the original length,
    between which frequencies go from kept to divided by s; ``mscale`` and
    ``mscale_all_dim`` set the temperature. Defaults are the published ones.
    """

    type: str
    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        config_checks.rope_scaling(self)

    @classmethod
    def from_dict(cls, scaling: Mapping[str, Any]) -> Self | None:
        """Read a published ``rope_scaling`` (key ``type`` or ``rope_type``);
        ``default`` gives None."""
        given = published.rope_scaling(scaling)
        return None if given is None else cls(**given)


@dataclass(frozen=True, kw_only=True)
class DeepseekV2Config:
    """Hyperparameters under their published names; the defaults are those of the
    data sheet that the book checks (``card``).

    ``num_key_value_heads=None`` means one per attention head. ``q_lora_rank=None``
    drops query compression, ``n_routed_experts=None`` makes every layer dense,
    ``n_shared_experts=None`` drops the shared experts. ``_attn_implementation`` is
    ``eager``, ``sdpa`` or ``flash_attention_2``; ``mla_form`` is ``expanded``,
    ``absorbed`` or ``auto`` (the one with fewer operations for the call at hand).
    ``device_aux_loss_alpha`` and ``communication_aux_loss_alpha`` weight the two losses
    of the paper that no published code has, over ``n_group`` devices.
    `dataclasses.replace` derives a variant.

    Raises:
        ValueError: for a value no layer can be built from, naming the field, the value
            and what was wanted.

    Source: ``DeepseekV2Config`` of the published code; ``_attn_implementation``,
    ``mla_form`` and the two weights of losses are not stored there.
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
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    topk_method: str = "greedy"
    n_group: int = 1
    topk_group: int = 1
    num_experts_per_tok: int = 2
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
            said = "topk_method 'gready' is a misspelling in published configurations"
            warnings.warn(f"{said}; read as 'greedy'", stacklevel=3)
            object.__setattr__(self, "topk_method", "greedy")
        known = scaling is None or isinstance(scaling, RopeScaling)
        checks.require(known, "rope_scaling", scaling, "a dict or None")
        config_checks.configuration(self)

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether the layer of this index holds experts rather than a dense MLP (the
        published rule)."""
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    @classmethod
    def from_published(cls, source: Mapping[str, Any] | str | Path) -> Self:
        """Read a published ``config.json``, given as a dict or a path.

        ``model_type`` or ``architectures`` say which model it is, and keys left out
        take the defaults of its published code. A model with vision keeps its decoder
        in an object of its own, ``language_config`` or ``text_config``.

        Raises:
            ValueError: for what is not a JSON object in UTF-8, for a model of another
                kind, and for a key whose value would change the layer; it names the
                file and the key.

        Warns:
            UserWarning: for keys that are not known, naming them.
        """
        if not isinstance(source, str | Path):
            return cls._from_object(source)
        content = strict_json.load(source)
        try:
            return cls._from_object(content)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def _from_object(cls, source: object) -> Self:
        decoder, values = published.read(source, {f.name for f in fields(cls)})
        config = cls(**values)
        published.require_agreement(decoder, config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values: JSON, and `from_published` of it, give the same
        configuration."""
        return asdict(self)

    @classmethod
    def card(cls) -> Self:
        """The layer of the data sheet that the book checks: all defaults."""
        return cls()

    @classmethod
    def tiny(cls) -> Self:
        """A layer small enough to print, with every part of a real one."""
        return cls(
            vocab_size=256, hidden_size=64, intermediate_size=128,
            moe_intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
            kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=8, qk_nope_head_dim=16,
            v_head_dim=16, n_routed_experts=8, max_position_embeddings=256,
        )  # fmt: skip

    @classmethod
    def deepseek_v2(cls) -> Self:
        """DeepSeek-V2, 236B parameters (arXiv 2405.04434, section 3.1.2, and its
        config.json)."""
        return cls(
            hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536,
            num_hidden_layers=60, num_experts_per_tok=6,
            topk_method="group_limited_greedy", n_group=8, topk_group=3,
            routed_scaling_factor=16.0, rope_scaling=_V2_YARN,
        )  # fmt: skip

    @classmethod
    def deepseek_v2_lite(cls) -> Self:
        """DeepSeek-V2-Lite, 15.7B parameters (arXiv 2405.04434, appendix B, and its
        config.json)."""
        return cls(
            hidden_size=2048, intermediate_size=10944, num_hidden_layers=27,
            num_attention_heads=16, q_lora_rank=None, n_routed_experts=64,
            num_experts_per_tok=6, rope_scaling=_V2_YARN,
        )  # fmt: skip

    @classmethod
    def deepseek_v3(cls) -> Self:
        """DeepSeek-V3, 671B parameters (arXiv 2412.19437, section 4.2, and its
        config.json), without the modules that predict further tokens."""
        return cls(
            vocab_size=129280, hidden_size=7168, intermediate_size=18432,
            moe_intermediate_size=2048, num_hidden_layers=61, n_shared_experts=1,
            n_routed_experts=256, num_experts_per_tok=8, first_k_dense_replace=3,
            topk_method="noaux_tc", scoring_func="sigmoid", n_group=8, topk_group=4,
            norm_topk_prob=True, routed_scaling_factor=2.5,
            rope_scaling=RopeScaling(type="yarn", factor=40, mscale_all_dim=1.0),
        )  # fmt: skip

    @classmethod
    def moonlight(cls) -> Self:
        """Moonlight-16B-A3B, a layer of DeepSeek-V3's kind in V2-Lite's size (its
        config.json)."""
        return cls(
            vocab_size=163840, hidden_size=2048, intermediate_size=11264,
            num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None,
            n_routed_experts=64, num_experts_per_tok=6, topk_method="noaux_tc",
            scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.446,
            rms_norm_eps=1e-5, rope_theta=50000.0, max_position_embeddings=8192,
        )  # fmt: skip

    @classmethod
    def deepseek_ocr(cls) -> Self:
        """The decoder of DeepSeek-OCR, 12 layers of plain multi-head attention (its
        config.json)."""
        return cls(
            vocab_size=129280, intermediate_size=6848, moe_intermediate_size=896,
            num_hidden_layers=12, num_attention_heads=10, use_mla=False,
            q_lora_rank=None, qk_rope_head_dim=0,
            kv_lora_rank=None,  # type: ignore[arg-type]  # as its config.json has it
            qk_nope_head_dim=0, v_head_dim=0, n_routed_experts=64,
            num_experts_per_tok=6, max_position_embeddings=8192,
        )  # fmt: skip


_V2_YARN = RopeScaling(type="yarn", factor=40, mscale=0.707, mscale_all_dim=0.707)
