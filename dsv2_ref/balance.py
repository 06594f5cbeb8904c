"""Keeping experts evenly used: DeepSeek-V2's three losses, how they reach the gate, and
dropping what is too much; DeepSeek-V3's bias that balances without a loss.

Experts are numbered device by device: with E experts on D devices, device i holds the
experts from i·E/D on. All losses have the form α Σ f P: f counts what was chosen and
has no gradient, P is the mean of the softmax scores, before any choice, scaling or
normalisation, and has one. So they push down the scores of what is used too often. Each
is taken over every sequence and averaged (``seq_aux``, the paper's), or over all tokens
of the batch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from dsv2_ref.checks import require
from dsv2_ref.recompute import is_recomputing

if TYPE_CHECKING:
    from dsv2_ref.moe import MoEGate


def _frequency_and_score(
    scores: Tensor, topk_idx: Tensor, seq_aux: bool
) -> tuple[Float[Tensor, "parts experts"], Float[Tensor, "parts experts"]]:
    """f and P of every expert, for each sequence or for the batch as one."""
    if not seq_aux:
        scores, topk_idx = scores.flatten(0, 1)[None], topk_idx.flatten(0, 1)[None]
    batch, _, experts = scores.shape
    chosen = topk_idx.reshape(batch, -1)
    counts = scores.new_zeros(batch, experts)
    counts = counts.scatter_add(1, chosen, scores.new_ones(chosen.shape))
    return counts * (experts / chosen.shape[1]), scores.mean(dim=1)


def _experts_of_a_device(experts: int, devices: int) -> int:
    divides = devices >= 1 and experts % devices == 0
    require(divides, "devices", devices, "a divisor of the {} experts", experts)
    return experts // devices


def expert_balance_loss(
    scores: Float[Tensor, "batch seq experts"],
    topk_idx: Int[Tensor, "batch seq top_k"],
    alpha: float,
    seq_aux: bool = True,
) -> Float[Tensor, ""]:
    """α · Σ f P over the experts: α when all are used alike, more when those liked best
    are also used most.

    f is the number of times an expert was chosen, over the k · tokens / E of an even
    share; P is its mean score.

    Source: DeepSeek-V2, equations 23 to 25; ``MoEGate.forward`` of the published code.
    """
    frequency, score = _frequency_and_score(scores, topk_idx, seq_aux)
    return alpha * (frequency * score).sum(dim=1).mean()


def device_balance_loss(
    scores: Float[Tensor, "batch seq experts"],
    topk_idx: Int[Tensor, "batch seq top_k"],
    alpha: float,
    devices: int,
    seq_aux: bool = True,
) -> Float[Tensor, ""]:
    """α · Σ f P over the devices: even work for devices, whichever of their experts
    does it.

    f is the mean of `expert_balance_loss`'s f over the experts of a device, P the sum
    of their mean scores.

    Raises:
        ValueError: if ``devices`` does not divide the experts.

    Source: DeepSeek-V2, equations 26 to 28. No published code has it.
    """
    group = _experts_of_a_device(scores.shape[-1], devices)
    frequency, score = _frequency_and_score(scores, topk_idx, seq_aux)
    frequency = frequency.unflatten(1, (devices, group)).mean(dim=2)
    score = score.unflatten(1, (devices, group)).sum(dim=2)
    return alpha * (frequency * score).sum(dim=1).mean()


def communication_balance_loss(
    scores: Float[Tensor, "batch seq experts"],
    topk_idx: Int[Tensor, "batch seq top_k"],
    alpha: float,
    devices: int,
    topk_devices: int,
    seq_aux: bool = True,
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
    group = _experts_of_a_device(scores.shape[-1], devices)
    fits, wanted = 1 <= topk_devices <= devices, "from 1 to the {} devices"
    require(fits, "topk_devices", topk_devices, wanted, devices)
    if not seq_aux:
        scores, topk_idx = scores.flatten(0, 1)[None], topk_idx.flatten(0, 1)[None]
    sent = _sent_to(topk_idx, group, devices).to(scores.dtype)
    frequency = sent.mean(dim=1) * (devices / topk_devices)
    score = scores.mean(dim=1).unflatten(1, (devices, group)).sum(dim=2)
    return alpha * (frequency * score).sum(dim=1).mean()


def _sent_to(
    topk_idx: Tensor, group: int, devices: int
) -> Bool[Tensor, "*tokens devices"]:
    sent = topk_idx.new_zeros(*topk_idx.shape[:-1], devices, dtype=torch.bool)
    return sent.scatter(-1, topk_idx // group, True)


def devices_reached(
    topk_idx: Int[Tensor, "*tokens top_k"], experts: int, devices: int
) -> Int[Tensor, "*tokens"]:
    """To how many devices each token is sent: what device-limited routing bounds by
    ``topk_group``.

    Raises:
        ValueError: if ``devices`` does not divide ``experts``.

    Source: DeepSeek-V2, section 2.2.2.
    """
    group = _experts_of_a_device(experts, devices)
    return _sent_to(topk_idx, group, devices).sum(dim=-1)


def choices_within_budget(
    topk_idx: Int[Tensor, "tokens top_k"],
    affinity: Float[Tensor, "tokens top_k"],
    experts: int,
    devices: int,
    capacity_factor: float = 1.0,
    protected: Bool[Tensor, "tokens"] | None = None,
) -> Bool[Tensor, "tokens top_k"]:
    """Which choices are computed when every device has a budget: the strongest of those
    that reached it.

    A device computes at most ``capacity_factor`` · tokens · k / devices choices,
    rounded down; beyond, those of the lowest affinity are dropped: that expert then
    adds nothing to that token, which keeps its other experts, the shared ones and the
    residual stream. The budget is the device's, so a popular expert may use what its
    neighbours leave. The paper drops in training and not in evaluation, and leaves
    inference the choice (sections 2.2.4 and 3.1.2).

    Args:
        topk_idx: the chosen experts.
        affinity: their scores, by which the strongest are kept.
        experts: routed experts E.
        devices: devices D that share them.
        capacity_factor: budget over an even share; the paper's is 1.
        protected: tokens of which nothing is dropped; they use the budget first and may
            exceed it. The paper protects about a tenth of the sequences, so that
            training has also seen what inference does.

    Raises:
        ValueError: if ``devices`` does not divide ``experts``, and for a negative
            factor.

    Source: DeepSeek-V2, section 2.2.4.
    """
    group = _experts_of_a_device(experts, devices)
    require(capacity_factor >= 0, "capacity_factor", capacity_factor, "0 or more")
    budget = int(capacity_factor * topk_idx.numel() / devices)
    if protected is not None:
        affinity = affinity.masked_fill(protected[:, None], float("inf"))
    device = (topk_idx // group).flatten()
    strongest_first = affinity.flatten().argsort(descending=True, stable=True)
    order = strongest_first[device[strongest_first].argsort(stable=True)]
    arrived = device.new_zeros(devices).scatter_add(0, device, torch.ones_like(device))
    before = (arrived.cumsum(0) - arrived)[device[order]]
    place = torch.arange(len(order), device=order.device) - before
    kept = torch.empty_like(order, dtype=torch.bool)
    kept = kept.scatter(0, order, place < budget).view_as(topk_idx)
    return kept if protected is None else kept | protected[:, None]


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
    routed = scores, topk_idx
    losses = []
    if (alpha := gate.alpha) > 0:
        losses.append(expert_balance_loss(scores, liked, alpha, seq_aux))
    if (alpha := gate.device_alpha) > 0:
        losses.append(device_balance_loss(*routed, alpha, D, seq_aux))
    if (alpha := gate.communication_alpha) > 0:
        losses.append(communication_balance_loss(*routed, alpha, D, M, seq_aux))
    return sum(losses[1:], losses[0]) if losses else None


def updated_bias(
    bias: Float[Tensor, "experts"], load: Shaped[Tensor, "experts"], speed: float
) -> Float[Tensor, "experts"]:
    """Expert biases after a training step: up by ``speed`` for each expert that got
    fewer than an even share of ``load``, the choices of all tokens; down for more.

    Source: Wang et al. (2024), algorithm 1; DeepSeek-V3, section 2.1.2.
    """
    load = load.to(bias.dtype)
    return bias + speed * (load.mean() - load).sign()


class LossFreeBalancing:
    """Balance a model by its gates' ``e_score_correction_bias``, without a loss.

    It counts what the gates choose in training, also where layers are checkpointed;
    `step`, called after each step of the optimizer, moves every bias by `updated_bias`
    and starts counting anew. In data parallel training, sum ``loads`` over the
    processes first.

    Args:
        model: any module with `MoEGate` inside, of ``topk_method`` ``noaux_tc``.
        speed: γ; DeepSeek-V3 took 0.001, and 0 for its last 500 billion tokens
            (section 4.2).

    Raises:
        ValueError: for a model without such a gate, and a negative speed.

    Source: Wang et al. (2024), algorithm 1; DeepSeek-V3, section 2.1.2.
    """

    def __init__(self, model: nn.Module, speed: float = 0.001) -> None:
        named = {
            name: gate
            for name, gate in model.named_modules()
            if getattr(gate, "e_score_correction_bias", None) is not None
        }
        require(len(named) > 0, "model", model, "gates with topk_method noaux_tc")
        require(speed >= 0, "speed", speed, "0 or more")
        self.speed, self.gates = speed, named
        self.loads = {
            name: torch.zeros_like(gate.e_score_correction_bias, dtype=torch.long)
            for name, gate in named.items()
        }
        for name, gate in named.items():
            gate.register_forward_hook(self._counter(self.loads[name]))

    @staticmethod
    def _counter(load: Tensor) -> Callable[[nn.Module, Any, Any], None]:
        def count(gate: nn.Module, _: Any, routed: tuple[Tensor, ...]) -> None:
            if gate.training and not is_recomputing():
                chosen = routed[0].flatten()
                load.scatter_add_(0, chosen, torch.ones_like(chosen))

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases of all gates, and count anew."""
        for name, gate in self.gates.items():
            bias, load = gate.e_score_correction_bias, self.loads[name]
            bias.copy_(updated_bias(bias, load, self.speed))
            load.zero_()


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
    kind = _Inject if torch.compiler.is_compiling() else _InjectForwardMode
    return kind.apply(hidden_states, loss)
