"""The part of latent attention for a prompt: its cases and known mistakes, and those that it shares with decoding."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from dsv2_ref import attention, mla, rope
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.grading.answers import Values, output, tokens
from dsv2_ref.grading.part import Case, Mistake, Part, Plant
from dsv2_ref.grading.parts.rope import ANGLES, LONGER, MSCALES, PAIRS, YARN, unmagnified
from dsv2_ref.masks import Visibility

SMALL = replace(
    DeepseekV2Config.tiny(), hidden_size=88, q_lora_rank=None, aux_loss_alpha=0.0, _attn_implementation="eager"
)
"""Heads with N = V, so that matrices that were exchanged fit however it was done; and wider than D / H, as the family's
are, so that nobody's scale is right by chance."""
ODD = replace(SMALL, q_lora_rank=40, v_head_dim=12, rms_norm_eps=0.1, rope_theta=50000.0)
"""N, R and V differ, theta is not the usual one, and the layer's epsilon is large enough to be seen."""
LONG = replace(SMALL, v_head_dim=12, rope_scaling=YARN, max_position_embeddings=512)


def inside(name: str, value: Any, module: Any = mla) -> Plant:
    """Another function in the reference's attention, or in a module that it uses."""
    return lambda _: patch.object(module, name, value)


def scaled(scale: Callable[[Any], float]) -> Plant:
    """Scores multiplied by something else than one over the root of N + R; YaRN's temperature stays as it is, right or
    wrong."""

    def change(module: Any) -> None:
        module.softmax_scale *= scale(module) * module.qk_head_dim**0.5

    return change


def without_temperature(module: Any) -> None:
    """Scores not multiplied by YaRN's temperature."""
    module.softmax_scale /= rope.softmax_temperature(module.config.rope_scaling)


def identity(name: str) -> Plant:
    """A norm of the attention left out, where there is one."""

    def change(module: Any) -> None:
        if hasattr(module, name):
            setattr(module, name, nn.Identity())

    return change


def layers_epsilon(module: Any) -> None:
    """The norms of the latents take the layer's epsilon."""
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if hasattr(module, name):
            getattr(module, name).variance_epsilon = module.config.rms_norm_eps


def seen(mask: Callable[[int, int], Values]) -> Plant:
    """Another mask, made from the numbers of queries and keys. What sees nothing is NaN: each submission makes something
    else of it."""
    attend = attention.attend

    def wrong(q: Any, k: Any, v: Any, visible: Visibility, *rest: Any, **how: Any) -> Any:
        keep = mask(visible.seq, visible.kv_seq)[None, None]
        own = replace(visible, attention_mask=keep)
        out, weights = attend(q, k, v, own, *rest, **how)
        return out.masked_fill(~keep.any(-1, keepdim=True), torch.nan), weights

    return inside("attend", wrong)


def weighs(weights: Callable[[Values, Values], Values]) -> Plant:
    """Attention weights made otherwise, of the scores and of what may be seen."""

    def wrong(q: Any, k: Any, v: Any, visible: Visibility, scale: float, *_: Any, **__: Any) -> tuple[Values, None]:
        keep = visible.block(0, visible.seq)[0]
        scores = q @ k.mT * scale
        return weights(scores, everything(*scores.shape[-2:]) if keep is None else keep) @ v, None

    return inside("attend", wrong)


def of_zeros(scores: Values, keep: Values) -> Values:
    """What must not be seen has the score 0, and e^0 = 1 of the sum."""
    return scores.masked_fill(~keep, 0).softmax(-1)


def hidden_late(scores: Values, keep: Values) -> Values:
    """Of a softmax over all keys, what must not be seen set to 0."""
    return scores.softmax(-1).masked_fill(~keep, 0)


def everything(queries: int, keys: int) -> Values:
    """No mask."""
    return torch.ones(queries, keys, dtype=torch.bool)


def shifted(by: int) -> Callable[[int, int], Values]:
    """Causal order, off by some keys."""
    return lambda queries, keys: everything(queries, keys).tril(keys - queries + by)


def ones(queries: int, keys: int) -> Values:
    """A mask that is added, of ones and zeros: it hides nothing."""
    return shifted(0)(queries, keys).double()


def top_left(queries: int, keys: int) -> Values:
    """Causal order as if the first query stood at the first key."""
    return everything(queries, keys).tril()


def without_position(part: str) -> Plant:
    """The key's features left unrotated, or the query's, or both, or the scores' part 0."""
    apply = rope.apply_rotary

    def wrong(q_pe: Any, k_pe: Any, cos: Any, sin: Any) -> tuple[Values, Values]:
        queries, keys = apply(q_pe, k_pe, cos, sin)
        if part == "lost":
            return queries * 0, keys
        return queries if part == "key" else q_pe, keys if part == "query" else k_pe

    return inside("apply_rotary", wrong)


def remade(change: Callable[..., Any]) -> Plant:
    """Tables that ``change`` makes with what makes them now, perhaps with another mistake already."""
    return lambda _: patch.object(rope, "rotary_tables", partial(change, vars(rope)["rotary_tables"]))


def placed(place: Callable[[Values, int], Values]) -> Plant:
    """Other positions, made from those of a call and its number of keys."""

    def change(made: Any, ids: Values, *args: Any, kv_length: int, **kwargs: Any) -> Any:
        return made(place(ids, kv_length), *args, kv_length=kv_length, **kwargs)

    return remade(change)


