"""Parts from the experts on: gate, experts, balance loss and the whole layer, with their
known mistakes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2_ref import balance
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.grading.attention import SMALL, Plant, changed, has, tokens
from dsv2_ref.grading.part import (
    Answers,
    Case,
    Mistake,
    Part,
    Values,
    WrongError,
    normal,
    operations,
    output,
)

Change = Callable[[Any], None]

ROUTED = replace(SMALL, hidden_size=48, n_routed_experts=16, num_experts_per_tok=3)
GROUPED = replace(
    ROUTED,
    topk_method="group_limited_greedy",
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)
NORMALISED = replace(ROUTED, norm_topk_prob=True, routed_scaling_factor=2.5)
SIGMOID = replace(ROUTED, scoring_func="sigmoid")
V3 = replace(
    SIGMOID,
    topk_method="noaux_tc",
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
)


def routes(module: Any, inputs: dict[str, Any]) -> Answers:
    """What a gate chose, as weights and choices over all experts: no order counts."""
    x = inputs["hidden_states"]
    result = module(x)
    count, experts = x.shape[0] * x.shape[1], inputs["experts"]
    pair = result[:2] if isinstance(result, tuple) else ()
    if len(pair) < 2 or not all(isinstance(part, Tensor) for part in pair):
        said = f"forward returned a {type(result).__name__}"
        raise WrongError(f"{said}; wanted (topk_idx, topk_weight, aux_loss)")
    index, weight = (part.reshape(-1, part.shape[-1]) for part in pair)
    shape, wanted = tuple(index.shape), (count, inputs["k"])
    if shape != wanted or tuple(weight.shape) != wanted:
        said = f"topk_idx is {shape} and topk_weight {tuple(weight.shape)}"
        raise WrongError(f"{said}; wanted {wanted}: tokens, experts per token")
    if index.is_floating_point() or not ((index >= 0) & (index < experts)).all():
        raise WrongError(
            f"topk_idx holds {index.dtype} values; wanted 0 to {experts - 1}"
        )
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


def sets(**fields: Any) -> Change:
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


def weighs(weigh: Callable[[Any, Values, Values, Values], Values]) -> Change:
    """The right choices with weights made of logits, scores and the choices."""

    def change(gate: Any) -> None:
        forward = gate.forward

        def wrong(x: Values) -> tuple[Values, Values, None]:
            topk_idx = forward(x)[0]
            return topk_idx, weigh(gate, *scores_of(gate, x), topk_idx), None

        gate.forward = wrong

    return change


def late_softmax(gate: Any, logits: Values, _: Values, topk_idx: Values) -> Values:
    """The softmax of the chosen logits alone."""
    chosen = logits.gather(-1, topk_idx)
    sigmoid = gate.scoring_func == "sigmoid"
    return weighed(gate, chosen.sigmoid() if sigmoid else chosen.softmax(-1))


def with_bias(gate: Any, _: Values, scores: Values, topk_idx: Values) -> Values:
    """The values that chose, bias included."""
    bias = gate.e_score_correction_bias
    return weighed(
        gate, (scores if bias is None else scores + bias).gather(-1, topk_idx)
    )


def scaled_before(gate: Any, _: Values, scores: Values, topk_idx: Values) -> Values:
    """The factor applied before normalising, which cancels it."""
    chosen = scores.gather(-1, topk_idx) * gate.routed_scaling_factor
    total = chosen.sum(-1, keepdim=True)
    return chosen / total if gate.norm_topk_prob else chosen


def chooses(
    judge: Callable[[Values, bool], Values], fill: float = -torch.inf
) -> Change:
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
    answer=routes,
    cases=(
        Case("softmax scores", 4, routed(ROUTED, 20), (ROUTED,)),
        Case("limited groups, scaled", 4, routed(GROUPED, 21), (GROUPED,)),
        Case("normalised weights", 2, routed(NORMALISED, 22), (NORMALISED,)),
        Case("sigmoid scores", 1, routed(SIGMOID, 23), (SIGMOID,)),
        Case("sigmoid scores and a bias, as in V3", 3, routed(V3, 24), (V3,)),
    ),
    mistakes=(
        Mistake(
            "softmax after top-k", "experts", WEIGHS, changed(weighs(late_softmax))
        ),
        Mistake(
            "routed_scaling_factor left out",
            "experts",
            WEIGHS,
            changed(sets(routed_scaling_factor=1.0)),
        ),
        Mistake(
            "routed_scaling_factor before normalising, which cancels it",
            "experts",
            WEIGHS,
            changed(weighs(scaled_before)),
        ),
        Mistake(
            "weights normalised though norm_topk_prob is off",
            "experts",
            WEIGHS,
            changed(sets(norm_topk_prob=True)),
        ),
        Mistake(
            "norm_topk_prob ignored",
            "experts",
            WEIGHS,
            changed(sets(norm_topk_prob=False)),
        ),
        Mistake(
            "group limit left out",
            "experts",
            DEVICES,
            changed(lambda gate: setattr(gate, "topk_group", gate.n_group)),
        ),
        Mistake(
            "groups judged by the sum of all their experts",
            "experts",
            DEVICES,
            changed(chooses(lambda grouped, _: grouped.sum(-1))),
        ),
        Mistake(
            "groups judged by their best expert even with a bias; V3 takes the two best",
            "experts",
            FAMILY,
            changed(chooses(lambda grouped, _: grouped.amax(-1))),
        ),
        Mistake(
            "groups judged by their two best experts without a bias; V2 takes the best",
            "experts",
            DEVICES,
            changed(chooses(lambda grouped, _: as_published(grouped, True))),
        ),
        Mistake(
            "experts of closed groups get 0, which beats a negative biased score",
            "experts",
            GATE_SYMPTOMS,
            changed(chooses(as_published, 0.0)),
        ),
        Mistake(
            "the bias weighs: it may only choose",
            "balance",
            WITHOUT_LOSS,
            changed(weighs(with_bias)),
        ),
        Mistake("the bias left out", "balance", WITHOUT_LOSS, changed(without_bias)),
        Mistake(
            "softmax scores where scoring_func is sigmoid",
            "experts",
            FAMILY,
            changed(softmax_for_sigmoid),
        ),
    ),
)


# Experts


def mix(module: Any, inputs: dict[str, Any]) -> Answers:
    """The output of a mixture, or what it costs."""
    if "cost" in inputs:
        return {"FLOPs": operations(lambda: module(inputs["hidden_states"]))}
    return output(module, inputs)


def reroutes(weigh: Callable[[Values], Values]) -> Change:
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
    shared = moe.shared_experts
    for stacked in (moe.experts.gate_up_proj,):
        gate, up = stacked.detach().chunk(2, dim=1)
        stacked.copy_(torch.cat((up, gate), dim=1))
    shared.gate_proj, shared.up_proj = shared.up_proj, shared.gate_proj


def activates(function: Callable[[Values], Values]) -> Callable[[Any], Any]:
    """Another activation."""
    return lambda _: patch.object(F, "silu", function)


def drop_shared(moe: Any) -> None:
    """No shared experts."""
    moe.shared_experts = None


def shared_scaled(moe: Any) -> None:
    """The shared experts' output multiplied by the factor of the routed ones."""
    factor = moe.gate.routed_scaling_factor
    moe.shared_experts.down_proj.weight.mul_(factor)


