"""Keeping experts evenly used: DeepSeek-V2's three losses, and how they are trained.

Experts are numbered device by device: with E experts on D devices, device i holds the
experts from i·E/D on. All losses have the form α Σ f P: f counts what was chosen and
has no gradient, P is the mean of the softmax scores, before any choice, scaling or
normalisation, and has one. So they push down the scores of what is used too often. Each
is taken over every sequence and averaged (``seq_aux``, the paper's), or over all tokens
of the batch.

With ``ranks``, the mean of the ranks' losses, and of their gradients, is that of the
batch of all of them together. Of a batch that is taken as one, f counts the tokens of
all ranks, and P is the sum over this rank's tokens by the mean number of tokens of a
rank. Losses over each sequence are summed by the mean number of sequences of a rank,
which may itself bring none.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv2_ref import training_checks
from dsv2_ref.capacity import choices_within_budget as choices_within_budget
from dsv2_ref.capacity import devices_reached as devices_reached
from dsv2_ref.capacity import experts_of_a_device, sent_to
from dsv2_ref.loss_free import LossFreeBalancing as LossFreeBalancing
from dsv2_ref.loss_free import updated_bias as updated_bias

if TYPE_CHECKING:
    from dsv2_ref.moe import MoEGate
    from dsv2_ref.parallel import Ranks


def _frequency_and_score(
    scores: Tensor, topk_idx: Tensor, seq_aux: bool, ranks: "Ranks | None" = None
) -> tuple[Float[Tensor, "parts experts"], Float[Tensor, "parts experts"]]:
    """f and P of every expert, for each sequence or for the batch as one."""
    scores, topk_idx = _parts(scores, topk_idx, seq_aux)
    batch, tokens, experts = scores.shape
    chosen = topk_idx.flatten(1)
    counts = scores.new_zeros(batch, experts)
    counts = counts.scatter_add(1, chosen, scores.new_ones(chosen.shape))
    counts, tokens = _over(None if seq_aux else ranks, counts, tokens)
    frequency = counts * (experts / (topk_idx.shape[2] * tokens))
    return frequency, scores.sum(dim=1) / tokens


def _parts(scores: Tensor, topk_idx: Tensor, seq_aux: bool) -> tuple[Tensor, Tensor]:
    """Each sequence, or all tokens as one, (parts, tokens, experts or top_k)."""
    if seq_aux:
        return scores, topk_idx
    return scores.flatten(0, 1)[None], topk_idx.flatten(0, 1)[None]


def _mean(
    losses: Float[Tensor, "parts"], seq_aux: bool, ranks: "Ranks | None"
) -> Float[Tensor, ""]:
    """The mean over the parts; of sequences, this rank's share of the mean of all."""
    if ranks is None or not seq_aux:
        return losses.mean()
    sequences = ranks.sum(losses.new_tensor(float(len(losses))))
    return losses.sum() * ranks.total / sequences.clamp(min=1)  # 0 where none has any


def _over(
    ranks: "Ranks | None", counts: Float[Tensor, "parts places"], tokens: int
) -> tuple[Float[Tensor, "parts places"], Any]:
    """Counts and number of tokens, or the means of both over all ranks."""
    if ranks is None:
        return counts, tokens
    mean = ranks.sum(torch.cat((counts[0], counts.new_tensor([tokens])))) / ranks.total
    return mean[None, :-1], mean[-1].clamp(min=1 / ranks.total)  # of 0, nothing is left


def expert_balance_loss(
    scores: Float[Tensor, "batch seq experts"],
    topk_idx: Int[Tensor, "batch seq top_k"],
    alpha: float,
    seq_aux: bool = True,
    ranks: "Ranks | None" = None,
) -> Float[Tensor, ""]:
    """α · Σ f P over the experts: α when all are used alike, more when those liked best
    are also used most.

    f is the number of times an expert was chosen, over the k · tokens / E of an even
    share; P is its mean score.

    Source: DeepSeek-V2, equations 23 to 25; ``MoEGate.forward`` of the published code.
    """
    training_checks.balance_loss(scores, topk_idx, alpha, ranks)
    frequency, score = _frequency_and_score(scores, topk_idx, seq_aux, ranks)
    return alpha * _mean((frequency * score).sum(dim=1), seq_aux, ranks)


