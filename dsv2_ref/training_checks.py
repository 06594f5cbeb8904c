"""The door of training, beside `dsv2_ref.checks`: what the balance losses, token dropping and many ranks take. Importing
this module does not import torch either."""

from typing import TYPE_CHECKING, Any

from dsv2_ref.checks import (
    WrongTypeError,
    is_int,
    is_module,
    is_number,
    reject,
    require,
    require_not_negative,
    require_tensor,
    require_values,
)

if TYPE_CHECKING:
    from torch import Tensor


# Balance


def choices(topk_idx: "Tensor", experts: int) -> None:
    """Reject what does not choose among so many experts."""
    import torch

    require_tensor(topk_idx, "topk_idx")
    integers = topk_idx.dtype in (torch.int32, torch.int64)
    require(integers, "topk_idx", topk_idx, "integers, the numbers of experts")
    if topk_idx.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere, what counts them asserts it
        inside = ((topk_idx >= 0) & (topk_idx < experts)).all()
        require_values(inside, "topk_idx", "beyond the experts somewhere", f"from 0 to {experts - 1}")


def balance_loss(scores: "Tensor", topk_idx: "Tensor", alpha: object, ranks: object) -> None:
    """Check of the balance losses. One of several ranks may have no sequences."""
    require_tensor(scores, "scores")
    fits = scores.ndim == 3 and scores.is_floating_point()
    fits = fits and (scores.numel() > 0 or (ranks is not None and scores.shape[1:].numel() > 0))
    require(fits, "scores", scores, "(batch, seq, experts), floating point and with at least one token")
    choices(topk_idx, scores.shape[2])
    fits = topk_idx.ndim == 3 and topk_idx.shape[:2] == scores.shape[:2] and topk_idx.shape[2] > 0
    wanted = "(batch, seq, top_k) of the {} sequences of {} tokens in scores"
    require(fits, "topk_idx", topk_idx, wanted, *scores.shape[:2])
    require_not_negative("alpha", alpha)
    known = ranks is None or hasattr(ranks, "total")
    require(known, "ranks", ranks, "None or the Ranks that parallelize_experts gives a module")


def injected(hidden_states: "Tensor", loss: "Tensor") -> None:
    """Check of `dsv2_ref.balance.inject_loss`."""
    require_tensor(hidden_states, "hidden_states")
    require_tensor(loss, "loss")
    scalar = loss.ndim == 0 and loss.is_floating_point()
    require(scalar, "loss", loss, "one floating-point number, in a tensor without axes")


def experts_by_device(experts: int, devices: object) -> None:
    """Reject devices that cannot share the experts evenly."""
    require(is_int(experts, 1), "experts", experts, "a number of experts")
    divides = isinstance(devices, int) and is_int(devices, 1) and experts % devices == 0
    require(divides, "devices", devices, "a divisor of the {} experts", experts)


def devices_of_a_token(topk_devices: object, devices: int) -> None:
    """Check of ``topk_devices`` of `dsv2_ref.balance.communication_balance_loss`."""
    require(is_int(topk_devices, 1, devices), "topk_devices", topk_devices, "from 1 to the {} devices", devices)


def budgets(topk_idx: "Tensor", affinity: "Tensor", experts: int, factor: object, protected: "Tensor | None") -> None:
    """Check of `dsv2_ref.capacity.choices_within_budget`."""
    import torch

    require_not_negative("capacity_factor", factor)
    choices(topk_idx, experts)
    require(topk_idx.ndim == 2, "topk_idx", topk_idx, "(tokens, top_k)")
    require_tensor(affinity, "affinity")
    require(affinity.shape == topk_idx.shape, "affinity", affinity, "{}", tuple(topk_idx.shape))
    if protected is not None:
        require_tensor(protected, "protected")
        fits = protected.shape == topk_idx.shape[:1] and protected.dtype == torch.bool
        require(fits, "protected", protected, "None or one for each of {} tokens, bool", len(topk_idx))


def dropping(model: Any, capacity_factor: object, exempt: object, generator: object) -> None:
    """Check of `dsv2_ref.capacity.TokenDropping`."""
    from torch import Generator

    is_module(model, "model")
    grouped = any(getattr(gate, "n_group", 1) > 1 for gate in model.modules())
    require(grouped, "model", model, "gates with more than one n_group, which are the devices")
    require_not_negative("capacity_factor", capacity_factor)
    require(is_number(exempt) and 0 <= exempt <= 1, "exempt", exempt, "from 0 to 1")  # type: ignore[operator]
    drawn = generator is None or isinstance(generator, Generator)
    require(drawn, "generator", generator, "None or a torch.Generator")


def loads(bias: "Tensor", load: "Tensor", speed: object) -> None:
    """Check of `dsv2_ref.loss_free.updated_bias`."""
    require_tensor(bias, "bias")
    require(bias.ndim == 1 and bias.is_floating_point(), "bias", bias, "(experts,), floating point")
    require_tensor(load, "load")
    fits = load.shape == bias.shape and load.device == bias.device
    require(fits, "load", load, "{} on {}, as the bias", tuple(bias.shape), bias.device)
    require_not_negative("speed", speed)


