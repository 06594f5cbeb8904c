"""All counts of a call together, and the activations that it holds at once."""

from dataclasses import asdict, replace
from typing import Any

from dsv2_ref.accounting import memory
from dsv2_ref.accounting.cached import cache_bytes, possible_kinds
from dsv2_ref.accounting.call import Call, Counts, layers_alike, one_of
from dsv2_ref.accounting.operations import elementwise, form_of, products
from dsv2_ref.accounting.traffic import Moved, activations_moved, weights_read
from dsv2_ref.accounting.weights import by_module, matrices, model_matrices
from dsv2_ref.config import DeepseekV2Config, require

MOST_CHOSEN = 1_000
"""So many experts of a token at most, where activations are counted, as their sum is gone through one by one."""


def _settled(config: DeepseekV2Config, call: Call, training: bool) -> Call:
    """The call in the form that it takes, if it can be made."""
    form = form_of(config, call)
    if training and {call.form, config.mla_form} == {"auto"}:
        form = "expanded"
    flash = config._attn_implementation == "flash_attention_2" and not (config.use_mla and form == "absorbed")
    good = not flash or call.dtype in ("float16", "bfloat16")
    require(good, "dtype", call.dtype, "float16 or bfloat16 for flash_attention_2")
    return replace(call, form=form)


def activation_peak(
    config: DeepseekV2Config,
    call: Call,
    layer_idx: int | None = None,
    training: bool = False,
    checkpointing: bool = False,
) -> int:
    """The most bytes of activations that are alive together in a call of a layer, or of a model (None).

    ``config._attn_implementation`` decides whether attention is ``eager`` or fused. See `dsv2_ref.accounting.memory` for what is counted.
    The masks of the reference are causal, whatever ``call.causal`` says of the FLOPs.

    Args:
        training: with what gradients need, and the way back; a form that is left open (``auto``) is then the expanded one.
        checkpointing: keep the inputs of layers only, and compute a layer once more when its gradient is due.

    Raises:
        ValueError: in training, for a call over a cache, in the absorbed form or with dropout; for checkpointing without
            training; for ``flash_attention_2`` in a dtype that it does not take; for more experts of a token than
            `MOST_CHOSEN`.
    """
    call = _settled(config, call, training)
    absorbed = config.use_mla and call.form == "absorbed"
    require(training or not checkpointing, "checkpointing", checkpointing, "False where nothing is trained")
    require(not training or call.kv == call.seq, "kv", call.kv, f"the {call.seq} new tokens: training has no cache")
    require(not (training and absorbed), "form", "absorbed", "expanded: the absorbed form is counted in inference only")
    dropout, chosen = config.attention_dropout, config.num_experts_per_tok or 0
    require(not (training and dropout), "attention_dropout", dropout, "0: what it draws in training is not counted")
    counted = config.n_routed_experts is None or chosen <= MOST_CHOSEN
    require(counted, "num_experts_per_tok", chosen, f"at most {MOST_CHOSEN}, for activations to be counted")
    sizes = memory.Pass(
        config=config, batch=call.batch, seq=call.seq, kv=call.kv, width=call.bytes_each, absorbed=absorbed
    )
    return memory.peak(sizes, None if layer_idx is None else one_of(config, layer_idx), training, checkpointing)


def report(
    config: DeepseekV2Config,
    call: Call,
    layer_idx: int | None = None,
    training: bool = False,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """All of it for one layer, or for the whole model with embedding and head, ready for JSON.

    ``config`` has the fields of the configuration and, beside them, the ``call`` with the form that it takes;
    `DeepseekV2Config.from_published` reads it and skips the call. ``parameters`` has ``total`` and ``active_per_token``, both
    again as ``by_module`` and ``active_by_module``, and ``by_matrix`` the shape of each weight, how many there are, and the
    parameters stored and active. ``flops`` has ``total``, ``products`` and ``by_operation``. ``bytes`` has ``weights``,
    ``weights_read`` (see `weights_read`), ``kv_cache`` (all tokens, after the call), ``kv_cache_by_kind`` (what it would be,
    see `cache_numbers`), ``kv_cache_written`` (the new tokens), ``activations_read`` and ``activations_written`` (see
    `activations_moved`), ``activations_by_operation``, and ``activations_peak`` (see `activation_peak`, also for ``training`` and
    ``checkpointing``); ``intensity`` is FLOPs over the bytes of weights and cache that are read. All but the peak of a
    training are those of the way forward.
    """
    call = _settled(config, call, training)
    if layer_idx is None:
        layers, weights = layers_alike(config), model_matrices(config)
        operations: Counts = {"lm_head": 2 * call.tokens * config.hidden_size * config.vocab_size}
        others: Counts = {"last_norm": 4 * call.tokens * config.hidden_size}
        stream, logits = (call.tokens * n * call.bytes_each for n in (config.hidden_size, config.vocab_size))
        moved: Moved = {"embed_tokens": (0, stream), "last_norm": (stream, stream), "lm_head": (stream, logits)}
        rows = 0 if config.tie_word_embeddings else call.tokens  # an embedding that is the head is read as that
        read = (config.hidden_size * (config.vocab_size + rows + 1)) * call.bytes_each
    else:
        layers, weights = [(one_of(config, layer_idx), 1)], matrices(config, layer_idx)
        operations, others, moved, read = {}, {}, {}, 0
    for index, alike in layers:
        for total, part in ((operations, products(config, index, call)), (others, elementwise(config, index, call))):
            for name, count in part.items():
                total[name] = total.get(name, 0) + alike * count
        for name, part_moved in activations_moved(config, index, call).items():
            before = moved.get(name, (0, 0))
            moved[name] = before[0] + alike * part_moved[0], before[1] + alike * part_moved[1]
        read += alike * weights_read(config, index, call)
    stored, active = by_module(weights), by_module(weights, active=True)
    cached = {
        kind: cache_bytes(config, call.batch * call.kv, call.dtype, kind, sum(alike for _, alike in layers))
        for kind in ("own", *possible_kinds(config))
    }
    cache = cached.pop("own")
    flops = sum(operations.values()) + sum(others.values())
    return {
        "config": config.to_dict()
        | {
            "call": asdict(call)
            | {
                "form": call.form if config.use_mla else None,
                "layer": layer_idx,
                "training": training,
                "checkpointing": checkpointing,
            }
        },
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
        "flops": {"total": flops, "products": sum(operations.values()), "by_operation": operations | others},
        "bytes": {
            "weights": sum(stored.values()) * call.bytes_each,
            "weights_read": read,
            "kv_cache": cache,
            "kv_cache_by_kind": cached,
            "kv_cache_written": cache // call.kv * call.seq,
            "activations_read": sum(taken for taken, _ in moved.values()),
            "activations_written": sum(given for _, given in moved.values()),
            "activations_by_operation": {name: {"read": r, "written": w} for name, (r, w) in moved.items()},
            "activations_peak": activation_peak(config, call, layer_idx, training, checkpointing),
        },
        "intensity": round(flops / (read + cache), 3),
    }
