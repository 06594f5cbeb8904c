"""The part of balance, with a loss and without: its cases and known mistakes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2_ref.grading.answers import Answers, Values, WrongError, call, normal, returned
from dsv2_ref.grading.part import Case, Mistake, Part, Plant, has
from dsv2_ref.grading.parts.gate import WITHOUT_LOSS


def loss_and_gradient(functions: Any, inputs: dict[str, Any]) -> Answers:
    """The loss and its gradient for the scores, or the biases after a step."""
    if "bias" in inputs:
        bias = call(functions.updated_bias, inputs)
        if not isinstance(bias, Tensor):
            raise WrongError(f"{returned(bias, 'updated_bias')}; wanted a tensor")
        return {"bias": bias}
    with torch.enable_grad():
        scores = inputs["scores"].requires_grad_()
        loss = call(functions.expert_balance_loss, inputs)
        if not isinstance(loss, Tensor):
            raise WrongError(f"{returned(loss, 'expert_balance_loss')}; wanted a tensor without axes")
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
        return {"scores": scores, "topk_idx": chosen, "alpha": alpha, "seq_aux": seq_aux}

    return make


RIGHT: dict[str, Callable[..., Any]] = {
    "each": lambda seq_aux: seq_aux,
    "f": lambda f, scores: f,
    "P": lambda scores, chosen: scores.mean(1),
    "times": lambda k, experts: 1.0,
    "over": lambda losses: losses.mean(),
    "alpha": lambda alpha: alpha,
}
"""The loss in steps: whether each sequence has its own, f and P (sequences, experts), a
factor, what becomes of the sequences' losses, and alpha."""


def loses(**wrong: Callable[..., Any]) -> Plant:
    """The loss with some of its steps as given, the others as they are, right or wrong."""

    def change(functions: Any) -> None:
        functions.steps = getattr(functions, "steps", RIGHT) | wrong
        functions.expert_balance_loss = partial(in_steps, functions.steps)

    return change


def in_steps(
    steps: dict[str, Callable[..., Any]], scores: Values, topk_idx: Values, alpha: float, seq_aux: bool = True
) -> Any:
    """The loss made of its steps."""
    if not steps["each"](seq_aux):
        scores, topk_idx = scores.flatten(0, 1)[None], topk_idx.flatten(0, 1)[None]
    k, experts = topk_idx.shape[-1], scores.shape[-1]
    chosen = F.one_hot(topk_idx, experts).sum(2).to(scores.dtype)
    f = steps["f"](chosen.mean(1) * experts / k, scores)
    losses = (f * steps["P"](scores, chosen)).sum(-1) * steps["times"](k, experts)
    return steps["alpha"](alpha) * steps["over"](losses)


def of_scores(_: Values, scores: Values) -> Values:
    """E · P in the place of f."""
    return scores.mean(1) * scores.shape[-1]


def straight_through(f: Values, scores: Values) -> Values:
    """f keeps its value and gets the gradient of E · P."""
    soft = of_scores(f, scores)
    return f + soft - soft.detach()


def moved() -> dict[str, Any]:
    """Biases, and how often each expert was chosen; one has exactly its share, which is not the median."""
    load = torch.tensor([11, 2, 4, 3, 1, 3])
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
            loses(each=lambda _: False),
        ),
        Mistake("per sequence, though seq_aux is off", "balance", LOSS, loses(each=lambda _: True)),
        Mistake("counts over T, not over k T", "balance", COUNTS, loses(times=lambda k, _: k)),
        Mistake(
            "P over the chosen experts alone",
            "balance",
            COUNTS,
            loses(P=lambda scores, chosen: (scores * chosen).mean(1)),
        ),
        Mistake(
            "f made of scores, not of counts, so that it has a gradient",
            "balance",
            COUNTS,
            loses(f=of_scores),
        ),
        Mistake("f has a gradient, passed straight through the counts", "balance", COUNTS, loses(f=straight_through)),
        Mistake("P has no gradient", "balance", COUNTS, loses(P=lambda scores, _: scores.detach().mean(1))),
        Mistake("alpha left out", "balance", LOSS, loses(alpha=lambda _: 1.0)),
        Mistake("summed over the sequences, not averaged", "balance", LOSS, loses(over=lambda losses: losses.sum())),
        Mistake(
            "the number of experts left out of f, or a mean over the experts",
            "balance",
            LOSS,
            loses(times=lambda _, experts: 1 / experts),
        ),
        Mistake("the bias moves the wrong way", "balance", WITHOUT_LOSS, moves(lambda below: -below.sign())),
        Mistake("the bias moves in proportion to the load", "balance", WITHOUT_LOSS, moves(lambda below: below)),
        Mistake(
            "the bias moves down at an even share",
            "balance",
            WITHOUT_LOSS,
            moves(lambda below: (below > 0).to(below) * 2 - 1),
        ),
        Mistake(
            "the bias moves up at an even share",
            "balance",
            WITHOUT_LOSS,
            moves(lambda below: (below >= 0).to(below) * 2 - 1),
        ),
    ),
)
