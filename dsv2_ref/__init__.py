"""The DeepSeek-V2 decoder layer, as an executable reference."""

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
