"""Mixture of experts: a gate chooses a few experts for every token, and a few more serve all of them."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2_ref.balance import (
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    inject_loss,
)
from dsv2_ref.checks import require, require_tensor
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.experts import RoutedExperts
from dsv2_ref.mlp import DeepseekV2MLP
from dsv2_ref.projection import autocast_is_on, require_features


class MoEGate(nn.Module):
    """Choose ``num_experts_per_tok`` of ``n_routed_experts`` experts for every token, and how much each counts.

    Scores are the softmax, over all experts, of the token's product with a vector of each. ``greedy`` takes the best k.
    ``group_limited_greedy`` first takes the ``topk_group`` groups whose best expert is best (experts of a group share a
    device), then the best k within. A chosen expert counts with its score; ``norm_topk_prob`` makes the k scores sum
    to 1 (not for k = 1), then ``routed_scaling_factor`` multiplies them. All of it runs in at least float32, autocast or
    not: in bfloat16 some tokens would go to other experts.

    Raises:
        ValueError: if the configuration has no routed experts, and for an input of another shape, dtype or device.

    Source: DeepSeek-V2, equations 20 to 22 and section 2.2.2; ``MoEGate`` of the published code. The paper neither
    normalises nor scales.
    """

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        require(config.n_routed_experts is not None, "n_routed_experts", config.n_routed_experts, "a number of experts")
        self.n_routed_experts = config.n_routed_experts or 0
        self.top_k = config.num_experts_per_tok or 0
        self.n_group = (config.n_group or 1) if config.topk_method == "group_limited_greedy" else 1
        self.topk_group = (config.topk_group or 1) if config.topk_method == "group_limited_greedy" else 1
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.alpha = config.aux_loss_alpha
        self.device_alpha = config.device_aux_loss_alpha
        self.communication_alpha = config.communication_aux_loss_alpha
        self.seq_aux = config.seq_aux
        self.weight = nn.Parameter(torch.empty(self.n_routed_experts, config.hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(
        self, hidden_states: Float[Tensor, "batch seq hidden"]
    ) -> tuple[Int[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"], Float[Tensor, ""] | None]:
        """Route every token.

        Returns:
            ``(topk_idx, topk_weight, aux_loss)``: the chosen experts, best first, with tokens = batch · seq; what each
            counts, float32 (float64 for float64); and in training the sum of the balance losses whose α is not 0 (else
            None).
        """
        require_tensor(hidden_states, "hidden_states")
        fits = hidden_states.ndim == 3 and hidden_states.is_floating_point() and hidden_states.numel() > 0
        fits = fits and hidden_states.shape[-1] == self.weight.shape[-1] and hidden_states.device == self.weight.device
        wanted = "floating (batch, seq, {}) on {}, with at least one token"
        require(fits, "hidden_states", hidden_states, wanted, self.weight.shape[-1], self.weight.device)
        batch, seq, _ = hidden_states.shape
        scores = self._scores(hidden_states)
        topk_idx = self._choose(scores.detach()).topk(self.top_k, dim=-1).indices
        topk_weight = scores.gather(-1, topk_idx)
        if self.norm_topk_prob and self.top_k > 1:
            topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20)
        topk_weight = topk_weight * self.routed_scaling_factor

        aux_loss = None
        if self.training:
            aux_loss = self._balance_loss(scores.view(batch, seq, -1), topk_idx.view(batch, seq, -1))
        return topk_idx, topk_weight, aux_loss

    def _balance_loss(
        self, scores: Float[Tensor, "batch seq experts"], topk_idx: Int[Tensor, "batch seq top_k"]
    ) -> Float[Tensor, ""] | None:
        """The sum of the balance losses whose α is above 0, or None."""
        losses = []
        if self.alpha > 0:
            losses.append(expert_balance_loss(scores, topk_idx, self.alpha, self.seq_aux))
        if self.device_alpha > 0:
            losses.append(device_balance_loss(scores, topk_idx, self.device_alpha, self.n_group, self.seq_aux))
        if self.communication_alpha > 0:
            groups = self.n_group, self.topk_group
            losses.append(communication_balance_loss(scores, topk_idx, self.communication_alpha, *groups, self.seq_aux))
        return sum(losses[1:], start=losses[0]) if losses else None

    def _scores(self, hidden_states: Tensor) -> Float[Tensor, "tokens experts"]:
        dtype = torch.promote_types(torch.promote_types(hidden_states.dtype, self.weight.dtype), torch.float32)
        device = hidden_states.device
        with torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext():
            logits = F.linear(hidden_states.flatten(0, 1).to(dtype), self.weight.to(dtype))
            return logits.softmax(dim=-1)

    def _choose(self, scores: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        """The scores to choose by: minus infinity for experts outside the best groups."""
        if self.topk_group == self.n_group:
            return scores
        grouped = scores.unflatten(-1, (self.n_group, -1))
        best_groups = grouped.amax(dim=-1).topk(self.topk_group, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best_groups, True)
        return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)


class DeepseekV2MoE(nn.Module):
    """The routed experts a token chose, weighted, plus the shared experts that serve every token.

    Args:
        config: hyperparameters; ``n_shared_experts`` shared experts are one MLP that many times as wide.

    Raises:
        ValueError: if the configuration has no routed experts, and for an input that does not fit the weights.

    Source: DeepSeek-V2, equation 20; Dai et al. (2024), equations 9 to 11; ``DeepseekV2MoE`` of the published code.
    """

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.gate = MoEGate(config)
        self.experts = RoutedExperts(config)
        self.shared_experts = (
            None
            if config.n_shared_experts is None
            else DeepseekV2MLP(config, intermediate_size=config.moe_intermediate_size * config.n_shared_experts)
        )

    def forward(self, hidden_states: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        """Transform every token by its experts; in training the balance loss is injected on the way (`inject_loss`)."""
        require_tensor(hidden_states, "hidden_states")
        require(hidden_states.ndim == 3, "hidden_states", hidden_states, "(batch, seq, hidden)")
        require_features(hidden_states, self.gate.weight.shape[-1], self.experts.down_proj[0])
        topk_idx, topk_weight, aux_loss = self.gate(hidden_states)
        out = self.experts(hidden_states.flatten(0, 1), topk_idx, topk_weight).view_as(hidden_states)
        if aux_loss is not None:
            out = inject_loss(out, aux_loss)
        return out if self.shared_experts is None else out + self.shared_experts(hidden_states)