def residual_inside(moe: Any) -> None:
    """The input added, as the layer will do once more."""
    forward = moe.forward
    moe.forward = lambda x: forward(x) + x


def of_expert(experts: Any, number: int, x: Values) -> Values:
    """What one expert makes of tokens."""
    gate, up = F.linear(x, experts.gate_up_proj[number]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, experts.down_proj[number])


def all_of_all(
    experts: Any, x: Values, topk_idx: Values, topk_weight: Values
) -> Values:
    """All experts of all tokens, weighted by a row that is mostly 0."""
    out = torch.zeros_like(x)
    for number in range(len(experts.gate_up_proj)):
        weight = (topk_weight * (topk_idx == number)).sum(-1, keepdim=True)
        out = out + of_expert(experts, number, x) * weight
    return out


def of_weighted(
    experts: Any, x: Values, topk_idx: Values, topk_weight: Values
) -> Values:
    """Each expert gets its tokens times their weights."""
    out = torch.zeros_like(x)
    for number in range(len(experts.gate_up_proj)):
        token, choice = torch.where(topk_idx == number)
        rows = x[token] * topk_weight[token, choice, None]
        out = out.index_add(0, token, of_expert(experts, number, rows))
    return out


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
    routed_scaling_factor=2.5,
)
GROUPED_MIX = replace(
    MIXED, topk_method="group_limited_greedy", n_group=4, topk_group=1
)
DISPATCH = "Getting there: dispatch"
EXPERTS = Part(
    name="experts",
    module="moe",
    defines=("DeepseekV2MoE",),
    answer=mix,
    yours=("moe.RoutedExperts", "moe.DeepseekV2MLP"),
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
        Mistake("shared experts left out", "experts", "Symptoms", changed(drop_shared)),
        Mistake(
            "gate_proj and up_proj exchanged",
            "symptoms",
            "Experts' storage",
            changed(exchange),
        ),
        Mistake(
            "expert weights not applied",
            "experts",
            WEIGHS,
            changed(reroutes(torch.ones_like)),
        ),
        Mistake(
            "the chosen experts averaged, not weighted",
            "experts",
            WEIGHS,
            changed(reroutes(lambda w: torch.full_like(w, 1 / w.shape[-1]))),
        ),
        Mistake(
            "weights in another order than the choices",
            "experts",
            "Symptoms",
            changed(reroutes(lambda w: w.flip(-1))),
        ),
        Mistake(
            "weights normalised to sum to 1",
            "experts",
            WEIGHS,
            changed(sets(norm_topk_prob=True)),
        ),
        Mistake(
            "routed_scaling_factor left out",
            "experts",
            WEIGHS,
            changed(sets(routed_scaling_factor=1.0)),
        ),
        Mistake(
            "shared experts scaled by routed_scaling_factor",
            "experts",
            "Symptoms",
            changed(shared_scaled),
        ),
        Mistake(
            "the weight multiplies an expert's input, not its output",
            "experts",
            WEIGHS,
            changed(weighs_inputs),
        ),
        Mistake(
            "group limit left out",
            "experts",
            DEVICES,
            changed(lambda moe: setattr(moe.gate, "topk_group", moe.gate.n_group)),
        ),
        Mistake(
            "sigmoid, not SiLU", "experts", "Why experts?", activates(torch.sigmoid)
        ),
        Mistake("GELU, not SiLU", "experts", "Why experts?", activates(F.gelu)),
        Mistake(
            "the input added to the output: the layer does that",
            "prenorm",
            "The whole layer on one page",
            changed(residual_inside),
        ),
        Mistake(
            "every expert computes every token",
            "experts",
            DISPATCH,
            changed(computes_all),
        ),
    ),
)


