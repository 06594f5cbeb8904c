"""Bytes that travel between the ranks that share a layer's experts, and what each of them stores.

P ranks hold E/P experts each, and whole groups where experts have groups. A token travels once to every other rank that
holds some of its experts, whatever number of them, and comes back as one row. With it go, for each of these experts, two
int32 numbers and its weight; and between each two ranks two int64 counts. In training the gradients of rows and weights
travel the same ways; where layers run twice (``full``), all that the forward pass sends travels once more. What a rank
holds itself does not travel.
"""

from collections.abc import Sequence
from math import comb

from dsv2_ref.accounting.call import Call, Counts, moe_layers, require_call, require_layer
from dsv2_ref.accounting.sizes import Sizes
from dsv2_ref.accounting.stored import model_weight_bytes, weight_bytes
from dsv2_ref.accounting.training import require_training, state_bytes
from dsv2_ref.checks import is_int, require
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.training_checks import exchanged

COUNTS = 2 * 8
"""Bytes that tell a rank how many rows and choices come from another."""

NUMBERS = 2 * 4
"""Bytes that tell which expert a choice is, and of which row."""


def _require_ranks(config: DeepseekV2Config, ranks: int) -> None:
    s, groups = Sizes.of(config), 1 if config.topk_method == "greedy" else config.n_group
    require(s.E > 0, "n_routed_experts", None, "a number of experts, which ranks could share")
    divides = is_int(ranks, 1) and s.E % ranks == 0
    require(divides, "ranks", ranks, "a divisor of the {} experts", s.E)
    require(groups == 1 or groups % ranks == 0, "ranks", ranks, "a divisor of n_group={}", groups)


