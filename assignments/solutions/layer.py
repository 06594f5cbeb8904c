"""The layer: solution."""

from torch import nn

from dsv2_ref import DeepseekV2Attention, DeepseekV2MLP, DeepseekV2MoE, DeepseekV2RMSNorm


class DeepseekV2DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        eps = config.rms_norm_eps
        self.input_layernorm = DeepseekV2RMSNorm(config.hidden_size, eps)
        self.post_attention_layernorm = DeepseekV2RMSNorm(config.hidden_size, eps)
        self.self_attn = DeepseekV2Attention(config, layer_idx)
        experts = config.is_moe_layer(layer_idx)
        self.mlp = DeepseekV2MoE(config) if experts else DeepseekV2MLP(config)

    def forward(self, hidden_states):
        x = hidden_states
        h = x + self.self_attn(self.input_layernorm(x))[0]
        return h + self.mlp(self.post_attention_layernorm(h))