# Balance


def loss_and_gradient(functions: Any, inputs: dict[str, Any]) -> Answers:
    """The loss and its gradient for the scores, or the biases after a step."""
    if "bias" in inputs:
        bias = functions.updated_bias(**inputs)
        if not isinstance(bias, Tensor):
            said = f"updated_bias returned a {type(bias).__name__}"
            raise WrongError(f"{said}; wanted a tensor")
        return {"bias": bias}
    with torch.enable_grad():
        scores = inputs["scores"].requires_grad_()
        loss = functions.expert_balance_loss(**inputs)
        if not isinstance(loss, Tensor):
            said = f"expert_balance_loss returned a {type(loss).__name__}"
            raise WrongError(f"{said}; wanted a tensor without axes")
        gradient = None
        if loss.requires_grad and loss.numel() == 1:
            (gradient,) = torch.autograd.grad(loss.sum(), scores, allow_unused=True)
        nothing = torch.zeros_like(scores)
    scores.requires_grad_(False)
    found = nothing if gradient is None else gradient
    return {"loss": loss.detach(), "gradient": found.detach()}


def used(seq_aux: bool, alpha: float, seed: int) -> Callable[[], dict[str, Any]]:
    """Scores and choices of two sequences that like different experts."""

    def make() -> dict[str, Any]:
        lean = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]])[:, None]
        scores = (normal(2, 8, 6, seed=seed) + lean).softmax(-1)
        chosen = scores.topk(2, dim=-1).indices
        return {
            "scores": scores,
            "topk_idx": chosen,
            "alpha": alpha,
            "seq_aux": seq_aux,
        }

    return make


Loss = Callable[[Values, Values, Values, int], Values]


def loses(loss: Loss, keep: bool = True) -> Plant:
    """A loss of f, P, scores and k for each sequence, or for the batch as one."""

    def wrong(
        scores: Values, topk_idx: Values, alpha: float, seq_aux: bool = True
    ) -> Any:
        if not seq_aux:
            scores, topk_idx = scores.flatten(0, 1)[None], topk_idx.flatten(0, 1)[None]
        k, experts = topk_idx.shape[-1], scores.shape[-1]
        chosen = F.one_hot(topk_idx, experts).sum(2).to(scores.dtype)
        f = chosen.mean(1) * experts / k  # (sequences, experts)
        P = scores.mean(1)
        return (alpha if keep else 1.0) * loss(f, P, scores * chosen, k).mean()

    return has("expert_balance_loss", wrong)


