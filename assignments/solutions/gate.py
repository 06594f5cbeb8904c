"""The gate: solution."""

import torch
from torch import nn
from torch.nn import functional as F


class MoEGate(nn.Module):
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
        config, bias = self.config, self.e_score_correction_bias
        logits = F.linear(hidden_states.flatten(0, 1), self.weight)
        sigmoid = config.scoring_func == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
        choose_by = scores if bias is None else scores + bias
        if config.topk_method != "greedy":
            grouped = choose_by.unflatten(-1, (config.n_group, -1))
            best = 1 if bias is None else 2
            of_group = grouped.topk(best, dim=-1).values.sum(-1)
            kept = of_group.topk(config.topk_group, dim=-1).indices
            closed = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, kept, False)
            choose_by = grouped.masked_fill(closed[..., None], -torch.inf).flatten(-2)
        topk_idx = choose_by.topk(config.num_experts_per_tok, dim=-1).indices
        topk_weight = scores.gather(-1, topk_idx)
        if config.norm_topk_prob:
            topk_weight = topk_weight / topk_weight.sum(-1, keepdim=True)
        topk_weight = topk_weight * config.routed_scaling_factor
        return topk_idx, topk_weight, None