def tabled(of: Callable[[float, Any], tuple[float, Any]]) -> Plant:
    """Tables of another theta and another scaling."""

    def change(made: Any, ids: Values, dim: int, theta: float, scaling: Any, **kwargs: Any) -> Any:
        return made(ids, dim, *of(theta, scaling), **kwargs)

    return remade(change)


def unstretched(module: Any) -> AbstractContextManager[Any] | None:
    """YaRN's angles and magnitude left out; its temperature stays."""
    return tabled(lambda theta, _: (theta, None))(module)


def without_yarn(module: Any) -> AbstractContextManager[Any] | None:
    """Neither angles nor temperature."""
    without_temperature(module)
    return unstretched(module)


def exchanged(module: Any) -> None:
    """The rows of each head read as values first."""
    N, V = module.qk_nope_head_dim, module.v_head_dim
    rows = module.kv_b_proj.weight.view(module.num_heads, N + V, -1)
    with torch.no_grad():
        rows.copy_(torch.cat((rows[:, V:], rows[:, :V]), dim=1))


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
CODE, NORM = "The code", "The norm on the latent"

BOTH = (
    Mistake("pairs half-split", "rope", PAIRS, inside("rotate_interleaved", rope.rotate_half_split, rope)),
    Mistake("temperature left out", "rope", MSCALES, without_temperature),
    Mistake("the norm on the latent left out", "mla", NORM, identity("kv_a_layernorm")),
    Mistake("no causal mask", "overview", "Symptoms", seen(everything)),
    Mistake("a mask of ones and zeros added to the scores", "overview", "Symptoms", seen(ones)),
    Mistake("scores hidden by 0, not by minus infinity", "overview", "Symptoms", weighs(of_zeros)),
    Mistake("masked after the softmax: the weights no longer sum to 1", "overview", "Symptoms", weighs(hidden_late)),
    Mistake(
        "scores divided by the root of C + R, the absorbed width",
        "decoding",
        "Moving a matrix",
        scaled(width(LATENT, ROPE_WIDTH)),
    ),
    Mistake("scores divided by the root of N, without the rope features", "mla", CODE, scaled(width(NOPE))),
    Mistake("scores divided by the root of V, the width of a value", "mla", CODE, scaled(width("v_head_dim"))),
    Mistake(
        "scores divided by the root of D / H, which is no width of MLA's heads",
        "mla",
        CODE,
        scaled(lambda module: (module.config.hidden_size // module.num_heads) ** -0.5),
    ),
    Mistake("the rope key not rotated", "mla", "Symptoms", without_position("key")),
    Mistake("the query not rotated", "rope", "Only the distance counts", without_position("query")),
    Mistake("no position at all", "rope", "Symptoms", without_position("both")),
    Mistake("the rope part of the scores lost", "mla", "Symptoms", without_position("lost")),
    Mistake("the up-projections of keys and values exchanged", "decoding", "Symptoms", exchanged),
    Mistake("kv_b_proj split in the middle, not head by head", "decoding", "Symptoms", split_in_the_middle),
    Mistake("the norm on the query's latent left out", "mla", "Why compress the queries?", identity("q_a_layernorm")),
    Mistake("the layer's epsilon in the norms of the latents", "rmsnorm", "Symptoms", layers_epsilon),
    Mistake("a token does not see itself", "overview", "Symptoms", seen(shifted(-1))),
    Mistake("a token sees the next one", "overview", "Symptoms", seen(shifted(1))),
    Mistake("theta is 10000, whatever rope_theta is", "rope", ANGLES, tabled(lambda _, scaling: (10000.0, scaling))),
    Mistake("YaRN left out", "rope", LONGER, without_yarn),
    Mistake("YaRN's angles left out", "rope", LONGER, unstretched),
    Mistake(
        "YaRN's magnitude left out: m(mscale) / m(mscale_all_dim)",
        "rope",
        MSCALES,
        remade(unmagnified),
    ),
    Mistake("scores not scaled", "overview", "Attention, recalled", scaled(lambda _: 1.0)),
    Mistake(
        "heads not brought back beside their features before o_proj",
        "overview",
        "Attention, recalled",
        heads_not_brought_back,
    ),
)
"""Mistakes of latent attention with and without a cache."""

ATTENTION = (
    "attention.attend",
    "fast.sdpa.attend_sdpa",
    "fast.products.attend_products",
    "fast.cpu.attend_blocks",
    "fast.cpu.attend_rounded_up",
    "fast.cpu.attend_fused",
    "fast.cpu.attend_in_float32",
)
"""What weighs values by scores in the package."""

MLA = Part(
    name="mla",
    module="mla",
    defines=("DeepseekV2Attention",),
    takes=("config", "layer_idx"),
    answer=output,
    yours=ATTENTION,
    cases=(
        Case("direct queries", 6, tokens(2, 7, 88, seed=7), (SMALL, 0)),
        Case("compressed queries", 6, tokens(1, 9, 88, seed=8, size=0.3), (ODD, 0)),
        Case("YaRN", 6, tokens(2, 6, 88, seed=9), (LONG, 0)),
    ),
    mistakes=BOTH,
)
