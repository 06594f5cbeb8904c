"""What a training step costs: FLOPs of the backward pass and of what is computed twice, and bytes of gradients, optimizer
states and master weights.

A product ``y = x W`` has two products in its backward pass, ``dx = dy Wᵀ`` and ``dW = xᵀ dy``, each with as many
multiplications. So have the products of queries with keys and of weights with values, whose two factors both get gradients.
Only products are counted here; everything else is a few percent.
"""

from collections import Counter
from collections.abc import Mapping

from dsv2_ref.accounting.call import Call, Counts, layers_alike, require_call
from dsv2_ref.accounting.operations import form_of, products
from dsv2_ref.accounting.sizes import Sizes
from dsv2_ref.accounting.weights import matrices, model_matrices, model_parameters
from dsv2_ref.checks import CHECKPOINTING, is_number, require, require_not_negative
from dsv2_ref.config import DeepseekV2Config

OPTIMIZERS = {"adamw": 2, "momentum": 1, "sgd": 0}
"""Optimizers by name, and how many values each keeps per parameter. AdamW keeps the means of gradients and of their squares,
SGD with momentum the former alone."""


def require_training(call: Call, checkpointing: str | None = None) -> None:
    """Raise ValueError for a call that no training step makes, and for an unknown mode."""
    require_call(call)
    known, wanted = (None, *CHECKPOINTING), f"None, {' or '.join(CHECKPOINTING)}"
    require(checkpointing in known, "checkpointing", checkpointing, wanted)
    wanted = "the {} new tokens: training has no cache"
    require(call.kv == call.seq, "kv", call.kv, wanted, call.seq)
    require(call.cache is None, "cache", call.cache, "None: training has no cache")
    wanted = "None for training: rounded weights get no gradients"
    require(call.weights is None, "weights", call.weights, wanted)


def backward(config: DeepseekV2Config, layer_idx: int, call: Call) -> Counts:
    """FLOPs of a layer's products in the backward pass, by the operation of the forward pass.

    Raises:
        ValueError: for a layer that the model does not have, and for a call that is no training step.
    """
    require_training(call)
    return {name: 2 * count for name, count in products(config, layer_idx, call).items()}


def is_fused(config: DeepseekV2Config, call: Call) -> bool:
    """Whether attention is one kernel, which keeps no scores."""
    absorbed = config.use_mla and form_of(config, call) == "absorbed"
    return config._attn_implementation != "eager" and not absorbed


def recomputed(config: DeepseekV2Config, layer_idx: int, call: Call, checkpointing: str | None = None) -> Counts:
    """FLOPs of a layer's products that are computed a second time, by operation.

    A fused kernel of attention computes the scores again in its backward pass, whatever else is kept. ``full`` runs the
    layer once more, up to the last result that a gradient needs: the last product, the ``down_proj`` of a dense network
    or of the shared experts, is not among them. ``selective`` keeps what fused attention gave.

    Raises:
        ValueError: as `backward`, and for an unknown mode.
    """
    require_training(call, checkpointing)
    counts, again = products(config, layer_idx, call), Counter[str]()
    fused = is_fused(config, call)
    if checkpointing is not None:
        again.update(counts)
        for last in ("mlp", "mlp.shared_experts"):
            again[last] -= counts.get(last, 0) // 3
    attending = ("self_attn.scores", "self_attn.values")
    if checkpointing == "selective" and fused:
        again.subtract({name: counts[name] for name in attending})
    if fused:
        again["self_attn.scores"] += counts["self_attn.scores"]
    return dict(+again)


def step_flops(
    config: DeepseekV2Config, call: Call, layer_idx: int | None = None, checkpointing: str | None = None
) -> dict[str, Counts]:
    """FLOPs of a training step's products: ``forward``, ``backward`` and ``recomputed``, each by operation.

    Args:
        layer_idx: of one layer; None for the whole model with its head.
        checkpointing: None, ``full`` or ``selective``.

    Raises:
        ValueError: for a layer that the model does not have, for a call that is no training step and for an unknown mode.
    """
    require_training(call, checkpointing)
    parts: dict[str, Counter[str]] = {name: Counter() for name in ("forward", "backward", "recomputed")}
    for index, alike in layers_alike(config) if layer_idx is None else [(layer_idx, 1)]:
        of_layer = (
            products(config, index, call),
            backward(config, index, call),
            recomputed(config, index, call, checkpointing),
        )
        for total, counts in zip(parts.values(), of_layer, strict=True):
            total.update({name: alike * count for name, count in counts.items()})
    if layer_idx is None:
        s = Sizes.of(config)
        head = 2 * call.tokens * s.D * s.vocab
        parts["forward"]["lm_head"], parts["backward"]["lm_head"] = head, 2 * head
    return {name: dict(counts) for name, counts in parts.items()}


