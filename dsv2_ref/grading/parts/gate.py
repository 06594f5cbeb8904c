"""The part of the gate: its cases and known mistakes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.grading.answers import Answers, Values, WrongError, normal, pair
from dsv2_ref.grading.part import Case, Mistake, Part, Plant
from dsv2_ref.grading.parts.mla import SMALL

ROUTED = replace(SMALL, hidden_size=48, n_routed_experts=16, num_experts_per_tok=3)
GROUPED = replace(ROUTED, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=2.5)
NORMALISED = replace(ROUTED, norm_topk_prob=True, routed_scaling_factor=2.5)
SIGMOID = replace(ROUTED, scoring_func="sigmoid")
V3 = replace(SIGMOID, topk_method="noaux_tc", n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=1.5)


def routes(module: Any, inputs: dict[str, Any]) -> Answers:
    """What a gate chose, as weights and choices over all experts: no order counts."""
    x = inputs["hidden_states"]
    count, experts = x.shape[0] * x.shape[1], inputs["experts"]
    found = pair(module(x), "forward", "(topk_idx, topk_weight, aux_loss)")
    index, weight = (part.reshape(-1, part.shape[-1]) if part.ndim else part for part in found)
    wanted = count, inputs["k"]
    if tuple(index.shape) != wanted or tuple(weight.shape) != wanted:
        said = f"topk_idx is {tuple(index.shape)} and topk_weight {tuple(weight.shape)}"
        raise WrongError(f"{said}; wanted {wanted}: tokens, experts per token")
    if index.is_floating_point() or not ((index >= 0) & (index < experts)).all():
        raise WrongError(f"topk_idx holds {index.dtype} values; wanted 0 to {experts - 1}")
    weights = x.new_zeros(count, experts)
    choices = x.new_zeros(count, experts)
    ones = torch.ones_like(index, dtype=x.dtype)
    return {
        "choices": choices.scatter_add(1, index.long(), ones),
        "weights": weights.scatter_add(1, index.long(), weight.to(x.dtype)),
    }


def routed(config: DeepseekV2Config, seed: int) -> Callable[[], dict[str, Any]]:
    """Tokens for a gate, and the sizes of what it returns."""
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    made = partial(normal, 2, 24, config.hidden_size, seed=seed, size=0.5)
    return lambda: {"hidden_states": made(), "experts": experts, "k": k}


def sets(**fields: Any) -> Plant:
    """Other attributes of a gate, or of the gate of a mixture."""

    def change(module: Any) -> None:
        vars(getattr(module, "gate", module)).update(fields)

    return change


def scores_of(gate: Any, x: Values) -> tuple[Values, Values]:
    """Logits and scores of every token for every expert."""
    logits = F.linear(x.flatten(0, 1), gate.weight)
    sigmoid = gate.scoring_func == "sigmoid"
    return logits, logits.sigmoid() if sigmoid else logits.softmax(-1)


def weighed(gate: Any, chosen: Values) -> Values:
    """Weights made of the values of the chosen experts, as the gate is told to."""
    if gate.norm_topk_prob:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    return chosen * gate.routed_scaling_factor


def weighs(weigh: Callable[[Any, Values, Values, Values], Values]) -> Plant:
    """The right choices with weights made of logits, scores and the choices."""

    def change(gate: Any) -> None:
        forward = gate.forward

        def wrong(x: Values) -> tuple[Values, Values, None]:
            topk_idx = forward(x)[0]
            return topk_idx, weigh(gate, *scores_of(gate, x), topk_idx), None

        gate.forward = wrong

    return change


def late_softmax(gate: Any, logits: Values, _: Values, topk_idx: Values) -> Values:
    """The softmax of the chosen logits alone; sigmoid scores stay."""
    chosen = logits.gather(-1, topk_idx)
    return weighed(gate, chosen.sigmoid() if gate.scoring_func == "sigmoid" else chosen.softmax(-1))


def always_late(gate: Any, logits: Values, _: Values, topk_idx: Values) -> Values:
    """The same in place of sigmoid scores, too."""
    return weighed(gate, logits.gather(-1, topk_idx).softmax(-1))


def of_logits(gate: Any, logits: Values, _: Values, topk_idx: Values) -> Values:
    """The logits themselves."""
    return weighed(gate, logits.gather(-1, topk_idx))


def of_all(gate: Any, _: Values, scores: Values, topk_idx: Values) -> Values:
    """Scores over the sum of all scores, where the chosen ones' is wanted."""
    chosen = scores.gather(-1, topk_idx)
    chosen = chosen / scores.sum(-1, keepdim=True) if gate.norm_topk_prob else chosen
    return chosen * gate.routed_scaling_factor


def with_bias(gate: Any, _: Values, scores: Values, topk_idx: Values) -> Values:
    """The values that chose, bias included."""
    bias = gate.e_score_correction_bias
    return weighed(gate, (scores if bias is None else scores + bias).gather(-1, topk_idx))


