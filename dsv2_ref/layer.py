"""The decoder layer: attention, then feed-forward, each on normalised input and added
to the residual stream."""

from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dsv2_ref import checks, ops
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.mha import MultiHeadAttention, MultiHeadFlashAttention2
from dsv2_ref.mla import DeepseekV2Attention, DeepseekV2FlashAttention2
from dsv2_ref.moe import DeepseekV2MLP, DeepseekV2MoE
from dsv2_ref.pretrained import PretrainedLayer
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from dsv2_ref.rope import Tables

ATTENTION_CLASSES: dict[str, type[DeepseekV2Attention] | type[MultiHeadAttention]] = {
    "mla_eager": DeepseekV2Attention,
    "mla_sdpa": DeepseekV2Attention,
    "mla_flash_attention_2": DeepseekV2FlashAttention2,
    "mha_eager": MultiHeadAttention,
    "mha_sdpa": MultiHeadAttention,
    "mha_flash_attention_2": MultiHeadFlashAttention2,
}
"""The class for ``"mla_"`` or ``"mha_"`` + ``config._attn_implementation``."""


class DeepseekV2DecoderLayer(PretrainedLayer, nn.Module):
    """``h = x + attention(norm(x))``, then ``h + feed_forward(norm(h))``.

    Attention is MLA or, with ``use_mla=False``, multi-head attention. The feed-forward
    network is a mixture of experts from layer ``first_k_dense_replace`` on, at every
    ``moe_layer_freq``-th index, and dense elsewhere.

    Args:
        config: hyperparameters.
        layer_idx: index of the layer in its model, from 0; its cache carries it.

    Raises:
        ImportError: for ``flash_attention_2`` where flash-attn is not installed.
        ValueError: for an index that the model does not have, and from `forward`,
            before anything has changed, for an input that does not fit.

    Source: DeepSeek-V2, figure 2; ``DeepseekV2DecoderLayer`` of the published code.
    """

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__()
        checks.layer_of(config, layer_idx)
        self.hidden_size = config.hidden_size
        kind = ("mla_" if config.use_mla else "mha_") + config._attn_implementation
        self.self_attn = ATTENTION_CLASSES[kind](config=config, layer_idx=layer_idx)
        moe = config.is_moe_layer(layer_idx)
        self.mlp = DeepseekV2MoE(config) if moe else DeepseekV2MLP(config)
        eps = config.rms_norm_eps
        self.input_layernorm = DeepseekV2RMSNorm(config.hidden_size, eps=eps)
        self.post_attention_layernorm = DeepseekV2RMSNorm(config.hidden_size, eps=eps)

    @ops.defines(checks.layer_call)
    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq hidden"],
        attention_mask: Shaped[Tensor, "..."] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        past_key_value: Any = None,
        output_attentions: bool | None = False,
        use_cache: bool | None = False,
        position_embeddings: Tables | None = None,
    ) -> tuple[Any, ...]:
        """Pass tokens through the layer.

        Args:
            hidden_states: the residual stream, in the dtype of the weights or one that
                they widen.
            attention_mask: None for causal order; (batch, kv_seq) bool or integer for
                padding beside it; (batch or 1, heads or 1, seq, kv_seq) bool (True
                keeps) or floating (added to the scores) to decide alone.
            position_ids: positions of the tokens, 0 or more; None continues from the
                cache.
            past_key_value: what this layer returned with ``use_cache=True``.
            output_attentions: return the attention weights as well (``eager`` only).
            use_cache: return the cache, these tokens included, as well.
            position_embeddings: `position_tables` of the call, which a model makes once
                for all its layers; None makes them here.

        Returns:
            ``(hidden_states, attn_weights?, present_key_value?)``, the last two where
            asked for.
        """
        own = position_embeddings is None  # others' attention may not take them
        tables = {} if own else {"position_embeddings": position_embeddings}
        residual = hidden_states  # (B, S, D)
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, attn_weights, present_key_value = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=bool(output_attentions),
            use_cache=bool(use_cache),
            **tables,
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = residual + self.mlp(hidden_states)

        outputs: tuple[Any, ...] = (hidden_states,)
        if output_attentions:
            outputs += (attn_weights,)
        if use_cache:
            outputs += (present_key_value,)
        return outputs
