"""All counts of a call together, and the activations that are alive at once."""

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from dsv2_ref.accounting.cached import cache_bytes, numbers_by_kind
from dsv2_ref.accounting.call import Call, Counts, layers_alike, require_layer
from dsv2_ref.accounting.operations import elementwise, form_of, products
from dsv2_ref.accounting.sizes import Sizes
from dsv2_ref.accounting.stored import bytes_by_module
from dsv2_ref.accounting.traffic import Moved, activations_moved, cache_read, weights_read
from dsv2_ref.accounting.training import require_training, training_report
from dsv2_ref.accounting.weights import by_module, matrices, model_matrices
from dsv2_ref.checks import require
from dsv2_ref.config import DeepseekV2Config


def _checked(
    config: DeepseekV2Config, call: Call, layer_idx: int | None, training: bool, checkpointing: str | bool | None
) -> tuple[Call, str | None]:
    """The call in the form that it takes, and the mode of checkpointing; ValueError for a call that cannot be made."""
    require(isinstance(training, bool), "training", training, "True or False")
    if layer_idx is not None:
        require_layer(config, layer_idx)
    call = replace(call, form=form_of(config, call))
    absorbed = config.use_mla and call.form == "absorbed"
    fits = config._attn_implementation != "flash_attention_2" or absorbed or call.dtype in ("float16", "bfloat16")
    require(fits, "dtype", call.dtype, "float16 or bfloat16 for flash_attention_2")
    mode = "full" if checkpointing is True else None if checkpointing is False else checkpointing
    require(training or mode is None, "checkpointing", checkpointing, "None where nothing is trained")
    if training:
        require_training(call, mode)
    return call, mode


def activation_peak(
    config: DeepseekV2Config,
    call: Call,
    layer_idx: int | None = None,
    training: bool = False,
    checkpointing: str | bool | None = None,
) -> int:
    """The most bytes of activations that are alive at once in a call of a layer, or of a model (``layer_idx`` is None).

    The layer itself runs, on tensors without memory; see `activations` for what is counted.
    ``config._attn_implementation`` decides whether attention holds its scores (``eager``) or not. The layer's mask is
    causal, whatever ``call.causal`` says about FLOPs, and it reads all rows that are kept. Weights and cache are in the
    dtype: what unpacking codes would take is not counted.

    Args:
        training: the forward pass keeps what gradients need, and a backward pass follows.
        checkpointing: ``full`` (or True) keeps only the inputs of layers, and runs each layer once more when its gradient
            is due; ``selective`` keeps some results beside them (see `dsv2_ref.recompute`); None keeps all.

    Raises:
        ModuleNotFoundError: where torch is not installed.
        OverflowError: for a call too large to be followed (see `activations`).
        ValueError: for a layer that the model does not have; for training over a cache, or with quantised weights; for
            checkpointing without training, or an unknown mode of it; for ``int8``, in which no layer runs; and for
            ``flash_attention_2`` in a dtype it does not take.
    """
    call, mode = _checked(config, call, layer_idx, training, checkpointing)
    require(call.dtype != "int8", "dtype", call.dtype, "a floating-point dtype: no layer runs in int8")
    from dsv2_ref.accounting.activations import peak  # needs torch

    call = replace(call, kv=call.rows, weights=None, cache=None, kept=None, read=None)
    return peak(config, call, layer_idx, training, mode)


def _peak_or_none(config: DeepseekV2Config, call: Call, *how: Any) -> int | None:
    """`activation_peak`; None where it cannot be counted."""
    try:
        return None if call.dtype == "int8" else activation_peak(config, call, *how)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
    except OverflowError:
        pass
    return None


