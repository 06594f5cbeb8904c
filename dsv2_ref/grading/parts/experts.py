"""The part of the mixture of experts: its cases, a cost among them, and known mistakes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from dsv2_ref.grading.answers import Answers, Values, normal, operations, output, tokens
from dsv2_ref.grading.part import Case, Mistake, Part, Plant
from dsv2_ref.grading.parts.gate import DEVICES, WEIGHS, sets
from dsv2_ref.grading.parts.mla import SMALL

FACTOR = 2.5
"""What the gates of all cases scale the weights by."""


def mix(module: Any, inputs: dict[str, Any]) -> Answers:
    """The output of a mixture, or what it costs."""
    if "cost" in inputs:
        return {"FLOPs": operations(lambda: module(inputs["hidden_states"]))}
    return output(module, inputs)


def reroutes(weigh: Callable[[Values], Values]) -> Plant:
    """Other weights of the chosen experts."""

    def change(moe: Any) -> None:
        forward = moe.gate.forward

        def wrong(x: Values) -> tuple[Values, Values, None]:
            topk_idx, topk_weight, _ = forward(x)
            return topk_idx, weigh(topk_weight), None

        moe.gate.forward = wrong

    return change


def exchange(moe: Any) -> None:
    """Gates and ups of all experts exchanged."""
    exchange_routed(moe)
    shared = moe.shared_experts
    shared.gate_proj, shared.up_proj = shared.up_proj, shared.gate_proj


def exchange_routed(moe: Any) -> None:
    """Ups read as gates in what is stacked alone, where the order is nobody's but one's own."""
    gate, up = moe.experts.gate_up_proj.detach().chunk(2, dim=1)
    moe.experts.gate_up_proj.copy_(torch.cat((up, gate), dim=1))


def activates(function: Callable[[Values], Values]) -> Callable[[Any], Any]:
    """Another activation."""
    return lambda _: patch.object(F, "silu", function)


def drop_shared(moe: Any) -> None:
    """No shared experts."""
    moe.shared_experts = None


def shared_scaled(moe: Any) -> None:
    """The shared experts' output multiplied by the factor of the routed ones."""
    moe.shared_experts.down_proj.weight.mul_(FACTOR)


def residual_inside(moe: Any) -> None:
    """The input added, as the layer will do once more."""
    forward = moe.forward
    moe.forward = lambda x: forward(x) + x


def of_expert(experts: Any, number: int, x: Values) -> Values:
    """What one expert makes of tokens."""
    gate, up = F.linear(x, experts.gate_up_proj[number]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, experts.down_proj[number])


def all_of_all(experts: Any, x: Values, topk_idx: Values, topk_weight: Values) -> Values:
    """All experts of all tokens, weighted by a row that is mostly 0."""
    out = torch.zeros_like(x)
    for number in range(len(experts.gate_up_proj)):
        weight = (topk_weight * (topk_idx == number)).sum(-1, keepdim=True)
        out = out + of_expert(experts, number, x) * weight
    return out


def of_weighted(experts: Any, x: Values, topk_idx: Values, topk_weight: Values) -> Values:
    """Each expert gets its tokens times their weights."""
    out = torch.zeros_like(x)
    for number in range(len(experts.gate_up_proj)):
        token, choice = torch.where(topk_idx == number)
        rows = x[token] * topk_weight[token, choice, None]
        out = out.index_add(0, token, of_expert(experts, number, rows))
    return out


def last_of_all(experts: Any, x: Values, topk_idx: Values, topk_weight: Values) -> Values:
    """Each expert's result in the place of those before it."""
    out = torch.zeros_like(x)
    for number in range(len(experts.gate_up_proj)):
        token, choice = torch.where(topk_idx == number)
        out[token] = of_expert(experts, number, x[token]) * topk_weight[token, choice, None]
    return out