def device_balance_loss(
    scores: Float[Tensor, "batch seq experts"],
    topk_idx: Int[Tensor, "batch seq top_k"],
    alpha: float,
    devices: int,
    seq_aux: bool = True,
    ranks: "Ranks | None" = None,
) -> Float[Tensor, ""]:
    """α · Σ f P over the devices: even work for devices, whichever of their experts
    does it.

    f is the mean of `expert_balance_loss`'s f over the experts of a device, P the sum
    of their mean scores.

    Raises:
        ValueError: if ``devices`` does not divide the experts.

    Source: DeepSeek-V2, equations 26 to 28. No published code has it.
    """
    training_checks.balance_loss(scores, topk_idx, alpha, ranks)
    group = experts_of_a_device(scores.shape[-1], devices)
    frequency, score = _frequency_and_score(scores, topk_idx, seq_aux, ranks)
    frequency = frequency.unflatten(1, (devices, group)).mean(dim=2)
    score = score.unflatten(1, (devices, group)).sum(dim=2)
    return alpha * _mean((frequency * score).sum(dim=1), seq_aux, ranks)


def communication_balance_loss(
    scores: Float[Tensor, "batch seq experts"],
    topk_idx: Int[Tensor, "batch seq top_k"],
    alpha: float,
    devices: int,
    topk_devices: int,
    seq_aux: bool = True,
    ranks: "Ranks | None" = None,
) -> Float[Tensor, ""]:
    """α · Σ f P over the devices: each receives as many tokens as another, however many
    experts it applies to them.

    f is the number of tokens sent to a device, over the M · tokens / D of an even
    share, where no token may reach more than M = ``topk_devices`` devices; a token
    counts once for a device, whether one or all of its experts are there. P is the sum
    of the mean scores of the device's experts.

    Raises:
        ValueError: if ``devices`` does not divide the experts, or ``topk_devices`` is
            not between 1 and ``devices``.

    Source: DeepSeek-V2, equations 29 to 31. No published code has it.
    """
    training_checks.balance_loss(scores, topk_idx, alpha, ranks)
    group = experts_of_a_device(scores.shape[-1], devices)
    training_checks.devices_of_a_token(topk_devices, devices)
    scores, topk_idx = _parts(scores, topk_idx, seq_aux)
    sent = sent_to(topk_idx, group, devices).to(scores.dtype).sum(dim=1)
    sent, tokens = _over(None if seq_aux else ranks, sent, scores.shape[1])
    frequency = sent / tokens * (devices / topk_devices)
    score = (scores.sum(dim=1) / tokens).unflatten(1, (devices, group)).sum(dim=2)
    return alpha * _mean((frequency * score).sum(dim=1), seq_aux, ranks)


def balance_loss(
    gate: "MoEGate",
    scores: Float[Tensor, "batch seq experts"],
    topk_idx: Int[Tensor, "batch seq top_k"],
) -> Float[Tensor, ""] | None:
    """The sum of the balance losses whose α in ``gate`` is above 0; None if there are
    none.

    DeepSeek-V3's complementary loss is `expert_balance_loss` of sigmoid scores that are
    divided by their sum, and of the k best scores without the correction bias, which
    would hide what the router likes too much.

    Source: DeepSeek-V2, section 2.2.3; DeepSeek-V3, equations 17 to 20.
    """
    seq_aux, liked = gate.seq_aux, topk_idx
    if gate.scoring_func == "sigmoid":
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    if gate.e_score_correction_bias is not None:
        liked = scores.detach().topk(gate.top_k, dim=-1).indices
    D, M = gate.n_group, gate.topk_group  # devices, how many of them a token reaches
    how = seq_aux, getattr(gate, "ranks", None)
    losses = []
    if (alpha := gate.alpha) > 0:
        losses.append(expert_balance_loss(scores, liked, alpha, *how))
    if (alpha := gate.device_alpha) > 0:
        losses.append(device_balance_loss(scores, topk_idx, alpha, D, *how))
    if (alpha := gate.communication_alpha) > 0:
        losses.append(communication_balance_loss(scores, topk_idx, alpha, D, M, *how))
    return sum(losses[1:], losses[0]) if losses else None


class _Inject(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(hidden_states: Tensor, loss: Tensor) -> Tensor:
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.loss_dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones((), dtype=ctx.loss_dtype, device=grad_output.device)
        return grad_output, one


class _InjectForwardMode(_Inject):
    """With a rule for tangents, which the compiler does not take."""

    @staticmethod
    def jvp(ctx: Any, of_hidden_states: Tensor, of_loss: Tensor) -> Tensor:
        return of_hidden_states.view_as(of_hidden_states)


def inject_loss(
    hidden_states: Float[Tensor, "*batch hidden"], loss: Float[Tensor, ""]
) -> Float[Tensor, "*batch hidden"]:
    """The same hidden states, through which ``loss`` is trained as if it were added to
    the final loss.

    Whatever gradient arrives here, ``loss`` receives 1: its weight against the model's
    loss is its α alone.

    Source: ``AddAuxiliaryLoss`` of the published code.
    """
    training_checks.injected(hidden_states, loss)
    kind = _Inject if torch.compiler.is_compiling() else _InjectForwardMode
    return kind.apply(hidden_states, loss)
