"""Multi-head attention (MHA), with grouped key-value heads, for models without MLA."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dsv2_ref import checks, ops
from dsv2_ref.attention import attend
from dsv2_ref.cache import KeyValueCache
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.linear import linear
from dsv2_ref.masks import Visibility
from dsv2_ref.rope import Tables, position_tables, rotate_half_split


class MultiHeadAttention(nn.Module):
    """Plain multi-head attention with rotated keys, and grouped key-value heads where
    ``num_key_value_heads`` is smaller than ``num_attention_heads``.

    Takes and returns what `DeepseekV2Attention` does; its cache holds a key and a value
    for every key-value head. Heads are ``hidden_size / num_attention_heads`` wide and
    rotate in half-split pairs. The scores carry no YaRN temperature, as in the
    published code.

    Source: Vaswani et al. (2017), section 3.2; Ainslie et al. (2023) for grouped heads;
    the ``mha_*`` entries of the published ``ATTENTION_CLASSES`` (Llama's attention).
    """

    cache_class = KeyValueCache
    fixed_implementation: str | None = None

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__()
        checks.attention_of(config, layer_idx, False, self.fixed_implementation)
        self.implementation = self.fixed_implementation or config._attn_implementation
        self.config, self.layer_idx = config, layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads or self.num_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.rotary_dim = self.widest_head = self.head_dim
        self.cache_features = (2, self.num_key_value_heads, self.head_dim)
        self.attention_dropout = config.attention_dropout
        self.softmax_scale = self.head_dim**-0.5

        D, kv = config.hidden_size, self.num_key_value_heads * self.head_dim
        std, bias = config.initializer_range, config.attention_bias
        self.q_proj = linear(D, D, std, bias)
        self.k_proj = linear(D, kv, std, bias)
        self.v_proj = linear(D, kv, std, bias)
        self.o_proj = linear(D, D, std, bias)

    @ops.defines(checks.attention_call)
    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq hidden"],
        attention_mask: Shaped[Tensor, "..."] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        past_key_value: KeyValueCache | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        position_embeddings: Tables | None = None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Tensor | None, KeyValueCache | None]:
        """See `DeepseekV2Attention.forward`."""
        config, (_, S, _) = self.config, hidden_states.shape
        past, tables, width = past_key_value, position_embeddings, self.head_dim
        K = S if past is None else past.length + S
        if tables is None:
            tables = position_tables(config, hidden_states, position_ids, past)
        cos, sin = (table[:, :, None] for table in tables)  # the same for all heads

        query = self.q_proj(hidden_states).unflatten(-1, (-1, width))  # (B, S, H, ·)
        key = self.k_proj(hidden_states).unflatten(-1, (-1, width))  # (B, S, G, ·)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, width))
        query = rotate_half_split(query, cos, sin).transpose(1, 2)
        new = torch.stack((rotate_half_split(key, cos, sin), value), dim=2)
        if past_key_value is None:
            present = KeyValueCache(self.layer_idx, new)
        else:
            present = past_key_value.append(new)
        keys, values = present.tokens.transpose(1, 3).unbind(2)  # (B, G, K, width) each

        visible = Visibility(S, K, hidden_states.device, attention_mask)
        scale, dropout = self.softmax_scale, self.attention_dropout
        dropout, kernel = dropout if self.training else 0.0, self.implementation
        out, weights = attend(
            query, keys, values, visible, scale, dropout, implementation=kernel
        )
        attn_output = self.o_proj(out.transpose(1, 2).flatten(2))  # (B, S, D)
        weights = weights if output_attentions else None
        return attn_output, weights, present if use_cache else None

    def empty_cache(self, batch: int, capacity: int = 0) -> KeyValueCache:
        """A cache without tokens, with room for ``capacity`` of each sequence."""
        return KeyValueCache.of(self, batch, capacity)


class MultiHeadFlashAttention2(MultiHeadAttention):
    """`MultiHeadAttention` that always runs in flash-attn 2."""

    fixed_implementation = "flash_attention_2"
