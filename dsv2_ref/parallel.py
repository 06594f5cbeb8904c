"""Expert parallelism: each of P ranks holds E/P experts, and tokens travel to them.

Everything but the routed experts is replicated, and every rank brings its own tokens. A
token travels once to each rank that holds some of its experts, which is what
device-limited routing bounds and the communication loss evens out (DeepSeek-V2,
sections 2.2.2 and 2.2.3).

Letters: T tokens of this rank, D hidden size, P ranks; of this rank, n rows (tokens)
and c choices sent, and m rows and d choices received.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from dsv2_ref import checks, ops, training_checks
from dsv2_ref.checkpoint import StackedExperts
from dsv2_ref.moe import DeepseekV2MoE, MoEGate, RoutedExperts


@dataclass(frozen=True)
class Ranks:
    """The ranks that share the experts, and what they send each other. Groups are held
    by name, so that a module that has them can be copied."""

    group: Any  #: of the ranks that share one set of experts
    rank: int  #: of this process in it
    size: int  #: P
    replicas: Any  #: group of the ranks that hold the same experts as this one
    total: int  #: ranks of all sets together

    def exchange(
        self, rows: Shaped[Tensor, "sent *row"], received: list[int], sent: list[int]
    ) -> Shaped[Tensor, "received *row"]:
        """Send the first ``sent[0]`` rows to rank 0 and so on; what the others sent, in
        the order of the ranks. Gradients travel back."""
        return collectives.all_to_all_single_autograd(rows, received, sent, self.group)

    def gather(self, rows: Shaped[Tensor, "rows *row"]) -> Shaped[Tensor, "all *row"]:
        """The rows of all ranks of the group, one after the other."""
        sizes, one = rows.new_tensor([len(rows)], dtype=torch.long), [1] * self.size
        received = self.exchange(sizes.repeat(self.size), one, one).tolist()
        return self.exchange(
            torch.cat([rows] * self.size), received, [len(rows)] * self.size
        )

    def sum(self, x: Shaped[Tensor, "*sizes"]) -> Shaped[Tensor, "*sizes"]:
        """The sum over all ranks, without gradients."""
        return self.sum_of_replicas(collectives.all_reduce(x, "sum", self.group))

    def sum_of_replicas(self, x: Shaped[Tensor, "*sizes"]) -> Shaped[Tensor, "*sizes"]:
        """The sum over the ranks that hold the same experts, without gradients."""
        if self.replicas is None:
            return x
        return collectives.all_reduce(x, "sum", self.replicas)


class ParallelExperts(RoutedExperts):
    """One rank's part of the routed experts, E/P neighbours; `state_dict` has them
    under their published names, with their numbers among all E."""

    def __init__(self, experts: RoutedExperts, rank: int, size: int) -> None:
        number = len(experts.down_proj) // size
        StackedExperts.__init__(self, number, first=rank * number)
        self.expert_hidden = experts.expert_hidden
        for name, stack in experts.named_parameters():
            own = stack.detach().chunk(size)[rank].clone()
            setattr(self, name, nn.Parameter(own, requires_grad=stack.requires_grad))
        self.share = rank, size
        self.ranks: Ranks | None = None  # `parallelize_experts` says

    @ops.defines()
    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        topk_idx: Int[Tensor, "tokens top_k"],
        topk_weight: Float[Tensor, "tokens top_k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """`RoutedExperts.forward` of the tokens of this rank, computed where their
        experts are. Choices of weight 0, as dropped ones, do not travel."""
        ranks = training_checks.known_ranks(self)
        here = len(self.down_proj)  # experts on each rank
        # 1. Local reorder: choices by rank, and one row for each token that goes there.
        token, place = torch.where(topk_weight != 0)  # (c,) each
        order = topk_idx[token, place].argsort(stable=True)
        token, place = token[order], place[order]
        expert, weight = topk_idx[token, place], topk_weight[token, place]
        rank = expert // here  # (c,)
        goes = rank.new_zeros(ranks.size, len(hidden_states), dtype=torch.bool)
        goes[rank, token] = True  # (P, T)
        row = goes.cumsum(dim=1)[rank, token] - 1  # (c,): among the rows of that rank
        travels = torch.where(goes)[1]  # (n,): the token of each row

        # 2. Exchange of counts: rows and choices that each rank gets from each.
        counts = torch.stack((goes.sum(1), rank.bincount(minlength=ranks.size)), dim=1)
        arriving = ranks.exchange(counts, [1] * ranks.size, [1] * ranks.size)  # (P, 2)
        (rows_out, out), (rows_in, into) = counts.T.tolist(), arriving.T.tolist()

        # 3. All-to-all there: rows; and for each choice its row and expert, its weight.
        rows = ranks.exchange(hidden_states[travels], rows_in, rows_out)  # (m, D)
        numbers = torch.stack((row, expert % here), dim=1).int()  # (c, 2)
        numbers = ranks.exchange(numbers, into, out).long()  # (d, 2)
        weight = ranks.exchange(weight, into, out)  # (d,)

        # 4. Rank-major to expert-major, the grouped product, and a sum for each row.
        start = arriving[:, 0].cumsum(0) - arriving[:, 0]  # (P,): first row of a rank
        row = numbers[:, 0] + start.repeat_interleave(arriving[:, 1])  # (d,)
        order = numbers[:, 1].argsort(stable=True)
        row, expert, weight = row[order], numbers[order, 1:], weight[order, None]
        made = super().forward(rows[row], expert, torch.ones_like(weight))  # (d, D)
        sums = torch.zeros_like(rows, dtype=weight.dtype)  # (m, D)
        sums = sums.index_add(0, row, made * weight).to(rows.dtype)

        # 5. All-to-all back, and combine: the sum of what the ranks made of a token.
        back = ranks.exchange(sums, rows_out, rows_in).to(weight.dtype)  # (n, D)
        out = torch.zeros_like(hidden_states, dtype=weight.dtype)  # (T, D)
        return out.index_add(0, travels, back).to(hidden_states.dtype)


Module = TypeVar("Module", bound=nn.Module)


def share_experts(module: Module, rank: int, size: int) -> Module:
    """Keep the experts of one of ``size`` ranks, in place, before anything is known of
    the others."""
    checks.is_module(module)
    training_checks.expert_share(rank, size)
    mixtures = [part for part in module.modules() if isinstance(part, DeepseekV2MoE)]
    for mixture in mixtures:
        training_checks.experts_to_share(mixture, size)
    for mixture in mixtures:
        own = ParallelExperts(mixture.experts, rank, size)
        mixture.experts = own.train(mixture.experts.training)
    return module


def parallelize_experts(
    module: Module,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    replicas: dist.ProcessGroup | DeviceMesh | None = None,
) -> Module:
    """Share the routed experts of a layer, a model or any module that holds a
    `DeepseekV2MoE` among the ranks of a group, in place.

    Each rank keeps E/P of them. Everything else is replicated: each rank computes it
    for its own tokens. Make the optimizer afterwards, and call `average_gradients`
    between ``backward`` and its step. Balance losses pooled over the batch
    (``seq_aux=False``), `LossFreeBalancing` and `TokenDropping` then count the tokens
    of all ranks. ``torch.distributed.checkpoint`` saves the state dicts of all ranks as
    one, with every published name, and loads from it what a rank holds; give it the
    optimizer as a `dsv2_ref.optimizer_state.OptimizerState`.

    All ranks of the group must take part in every forward and backward pass. One that
    has run out of sequences passes none of them, a batch of (0, seq), and a loss like
    the sum of its logits, which is 0. If a rank dies, the others raise
    ``RuntimeError``: at once where its connection breaks, else after the ``timeout`` of
    its group. The groups of a mesh of several dimensions have that of torch, up to half
    an hour; those of ``torch.distributed.new_subgroups_by_enumeration`` take another.

    Args:
        module: the same on all ranks, or read with
            ``from_pretrained(..., experts_of=(rank, P))``. All weights are read once to
            compare them. It is returned.
        group: a process group, or a device mesh of one dimension; None is all ranks.
        replicas: the ranks of other such groups that hold the same experts as this one,
            for data parallelism over groups.

    Raises:
        ValueError: on all ranks, for configurations, dtypes or weights that differ, and
            for a share that is another rank's; for experts or groups of them
            (``n_group``) that the ranks cannot share evenly; and for experts that are
            quantised, packed or wrapped, or have hooks.

    Source: DeepSeek-V2, section 3.1.3; the steps are those of torchtitan.
    """
    checks.is_module(module)
    training_checks.process_groups(group=group, replicas=replicas)
    found = _group(dist.group.WORLD if group is None else group)
    copies = _group(replicas)
    size, sets = found.size(), copies.size() if copies else 1
    names = found.group_name, copies.group_name if copies else None
    ranks = Ranks(names[0], found.rank(), size, names[1], size * sets)
    device = "cuda" if dist.get_backend(found) == "nccl" else "cpu"
    same = dist.get_process_group_ranks(copies) if copies else [dist.get_rank()]
    _require_agreement(module, ranks, same, device)
    if not _shared(module):
        share_experts(module, ranks.rank, size)
    shared = _shared(module)
    checks.require(bool(shared), "module", module, "one with routed experts")
    for part in (*shared, *module.modules()):
        if isinstance(part, MoEGate | ParallelExperts):
            part.ranks = ranks
    return module


def _group(group: Any) -> Any:
    return group.get_group() if isinstance(group, DeviceMesh) else group


def _shared(module: nn.Module) -> list[ParallelExperts]:
    return [part for part in module.modules() if isinstance(part, ParallelExperts)]


def _require_agreement(
    module: nn.Module, ranks: Ranks, same: list[int], device: str
) -> None:
    """Raise on all ranks, those of all groups, unless the module is alike on them: the
    experts of a rank on the ``same``, those that hold them too; all else on all."""
    own, sets = (ranks.rank, ranks.size), ranks.total // ranks.size

    def of_all(found: list[int]) -> Int[Tensor, "ranks found"]:
        x = ranks.gather(torch.tensor(found, dtype=torch.long, device=device))
        if sets > 1:
            x = replace(ranks, group=ranks.replicas, size=sets).gather(x)
        return x.view(ranks.total, len(found))

    places = of_all([dist.get_rank()]).view(sets, ranks.size)[:, ranks.rank]
    training_checks.same_place(same, places.tolist())
    told: list[Any] = [
        (name, tuple(weight.shape), weight.dtype, weight.requires_grad)
        for name, weight in module.named_parameters()
    ]
    for part in module.modules():
        if isinstance(part, MoEGate):
            settings = vars(part).items()
            told += [one for one in settings if isinstance(one[1], int | float | str)]
        names = "config", "gradient_checkpointing"
        told += [getattr(part, name, None) for name in names]
    digest = hashlib.sha256(repr(told).encode()).digest()
    training_checks.alike_on_all(
        of_all([int.from_bytes(digest[:7], "big")])[:, 0].tolist()
    )

    shares = {part.share for part in _shared(module)}
    training_checks.own_share(shares, own, of_all([shares <= {own}])[:, 0].tolist())

    experts = {weight for part in _shared(module) for weight in part.parameters()}
    held = dict((*module.named_parameters(), *module.named_buffers()))
    bits = of_all([_sum_of_bits(weight) for weight in held.values()])
    wanted = bits[:1].repeat(ranks.total, 1)
    of_some = [weight in experts for weight in held.values()]
    wanted[:, of_some] = bits[: ranks.size, of_some].repeat(sets, 1)
    training_checks.same_weights(list(held), (bits == wanted).tolist())


def _sum_of_bits(x: Shaped[Tensor, "*sizes"]) -> int:
    """The sum of all elements, their bits read as integers; 0 without memory."""
    if x.is_meta:
        return 0
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = x.detach().flatten().contiguous().view(integers[x.itemsize])
    # In pieces, as a sum on the CPU widens what it sums.
    sums = [part.sum(dtype=torch.long) for part in bits.split(1 << 24)]
    return int(torch.stack(sums).sum())


@torch.no_grad()
def average_gradients(module: nn.Module) -> Float[Tensor, ""]:
    """Make the gradients those of the mean of all ranks' losses, as one process would
    have them; returns the norm of all of them, the experts of all ranks included.

    Replicated parameters get the mean over all ranks. An expert's gradient has gone
    back to it from all ranks of its group, summed: it is divided by their number.
    A gradient that is None on some ranks counts as 0 there; one that is None on all
    stays None.
    ``torch.nn.utils.clip_grads_with_norm_`` takes the norm.
    """
    checks.is_module(module)
    shared = _shared(module)
    checks.require(bool(shared), "module", module, "one of `parallelize_experts`")
    ranks, total_norm = training_checks.known_ranks(shared[0]), nn.utils.get_total_norm
    experts = {weight for part in shared for weight in part.parameters()}
    own: list[Tensor] = []
    replicated: list[Tensor] = []
    weights = list(module.parameters())
    device = shared[0].down_proj.device
    having = torch.tensor([w.grad is not None for w in weights], device=device).long()
    for weight, some in zip(weights, ranks.sum(having).tolist(), strict=True):
        if some:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            mine = weight in experts
            summed = (ranks.sum_of_replicas if mine else ranks.sum)(weight.grad)
            weight.grad.copy_(summed / ranks.total)
            (own if mine else replicated).append(weight.grad)
    squares = total_norm(own).to(device) ** 2
    squares = ranks.sum(squares) * ranks.size / ranks.total  # of the experts of a group
    return (squares + total_norm(replicated) ** 2).sqrt()
