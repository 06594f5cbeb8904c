"""The part of absorbed attention with a cache: its cases, costs among them, and known mistakes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.grading.answers import Answers, Values, WrongError, elements, first, normal, operations
from dsv2_ref.grading.part import Case, Mistake, Part, Plant
from dsv2_ref.grading.parts.mla import ATTENTION, BOTH, ODD, SMALL, everything, placed, seen, top_left
from dsv2_ref.grading.parts.rope import YARN

CONTEXT = 255
"""Tokens of the prompt where costs are measured. One more fills ``max_position_embeddings``,
so that a cache of that room is full."""


def in_turn(module: Any, calls: Sequence[Values]) -> tuple[list[Values], Any]:
    """Outputs of calls one after another, each with the cache that the last returned; and that of the last."""
    past, outputs = None, []
    for call in calls:
        result = module(call, past_key_value=past, use_cache=True)
        outputs.append(first(result).clone())  # a module may write the next one in the same place
        past = result[-1] if isinstance(result, tuple | list) and len(result) > 1 else None
        if past is None:
            raise WrongError("forward(..., use_cache=True) returned no cache; wanted (output, ..., cache)")
    return outputs, past


def decode(module: Any, inputs: dict[str, Any]) -> Answers:
    """Outputs of calls one after another; or what the last of them costs."""
    calls = inputs["hidden_states"].split(inputs["calls"], dim=1)
    if inputs["cost"] == "FLOPs":
        past = in_turn(module, calls[:-1])[1]
        return {"FLOPs": operations(lambda: module(calls[-1], past_key_value=past, use_cache=True))}
    if inputs["cost"]:
        B, S, _ = inputs["hidden_states"].shape
        before = elements(module)
        of_one = elements(in_turn(module, [call[:1] for call in calls])[1], module)
        past = in_turn(module, calls)[1]
        of_all = elements(past, module)
        # Tables and masks that a module keeps do not grow with the batch: in the module only what does is a cache.
        more, returned = (of_all - of_one) / ((B - 1) * S), min(elements(past), of_all - before) / (B * S)
        return {"elements per token": torch.tensor(max(more, returned), dtype=torch.float64)}
    return {f"call {i}": out for i, out in enumerate(in_turn(module, calls)[0], 1)}


def calls(*lengths: int, seed: int, size: float = 1.0, cost: str = "") -> Callable[[], dict[str, Any]]:
    """Tokens, and how many of them each call gets."""
    made = partial(normal, 2, sum(lengths), 88, seed=seed, size=size)
    fixed = {"calls": list(lengths), "cost": cost}
    return lambda: {"hidden_states": made(), **fixed}


def also_holds(count: Callable[[DeepseekV2Config], int]) -> Plant:
    """A cache that holds so many elements per token, and not latents and rope keys."""

    def change(module: Any) -> None:
        forward = module.forward

        def wrong(*args: Any, **kwargs: Any) -> Any:
            out, weights, present = forward(*args, **kwargs)
            stored = present.stored
            more = count(module.config) - module.cache_features[0]
            present.more = stored.new_zeros(*stored.shape[:2], more)
            return out, weights, present

        module.forward = wrong

    return change


def keys_and_values(config: DeepseekV2Config) -> int:
    """Elements per token of all heads' keys and values."""
    wide = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return config.num_attention_heads * wide


def keys_and_values_with_one_rope_key(config: DeepseekV2Config) -> int:
    """The same, with the rope key that all heads share stored once."""
    return config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim) + config.qk_rope_head_dim


def rope_key_of_each_head(config: DeepseekV2Config) -> int:
    """Elements per token where the shared key is stored once per head."""
    return config.kv_lora_rank + config.num_attention_heads * config.qk_rope_head_dim


ABSORB = replace(SMALL, mla_form="absorbed")
ABSORB_ODD = replace(ODD, mla_form="absorbed", rope_scaling=YARN)
DECODING = Part(
    name="decoding",
    module="mla",
    defines=("DeepseekV2Attention",),
    takes=("config", "layer_idx"),
    answer=decode,
    yours=ATTENTION,
    cases=(
        Case("a prompt, then tokens", 5, calls(5, 1, 1, seed=10), (ABSORB, 0)),
        Case("several tokens after a prompt", 5, calls(4, 3, 1, seed=11), (ABSORB_ODD, 0)),
        Case(
            "elements per token in the cache", 4, calls(CONTEXT, 1, seed=12, cost="cache"), (ABSORB_ODD, 0), at_most=1.3
        ),
        Case("FLOPs of a decoded token", 4, calls(CONTEXT, 1, seed=13, cost="FLOPs"), (ABSORB_ODD, 0), at_most=2.0),
    ),
    mistakes=(
        *BOTH,
        Mistake("positions restart in each call", "decoding", "Symptoms", placed(lambda ids, _: ids - ids[:, :1])),
        Mistake(
            "positions one too far after a cache",
            "decoding",
            "Symptoms",
            placed(lambda ids, keys: ids + int(keys > ids.shape[1])),
        ),
        Mistake(
            "positions one too few after a cache",
            "decoding",
            "Symptoms",
            placed(lambda ids, keys: ids - int(keys > ids.shape[1])),
        ),
        Mistake(
            "mask aligned at the top left: the first query at the first key",
            "symptoms",
            "Causal alignment",
            seen(top_left),
        ),
        Mistake(
            "mask aligned at the top left where a call brings several tokens",
            "symptoms",
            "Causal alignment",
            seen(lambda queries, keys: (top_left if queries > 1 else everything)(queries, keys)),
        ),
        Mistake(
            "no mask where several tokens follow a cache",
            "symptoms",
            "Causal alignment",
            seen(lambda queries, keys: (everything if keys > queries else top_left)(queries, keys)),
        ),
        Mistake(
            "expanded cache: all heads' keys and values are cached, not the latent",
            "mla",
            "What must a layer cache?",
            also_holds(keys_and_values),
        ),
        Mistake(
            "expanded cache: all heads' keys and values are cached, only the rope key once",
            "mla",
            "What must a layer cache?",
            also_holds(keys_and_values_with_one_rope_key),
        ),
        Mistake("the rope key is cached once per head", "mla", "How many bytes?", also_holds(rope_key_of_each_head)),
        Mistake(
            "the layer's inputs are cached, not the latent",
            "mla",
            "What must a layer cache?",
            also_holds(lambda config: config.hidden_size),
        ),
        Mistake(
            "keys and values of all tokens are made anew for each token",
            "decoding",
            "Three ways to decode",
            lambda module: setattr(module, "form", "expanded"),
        ),
    ),
)
