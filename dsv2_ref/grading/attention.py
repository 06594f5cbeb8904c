"""Parts before the experts: RMSNorm, rotary positions, latent attention and decoding, with
their known mistakes."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from dsv2_ref import attention, mla, rope
from dsv2_ref.config import DeepseekV2Config, RopeScaling
from dsv2_ref.grading.part import (
    Answers,
    Case,
    Mistake,
    Part,
    Values,
    WrongError,
    elements,
    first,
    normal,
    operations,
    output,
)
from dsv2_ref.masks import Visibility

Plant = Callable[[Any], AbstractContextManager[Any] | None]


def given(**makers: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """Arguments of a case, made anew for each subject."""
    return lambda: {name: make() for name, make in makers.items()}


def tokens(*shape: int, seed: int, size: float = 1.0, mean: float = 0.0) -> Any:
    """The arguments of a module that takes tokens alone."""
    made = partial(normal, *shape, seed=seed, size=size)
    return given(hidden_states=lambda: made() + mean)


def computes(formula: Callable[[Values, Values, float], Values]) -> Plant:
    """A norm that computes something else of its input, weight and epsilon."""

    def plant(norm: Any) -> None:
        norm.forward = lambda x: formula(x, norm.weight, norm.variance_epsilon)

    return plant


def mean_square(x: Values) -> Values:
    """Of each token."""
    return x.square().mean(-1, keepdim=True)


INSIDE = "Why ε, and why inside the root?"
WEIGHT = "What is the weight for?"
RMSNORM = Part(
    name="rmsnorm",
    module="rmsnorm",
    defines=("DeepseekV2RMSNorm",),
    answer=output,
    cases=(
        Case("tokens", 2, tokens(2, 5, 48, seed=1, mean=0.5), (48, 1e-6)),
        Case("small tokens", 3, tokens(2, 3, 48, seed=2, size=1e-3), (48, 1e-6)),
        Case("another epsilon", 2, tokens(7, 32, seed=3, size=0.3), (32, 0.1)),
        Case("a token of zeros", 1, tokens(1, 1, 16, seed=4, size=0.0), (16, 1e-6)),
    ),
    mistakes=(
        Mistake(
            "epsilon outside the root",
            "rmsnorm",
            INSIDE,
            computes(lambda x, w, eps: w * x / (mean_square(x).sqrt() + eps)),
        ),
        Mistake(
            "epsilon left out",
            "rmsnorm",
            INSIDE,
            computes(lambda x, w, eps: w * x / mean_square(x).sqrt()),
        ),
        Mistake(
            "a fixed epsilon of 1e-6, whatever the constructor was given",
            "rmsnorm",
            INSIDE,
            computes(lambda x, w, eps: w * x / (mean_square(x) + 1e-6).sqrt()),
        ),
        Mistake(
            "the mean subtracted, as in LayerNorm",
            "rmsnorm",
            "LayerNorm or RMSNorm?",
            computes(lambda x, w, eps: F.layer_norm(x, w.shape, w, None, eps)),
        ),
        Mistake(
            "the weight not applied",
            "rmsnorm",
            WEIGHT,
            computes(lambda x, w, eps: x / (mean_square(x) + eps).sqrt()),
        ),
        Mistake(
            "multiplied by 1 + weight, as in Gemma",
            "rmsnorm",
            WEIGHT,
            computes(lambda x, w, eps: (1 + w) * x / (mean_square(x) + eps).sqrt()),
        ),
        Mistake(
            "the sum of the squares, not their mean",
            "rmsnorm",
            "By hand",
            computes(
                lambda x, w, eps: w * x / (mean_square(x) * x.shape[-1] + eps).sqrt()
            ),
        ),
        Mistake(
            "no root: divided by the mean square",
            "rmsnorm",
            "By hand",
            computes(lambda x, w, eps: w * x / (mean_square(x) + eps)),
        ),
        Mistake(
            "one mean over all tokens",
            "rmsnorm",
            "By hand",
            computes(lambda x, w, eps: w * x / (x.square().mean() + eps).sqrt()),
        ),
    ),
)


YARN = RopeScaling(
    type="yarn",
    factor=8,
    original_max_position_embeddings=64,
    beta_fast=8,
    mscale=0.707,
    mscale_all_dim=1.0,
)
PAIRS, ANGLES = "Which features form a pair?", "Turn pairs of features"
LONGER = "Longer than it was trained for"
MSCALES = "What are mscale and mscale_all_dim?"


def positions() -> Values:
    """Of two sequences, which do not begin at 0."""
    return torch.tensor([[3, 4, 5, 6, 7, 8], [90, 91, 95, 200, 4001, 4002]])


def tables(functions: Any, inputs: dict[str, Any]) -> Answers:
    """Everything a case of rotary positions asks for."""
    if "q_pe" in inputs:
        turned = functions.apply_rotary(**inputs)
        if not isinstance(turned, tuple) or len(turned) != 2:
            said = f"apply_rotary returned a {type(turned).__name__}"
            raise WrongError(f"{said}; wanted the queries and the keys")
        return {"queries": turned[0], "keys": turned[1]}
    if "position_ids" not in inputs:
        value = functions.softmax_temperature(**inputs)
        if not isinstance(value, int | float):
            said = f"softmax_temperature returned a {type(value).__name__}"
            raise WrongError(f"{said}; wanted a number")
        return {"temperature": torch.tensor(float(value), dtype=torch.float64)}
    pair = functions.rotary_tables(**inputs, dtype=torch.float64)
    if not isinstance(pair, tuple) or len(pair) != 2:
        said = f"rotary_tables returned a {type(pair).__name__}"
        raise WrongError(f"{said}; wanted cosines and sines")
    return {"cosines": pair[0], "sines": pair[1]}


def rotation() -> dict[str, Any]:
    """What `apply_rotary` takes, with tables of the reference."""
    cos, sin = rope.rotary_tables(positions(), 8, 10000.0, dtype=torch.float64)
    q_pe, k_pe = normal(2, 3, 6, 8, seed=5), normal(2, 6, 8, seed=6)
    return {"q_pe": q_pe, "k_pe": k_pe, "cos": cos, "sin": sin}


def angles(
    dim: int, scaling: RopeScaling | None = None
) -> Callable[[], dict[str, Any]]:
    """What `rotary_tables` takes."""
    fields = {"dim": dim, "theta": 10000.0, "scaling": scaling}
    return lambda: {"position_ids": positions(), **fields}


def has(name: str, value: Callable[..., Any]) -> Plant:
    """Another function of this name."""
    return lambda functions: setattr(functions, name, value)


def rotates(
    turn: Callable[[Values, Values, Values], Values], keys: bool = True
) -> Plant:
    """Queries, and if asked for keys too, rotated in another way."""

    def apply_rotary(q_pe: Any, k_pe: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        queries = turn(q_pe, cos[:, None], sin[:, None])
        return queries, turn(k_pe, cos, sin) if keys else k_pe

    return has("apply_rotary", apply_rotary)


def tabled(change: Callable[..., tuple[Values, Values]]) -> Plant:
    """``change`` makes cosines and sines of position_ids, dim, theta, scaling and dtype."""
    return has("rotary_tables", change)


def of_frequencies(frequencies: Callable[[int, float, Any], Values]) -> Plant:
    """Tables of other frequencies, each from dim, theta and scaling; no magnitude is
    changed but YaRN's."""

    def make(
        position_ids: Any, dim: Any, theta: Any, scaling: Any = None, **_: Any
    ) -> Any:
        size = magnitude(scaling)
        turned = position_ids[..., None].double() * frequencies(dim, theta, scaling)
        return turned.cos() * size, turned.sin() * size

    return tabled(make)