def misplaced(
    experts: Any, place: Callable[[Values, Values], Values], x: Values, topk_idx: Values, topk_weight: Values
) -> Values:
    """Results of choices sorted by expert, placed by something else than the inverse of that order."""
    choices = topk_idx.flatten()
    order = choices.argsort(stable=True)
    made = x.new_zeros(len(choices), x.shape[1])
    for number in range(len(experts.gate_up_proj)):
        own = torch.where(choices == number)[0]
        made[own] = of_expert(experts, number, x[own // topk_idx.shape[1]])
    of_choices = place(made[order], order).view(*topk_idx.shape, -1)
    return (of_choices * topk_weight[..., None]).sum(1)


def places(place: Callable[[Values, Values], Values]) -> Plant:
    """Sorted results, and their order, not brought back as they were."""
    return lambda moe: setattr(moe.experts, "forward", partial(misplaced, moe.experts, place))


def first_alone(weights: Values) -> Values:
    """Nothing for all choices but the best one."""
    return weights * (torch.arange(weights.shape[-1]) == 0)


def replaces(moe: Any) -> None:
    """What an expert makes replaces what earlier ones made."""
    moe.experts.forward = partial(last_of_all, moe.experts)


def scaled_twice(moe: Any) -> None:
    """The factor of the routed experts applied once more."""
    moe.gate.routed_scaling_factor *= FACTOR


def computes_all(moe: Any) -> None:
    """Every expert computes every token."""
    moe.experts.forward = partial(all_of_all, moe.experts)


def weighs_inputs(moe: Any) -> None:
    """The weight multiplies what an expert gets."""
    moe.experts.forward = partial(of_weighted, moe.experts)


MIXED = replace(
    SMALL,
    hidden_size=48,
    moe_intermediate_size=20,
    n_routed_experts=8,
    num_experts_per_tok=2,
    routed_scaling_factor=FACTOR,
)
GROUPED_MIX = replace(MIXED, topk_method="group_limited_greedy", n_group=4, topk_group=1)
DISPATCH = "Getting there: dispatch"
EXPERTS = Part(
    name="experts",
    module="moe",
    defines=("DeepseekV2MoE",),
    takes=("config",),
    answer=mix,
    yours=(
        "moe.RoutedExperts",
        "moe.DeepseekV2MLP",
        "fast.products.grouped_experts",
        "fast.products.all_experts",
    ),
    cases=(
        Case("tokens", 5, tokens(2, 12, 48, seed=30), (MIXED,)),
        Case("limited groups", 3, tokens(3, 7, 48, seed=31), (GROUPED_MIX,)),
        Case("one token", 2, tokens(1, 1, 48, seed=32), (MIXED,)),
        Case(
            "FLOPs of the matrices",
            4,
            lambda: {"hidden_states": normal(2, 64, 48, seed=33), "cost": "FLOPs"},
            (MIXED,),
            at_most=1.8,  # a padded dispatch may pass, all experts of all tokens may not
        ),
    ),
    mistakes=(
        Mistake("shared experts left out", "experts", "Symptoms", drop_shared),
        Mistake("gate_proj and up_proj exchanged", "symptoms", "Experts' storage", exchange),
        Mistake(
            "gate_proj and up_proj exchanged in the stacked experts alone",
            "symptoms",
            "Experts' storage",
            exchange_routed,
        ),
        Mistake("expert weights not applied", "experts", WEIGHS, reroutes(torch.ones_like)),
        Mistake(
            "the chosen experts averaged, not weighted",
            "experts",
            WEIGHS,
            reroutes(lambda w: torch.full_like(w, 1 / w.shape[-1])),
        ),
        Mistake("weights in another order than the choices", "experts", "Symptoms", reroutes(lambda w: w.flip(-1))),
        Mistake(
            "a softmax over the weights: the gate has scored", "experts", WEIGHS, reroutes(lambda w: w.softmax(-1))
        ),
        Mistake("the best expert alone, not all that were chosen", "experts", WEIGHS, reroutes(first_alone)),
        Mistake("weights normalised to sum to 1", "experts", WEIGHS, sets(norm_topk_prob=True)),
        Mistake("routed_scaling_factor left out", "experts", WEIGHS, sets(routed_scaling_factor=1.0)),
        Mistake("routed_scaling_factor applied again: the gate has done so", "experts", WEIGHS, scaled_twice),
        Mistake("each expert's result replaces the earlier ones, not added to them", "experts", DISPATCH, replaces),
        Mistake("sorted by expert and left in that order", "experts", DISPATCH, places(lambda made, order: made)),
        Mistake(
            "sorted by expert, and the order applied again where its inverse was wanted",
            "experts",
            DISPATCH,
            places(lambda made, order: made[order]),
        ),
        Mistake("shared experts scaled by routed_scaling_factor", "experts", "Symptoms", shared_scaled),
        Mistake("the weight multiplies an expert's input, not its output", "experts", WEIGHS, weighs_inputs),
        Mistake(
            "group limit left out", "experts", DEVICES, lambda moe: setattr(moe.gate, "topk_group", moe.gate.n_group)
        ),
        Mistake("sigmoid, not SiLU", "experts", "Why experts?", activates(torch.sigmoid)),
        Mistake("GELU, not SiLU", "experts", "Why experts?", activates(F.gelu)),
        Mistake("ReLU, not SiLU", "experts", "Why experts?", activates(F.relu)),
        Mistake(
            "the input added to the output: the layer does that",
            "prenorm",
            "The whole layer on one page",
            residual_inside,
        ),
        Mistake("every expert computes every token", "experts", DISPATCH, computes_all),
    ),
)
