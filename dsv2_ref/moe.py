"""Mixture of experts: a gate chooses a few experts for every token, and a few more
serve all tokens.

Letters: B sequences, S tokens each, T = B · S tokens, D hidden size, E routed experts,
k experts per token, I expert width. Equation numbers are those of DeepSeek-V2 (arXiv
2405.04434).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2_ref import checks, ops
from dsv2_ref.balance import balance_loss, inject_loss
from dsv2_ref.checkpoint import StackedExperts
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.linear import linear


class DeepseekV2MLP(nn.Module):
    """The gated feed-forward network, SwiGLU: ``down(silu(gate(x)) * up(x))``.

    Args:
        config: hyperparameters.
        hidden_size: features in and out; None takes ``config.hidden_size``.
        intermediate_size: features in between; None takes ``config.intermediate_size``.

    Raises:
        ValueError: for a size below 1, and for an input that does not fit the weights.

    Source: Shazeer (2020), equation 6; ``DeepseekV2MLP`` of the published code.
    """

    def __init__(
        self,
        config: DeepseekV2Config,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
    ) -> None:
        super().__init__()
        D, wide = checks.mlp_sizes(config, hidden_size, intermediate_size)
        self.hidden_size, self.intermediate_size = D, wide
        self.gate_proj = linear(D, wide, config.initializer_range)
        self.up_proj = linear(D, wide, config.initializer_range)
        self.down_proj = linear(wide, D, config.initializer_range)

    @ops.defines(checks.mlp_input)
    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """Transform every token in the same way."""
        gate = F.silu(self.gate_proj(hidden_states))  # (..., I)
        return self.down_proj(gate * self.up_proj(hidden_states))


class MoEGate(nn.Module):
    """Choose k = ``num_experts_per_tok`` of E experts for each token, and weigh them.

    Scores are the softmax over all experts of the token's product with a vector of each
    (V2), or each product's sigmoid (V3). ``greedy`` takes the best k, the other methods
    the best k of the ``topk_group`` best groups (the experts of a group share a
    device). ``group_limited_greedy`` judges a group by its best expert, ``noaux_tc`` by
    the sum of its two best, of scores plus ``e_score_correction_bias``, which chooses
    but does not weigh. The weight of a chosen expert is its score, which
    ``norm_topk_prob`` divides by the sum of all k (not for k = 1), times
    ``routed_scaling_factor``. All of it runs in at least float32, under autocast too.

    Raises:
        ValueError: for a configuration without routed experts, and for an input that
            does not fit the weights.

    Source: DeepSeek-V2, equations 20 to 22 and section 2.2.2, without normalising and
    scaling; DeepSeek-V3, equations 13 to 16; ``MoEGate`` of their published code.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        E = checks.number_of_experts(config)
        grouped = config.topk_method != "greedy"
        self.n_routed_experts, self.top_k = E, config.num_experts_per_tok
        self.n_group = config.n_group if grouped else 1
        self.topk_group = config.topk_group if grouped else 1
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.alpha = config.aux_loss_alpha
        self.device_alpha = config.device_aux_loss_alpha
        self.communication_alpha = config.communication_aux_loss_alpha
        self.seq_aux = config.seq_aux
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        bias = torch.zeros(E) if config.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)

    @ops.defines(checks.gate_input, autocast=False)
    def forward(
        self, hidden_states: Float[Tensor, "batch seq hidden"]
    ) -> tuple[
        Int[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"], Tensor | None
    ]:
        """Route every token.

        Returns:
            ``(topk_idx, topk_weight, aux_loss)``: the chosen experts, best first; their
            weights, float32 (float64 for float64); and in training the sum of the
            balance losses whose α is not 0 (else None).
        """
        B, S, _ = hidden_states.shape
        wide = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        wide = torch.promote_types(wide, torch.float32)
        logits = F.linear(hidden_states.flatten(0, 1).to(wide), self.weight.to(wide))
        sigmoid, bias = self.scoring_func == "sigmoid", self.e_score_correction_bias
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)  # (T, E)

        choose_by = scores.detach() if bias is None else scores.detach() + bias
        if self.topk_group < self.n_group:  # V2's section 2.2.2: few devices per token
            grouped = choose_by.unflatten(-1, (self.n_group, -1))  # (T, n_group, ·)
            of_group = grouped.topk(1 if bias is None else 2, dim=-1).values.sum(dim=-1)
            best = of_group.topk(self.topk_group, dim=-1).indices  # (T, topk_group)
            closed = torch.ones_like(of_group).bool().scatter(-1, best, False)
            choose_by = grouped.masked_fill(closed[..., None], -torch.inf).flatten(-2)
        topk_idx = choose_by.topk(self.top_k, dim=-1).indices  # (T, k)
        topk_weight = scores.gather(-1, topk_idx)  # equation 21: (T, k)
        if self.norm_topk_prob and self.top_k > 1:
            topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20)
        topk_weight = topk_weight * self.routed_scaling_factor

        aux_loss = None
        if self.training:
            by_sequence = [x.unflatten(0, (B, S)) for x in (scores, topk_idx)]
            aux_loss = balance_loss(self, *by_sequence)
        return topk_idx, topk_weight, aux_loss