def magnitude(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies cosines and sines by."""
    if scaling is None:
        return 1.0
    up = rope.yarn_mscale(scaling.factor, scaling.mscale)
    return up / rope.yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def inverse(dim: int, theta: float, scaling: Any = None) -> Values:
    """The reference's frequencies in float64."""
    return rope.inverse_frequencies(dim, theta, scaling, dtype=torch.float64)


def without_magnitude(*args: Any, **kwargs: Any) -> tuple[Values, Values]:
    """Tables in which YaRN changes angles alone."""
    cos, sin = rope.rotary_tables(*args, **kwargs)
    size = magnitude(kwargs.get("scaling", args[3] if len(args) > 3 else None))
    return cos / size, sin / size


def only_up(*args: Any, **kwargs: Any) -> tuple[Values, Values]:
    """Tables with m(mscale), not divided by m(mscale_all_dim)."""
    scaling = kwargs.get("scaling")
    cos, sin = without_magnitude(*args, **kwargs)
    up = 1.0 if scaling is None else rope.yarn_mscale(scaling.factor, scaling.mscale)
    return cos * up, sin * up


def from_zero(position_ids: Any, *args: Any, **kwargs: Any) -> tuple[Values, Values]:
    """Tables that only look at how many positions there are."""
    counted = torch.arange(position_ids.shape[-1]).expand(position_ids.shape)
    return rope.rotary_tables(counted, *args, **kwargs)


def root_of_temperature(scaling: RopeScaling | None) -> float:
    """m, not its square."""
    return rope.softmax_temperature(scaling) ** 0.5


ROPE = Part(
    name="rope",
    module="rope",
    defines=("rotary_tables", "apply_rotary", "softmax_temperature"),
    answer=tables,
    yours=(
        "rope.inverse_frequencies",
        "rope.yarn_frequencies",
        "rope.yarn_mscale",
        "rope.rotate_interleaved",
        "rope.rotate_half_split",
    ),
    cases=(
        Case("cosines and sines", 3, angles(8)),
        Case("rotation", 3, rotation),
        Case("YaRN's cosines and sines", 4, angles(32, YARN)),
        Case("YaRN's temperature", 1, given(scaling=lambda: YARN)),
        Case("temperature without scaling", 1, given(scaling=lambda: None)),
    ),
    mistakes=(
        Mistake("pairs half-split", "rope", PAIRS, rotates(rope.rotate_half_split)),
        Mistake(
            "rotated the other way",
            "rope",
            ANGLES,
            rotates(lambda x, cos, sin: rope.rotate_interleaved(x, cos, -sin)),
        ),
        Mistake(
            "the key not rotated",
            "rope",
            "Only the distance counts",
            rotates(rope.rotate_interleaved, keys=False),
        ),
        Mistake(
            "positions counted from 0, position_ids not read",
            "rope",
            "The code",
            tabled(from_zero),
        ),
        Mistake(
            "the exponent is i / dim, not 2i / dim",
            "rope",
            ANGLES,
            of_frequencies(lambda dim, theta, s: inverse(dim, theta**0.5, s)),
        ),
        Mistake(
            "YaRN's angles left out",
            "rope",
            LONGER,
            of_frequencies(lambda dim, theta, s: inverse(dim, theta)),
        ),
        Mistake(
            "all angles divided by the factor, as in linear scaling",
            "rope",
            LONGER,
            of_frequencies(
                lambda dim, theta, s: inverse(dim, theta) / (s.factor if s else 1)
            ),
        ),
        Mistake(
            "YaRN's magnitude left out: m(mscale) / m(mscale_all_dim)",
            "rope",
            MSCALES,
            tabled(without_magnitude),
        ),
        Mistake(
            "the magnitude is m(mscale), not divided by m(mscale_all_dim)",
            "rope",
            MSCALES,
            tabled(only_up),
        ),
        Mistake(
            "temperature left out",
            "rope",
            MSCALES,
            has("softmax_temperature", lambda scaling: 1.0),
        ),
        Mistake(
            "the temperature is m, not its square",
            "rope",
            MSCALES,
            has("softmax_temperature", root_of_temperature),
        ),
    ),
)


# Latent attention

SMALL = replace(
    DeepseekV2Config.tiny(),
    hidden_size=96,
    q_lora_rank=None,
    aux_loss_alpha=0.0,
    _attn_implementation="eager",
)
"""Heads with N = V, so that exchanged matrices fit."""
ODD = replace(SMALL, q_lora_rank=40, v_head_dim=12, rms_norm_eps=0.1)
"""N, R and V differ, and the layer's epsilon is large enough to be seen."""
LONG = replace(SMALL, v_head_dim=12, rope_scaling=YARN, max_position_embeddings=512)


def changed(change: Callable[[Any], Any]) -> Plant:
    """A mistake that lies in the module, whatever its change returns."""

    def plant(module: Any) -> None:
        change(module)

    return plant


def inside(name: str, value: Any) -> Plant:
    """Another function in the reference's attention."""
    return lambda _: patch.object(mla, name, value)


def scaled(scale: Callable[[Any], float], temperature: bool = True) -> Plant:
    """Scores multiplied by something else."""

    def change(module: Any) -> None:
        module.softmax_scale = scale(module)
        if temperature:
            module.softmax_scale *= rope.softmax_temperature(module.config.rope_scaling)

    return changed(change)


def identity(name: str) -> Plant:
    """A norm of the attention left out, where there is one."""

    def change(module: Any) -> None:
        if hasattr(module, name):
            setattr(module, name, nn.Identity())

    return changed(change)


def layers_epsilon(module: Any) -> None:
    """The norms of the latents take the layer's epsilon."""
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if hasattr(module, name):
            getattr(module, name).variance_epsilon = module.config.rms_norm_eps


def seen(mask: Callable[[int, int], Values]) -> Plant:
    """Another mask, made from the numbers of queries and keys."""
    attend = attention.attend

    def wrong(
        q: Any, k: Any, v: Any, visible: Visibility, *rest: Any, **how: Any
    ) -> Any:
        keep = mask(visible.seq, visible.kv_seq)[None, None]
        own = replace(visible, attention_mask=keep)
        return attend(q, k, v, own, *rest, **how)

    return inside("attend", wrong)


def everything(queries: int, keys: int) -> Values:
    """No mask."""
    return torch.ones(queries, keys, dtype=torch.bool)


def shifted(by: int) -> Callable[[int, int], Values]:
    """Causal order, off by some keys."""
    return lambda queries, keys: everything(queries, keys).tril(keys - queries + by)


def top_left(queries: int, keys: int) -> Values:
    """Causal order as if the first query stood at the first key."""
    return everything(queries, keys).tril()


def without_position(part: str) -> Plant:
    """The query's or the key's features left unrotated, or the scores' part 0."""
    apply = rope.apply_rotary

    def wrong(q_pe: Any, k_pe: Any, cos: Any, sin: Any) -> tuple[Values, Values]:
        queries, keys = apply(q_pe, k_pe, cos, sin)
        if part == "lost":
            return queries * 0, keys
        return q_pe if part in (
            "query",
            "both",
        ) else queries, k_pe if part != "query" else keys

    return inside("apply_rotary", wrong)


def placed(place: Callable[[Values, int], Values]) -> Plant:
    """Other positions, made from those of a call and its number of keys."""
    made = rope.rotary_tables

    def wrong(position_ids: Values, *args: Any, kv_length: int, **kwargs: Any) -> Any:
        return made(
            place(position_ids, kv_length), *args, kv_length=kv_length, **kwargs
        )

    return inside("rotary_tables", wrong)


def unstretched(module: Any) -> AbstractContextManager[Any]:
    """YaRN's angles and magnitude left out; its temperature stays."""
    made = rope.rotary_tables

    def wrong(ids: Any, dim: Any, theta: Any, scaling: Any, **kwargs: Any) -> Any:
        return made(ids, dim, theta, None, **kwargs)

    return patch.object(mla, "rotary_tables", wrong)


def without_yarn(module: Any) -> AbstractContextManager[Any]:
    """Neither angles nor temperature."""
    module.softmax_scale = module.qk_head_dim**-0.5
    return unstretched(module)


def exchanged(module: Any) -> None:
    """The rows of each head read as values first."""
    N, V = module.qk_nope_head_dim, module.v_head_dim
    rows = module.kv_b_proj.weight.view(module.num_heads, N + V, -1)
    with torch.no_grad():
        rows.copy_(torch.cat((rows[:, V:], rows[:, :V]), dim=1) if N == V else rows)


def split_in_the_middle(module: Any) -> None:
    """All keys' rows first and all values' rows after them."""
    N, V, H = module.qk_nope_head_dim, module.v_head_dim, module.num_heads
    rows = module.kv_b_proj.weight
    keys, values = rows[: H * N].view(H, N, -1), rows[H * N :].view(H, V, -1)
    with torch.no_grad():
        rows.copy_(torch.cat((keys, values), dim=1).flatten(0, 1))


def heads_not_brought_back(module: Any) -> None:
    """The result viewed as (B, S, H · V) before its axes are exchanged."""
    H = module.num_heads

    def wrong(_: Any, args: tuple[Values]) -> tuple[Values]:
        B, S, wide = args[0].shape
        heads = args[0].view(B, S, H, wide // H).transpose(1, 2)
        return (heads.reshape(B, S, wide),)

    module.o_proj.register_forward_pre_hook(wrong)


def width(*names: str) -> Callable[[Any], float]:
    """One over the root of a sum of widths."""
    return lambda module: sum(getattr(module, name) for name in names) ** -0.5


NOPE, ROPE_WIDTH, LATENT = "qk_nope_head_dim", "rotary_dim", "kv_lora_rank"
_RIGHT_SCALE = width(NOPE, ROPE_WIDTH)
CODE, NORM = "The code", "The norm on the latent"
ABSORBED = "Why the rope key stays outside"

BOTH = (
    Mistake("pairs half-split", "rope", PAIRS, lambda _: halves()),
    Mistake("temperature left out", "rope", MSCALES, scaled(_RIGHT_SCALE, False)),
    Mistake("the norm on the latent left out", "mla", NORM, identity("kv_a_layernorm")),
    Mistake("no causal mask", "overview", "Symptoms", seen(everything)),
    Mistake(
        "scores divided by the root of C + R, the absorbed width",
        "decoding",
        "Moving a matrix",
        scaled(width(LATENT, ROPE_WIDTH)),
    ),
    Mistake(
        "scores divided by the root of N, without the rope features",
        "mla",
        CODE,
        scaled(width(NOPE)),
    ),
    Mistake("the rope key not rotated", "mla", "Symptoms", without_position("key")),
    Mistake("no position at all", "rope", "Symptoms", without_position("both")),
    Mistake(
        "the rope part of the scores lost", "mla", "Symptoms", without_position("lost")
    ),
    Mistake(
        "the up-projections of keys and values exchanged",
        "decoding",
        "Symptoms",
        changed(exchanged),
    ),
    Mistake(
        "kv_b_proj split in the middle, not head by head",
        "decoding",
        "Symptoms",
        changed(split_in_the_middle),
    ),
)
"""Mistakes of latent attention with and without a cache."""


def halves() -> AbstractContextManager[Any]:
    """Pairs half-split, wherever features are rotated."""
    return patch.object(rope, "rotate_interleaved", rope.rotate_half_split)


MLA = Part(
    name="mla",
    module="mla",
    defines=("DeepseekV2Attention",),
    answer=output,
    yours=("attention.attend", "attention.attend_sdpa"),
    cases=(
        Case("direct queries", 6, tokens(2, 7, 96, seed=7), (SMALL, 0)),
        Case("compressed queries", 6, tokens(1, 9, 96, seed=8, size=0.3), (ODD, 0)),
        Case("YaRN", 6, tokens(2, 6, 96, seed=9), (LONG, 0)),
    ),
    mistakes=(
        *BOTH,
        Mistake(
            "the norm on the query's latent left out",
            "mla",
            "Why compress the queries?",
            identity("q_a_layernorm"),
        ),
        Mistake(
            "the layer's epsilon in the norms of the latents",
            "rmsnorm",
            "Symptoms",
            changed(layers_epsilon),
        ),
        Mistake(
            "a token does not see itself", "overview", "Symptoms", seen(shifted(-1))
        ),
        Mistake("a token sees the next one", "overview", "Symptoms", seen(shifted(1))),
        Mistake("YaRN left out", "rope", LONGER, without_yarn),
        Mistake("YaRN's angles left out", "rope", LONGER, unstretched),
        Mistake(
            "YaRN's magnitude left out: m(mscale) / m(mscale_all_dim)",
            "rope",
            MSCALES,
            inside("rotary_tables", without_magnitude),
        ),
        Mistake(
            "scores not scaled",
            "overview",
            "Attention, recalled",
            scaled(lambda _: 1.0),
        ),
        Mistake(
            "heads not brought back beside their features before o_proj",
            "overview",
            "Attention, recalled",
            changed(heads_not_brought_back),
        ),
    ),
)


# Decoding

CONTEXT = 255
"""Tokens of the prompt where costs are measured. One more fills ``max_position_embeddings``,
so that a cache of that room is full."""


def decode(module: Any, inputs: dict[str, Any]) -> Answers:
    """Outputs of calls one after another, each with the cache that the last returned; or
    what the last call costs."""
    past, outputs, before, flops = None, [], elements(module), torch.zeros(())
    tokens = inputs["hidden_states"]
    for call in tokens.split(inputs["calls"], dim=1):
        result: Any = None

        def run(call: Values = call, past: Any = past) -> None:
            nonlocal result
            result = module(call, past_key_value=past, use_cache=True)

        if inputs["cost"] == "FLOPs":
            flops = operations(run)
        else:
            run()
        outputs.append(first(result))
        past = result[-1] if isinstance(result, tuple) and len(result) > 1 else None
        if past is None:
            said = "forward(..., use_cache=True) returned no cache"
            raise WrongError(f"{said}; wanted (output, ..., cache)")
    if inputs["cost"] == "FLOPs":
        return {"FLOPs": flops}
    if inputs["cost"]:
        held = elements(past, module) - before
        each = held / (tokens.shape[0] * tokens.shape[1])
        return {"elements per token": torch.tensor(each, dtype=torch.float64)}
    return {f"call {i}": out for i, out in enumerate(outputs, 1)}


def calls(
    *lengths: int, seed: int, size: float = 1.0, cost: str = ""
) -> Callable[[], dict[str, Any]]:
    """Tokens, and how many of them each call gets."""
    made = partial(normal, 2, sum(lengths), 96, seed=seed, size=size)
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

    return changed(change)


def keys_and_values(config: DeepseekV2Config) -> int:
    """Elements per token of all heads' keys and values."""
    wide = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return config.num_attention_heads * wide


def rope_key_of_each_head(config: DeepseekV2Config) -> int:
    """Elements per token where the shared key is stored once per head."""
    return config.kv_lora_rank + config.num_attention_heads * config.qk_rope_head_dim


ABSORB = replace(SMALL, mla_form="absorbed")
ABSORB_ODD = replace(ODD, mla_form="absorbed", rope_scaling=YARN)
DECODING = Part(
    name="decoding",
    module="mla",
    defines=("DeepseekV2Attention",),
    answer=decode,
    yours=("attention.attend", "attention.attend_sdpa"),
    cases=(
        Case("a prompt, then tokens", 5, calls(5, 1, 1, seed=10), (ABSORB, 0)),
        Case(
            "several tokens after a prompt", 5, calls(4, 3, 1, seed=11), (ABSORB_ODD, 0)
        ),
        Case(
            "elements per token in the cache",
            4,
            calls(CONTEXT, 1, seed=12, cost="cache"),
            (ABSORB_ODD, 0),
            at_most=1.3,
        ),
        Case(
            "FLOPs of a decoded token",
            4,
            calls(CONTEXT, 1, seed=13, cost="FLOPs"),
            (ABSORB_ODD, 0),
            at_most=2.0,
        ),
    ),
    mistakes=(
        *BOTH,
        Mistake(
            "positions restart in each call",
            "decoding",
            "Symptoms",
            placed(lambda ids, _: ids - ids[:, :1]),
        ),
        Mistake(
            "positions one too far after a cache",
            "decoding",
            "Symptoms",
            placed(lambda ids, keys: ids + int(keys > ids.shape[1])),
        ),
        Mistake(
            "mask aligned at the top left: the first query at the first key",
            "symptoms",
            "Causal alignment",
            seen(top_left),
        ),
        Mistake(
            "expanded cache: all heads' keys and values are cached, not the latent",
            "mla",
            "What must a layer cache?",
            also_holds(keys_and_values),
        ),
        Mistake(
            "the rope key is cached once per head",
            "mla",
            "How many bytes?",
            also_holds(rope_key_of_each_head),
        ),
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
            changed(lambda module: setattr(module, "form", "expanded")),
        ),
    ),
)