def ranks_reached(config: DeepseekV2Config, ranks: int) -> float:
    """How many ranks a token reaches on average, its own included, if all orders of its scores are as probable.

    Exact: without a limit, P (1 - C(E - E/P, k) / C(E, k)). With one, the M groups that are open are the first M that
    the order of the scores meets, so that a token reaches as many groups as the k best of all experts lie in, or M where
    these are more.

    Raises:
        ValueError: for ranks that cannot share the experts, and for a limit of ``noaux_tc``, which judges a group by its
            two best experts.
    """
    _require_ranks(config, ranks)
    s, limit = Sizes.of(config), config.topk_group
    if config.topk_method == "greedy" or limit >= config.n_group:
        return ranks * (1 - comb(s.E - s.E // ranks, s.k) / comb(s.E, s.k))
    judged = config.topk_method == "group_limited_greedy"
    require(judged, "topk_method", config.topk_method, "one that judges a group by its best expert")
    groups = config.n_group
    return sum(
        chance * ranks * (1 - comb(groups - groups // ranks, min(met, limit)) / comb(groups, min(met, limit)))
        for met, chance in enumerate(_groups_met(s.E, s.k, groups))
    )


def _groups_met(experts: int, chosen: int, groups: int) -> list[float]:
    """The chance that so many experts, drawn without putting back, lie in 0, 1, 2 … of the groups."""
    ways = [comb(experts // groups * some, chosen) for some in range(groups + 1)]  # within some given groups
    return [
        comb(groups, met) * sum((-1) ** (met - some) * comb(met, some) * ways[some] for some in range(met + 1))
        / ways[-1]
        for met in range(groups + 1)
    ]  # fmt: skip


def most_ranks_reached(config: DeepseekV2Config, ranks: int) -> int:
    """How many ranks a token reaches at most: as many as it has experts, or the M groups that it may choose from."""
    _require_ranks(config, ranks)
    limit = ranks if config.topk_method == "greedy" else config.topk_group
    return min(Sizes.of(config).k, limit, ranks)


def _passes(call: Call, training: bool, checkpointing: str | None) -> int:
    """How often a step sends what a forward pass does; ``selective`` keeps what came."""
    require(training or checkpointing is None, "checkpointing", checkpointing, "None where nothing is trained")
    if training:
        require_training(call, checkpointing)
    return 1 + (checkpointing == "full")


def _weight_size(call: Call) -> int:
    return max(call.itemsize, 4)


def bytes_of_travel(
    config: DeepseekV2Config,
    call: Call,
    rows: float,
    choices: float,
    training: bool = False,
    checkpointing: str | None = None,
) -> tuple[float, float]:
    """Bytes there and back of so many rows with so many choices, in one layer, without the counts.

    The dtype of the call is that of the rows. Weights are float32, or float64 with float64.
    """
    require_call(call)
    passes = _passes(call, training, checkpointing)
    row, weight = rows * Sizes.of(config).D * call.itemsize, choices * _weight_size(call)
    there, back = passes * (row + weight + choices * NUMBERS), passes * row
    return (there + row, back + row + weight) if training else (there, back)


def exchange_bytes(
    config: DeepseekV2Config,
    call: Call,
    rows: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    training: bool = False,
    checkpointing: str | None = None,
) -> list[list[int]]:
    """What each rank sends to each other in one layer, exactly, for counted rows and choices: bytes from rank i to
    rank j. Sums of rows are sent, sums of columns received.

    Args:
        rows: ``rows[i][j]``, tokens of rank i that have experts on rank j.
        choices: ``choices[i][j]``, their experts there.
        training: count the backward pass as well.
        checkpointing: None, ``full`` or ``selective``.

    Raises:
        ValueError: unless both are squares of integers in which each token has 1 to k experts, for a number of ranks
            that cannot share the experts, in training for a call that is no training step or an unknown mode, and for a
            mode without training.
    """
    exchanged(rows, choices, Sizes.of(config).k)
    _require_ranks(config, len(rows))
    passes = _passes(call, training, checkpointing)
    ranks = range(len(rows))
    sent = [[0] * len(rows) for _ in ranks]
    for i in ranks:
        for j in ranks:
            if i != j:
                there, back = bytes_of_travel(config, call, rows[i][j], choices[i][j], training, checkpointing)
                sent[i][j] += passes * COUNTS + int(there)
                sent[j][i] += int(back)
    return sent


def bytes_per_token(
    config: DeepseekV2Config, call: Call, ranks: int, training: bool = False, checkpointing: str | None = None
) -> dict[str, float]:
    """Bytes that travel for a token in one layer, there and back. Where all ranks bring as many tokens and hold experts
    that are as popular, each rank sends so many for each of its tokens, and receives as many.

    - ``most``: where all of a token's experts are on other ranks, and on as many as may be.
    - ``expected``: if all orders of a token's scores are as probable (see `ranks_reached`); left out where that is not
      known.

    Both without the counts, which are `COUNTS` bytes for each other rank and call.

    Args:
        training: count the backward pass as well.
        checkpointing: None, ``full`` or ``selective``.

    Raises:
        ValueError: for ranks that cannot share the experts, in training for a call that is no training step or an unknown
            mode, and for a mode without training.
    """
    most = min(most_ranks_reached(config, ranks), ranks - 1)
    k, elsewhere = Sizes.of(config).k, (ranks - 1) / ranks
    found = {"most": float(sum(bytes_of_travel(config, call, most, k if most else 0, training, checkpointing)))}
    if config.topk_method != "noaux_tc" or config.topk_group >= config.n_group:
        rows = ranks_reached(config, ranks) * elsewhere
        found["expected"] = sum(bytes_of_travel(config, call, rows, k * elsewhere, training, checkpointing))
    return found


def on_ranks(
    config: DeepseekV2Config,
    call: Call,
    ranks: int,
    layer_idx: int | None,
    training: bool,
    optimizer: str = "adamw",
    checkpointing: str | None = None,
) -> dict[str, float]:
    """Bytes of the weights that each of so many ranks holds, in training also of what `state_bytes` counts beside them,
    and of `bytes_per_token` of all layers with experts, of a layer or of the model, by what they are."""
    weights = sum(rank_weight_bytes(config, call, ranks, layer_idx).values())
    held = {"weights": weights}
    if training:  # as many bytes of each kind per weight as without ranks
        states = state_bytes(config, call, layer_idx, optimizer)
        held = {name.replace("_", " "): size // states["weights"] * weights for name, size in states.items()}
    layers = moe_layers(config, config.num_hidden_layers) if layer_idx is None else config.is_moe_layer(layer_idx)
    sent = bytes_per_token(config, call, ranks, training, checkpointing)
    named = {f"sent per token, {what}": size * layers for what, size in sent.items()}
    return held | named


def rank_weight_bytes(config: DeepseekV2Config, call: Call, ranks: int, layer_idx: int | None = None) -> Counts:
    """Bytes of the weights that each rank holds, of a layer or of the model, by name: a P-th of the routed experts, and
    all the rest."""
    _require_ranks(config, ranks)
    if layer_idx is not None:
        require_layer(config, layer_idx)
    sizes = model_weight_bytes(config, call) if layer_idx is None else weight_bytes(config, layer_idx, call)
    return {name: size // ranks if name.endswith("mlp.experts") else size for name, size in sizes.items()}
