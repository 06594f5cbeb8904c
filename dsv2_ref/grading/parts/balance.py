"""The part of balance, with a loss and without: its cases and known mistakes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2_ref import balance
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


Loss = Callable[[Values, Values, Values, int], Values]


def loses(loss: Loss, keep: bool = True) -> Plant:
    """A loss of f, P, scores and k for each sequence, or for the batch as one."""

    def wrong(scores: Values, topk_idx: Values, alpha: float, seq_aux: bool = True) -> Any:
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
        Mistake("over the batch as one, though seq_aux is on", "symptoms", "Expert balance loss", always(False)),
        Mistake("per sequence, though seq_aux is off", "balance", LOSS, always(True)),
        Mistake("counts over T, not over k T", "balance", COUNTS, loses(lambda f, P, _, k: dot(f * k, P))),
        Mistake(
            "P over the chosen experts alone", "balance", COUNTS, loses(lambda f, P, chosen, k: dot(f, chosen.mean(1)))
        ),
        Mistake(
            "f made of scores, not of counts, so that it has a gradient",
            "balance",
            COUNTS,
            loses(lambda f, P, _, k: dot(P * P.shape[-1], P)),
        ),
        Mistake("f has a gradient, passed straight through the counts", "balance", COUNTS, loses(straight_through)),
        Mistake("P has no gradient", "balance", COUNTS, loses(lambda f, P, _, k: dot(f, P.detach()))),
        Mistake("alpha left out", "balance", LOSS, loses(lambda f, P, _, k: dot(f, P), keep=False)),
        Mistake(
            "summed over the sequences, not averaged", "balance", LOSS, loses(lambda f, P, _, k: dot(f, P) * len(f))
        ),
        Mistake(
            "the number of experts left out of f, or a mean over the experts",
            "balance",
            LOSS,
            loses(lambda f, P, _, k: dot(f, P) / f.shape[-1]),
        ),
        Mistake("the bias moves the wrong way", "balance", WITHOUT_LOSS, moves(lambda below: -below.sign())),
        Mistake("the bias moves in proportion to the load", "balance", WITHOUT_LOSS, moves(lambda below: below)),
        Mistake(
            "the bias moves down at an even share",
            "balance",
            WITHOUT_LOSS,
            moves(lambda below: (below > 0).to(below) * 2 - 1),
        ),
    ),
)
