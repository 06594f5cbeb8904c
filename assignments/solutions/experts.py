"""The mixture of experts: solution."""

import torch
from torch import nn
from torch.nn import functional as F

from dsv2_ref import MoEGate


class MLP(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DeepseekV2MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate = MoEGate(config)
        self.experts = nn.ModuleList(MLP(hidden, inner) for _ in range(config.n_routed_experts))
        self.shared_experts = MLP(hidden, inner * config.n_shared_experts)

    def forward(self, hidden_states):
        topk_idx, topk_weight, _ = self.gate(hidden_states)
        tokens = hidden_states.flatten(0, 1)
        routed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(topk_idx == number)
            made = expert(tokens[token]) * topk_weight[token, choice, None]
            routed.index_add_(0, token, made)
        return routed.view_as(hidden_states) + self.shared_experts(hidden_states)
