"""How many devices a token reaches, and what a device computes of what reaches it."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsv2_ref import training_checks

if TYPE_CHECKING:
    from dsv2_ref.parallel import Ranks


def experts_of_a_device(experts: int, devices: int) -> int:
    """How many experts each device holds; ValueError unless ``devices`` divides."""
    training_checks.experts_by_device(experts, devices)
    return experts // devices


def sent_to(
    topk_idx: Int[Tensor, "*tokens top_k"], group: int, devices: int
) -> Bool[Tensor, "*tokens devices"]:
    """Whether a token has an expert on a device, each of which holds ``group``."""
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
    group = experts_of_a_device(experts, devices)
    training_checks.choices(topk_idx, experts)
    return sent_to(topk_idx, group, devices).sum(dim=-1)


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
        ValueError: if ``devices`` does not divide ``experts``, for a factor that is
            negative or not finite, and for sizes that do not fit ``topk_idx``.

    Source: DeepSeek-V2, section 2.2.4.
    """
    group = experts_of_a_device(experts, devices)
    training_checks.budgets(topk_idx, affinity, experts, capacity_factor, protected)
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


class TokenDropping:
    """Drop, in training, the choices that go beyond the budget of a device: the weights
    of those that `choices_within_budget` does not keep become 0, in every layer.

    The devices are the gates' ``n_group`` groups. A choice is as strong as its weight.
    Which sequences are exempt is drawn once for each step, by their place in the batch:
    the same in all layers, and again where a layer is computed twice. `step`, called
    after each step of the optimizer, draws anew. After `parallelize_experts` the budget
    is that of a device for the tokens of all ranks of the group; each rank then
    receives the choices of all of them, and the draw of the first.

    Args:
        model: any module with `MoEGate` inside.
        capacity_factor: budget over an even share; the paper's is 1.
        exempt: part of the sequences of which nothing is dropped; the paper's is about
            a tenth.
        generator: draws the exempt sequences, on the CPU; None is a new one with
            torch's seed, so that dropout repeats itself where layers run again.

    Raises:
        ValueError: for a model without a gate that has groups, a factor that is negative
            or not finite, and a part that is not from 0 to 1.

    Source: DeepSeek-V2, section 2.2.4.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity_factor: float = 1.0,
        exempt: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        training_checks.dropping(model, capacity_factor, exempt, generator)
        gates = [gate for gate in model.modules() if getattr(gate, "n_group", 1) > 1]
        self.capacity_factor, self.exempt = capacity_factor, exempt
        if generator is None:  # not torch's: what follows would repeat other numbers
            generator = torch.Generator("cpu").manual_seed(torch.initial_seed())
        self.generator = generator
        self.hooks = [gate.register_forward_hook(self._drop) for gate in gates]
        self.step()

    def step(self) -> None:
        """Draw other exempt sequences from now on."""
        self.drawn = torch.empty(0)

    def remove(self) -> None:
        """Drop nothing any more."""
        for hook in self.hooks:
            hook.remove()

    def _drop(self, gate: Any, inputs: Any, routed: Any) -> Any:
        topk_idx, topk_weight, aux_loss = routed
        if not gate.training:
            return routed
        ranks: Ranks | None = getattr(gate, "ranks", None)
        idx, affinity, before = topk_idx, topk_weight.detach(), 0
        sizes = idx.new_tensor([inputs[0].shape[:2]])  # (1, 2): sequences, their tokens
        if ranks is not None:
            idx, affinity = ranks.gather(idx), ranks.gather(affinity)
            sizes = ranks.gather(sizes)
            before = int(sizes[: ranks.rank].prod(dim=1).sum())
        safe = self._exempt(sizes[:, 0].sum(), ranks).to(idx.device)
        protected = safe.repeat_interleave(sizes[:, 1].repeat_interleave(sizes[:, 0]))
        kept = choices_within_budget(
            idx, affinity, gate.n_routed_experts, gate.n_group, self.capacity_factor,
            protected,
        )  # fmt: skip
        kept = kept[before : before + len(topk_idx)]
        return topk_idx, topk_weight * kept, aux_loss

    def _exempt(self, sequences: Tensor, ranks: "Ranks | None") -> Bool[Tensor, "all"]:
        """Whether each sequence of the batch is exempt in this step."""
        more = int(sequences) - len(self.drawn)
        if more > 0:
            drawn = torch.rand(more, generator=self.generator)
            self.drawn = torch.cat((self.drawn, drawn))
        drawn = self.drawn[: int(sequences)]
        if ranks is not None:  # the first rank's; sent again where layers run again
            drawn = ranks.gather(drawn.to(sequences.device))[: len(drawn)]
        return drawn < self.exempt
