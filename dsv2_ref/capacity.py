"""How many devices a token reaches, and what a device computes of what reaches it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2_ref.balance import experts_of_a_device, sent_to
from dsv2_ref.checks import require


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
        ValueError: if ``devices`` does not divide ``experts``, and for a negative
            factor.

    Source: DeepSeek-V2, section 2.2.4.
    """
    group = experts_of_a_device(experts, devices)
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
