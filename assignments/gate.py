"""Assignment 5: the gate. The page gate.md says what is wanted.

python -m dsv2_ref grade gate gate.py
"""

import torch
from torch import nn


class MoEGate(nn.Module):
    """Choose experts for each token, and weigh them.

    Parameter: weight (experts, hidden_size); buffer of V3: e_score_correction_bias (experts).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        biased = config.topk_method == "noaux_tc"
        bias = torch.zeros(experts) if biased else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, hidden_states):
        """hidden_states: (batch, seq, hidden_size).

        Returns (topk_idx, topk_weight, None), both (batch * seq, num_experts_per_tok).
        """
        raise NotImplementedError("the gate's forward: start with a score of each token for each expert")