class RoutedExperts(StackedExperts):
    """The routed experts, stacked so that one product can read those it needs.

    Parameters: ``gate_up_proj`` (E, 2I, D), gates above ups, and ``down_proj`` (E, D,
    I); `state_dict` uses the published names (`StackedExperts`).
    """

    def __init__(self, config: DeepseekV2Config) -> None:
        E, D = checks.number_of_experts(config), config.hidden_size
        super().__init__(E)
        self.expert_hidden = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * self.expert_hidden, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, self.expert_hidden))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=config.initializer_range)

    @ops.defines()
    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        topk_idx: Int[Tensor, "tokens top_k"],
        topk_weight: Float[Tensor, "tokens top_k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """Σ weight · expert(token) over a token's choices (equation 20), in float32."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        out = torch.zeros_like(hidden_states, dtype=dtype)  # (T, D)
        for expert in range(len(self.gate_up_proj)):
            token, choice = torch.where(topk_idx == expert)  # (n,) each
            rows = F.linear(hidden_states[token], self.gate_up_proj[expert])
            gate, up = rows.chunk(2, dim=-1)  # (n, I) each
            expert_out = F.linear(F.silu(gate) * up, self.down_proj[expert])  # (n, D)
            out = out.index_add(0, token, expert_out * topk_weight[token, choice, None])
        return out.to(hidden_states.dtype)


class DeepseekV2MoE(nn.Module):
    """The routed experts that a token chose, weighted, plus the shared experts, which
    serve every token.

    Args:
        config: hyperparameters; ``n_shared_experts`` shared experts are one MLP that
            many times as wide.

    Raises:
        ValueError: without routed experts, and for an input that does not fit.

    Source: DeepSeek-V2, equation 20; ``DeepseekV2MoE`` of the published code.
    """

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.gate = MoEGate(config)
        self.experts = RoutedExperts(config)
        self.shared_experts = None
        if config.n_shared_experts is not None:
            wide = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = DeepseekV2MLP(config, intermediate_size=wide)

    @ops.defines(checks.moe_input)
    def forward(
        self, hidden_states: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """Transform every token by its experts; in training the balance loss is
        injected on the way (`inject_loss`)."""
        topk_idx, topk_weight, aux_loss = self.gate(hidden_states)  # (T, k) each
        tokens = hidden_states.flatten(0, 1)  # (T, D)
        out = self.experts(tokens, topk_idx, topk_weight).view_as(hidden_states)
        if aux_loss is not None:
            out = inject_loss(out, aux_loss)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden_states)
        return out
