"""The DeepSeek-V2 decoder layer, as an executable reference.

Names are imported when they are first asked for, so that `accounting` and `config` work where there is no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv2_ref.attention import ATTENTION_CLASSES, DeepseekV2Attention, DeepseekV2FlashAttention2
    from dsv2_ref.cache import KeyValueCache, LatentCache
    from dsv2_ref.config import DeepseekV2Config, RopeScaling
    from dsv2_ref.layer import DeepseekV2DecoderLayer
    from dsv2_ref.mlp import DeepseekV2MLP
    from dsv2_ref.model import DeepseekV2ForCausalLM, DeepseekV2Model
    from dsv2_ref.moe import DeepseekV2MoE, MoEGate
    from dsv2_ref.packed import pack_weights
    from dsv2_ref.rmsnorm import DeepseekV2RMSNorm

__version__ = "0.1.0"

__all__ = [
    "ATTENTION_CLASSES",
    "DeepseekV2Attention",
    "DeepseekV2Config",
    "DeepseekV2DecoderLayer",
    "DeepseekV2FlashAttention2",
    "DeepseekV2ForCausalLM",
    "DeepseekV2MLP",
    "DeepseekV2MoE",
    "DeepseekV2Model",
    "DeepseekV2RMSNorm",
    "KeyValueCache",
    "LatentCache",
    "MoEGate",
    "RopeScaling",
    "pack_weights",
]

_PLACES = {
    "attention": "ATTENTION_CLASSES DeepseekV2Attention DeepseekV2FlashAttention2",
    "cache": "KeyValueCache LatentCache",
    "config": "DeepseekV2Config RopeScaling",
    "layer": "DeepseekV2DecoderLayer",
    "mlp": "DeepseekV2MLP",
    "model": "DeepseekV2ForCausalLM DeepseekV2Model",
    "moe": "DeepseekV2MoE MoEGate",
    "packed": "pack_weights",
    "rmsnorm": "DeepseekV2RMSNorm",
}


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names.split():
            value = globals()[name] = getattr(import_module(f"dsv2_ref.{module}"), name)
            return value
    raise AttributeError(f"module 'dsv2_ref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