def model_flops(config: DeepseekV2Config, call: Call) -> int:
    """FLOPs of the products of a model's training step, forward and backward, without what is computed twice."""
    flops = step_flops(config, call)
    return _total(flops["forward"]) + _total(flops["backward"])


def six_nd(config: DeepseekV2Config, call: Call) -> Counts:
    """The rule 6 · N · D (N parameters that a token passes through, D tokens), and what it leaves out or counts wrongly.

    The sum is `model_flops`. ``attention`` is the products of queries with keys and of weights with values, which no
    parameter has a part in: it grows with the length of a sequence. ``not multiplied`` are parameters that are looked up
    or multiplied element by element: an embedding, norms and biases.
    """
    flops = step_flops(config, call)["forward"]
    attention = 3 * sum(flops[f"self_attn.{name}"] for name in ("scores", "values"))
    rule = 6 * sum(model_parameters(config, active=True).values()) * call.tokens
    return {"6ND": rule, "attention": attention, "not multiplied": model_flops(config, call) - rule - attention}


def mfu(config: DeepseekV2Config, call: Call, tokens_per_second: float, peak: float) -> float:
    """Model FLOPs utilisation: the FLOPs that training needs per second, over those that the hardware could do.

    What is computed twice does not count, so recomputation lowers it.

    Args:
        call: a training step, whose FLOPs per token are taken.
        tokens_per_second: of all devices together.
        peak: FLOP/s of all devices together.

    Raises:
        ValueError: for a call that is no training step, for fewer tokens than 0, for a peak that is not above 0, and for
            either that is not finite.

    Source: Chowdhery et al. (2022), appendix B.
    """
    require_not_negative("tokens_per_second", tokens_per_second)
    require(is_number(peak) and peak > 0, "peak", peak, "a finite number above 0")
    return model_flops(config, call) / call.tokens * tokens_per_second / peak


def state_bytes(config: DeepseekV2Config, call: Call, layer_idx: int | None = None, optimizer: str = "adamw") -> Counts:
    """Bytes that training holds from step to step, of one layer or of the whole model.

    ``weights`` and ``gradients`` are in the dtype. For bfloat16 and float16 there are ``master_weights`` in float32, which
    the optimizer changes, and its states are float32 too: a bfloat16 weight would not move by a step of less than 1/512 of
    itself. ``optimizer`` are the states; numbers that it keeps per tensor are not counted.

    Raises:
        ValueError: for a layer that the model does not have, for a call that is no training step, for int8 and for an
            unknown optimizer.
    """
    require_training(call)
    require(call.dtype != "int8", "dtype", call.dtype, "a floating-point dtype: no layer is trained in int8")
    require(optimizer in tuple(OPTIMIZERS), "optimizer", optimizer, ", ".join(OPTIMIZERS))
    found = model_matrices(config) if layer_idx is None else matrices(config, layer_idx)
    number, half = sum(one.stored for one in found.values()), call.itemsize == 2
    return {
        "weights": number * call.itemsize,
        "gradients": number * call.itemsize,
        "master_weights": 4 * number if half else 0,
        "optimizer": OPTIMIZERS[optimizer] * number * max(call.itemsize, 4),
    }


def training_report(
    config: DeepseekV2Config,
    call: Call,
    layer_idx: int | None,
    checkpointing: str | None,
    optimizer: str,
    activations: int | None,
) -> dict[str, object]:
    """What `dsv2_ref.accounting.summary.report` says of training."""
    flops = step_flops(config, call, layer_idx, checkpointing)
    totals = {name: _total(counts) for name, counts in flops.items()}
    sizes = state_bytes(config, call, layer_idx, optimizer)
    held = None if activations is None else _total(sizes) + activations
    return {
        "optimizer": optimizer,
        "flops": {
            **totals,
            "total": _total(totals),
            "by_operation": {
                name: {part: counts.get(name, 0) for part, counts in flops.items()} for name in flops["forward"]
            },
        },
        "six_nd": six_nd(config, call) if layer_idx is None else None,
        "bytes": {**sizes, "activations": activations, "total": held},
    }


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())