def report(
    config: DeepseekV2Config,
    call: Call,
    layer_idx: int | None = None,
    training: bool = False,
    checkpointing: str | bool | None = None,
    optimizer: str | None = None,
) -> dict[str, Any]:
    """All counts for one layer, or for the whole model with embedding and head, ready for JSON.

    Returns:
        A dict with the keys below.

        - ``config``: the fields of the configuration, and the ``call`` in the form that it takes.
          `DeepseekV2Config.from_published` reads it, and ignores the call.
        - ``parameters``: ``total`` and ``active_per_token``, both also as ``by_module`` and ``active_by_module``; and
          ``by_matrix``: for each weight its shape, the number of such weights, and the parameters stored and active.
        - ``flops``: ``total``, ``products`` (of matrices alone), ``by_operation``.
        - ``bytes``: ``weights`` (with scales, where they are quantised); ``weights_read`` (see `weights_read`);
          ``kv_cache`` (all rows, after the call), ``kv_cache_by_kind`` (what so many rows would be in the dtype, see
          `cache_numbers`), ``kv_cache_written`` (the new tokens), ``kv_cache_read`` (the rows that are attended to);
          ``activations_read`` and ``activations_written`` (see `activations_moved`), both also as
          ``activations_by_operation``; and ``activations_peak`` (see `activation_peak`, to which ``training`` and
          ``checkpointing`` belong), None without torch, in int8, and for a call too large to be followed.
        - ``training``: None, or of a training step with this ``optimizer`` (one of `OPTIMIZERS`, ``adamw`` unless named):
          ``flops`` of products, ``forward``, ``backward`` and ``recomputed``, their ``total`` and all of them
          ``by_operation`` (see `step_flops`); ``six_nd`` (see `six_nd`; None for one layer); and ``bytes``: those of
          `state_bytes`, ``activations``, which is the peak above, and their sum ``total``, which a step does not exceed.
        - ``intensity``: FLOPs per byte of weights and cache that are read.

    Raises:
        ValueError: for what `activation_peak` rejects, except int8 where nothing is trained; for an unknown optimizer, or
            one without training; and for weights or a cache that cannot be quantised so: a width that no group divides,
            no latent, an odd one.
    """
    call, mode = _checked(config, call, layer_idx, training, checkpointing)
    require(training or optimizer is None, "optimizer", optimizer, "None where nothing is trained")
    if layer_idx is None:
        layers, weights, ends = layers_alike(config), model_matrices(config), _ends(config, call)
    else:
        layers, weights, ends = [(layer_idx, 1)], matrices(config, layer_idx), ({}, {}, {}, 0)
    operations, others, moved, read = Counter(ends[0]), Counter(ends[1]), ends[2], ends[3]
    for index, alike in layers:
        for name, count in products(config, index, call).items():
            operations[name] += alike * count
        for name, count in elementwise(config, index, call).items():
            others[name] += alike * count
        for name, (taken, given) in activations_moved(config, index, call).items():
            before = moved.get(name, (0, 0))
            moved[name] = before[0] + alike * taken, before[1] + alike * given
        read += alike * weights_read(config, index, call)
    stored, active = by_module(weights), by_module(weights, active=True)
    number, tokens = sum(alike for _, alike in layers), call.batch * call.rows
    cached = {kind: cache_bytes(config, tokens, call.dtype, kind, number) for kind in numbers_by_kind(config)}
    del cached["own"]
    cache, attended = (
        cache_bytes(config, tokens, call.dtype, layers=number, cache=call.cache),
        cache_read(config, call, number),
    )
    flops = operations.total() + others.total()
    how = {"layer": layer_idx, "training": training, "checkpointing": mode}
    most = _peak_or_none(config, call, *how.values())
    named = "adamw" if optimizer is None else optimizer
    step = training_report(config, call, layer_idx, mode, named, most) if training else None
    form = {"form": call.form if config.use_mla else None}
    return {
        "config": config.to_dict() | {"call": asdict(call) | form | how},
        "parameters": {
            "total": sum(stored.values()),
            "active_per_token": sum(active.values()),
            "by_module": stored,
            "active_by_module": active,
            "by_matrix": {
                name: {"shape": list(one.shape), "number": one.number, "stored": one.stored, "active": one.active}
                for name, one in weights.items()
            },
        },
        "flops": {"total": flops, "products": operations.total(), "by_operation": {**operations, **others}},
        "bytes": {
            "weights": sum(bytes_by_module(weights, call).values()),
            "weights_read": read,
            "kv_cache": cache,
            "kv_cache_by_kind": cached,
            "kv_cache_written": cache // call.rows * call.seq,
            "kv_cache_read": attended,
            "activations_read": sum(taken for taken, _ in moved.values()),
            "activations_written": sum(given for _, given in moved.values()),
            "activations_by_operation": {name: {"read": r, "written": w} for name, (r, w) in moved.items()},
            "activations_peak": most,
        },
        "training": step,
        "intensity": round(flops / (read + attended), 3),
    }


def _ends(config: DeepseekV2Config, call: Call) -> tuple[Counts, Counts, Moved, int]:
    """What a model needs for embedding, last norm and head: FLOPs of products, FLOPs of everything else, bytes of
    activations, and bytes of weights that are read."""
    s, size = Sizes.of(config), call.itemsize
    stream, logits = call.tokens * s.D * size, call.tokens * s.vocab * size
    moved = {"embed_tokens": (0, stream), "last_norm": (stream, stream), "lm_head": (stream, logits)}
    rows = 0 if config.tie_word_embeddings else call.tokens  # a tied embedding is read as the head
    read = (s.vocab + rows + 1) * s.D * size
    return {"lm_head": 2 * call.tokens * s.D * s.vocab}, {"last_norm": 4 * call.tokens * s.D}, moved, read
