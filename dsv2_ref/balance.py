"""Keeping experts evenly used: the auxiliary loss, and how it reaches the gate."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def expert_balance_loss(
    scores: Float[Tensor, "batch seq experts"],
    topk_idx: Int[Tensor, "batch seq top_k"],
    alpha: float,
    seq_aux: bool = True,
) -> Float[Tensor, ""]:
    """α · Σ f P over the experts: α when all are used alike, more when those liked best are also used most.

    f is the number of times an expert was chosen, over the E / (k · tokens) of an even share, and has no gradient; P
    is the mean of its softmax score, before any choice, scaling or normalisation. Both are taken over each sequence
    and the losses averaged (``seq_aux``, the paper's), or over all tokens of the batch.

    Source: DeepSeek-V2, equations 23 to 25; ``MoEGate.forward`` of the published code.
    """
    if not seq_aux:
        scores, topk_idx = scores.flatten(0, 1)[None], topk_idx.flatten(0, 1)[None]
    batch, _, experts = scores.shape
    chosen = topk_idx.reshape(batch, -1)
    counts = scores.new_zeros(batch, experts).scatter_add(1, chosen, scores.new_ones(chosen.shape))
    frequency = counts * (experts / chosen.shape[1])
    return alpha * (frequency * scores.mean(dim=1)).sum(dim=1).mean()


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype = loss.dtype
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return grad_output, torch.ones((), dtype=ctx.loss_dtype, device=grad_output.device)


def inject_loss(
    hidden_states: Float[Tensor, "*batch hidden"], loss: Float[Tensor, ""]
) -> Float[Tensor, "*batch hidden"]:
    """The same hidden states, through which ``loss`` is trained as if it were added to the final loss.

    Whatever gradient arrives here, ``loss`` receives 1: its weight against the model's loss is its α alone.

    Source: ``AddAuxiliaryLoss`` of the published code.
    """
    return _Inject.apply(hidden_states, loss)
