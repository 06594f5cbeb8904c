"""Latent attention, keys and values expanded from the latents: solution."""

import torch
from torch import nn

from dsv2_ref import DeepseekV2RMSNorm
from dsv2_ref.rope import apply_rotary, rotary_tables, softmax_temperature


class DeepseekV2Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.heads = H = config.num_attention_heads
        self.nope, self.rope = N, R = config.qk_nope_head_dim, config.qk_rope_head_dim
        D, C, V = config.hidden_size, config.kv_lora_rank, config.v_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, H * (N + R), bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=False)
            self.q_a_layernorm = DeepseekV2RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * (N + R), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, C + R, bias=False)
        self.kv_a_layernorm = DeepseekV2RMSNorm(C)
        self.kv_b_proj = nn.Linear(C, H * (N + V), bias=False)
        self.o_proj = nn.Linear(H * V, D, bias=False)
        temperature = softmax_temperature(config.rope_scaling)
        self.scale = (N + R) ** -0.5 * temperature

    def queries(self, x):
        if self.config.q_lora_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def forward(self, hidden_states):
        config, (B, S, _) = self.config, hidden_states.shape
        H, N, R, C, V = self.heads, self.nope, self.rope, config.kv_lora_rank, config.v_head_dim
        position_ids = torch.arange(S)[None]
        cos, sin = rotary_tables(position_ids, R, config.rope_theta, config.rope_scaling, dtype=hidden_states.dtype)

        query = self.queries(hidden_states).view(B, S, H, N + R).transpose(1, 2)
        q_nope, q_pe = query.split((N, R), dim=-1)
        compressed_kv, k_pe = self.kv_a_proj_with_mqa(hidden_states).split((C, R), dim=-1)
        q_pe, k_pe = apply_rotary(q_pe, k_pe, cos, sin)

        latent = self.kv_a_layernorm(compressed_kv)
        kv = self.kv_b_proj(latent).view(B, S, H, N + V).transpose(1, 2)
        k_nope, value = kv.split((N, V), dim=-1)
        key = torch.cat((k_nope, k_pe[:, None].expand(-1, H, -1, -1)), dim=-1)
        query = torch.cat((q_nope, q_pe), dim=-1)

        scores = query @ key.transpose(-1, -2) * self.scale
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(dim=-1)
        out = weights @ value
        return self.o_proj(out.transpose(1, 2).reshape(B, S, H * V))
