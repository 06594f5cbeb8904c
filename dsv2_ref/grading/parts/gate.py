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
    if index.is_floating_point() or index.is_complex():
        raise WrongError(f"topk_idx holds {index.dtype} values; wanted whole numbers from 0 to {experts - 1}")
    if not ((index >= 0) & (index < experts)).all():
        raise WrongError(f"topk_idx holds {int(index.min())} to {int(index.max())}; wanted 0 to {experts - 1}")
    if not weight.is_floating_point():
        raise WrongError(f"topk_weight holds {weight.dtype} values; wanted {x.dtype}, as the input")
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


def in_steps(**wrong: Callable[..., Any]) -> Plant:
    """The step ``score``, ``choose`` or ``weigh`` another one, the others as they are, right or wrong."""
    right = {"score": scores_of, "choose": choose_as_published, "weigh": of_scores}

    def change(gate: Any) -> None:
        def forward(x: Values) -> tuple[Values, Values, None]:
            logits, scores = gate.score(gate, x)
            topk_idx = gate.choose(gate, scores)
            return topk_idx, gate.weigh(gate, logits, scores, topk_idx), None

        vars(gate).update(right | vars(gate) | wrong)
        gate.forward = forward

    return change


def weighs(weigh: Callable[[Any, Values, Values, Values], Values]) -> Plant:
    """Weights made otherwise of logits, scores and the choices."""
    return in_steps(weigh=weigh)


def of_scores(gate: Any, _: Values, scores: Values, topk_idx: Values) -> Values:
    """The scores of the chosen experts, which is right."""
    return weighed(gate, scores.gather(-1, topk_idx))


def over_tokens(gate: Any, x: Values) -> tuple[Values, Values]:
    """Scores that sum to 1 for each expert, not for each token; sigmoid scores stay."""
    logits, scores = scores_of(gate, x)
    return logits, scores if gate.scoring_func == "sigmoid" else logits.softmax(0)


def bias_before_the_sigmoid(gate: Any) -> None:
    """The bias added to the logits, so that it is in every score."""
    if gate.e_score_correction_bias is None:
        return
    bias = gate.e_score_correction_bias.clone()
    without_bias(gate)

    def score(gate: Any, x: Values) -> tuple[Values, Values]:
        logits = scores_of(gate, x)[0] + bias
        return logits, logits.sigmoid()

    in_steps(score=score)(gate)


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


def by_topk(values: Values, k: int) -> Values:
    """The best k of each row, of equal ones those that topk takes."""
    return values.topk(k, dim=-1).indices


def by_sorting(values: Values, k: int) -> Values:
    """The best k of each row, of equal ones those that stand first, as in a sort or a loop."""
    return values.argsort(dim=-1, descending=True, stable=True)[:, :k]


Judge = Callable[[Values, bool], Values]
"""Values of groups, from what chooses (T, groups, experts of a group) and whether there is a bias."""


def choose(
    gate: Any, scores: Values, judge: Judge, fill: float = -torch.inf, best: Callable[[Values, int], Values] = by_topk
) -> Values:
    """The chosen experts, where experts of closed groups get ``fill``."""
    bias = gate.e_score_correction_bias
    by = scores if bias is None else scores + bias
    if gate.topk_group < gate.n_group:
        grouped = by.unflatten(-1, (gate.n_group, -1))
        of_group = judge(grouped, bias is not None)
        open_groups = of_group.topk(gate.topk_group, dim=-1).indices
        closed = torch.ones_like(of_group).bool().scatter(-1, open_groups, False)
        by = grouped.masked_fill(closed[..., None], fill).flatten(-2)
    return best(by, gate.top_k)


def chooses(judge: Judge, fill: float = -torch.inf, **how: Any) -> Plant:
    """Groups judged in another way, or closed experts filled with something else."""
    return in_steps(choose=partial(choose, judge=judge, fill=fill, **how))


def as_published(grouped: Values, biased: bool) -> Values:
    """The best expert of a group, or with a bias its two best."""
    return grouped.topk(2 if biased else 1, dim=-1).values.sum(-1)


def choose_as_published(gate: Any, scores: Values) -> Values:
    """The right choices."""
    return choose(gate, scores, as_published)


def unlimited(biased: bool) -> Plant:
    """All groups open in gates with a bias, or in those without one."""

    def change(gate: Any) -> None:
        if biased == (gate.e_score_correction_bias is not None):
            gate.topk_group = gate.n_group

    return change


def without_bias(gate: Any) -> None:
    """A gate whose bias is 0, if it has one."""
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias.zero_()


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
        Mistake("the softmax over the tokens, not over the experts", "experts", WEIGHS, in_steps(score=over_tokens)),
        Mistake("routed_scaling_factor left out", "experts", WEIGHS, sets(routed_scaling_factor=1.0)),
        Mistake("weights made of the logits, not of the scores", "experts", WEIGHS, weighs(of_logits)),
        Mistake(
            "normalised weights not scaled, or before they were normalised", "experts", WEIGHS, weighs(scaled_before)
        ),
        Mistake("normalised by the sum of all scores, not of the chosen ones", "experts", WEIGHS, weighs(of_all)),
        Mistake("weights normalised though norm_topk_prob is off", "experts", WEIGHS, sets(norm_topk_prob=True)),
        Mistake("norm_topk_prob ignored", "experts", WEIGHS, sets(norm_topk_prob=False)),
        Mistake("group limit left out where topk_method is group_limited_greedy", "experts", DEVICES, unlimited(False)),
        Mistake("group limit left out where topk_method is noaux_tc", "experts", FAMILY, unlimited(True)),
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
        Mistake(
            "experts of closed groups get 0, which beats a negative biased score; sorted, not by topk",
            "experts",
            GATE_SYMPTOMS,
            chooses(as_published, 0.0, best=by_sorting),
        ),
        Mistake("the bias weighs: it may only choose", "balance", WITHOUT_LOSS, weighs(with_bias)),
        Mistake("the bias added to the logits, before the sigmoid", "balance", WITHOUT_LOSS, bias_before_the_sigmoid),
        Mistake("the bias left out", "balance", WITHOUT_LOSS, without_bias),
        Mistake("sigmoid scores where scoring_func is softmax", "experts", FAMILY, sets(scoring_func="sigmoid")),
        Mistake("softmax scores where scoring_func is sigmoid", "experts", FAMILY, sets(scoring_func="softmax")),
    ),
)
