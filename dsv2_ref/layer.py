"""The decoder layer: attention, then experts, each on normalised input and added to the residual stream."""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dsv2_ref.attention import ATTENTION_CLASSES
from dsv2_ref.checks import require, require_tensor
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.mlp import DeepseekV2MLP
from dsv2_ref.moe import DeepseekV2MoE
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm


class DeepseekV2DecoderLayer(nn.Module):
    """``h = x + attention(norm(x))``, then ``h + feed_forward(norm(h))``.

    Attention is MLA or, with ``use_mla=False``, multi-head attention. The feed-forward network is a mixture of experts
    from layer ``first_k_dense_replace`` on, at every ``moe_layer_freq``-th index, and dense elsewhere.

    Args:
        config: hyperparameters.
        layer_idx: index of the layer in its model, from 0; its cache carries it.

    Raises:
        ImportError: for ``flash_attention_2`` where flash-attn is not installed.
        ValueError: for an index below 0, and from `forward`, before anything has changed, for an input that does not fit.

    Source: DeepSeek-V2, figure 2; ``DeepseekV2DecoderLayer`` of the published code.
    """

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        kind = ("mla_" if config.use_mla else "mha_") + config._attn_implementation
        self.self_attn = ATTENTION_CLASSES[kind](config=config, layer_idx=layer_idx)
        self.mlp = DeepseekV2MoE(config) if config.is_moe_layer(layer_idx) else DeepseekV2MLP(config)
        self.input_layernorm = DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq hidden"],
        attention_mask: Shaped[Tensor, "..."] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        past_key_value: Any = None,
        output_attentions: bool | None = False,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Pass tokens through the layer.

        Args:
            hidden_states: the residual stream, in the dtype of the weights or one that they widen.
            attention_mask: None for causal order; (batch, kv_seq) bool or integer for padding beside it; (batch or 1,
                heads or 1, seq, kv_seq) bool (True keeps) or floating (added to the scores) to decide alone.
            position_ids: places of the tokens, 0 or more; None continues from the cache.
            past_key_value: what this layer returned with ``use_cache=True``.
            output_attentions: return the attention weights as well (``eager`` only).
            use_cache: return what the layer now remembers as well.
            **kwargs: none is known; any is refused with a TypeError.

        Returns:
            ``(hidden_states, attn_weights?, present_key_value?)``, the last two where asked for.
        """
        require_tensor(hidden_states, "hidden_states")
        dtype = self.input_layernorm.weight.dtype
        require(
            hidden_states.is_floating_point() and torch.promote_types(hidden_states.dtype, dtype) == dtype,
            "hidden_states",
            hidden_states,
            "floating-point numbers that {} weights can hold",
            dtype,
        )
        residual = hidden_states
        hidden_states, attn_weights, present_key_value = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=bool(output_attentions),
            use_cache=bool(use_cache),
            **kwargs,
        )
        hidden_states, normed = self.post_attention_layernorm.after_adding(hidden_states, residual)
        hidden_states = hidden_states + self.mlp(normed)

        outputs: tuple[Any, ...] = (hidden_states,)
        if output_attentions:
            outputs += (attn_weights,)
        if use_cache:
            outputs += (present_key_value,)
        return outputs