def scaled_before(gate: Any, _: Values, scores: Values, topk_idx: Values) -> Values:
    """The factor applied before normalising, which cancels it."""
    chosen = scores.gather(-1, topk_idx) * gate.routed_scaling_factor
    total = chosen.sum(-1, keepdim=True)
    return chosen / total if gate.norm_topk_prob else chosen


def chooses(judge: Callable[[Values, bool], Values], fill: float = -torch.inf) -> Plant:
    """Groups judged in another way, from what chooses (T, groups, experts of a group) and
    whether there is a bias; closed experts get ``fill``."""

    def change(gate: Any) -> None:
        def wrong(x: Values) -> tuple[Values, Values, None]:
            _, scores = scores_of(gate, x)
            bias = gate.e_score_correction_bias
            by = scores if bias is None else scores + bias
            if gate.topk_group < gate.n_group:
                grouped = by.unflatten(-1, (gate.n_group, -1))
                of_group = judge(grouped, bias is not None)
                best = of_group.topk(gate.topk_group, dim=-1).indices
                closed = torch.ones_like(of_group).bool().scatter(-1, best, False)
                by = grouped.masked_fill(closed[..., None], fill).flatten(-2)
            topk_idx = by.topk(gate.top_k, dim=-1).indices
            return topk_idx, weighed(gate, scores.gather(-1, topk_idx)), None

        gate.forward = wrong

    return change


def as_published(grouped: Values, biased: bool) -> Values:
    """The best expert of a group, or with a bias its two best."""
    return grouped.topk(2 if biased else 1, dim=-1).values.sum(-1)


def without_bias(gate: Any) -> None:
    """A gate whose bias is 0, if it has one."""
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias.zero_()


def softmax_for_sigmoid(gate: Any) -> None:
    """V2's scores, whatever the configuration says."""
    gate.scoring_func = "softmax"


WEIGHS, GATE_SYMPTOMS = "How much does a chosen expert weigh?", "Symptoms"
DEVICES, FAMILY = "Experts on devices", "A family of gates"
WITHOUT_LOSS = "Balance without a loss"
GATE = Part(
    name="gate",
    module="moe",
    defines=("MoEGate",),
    takes=("config",),
    answer=routes,
    cases=(
        Case("softmax scores", 4, routed(ROUTED, 20), (ROUTED,)),
        Case("limited groups, scaled", 4, routed(GROUPED, 21), (GROUPED,)),
        Case("normalised weights", 2, routed(NORMALISED, 22), (NORMALISED,)),
        Case("sigmoid scores", 1, routed(SIGMOID, 23), (SIGMOID,)),
        Case("sigmoid scores and a bias, as in V3", 3, routed(V3, 24), (V3,)),
    ),
    mistakes=(
        Mistake("softmax after top-k", "experts", WEIGHS, weighs(late_softmax)),
        Mistake("softmax after top-k, in place of sigmoid scores too", "experts", WEIGHS, weighs(always_late)),
        Mistake("routed_scaling_factor left out", "experts", WEIGHS, sets(routed_scaling_factor=1.0)),
        Mistake("weights made of the logits, not of the scores", "experts", WEIGHS, weighs(of_logits)),
        Mistake(
            "normalised weights not scaled, or before they were normalised", "experts", WEIGHS, weighs(scaled_before)
        ),
        Mistake("normalised by the sum of all scores, not of the chosen ones", "experts", WEIGHS, weighs(of_all)),
        Mistake("weights normalised though norm_topk_prob is off", "experts", WEIGHS, sets(norm_topk_prob=True)),
        Mistake("norm_topk_prob ignored", "experts", WEIGHS, sets(norm_topk_prob=False)),
        Mistake("group limit left out", "experts", DEVICES, lambda gate: setattr(gate, "topk_group", gate.n_group)),
        Mistake(
            "groups judged by the sum of all their experts",
            "experts",
            DEVICES,
            chooses(lambda grouped, _: grouped.sum(-1)),
        ),
        Mistake(
            "groups judged by their best expert even with a bias; V3 takes the two best",
            "experts",
            FAMILY,
            chooses(lambda grouped, _: grouped.amax(-1)),
        ),
        Mistake(
            "groups judged by their two best experts without a bias; V2 takes the best",
            "experts",
            DEVICES,
            chooses(lambda grouped, _: as_published(grouped, True)),
        ),
        Mistake(
            "experts of closed groups get 0, which beats a negative biased score",
            "experts",
            GATE_SYMPTOMS,
            chooses(as_published, 0.0),
        ),
        Mistake("the bias weighs: it may only choose", "balance", WITHOUT_LOSS, weighs(with_bias)),
        Mistake("the bias left out", "balance", WITHOUT_LOSS, without_bias),
        Mistake("softmax scores where scoring_func is sigmoid", "experts", FAMILY, softmax_for_sigmoid),
    ),
)
