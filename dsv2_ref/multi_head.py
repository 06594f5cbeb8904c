"""Plain multi-head attention (MHA), with grouped KV heads, for the models without a latent."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dsv2_ref.attention_base import AttentionBase
from dsv2_ref.cache import KeyValueCache
from dsv2_ref.checks import require
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.projection import projection
from dsv2_ref.rope import rotate_half_split


class MultiHeadAttention(AttentionBase):
    """Plain multi-head attention with rotated keys, and grouped KV heads where ``num_key_value_heads`` is smaller.

    Takes and returns what `DeepseekV2Attention` does; its cache holds a key and a value for every KV head. Heads are
    ``hidden_size / num_attention_heads`` wide and rotate in half-split pairs. The scores carry no YaRN temperature, as
    in the published code.

    Source: Vaswani et al. (2017), section 3.2; Ainslie et al. (2023) for grouped heads; the ``mha_*`` entries of the
    published ``ATTENTION_CLASSES``, which are Llama's attention.
    """

    cache_class = KeyValueCache

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        require(not config.use_mla, "use_mla", config.use_mla, "False for plain multi-head attention")
        self.head_dim = config.hidden_size // self.num_heads
        self.num_key_value_heads = config.num_key_value_heads or self.num_heads
        self.rotary_dim = self.head_dim
        self.cache_features = (2, self.num_key_value_heads, self.head_dim)
        self.softmax_scale = self.head_dim**-0.5

        hidden, std, bias = config.hidden_size, config.initializer_range, config.attention_bias
        self.q_proj = projection(hidden, hidden, std, bias)
        self.k_proj = projection(hidden, self.num_key_value_heads * self.head_dim, std, bias)
        self.v_proj = projection(hidden, self.num_key_value_heads * self.head_dim, std, bias)
        self.o_proj = projection(hidden, hidden, std, bias)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq hidden"],
        attention_mask: Shaped[Tensor, "..."] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        past_key_value: KeyValueCache | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch heads seq kv_seq"] | None, KeyValueCache | None]:
        """Attend from every token to those before it; arguments and result as in `DeepseekV2Attention.forward`."""
        visible, cos, sin = self._read(hidden_states, attention_mask, position_ids, past_key_value, output_attentions)
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = cos[:, :, None], sin[:, :, None]
        query, key = rotate_half_split(query, cos, sin), rotate_half_split(key, cos, sin)
        self._check_kernel(query, self.head_dim, visible)
        present = self._remember(torch.stack((key, value), dim=2), past_key_value, use_cache)

        keys, values = present.keys.transpose(1, 2), present.values.transpose(1, 2)
        out, weights = self._attend(query.transpose(1, 2), keys, values, visible)
        attn_output = self.o_proj(out.transpose(1, 2).flatten(2))
        return attn_output, weights if output_attentions else None, present if use_cache else None


class MultiHeadFlashAttention2(MultiHeadAttention):
    """`MultiHeadAttention` whose products run in flash-attn 2, whatever the configuration says.

    Raises:
        ImportError: where flash-attn is not installed, with what to do.
    """

    fixed_implementation = "flash_attention_2"
