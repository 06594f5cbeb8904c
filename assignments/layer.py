"""Assignment 8: the whole layer. The page layer.md says what is wanted.

python -m dsv2_ref grade layer layer.py
"""

from torch import nn

from dsv2_ref import DeepseekV2Attention, DeepseekV2MLP, DeepseekV2MoE, DeepseekV2RMSNorm  # noqa: F401


class DeepseekV2DecoderLayer(nn.Module):
    """Attention and a feed-forward part, each on normalised input and added to the stream.

    Modules: input_layernorm, self_attn, post_attention_layernorm, mlp.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        raise NotImplementedError("the layer's modules: four, of which the last depends on layer_idx")

    def forward(self, hidden_states):
        """hidden_states: (batch, seq, hidden_size); returns the same shape."""
        raise NotImplementedError("the layer's forward: two additions")