def dot(f: Values, P: Values) -> Values:
    """Σ f P of each sequence."""
    return (f * P).sum(-1)


def straight_through(f: Values, P: Values, _: Values, k: int) -> Values:
    """f keeps its value and gets the gradient of E · P."""
    soft = P * P.shape[-1]
    return dot(f + soft - soft.detach(), P)


def always(seq_aux: bool) -> Plant:
    """Per sequence, or over the batch, whatever was asked for."""

    def wrong(scores: Any, topk_idx: Any, alpha: Any, seq_aux_: Any = True) -> Any:
        return balance.expert_balance_loss(scores, topk_idx, alpha, seq_aux)

    def named(scores: Any, topk_idx: Any, alpha: Any, **_: Any) -> Any:
        return wrong(scores, topk_idx, alpha)

    return has("expert_balance_loss", named)


def moved() -> dict[str, Any]:
    """Biases, and how often each expert was chosen; one has exactly its share."""
    load = torch.tensor([10, 2, 7, 5, 1, 5])
    return {"bias": normal(6, seed=42, size=0.1), "load": load, "speed": 0.01}


def moves(step: Callable[[Values], Values]) -> Plant:
    """Another step, made from how much each load is below the mean."""

    def wrong(bias: Values, load: Values, speed: float) -> Values:
        load = load.to(bias.dtype)
        return bias + speed * step(load.mean() - load)

    return has("updated_bias", wrong)


LOSS, COUNTS = "The expert loss", "Symptoms"
BALANCE = Part(
    name="balance",
    module="balance",
    defines=("expert_balance_loss", "updated_bias"),
    answer=loss_and_gradient,
    yours=("balance.device_balance_loss", "balance.balance_loss"),
    cases=(
        Case("per sequence", 4, used(True, 0.03, 40)),
        Case("over the batch", 2, used(False, 0.3, 41)),
        Case("the bias after a step", 2, moved),
    ),
    mistakes=(
        Mistake(
            "over the batch as one, though seq_aux is on",
            "symptoms",
            "Expert balance loss",
            always(False),
        ),
        Mistake("per sequence, though seq_aux is off", "balance", LOSS, always(True)),
        Mistake(
            "counts over T, not over k T",
            "balance",
            COUNTS,
            loses(lambda f, P, _, k: dot(f * k, P)),
        ),
        Mistake(
            "P over the chosen experts alone",
            "balance",
            COUNTS,
            loses(lambda f, P, chosen, k: dot(f, chosen.mean(1))),
        ),
        Mistake(
            "f made of scores, not of counts, so that it has a gradient",
            "balance",
            COUNTS,
            loses(lambda f, P, _, k: dot(P * P.shape[-1], P)),
        ),
        Mistake(
            "f has a gradient, passed straight through the counts",
            "balance",
            COUNTS,
            loses(straight_through),
        ),
        Mistake(
            "P has no gradient",
            "balance",
            COUNTS,
            loses(lambda f, P, _, k: dot(f, P.detach())),
        ),
        Mistake(
            "alpha left out",
            "balance",
            LOSS,
            loses(lambda f, P, _, k: dot(f, P), keep=False),
        ),
        Mistake(
            "summed over the sequences, not averaged",
            "balance",
            LOSS,
            loses(lambda f, P, _, k: dot(f, P) * len(f)),
        ),
        Mistake(
            "the number of experts left out of f, or a mean over the experts",
            "balance",
            LOSS,
            loses(lambda f, P, _, k: dot(f, P) / f.shape[-1]),
        ),
        Mistake(
            "the bias moves the wrong way",
            "balance",
            WITHOUT_LOSS,
            moves(lambda below: -below.sign()),
        ),
        Mistake(
            "the bias moves in proportion to the load",
            "balance",
            WITHOUT_LOSS,
            moves(lambda below: below),
        ),
        Mistake(
            "the bias moves down at an even share",
            "balance",
            WITHOUT_LOSS,
            moves(lambda below: (below > 0).to(below) * 2 - 1),
        ),
    ),
)


# The layer


def order(compute: Callable[[Any, Values], Values]) -> Change:
    """Another order of the layer's parts."""

    def change(layer: Any) -> None:
        layer.n1, layer.n2 = layer.input_layernorm, layer.post_attention_layernorm
        layer.att = lambda x: layer.self_attn(x)[0]
        layer.forward = lambda x: (compute(layer, x),)

    return change


