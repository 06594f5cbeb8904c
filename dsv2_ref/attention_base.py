"""What latent and multi-head attention share: reading the input, positions and masks, and the choice of kernel."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv2_ref.attend import attend_eager, attend_sdpa
from dsv2_ref.attend_flash import attend_flash, load_flash_attn, require_flash_input
from dsv2_ref.cache import LayerCache
from dsv2_ref.checks import require, require_tensor, require_values
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.masks import Visibility
from dsv2_ref.projection import require_features
from dsv2_ref.rope import rotary_tables


class AttentionBase(nn.Module):
    """Base of the attention classes; a subclass sets the attributes below and computes queries, keys and values.

    Attributes:
        cache_class: what it remembers tokens in. cache_features: the shape of one token there.
        fixed_implementation: the kernel, whatever the configuration says; None follows the configuration.
        rotary_dim: features that rotate. softmax_scale: multiplies the scores. o_proj: the last projection.
    """

    cache_class: ClassVar[type[LayerCache]]
    cache_features: tuple[int, ...]
    fixed_implementation: ClassVar[str | None] = None
    rotary_dim: int
    softmax_scale: float
    o_proj: nn.Linear

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__()
        require(isinstance(layer_idx, int) and layer_idx >= 0, "layer_idx", layer_idx, "the layer's index, 0 or more")
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.implementation = self.fixed_implementation or config._attn_implementation
        if self.implementation == "flash_attention_2":
            load_flash_attn()

    def empty_cache(self, batch: int, capacity: int = 0) -> Any:
        """A cache of this layer without tokens and with room for ``capacity`` of each sequence, for ``past_key_value``."""
        weight = self.o_proj.weight
        return self.cache_class.empty(
            self.layer_idx, batch, self.cache_features, capacity=capacity, dtype=weight.dtype, device=weight.device
        )

    def _read(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_value: Any,
        output_attentions: bool,
    ) -> tuple[Visibility, Tensor, Tensor]:
        """Refuse what cannot be computed; the visible keys, and cosines and sines (batch, seq, pairs)."""
        require_tensor(hidden_states, "hidden_states")
        require(hidden_states.ndim == 3, "hidden_states", hidden_states, "(batch, seq, hidden)")
        require_features(hidden_states, self.config.hidden_size, self.o_proj.weight)
        require(
            not output_attentions or self.implementation == "eager",
            "output_attentions",
            output_attentions,
            "False: _attn_implementation={!r} never holds the weights, 'eager' does",
            self.implementation,
        )
        past_length = 0
        if past_key_value is not None:
            require(
                type(past_key_value) is self.cache_class and past_key_value.layer_idx == self.layer_idx,
                "past_key_value",
                past_key_value,
                "the {} that layer {} returned",
                self.cache_class.__name__,
                self.layer_idx,
            )
            past_length = past_key_value.length
        batch, seq, _ = hidden_states.shape
        kv_seq, device = past_length + seq, hidden_states.device
        if position_ids is None:
            position_ids = torch.arange(past_length, kv_seq, device=device)[None]
        else:
            require_tensor(position_ids, "position_ids")
            integers = not (
                position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool
            )
            require(
                position_ids.shape in ((batch, seq), (1, seq)) and integers and position_ids.device == device,
                "position_ids",
                position_ids,
                "integers ({} or 1, {}) on {}",
                batch,
                seq,
                device,
            )
            require_values((position_ids >= 0).all(), "position_ids", "negative somewhere", "positions from 0 on")
        visible = Visibility.of(attention_mask, batch, self.num_heads, seq, kv_seq, device)
        cos, sin = rotary_tables(
            position_ids,
            self.rotary_dim,
            self.config.rope_theta,
            self.config.rope_scaling,
            max_position_embeddings=self.config.max_position_embeddings,
            kv_length=kv_seq,
            dtype=hidden_states.dtype,
        )
        return visible, cos, sin

    def _check_kernel(self, query: Tensor, width: int, visible: Visibility) -> None:
        """Refuse what the kernel cannot take, before anything is remembered."""
        if self.implementation == "flash_attention_2":
            require_flash_input(query, width, visible)

    def _remember(self, new: Tensor, past_key_value: Any, use_cache: bool) -> Any:
        """The cache with the new tokens; one that nobody keeps needs no room to grow."""
        if past_key_value is None and not use_cache:
            return self.cache_class(self.layer_idx, new)
        if past_key_value is None:
            past_key_value = self.cache_class.empty(
                self.layer_idx, len(new), self.cache_features, dtype=new.dtype, device=new.device
            )
        return past_key_value.append(new)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visibility
    ) -> tuple[Float[Tensor, "batch heads seq value_width"], Float[Tensor, "batch heads seq kv_seq"] | None]:
        dropout = self.attention_dropout if self.training else 0.0
        if self.implementation == "eager":
            return attend_eager(query, key, value, visible, self.softmax_scale, dropout)
        attend = attend_flash if self.implementation == "flash_attention_2" else attend_sdpa
        return attend(query, key, value, visible, self.softmax_scale, dropout), None