# Many ranks


def process_groups(**groups: Any) -> None:
    """Check of the groups that `dsv2_ref.parallel.parallelize_experts` takes."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("there are no process groups; wanted torch.distributed.init_process_group first")
    for name, group in groups.items():
        if isinstance(group, DeviceMesh):
            wanted = f"a mesh of one dimension, as in mesh[{(group.mesh_dim_names or ('name',))[-1]!r}]"
            require(group.ndim == 1, name, tuple(group.shape), wanted)
        elif group is not None and not isinstance(group, dist.ProcessGroup):
            reject(name, group, "a process group or a DeviceMesh of which this rank is one", WrongTypeError)


def exchanged(rows: Any, choices: Any, top_k: int) -> None:
    """Check of `dsv2_ref.accounting.communication.exchange_bytes`: a square of numbers each, of tokens and of their choices."""
    for name, counts in (("rows", rows), ("choices", choices)):
        square = isinstance(counts, list | tuple) and 0 < len(counts) == len(rows)
        square = square and all(isinstance(row, list | tuple) and len(row) == len(rows) for row in counts)
        fits = square and all(is_int(number, 0) for row in counts for number in row)
        require(fits, name, counts, "for each rank a list of integers, 0 or more, one for each rank")
    for there, chosen in zip(rows, choices, strict=True):
        for number, several in zip(there, chosen, strict=True):
            wanted = "from {} to {}: each of {} tokens has 1 to {} experts there"
            require(
                number <= several <= top_k * number, "choices", several, wanted, number, top_k * number, number, top_k
            )


def expert_share(rank: object, size: object) -> None:
    """Check of ``experts_of``."""
    fits = isinstance(size, int) and is_int(size, 1) and is_int(rank, 0, size - 1)
    if not fits:
        raise ValueError(f"experts_of is ({rank!r}, {size!r}); wanted a rank, from 0, and the number of ranks")


def experts_to_share(mixture: Any, size: int) -> None:
    """Check of a `DeepseekV2MoE` whose experts ``size`` ranks are to share."""
    from dsv2_ref.moe import RoutedExperts
    from dsv2_ref.quantize import is_plain

    experts, gate = mixture.experts, mixture.gate
    plain = isinstance(experts, RoutedExperts) and is_plain(experts)
    wanted = "RoutedExperts as they were built, neither quantised nor packed, without hooks, and shared once"
    require(plain, "experts", experts, wanted)
    number, groups = gate.n_routed_experts, gate.n_group
    require(number % size == 0, "number of ranks", size, "a divisor of the {} experts", number)
    wanted = "a divisor of n_group={}, so that each rank takes whole groups"
    require(groups == 1 or groups % size == 0, "number of ranks", size, wanted, groups)


def same_place(replicas: list[int], found: list[int]) -> None:
    """Check of ranks that shall hold the same experts, and of the ranks that have this one's place in their groups."""
    if replicas != found:
        wanted = "a rank of each group, at the place that this one has in its own"
        raise ValueError(f"replicas are ranks {replicas}; wanted {wanted}")


def _those(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def alike_on_all(found: list[int]) -> None:
    """Check of what all ranks say of a module; it fails on all of them alike."""
    others = [rank for rank, one in enumerate(found) if one != found[0]]
    if others:
        wanted = f"one configuration, dtype and mode on all {len(found)} ranks"
        raise ValueError(f"module is another on {_those(others)} than on rank 0; wanted {wanted}")


def own_share(shares: set[tuple[int, int]], own: tuple[int, int], found: list[int]) -> None:
    """Check of the experts that a module holds, here and on all ranks; it fails on all of them."""
    for rank, size in shares - {own}:
        raise ValueError(f"module has experts of rank {rank} of {size}; wanted those of rank {own[0]} of {own[1]}")
    others = [rank for rank, fits in enumerate(found) if not fits]
    if others:
        raise ValueError(f"module has experts of another rank on {_those(others)}; wanted its own on each rank")


def same_weights(names: list[str], found: list[list[bool]]) -> None:
    """Check of what is said of each weight on each rank; it fails on all of them alike."""
    for name, *same in zip(names, *found, strict=True):
        others = [rank for rank, one in enumerate(same) if not one]
        if others:
            wanted = "the same weights on all ranks, by one seed or from one checkpoint"
            raise ValueError(f"{name} is another on {_those(others)} than on the first; wanted {wanted}")


def all_experts(part: Any) -> None:
    """Reject, in a model that is to be saved, experts that other ranks have the rest of."""
    rank, size = getattr(part, "share", (0, 1))
    wanted = "all of them: torch.distributed.checkpoint saves what the ranks have together"
    if size > 1:
        raise ValueError(f"the model has the experts of rank {rank} of {size}; wanted {wanted}")


def known_ranks(experts: Any) -> Any:
    """The ranks that share these experts."""
    if experts.ranks is None:
        raise RuntimeError(
            "these experts are one rank's share; wanted parallelize_experts first, which knows the others"
        )
    return experts.ranks
