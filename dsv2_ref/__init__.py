"""The DeepSeek-V2 decoder layer, as an executable reference.

Names are imported when they are first asked for, so that `accounting` and `config` work
without torch.
"""

import sys
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv2_ref.cache import KeyValueCache, LatentCache
    from dsv2_ref.config import DeepseekV2Config, RopeScaling
    from dsv2_ref.fast.packed import pack_weights
    from dsv2_ref.layer import ATTENTION_CLASSES, DeepseekV2DecoderLayer
    from dsv2_ref.mla import DeepseekV2Attention, DeepseekV2FlashAttention2
    from dsv2_ref.model import DeepseekV2ForCausalLM, DeepseekV2Model
    from dsv2_ref.moe import DeepseekV2MLP, DeepseekV2MoE, MoEGate
    from dsv2_ref.rmsnorm import DeepseekV2RMSNorm

__version__ = "0.1.0"
# of this version, as the pages, the PDF and CITATION.cff have it
__date__ = "2026-11-26"

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

_MODULE_OF = {
    "ATTENTION_CLASSES": "layer",
    "DeepseekV2Attention": "mla",
    "DeepseekV2Config": "config",
    "DeepseekV2DecoderLayer": "layer",
    "DeepseekV2FlashAttention2": "mla",
    "DeepseekV2ForCausalLM": "model",
    "DeepseekV2MLP": "moe",
    "DeepseekV2MoE": "moe",
    "DeepseekV2Model": "model",
    "DeepseekV2RMSNorm": "rmsnorm",
    "KeyValueCache": "cache",
    "LatentCache": "cache",
    "MoEGate": "moe",
    "RopeScaling": "config",
    "pack_weights": "fast.packed",
}


def _refuse_old_torch() -> None:
    try:
        loaded = sys.modules.get("torch")
        torch = str(loaded.__version__) if loaded else metadata.version("torch")
    except (AttributeError, metadata.PackageNotFoundError):
        return  # the module that needs torch will say so
    if [int(part) for part in torch.split(".")[:2]] < [2, 11]:
        raise ImportError(f"torch {torch} is here; wanted 2.11 or newer")


_refuse_old_torch()


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dsv2_ref' has no attribute {name!r}")
    value = getattr(import_module(f"dsv2_ref.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _MODULE_OF.keys())
