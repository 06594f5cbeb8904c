"""Assignment 3: latent attention. The page mla.md says what is wanted.

python -m dsv2_ref grade mla mla.py
"""

import torch  # noqa: F401
from torch import nn

from dsv2_ref import DeepseekV2RMSNorm
from dsv2_ref.rope import apply_rotary, rotary_tables, softmax_temperature  # noqa: F401


class DeepseekV2Attention(nn.Module):
    """Latent attention: keys and values of all heads are made from one latent per token."""

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

    def forward(self, hidden_states):
        """hidden_states: (batch, seq, hidden_size), in causal order from position 0.

        Returns the same shape.
        """
        raise NotImplementedError("MLA's forward: start with the queries, (batch, heads, seq, N + R)")
