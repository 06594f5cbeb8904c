"""Assignment 6: the mixture of experts. The page experts.md says what is wanted.

python -m dsv2_ref grade experts experts.py
"""

import torch  # noqa: F401
from torch import nn

from dsv2_ref import MoEGate


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        """Any shape that ends with hidden."""
        raise NotImplementedError("SwiGLU's forward: one line")


class DeepseekV2MoE(nn.Module):
    """The routed experts that a token chose, weighted, plus the shared experts."""

    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate = MoEGate(config)
        self.experts = nn.ModuleList(MLP(hidden, inner) for _ in range(config.n_routed_experts))
        self.shared_experts = MLP(hidden, inner * config.n_shared_experts)

    def forward(self, hidden_states):
        """hidden_states: (batch, seq, hidden_size); returns the same shape."""
        raise NotImplementedError("the mixture's forward: ask the gate, then collect each expert's tokens")