def post_norm(layer: Any, x: Values) -> Values:
    """Norms after the additions."""
    h = layer.n1(x + layer.att(x))
    return layer.n2(h + layer.mlp(h))


def branch_norm(layer: Any, x: Values) -> Values:
    """Norms at the end of the branches."""
    h = x + layer.n1(layer.att(x))
    return h + layer.n2(layer.mlp(h))


def after_norm(layer: Any, x: Values) -> Values:
    """Residuals taken after the norms."""
    u = layer.n1(x)
    v = layer.n2(u + layer.att(u))
    return v + layer.mlp(v)


def second(
    attended: Callable[[Any, Values], Values],
    fed: Callable[[Any, Values], Values] = lambda layer, h: h + layer.mlp(layer.n2(h)),
) -> Change:
    """The layer in two lines, one of them wrong."""
    return order(lambda layer, x: fed(layer, attended(layer, x)))


def first_line(layer: Any, x: Values) -> Values:
    """x + attention(norm(x)), which is right."""
    return x + layer.att(layer.n1(x))


def parallel(layer: Any, x: Values) -> Values:
    """Both parts read the layer's input."""
    return first_line(layer, x) + layer.mlp(layer.n2(x))


def exchanged_norms(layer: Any) -> None:
    """The first norm's weights in the second's place."""
    names = ("input_layernorm", "post_attention_layernorm")
    one, two = (getattr(layer, name) for name in names)
    layer.input_layernorm, layer.post_attention_layernorm = two, one


def default_epsilon(layer: Any) -> None:
    """The norms of the layer built without the configuration's epsilon."""
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.variance_epsilon = 1e-6


WHOLE = replace(MIXED, q_lora_rank=None, rms_norm_eps=0.01, first_k_dense_replace=1)
ORDERS, LINES, LAYER_SYMPTOMS = "Two orders", "The whole layer on one page", "Symptoms"
LAYER = Part(
    name="layer",
    module="layer",
    defines=("DeepseekV2DecoderLayer",),
    answer=output,
    yours=("model.DeepseekV2Model", "model.DeepseekV2ForCausalLM"),
    cases=(
        Case("a dense layer", 4, tokens(2, 6, 48, seed=50, size=0.2), (WHOLE, 0)),
        Case(
            "a layer with experts", 4, tokens(1, 9, 48, seed=51, size=0.2), (WHOLE, 1)
        ),
    ),
    mistakes=(
        Mistake(
            "post-norm: norms after the additions",
            "prenorm",
            ORDERS,
            changed(order(post_norm)),
        ),
        Mistake(
            "norms at the end of the branches, as in OLMo 2",
            "prenorm",
            ORDERS,
            changed(order(branch_norm)),
        ),
        Mistake(
            "residuals taken after the norms",
            "prenorm",
            LAYER_SYMPTOMS,
            changed(order(after_norm)),
        ),
        Mistake(
            "the first norm left out",
            "prenorm",
            LINES,
            changed(second(lambda layer, x: x + layer.att(x))),
        ),
        Mistake(
            "the second norm left out",
            "prenorm",
            LINES,
            changed(second(first_line, lambda layer, h: h + layer.mlp(h))),
        ),
        Mistake(
            "one norm for both parts",
            "prenorm",
            LAYER_SYMPTOMS,
            changed(second(first_line, lambda layer, h: h + layer.mlp(layer.n1(h)))),
        ),
        Mistake(
            "the two norms exchanged",
            "prenorm",
            LAYER_SYMPTOMS,
            changed(exchanged_norms),
        ),
        Mistake(
            "nothing added to what attention returns",
            "prenorm",
            LINES,
            changed(second(lambda layer, x: layer.att(layer.n1(x)))),
        ),
        Mistake(
            "nothing added to what the feed-forward part returns",
            "prenorm",
            LINES,
            changed(second(first_line, lambda layer, h: layer.mlp(layer.n2(h)))),
        ),
        Mistake(
            "both parts read the layer's input, as in parallel layers",
            "prenorm",
            LAYER_SYMPTOMS,
            changed(order(parallel)),
        ),
        Mistake(
            "the layer's input added twice, not what attention made of it",
            "prenorm",
            LINES,
            changed(
                order(lambda layer, x: x + layer.mlp(layer.n2(first_line(layer, x))))
            ),
        ),
        Mistake(
            "rms_norm_eps not given to the norms",
            "rmsnorm",
            "Why ε, and why inside the root?",
            changed(default_epsilon),
        ),
    ),
)
