"""Policies that drop rows of a cache or leave them unread: by hand, against a full cache under a mask, and in generation."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM, LatentCache
from dsv2_ref.cache import LayerCache
from dsv2_ref.forget import HeavyHitters, chosen_mask, window, window_mask
from dsv2_ref.records import QuantizedLatentCache
from tests.peers import SMALL, YARN, assert_close, randomised, tokens

GROUPED = replace(SMALL, use_mla=False, num_key_value_heads=2)
LAYERS: dict[str, tuple[DeepseekV2Config, str | None]] = {
    "expanded": (replace(SMALL, mla_form="expanded"), None),
    "absorbed": (replace(SMALL, mla_form="absorbed"), None),
    "yarn": (replace(SMALL, rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}), None),
    "fp8": (replace(SMALL, mla_form="absorbed"), "fp8"),
    "int4": (replace(SMALL, mla_form="expanded"), "int4"),
    "mha": (GROUPED, None),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
SEQ = 23


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[DeepseekV2DecoderLayer, Callable[[], LayerCache]]:
    """A layer that can give its weights, and what makes an empty cache of its kind."""
    config, format = LAYERS[name]
    layer = randomised(DeepseekV2DecoderLayer(replace(config, _attn_implementation="eager"), 1), dtype)
    settings = (format,) if format else ()
    return layer.requires_grad_(False), lambda: layer.self_attn.empty_cache(2, 0, *settings)


def stream(seq: int) -> Tensor:
    """Tokens of two sequences, of which no derivatives are wanted."""
    return tokens(2, seq, torch.float64).detach()


def numbered(length: int, batch: int = 2) -> LatentCache:
    """A cache whose rows hold the numbers of their tokens."""
    rows = torch.arange(length, dtype=torch.float32)[:, None].expand(batch, -1, 3)
    return LatentCache.empty(0, batch, (3,), dtype=torch.float32, device="cpu").append(rows)


def held(cache: LayerCache) -> list[list[int]]:
    """The numbers of the rows of each sequence."""
    return cache.tokens[..., 0].int().tolist()


# Windows


@pytest.mark.parametrize(("sinks", "last", "kept"), [(0, 3, [6, 7, 8]), (2, 3, [0, 1, 6, 7, 8]), (2, 0, [0, 1])])
def test_a_window_keeps_the_first_and_the_last(sinks: int, last: int, kept: list[int]) -> None:
    cache = numbered(9)
    shorter = window(cache, sinks, last)
    assert held(shorter) == [kept, kept]
    assert (shorter.length, shorter.seen, shorter.layer_idx) == (len(kept), 9, cache.layer_idx)
    assert shorter.nbytes == len(kept) * 2 * 3 * 4
    assert shorter.reserved_nbytes == shorter.nbytes < cache.reserved_nbytes  # memory is given back
    assert held(cache) == [list(range(9))] * 2


@pytest.mark.parametrize(("sinks", "last"), [(0, 9), (4, 5), (9, 9), (100, 0)])
def test_a_window_wider_than_the_cache_is_the_cache_itself(sinks: int, last: int) -> None:
    cache = numbered(9)
    assert window(cache, sinks, last) is cache


@every_layer
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_window_cache_decodes_as_the_full_cache_under_its_mask(name: str, sinks: int, chunk: int) -> None:
    """Row by row and in chunks, which need the mask themselves. float64 apart, both read the same rows."""
    layer, empty = made(name)
    x, last = stream(SEQ), 6
    full, short = empty(), empty()
    for start in range(0, SEQ, chunk):
        new = x[:, start : start + chunk]
        seq = new.shape[1]
        mask = window_mask(seq, start + seq, sinks, last)
        expected, full = layer(new, mask, past_key_value=full, use_cache=True)
        mask = window_mask(seq, len(short) + seq, sinks, last) if chunk > 1 else None
        actual, short = layer(new, mask, past_key_value=short, use_cache=True)
        short = window(short, sinks, last - 1)
        assert_close(actual, expected, f"tokens from {start}")
    assert (len(full), full.seen, len(short), short.seen) == (SEQ, SEQ, sinks + last - 1, SEQ)
    assert isinstance(short, QuantizedLatentCache) == (LAYERS[name][1] is not None)
    assert short.nbytes * SEQ == full.nbytes * (sinks + last - 1)


@every_layer
def test_a_position_lost_with_its_row_is_another_output(name: str) -> None:
    """The planted fault: a cache that counts positions by its rows. The next token lands beside the wrong neighbours."""
    layer, empty = made(name)
    x = stream(SEQ + 1)
    _, cache = layer(x[:, :SEQ], past_key_value=empty(), use_cache=True)
    short = window(cache, 2, 6)
    right = layer(x[:, SEQ:], past_key_value=short)[0]
    assert_close(right, layer(x[:, SEQ:], window_mask(1, SEQ + 1, 2, 7), past_key_value=cache)[0], "the next token")
    short.seen = short.length
    wrong = layer(x[:, SEQ:], past_key_value=short)[0]
    assert (wrong - right).norm() > 1e-3 * right.norm()


def test_rows_in_another_order_are_the_same_attention() -> None:
    """Positions are in the rows, so their order is free."""
    layer, empty = made("absorbed")
    x = stream(SEQ + 1)
    _, cache = layer(x[:, :SEQ], past_key_value=empty(), use_cache=True)
    shuffled = cache.keep(torch.randperm(SEQ, generator=torch.Generator().manual_seed(0))[None])
    expected = layer(x[:, SEQ:], past_key_value=cache)[0]
    assert_close(layer(x[:, SEQ:], past_key_value=shuffled)[0], expected, "the next token")


def test_the_masks_of_windows() -> None:
    mask = window_mask(3, 6, 1, 2)
    assert mask.shape == (1, 1, 3, 6)
    assert mask[0, 0].int().tolist() == [[1, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]]
    assert torch.equal(window_mask(6, 6, 0, 6), torch.ones(1, 1, 6, 6).bool().tril())


# Heavy hitters

ROWS = [[1.0], [1 / 2, 1 / 2], [1 / 2, 1 / 4, 1 / 4], [1 / 4] * 4]
"""Attention of four tokens in a row, as the book's chapter has them by hand."""


def test_heavy_hitters_by_hand() -> None:
    """Totals 2.25, 1, 0.5, 0.25: with a budget of three and the newest kept, the third token goes."""
    cache, policy = numbered(0, 1), HeavyHitters(budget=3, recent=1)
    for token, row in enumerate(ROWS):
        new = torch.full((1, 1, 3), float(token))
        cache = policy.step(cache.append(new), torch.tensor(row)[None, None, None])
    assert policy.totals is not None
    assert policy.totals.tolist() == [[2.25, 1.0, 0.25]]
    assert held(cache) == [[0, 1, 3]]
    assert (cache.length, cache.seen) == (3, 4)


def test_one_call_counts_as_token_by_token() -> None:
    """The totals of a prompt, from one call with all its queries and heads, are those of its tokens one after another."""
    layer, empty = made("absorbed")
    x, budget = stream(SEQ), 9
    _, weights, whole = layer(x, past_key_value=empty(), output_attentions=True, use_cache=True)
    at_once = HeavyHitters(budget, 4)
    shorter = at_once.step(whole, weights)
    patient, cache = HeavyHitters(SEQ, 4), empty()
    for token in range(SEQ):
        new = x[:, token : token + 1]
        _, weights, cache = layer(new, past_key_value=cache, output_attentions=True, use_cache=True)
        assert patient.step(cache, weights) is cache
    assert patient.totals is not None
    assert at_once.totals is not None
    best = patient.totals[:, : SEQ - 4].topk(budget - 4).indices.sort().values
    rows = torch.cat((best, torch.arange(SEQ - 4, SEQ).expand(2, -1)), dim=1)
    assert_close(at_once.totals, patient.totals.gather(1, rows), "totals")
    assert_close(shorter.tokens, cache.keep(rows).tokens, "rows")


@every_layer
def test_heavy_hitters_decode_as_the_full_cache_under_their_mask(name: str) -> None:
    """Each sequence keeps rows of its own; a mask that hides the others from a full cache gives the same."""
    layer, empty = made(name)
    for part, weight in layer.self_attn.named_parameters():
        if part in ("q_b_proj.weight", "q_proj.weight"):
            weight *= 8  # sharper attention, in which sequences differ
    x, policy = stream(SEQ), HeavyHitters(12, 6)
    full, short = empty(), empty()
    rows = torch.empty(2, 0, dtype=torch.int64)  # the tokens that the short cache holds
    for token in range(SEQ):
        new, rows = x[:, token : token + 1], torch.cat((rows, torch.full((2, 1), token)), dim=1)
        mask = chosen_mask(rows[:, None], token + 1)
        expected, full = layer(new, mask, past_key_value=full, use_cache=True)
        actual, weights, longer = layer(new, past_key_value=short, output_attentions=True, use_cache=True)
        assert_close(actual, expected, f"token {token}")
        short = policy.step(longer, weights)
        kept = (short.stored[:, :, None] == longer.stored[:, None]).flatten(3).all(-1)  # (B, kept, before)
        rows = rows.gather(1, kept.int().argmax(-1))
    assert (len(short), short.seen) == (12, SEQ)
    assert rows.unique(dim=0).shape[0] == 2  # the sequences differ, or this test saw little
    assert (rows[:, -6:] == torch.arange(SEQ - 6, SEQ)).all()


def test_totals_carry_no_graph() -> None:
    policy, weights = HeavyHitters(2), torch.full((2, 4, 1, 3), 0.25, requires_grad=True)
    policy.step(numbered(3), weights)
    assert policy.totals is not None
    assert not policy.totals.requires_grad


# Reading less


def test_chosen_rows_become_a_mask_that_hides_the_future() -> None:
    rows = torch.tensor([[[0, 3], [1, 2]], [[2, 2], [3, 0]]])
    mask = chosen_mask(rows, 4)
    assert mask.shape == (2, 1, 2, 4)
    assert mask[:, 0].int().tolist() == [[[1, 0, 0, 0], [0, 1, 1, 0]], [[0, 0, 1, 0], [1, 0, 0, 1]]]


@pytest.mark.parametrize("name", ["expanded", "absorbed", "mha"])
def test_rows_that_are_not_chosen_are_not_read(name: str) -> None:
    """What is hidden by the mask equals what is dropped from the cache, but the cache stays as large."""
    layer, empty = made(name)
    x = stream(SEQ + 1)
    _, cache = layer(x[:, :SEQ], past_key_value=empty(), use_cache=True)
    rows = torch.tensor([[3, 7, 20], [0, 1, 22]])
    with_own = torch.cat((rows, torch.full((2, 1), SEQ)), dim=1)
    read, kept = layer(x[:, SEQ:], chosen_mask(with_own[:, None], SEQ + 1), past_key_value=cache, use_cache=True)
    dropped, less = layer(x[:, SEQ:], past_key_value=cache.keep(rows), use_cache=True)
    assert_close(read, dropped, "the next token")
    assert (len(kept), len(less)) == (SEQ + 1, 4)


# Generation


def model_of(**changes: Any) -> DeepseekV2ForCausalLM:
    return randomised(DeepseekV2ForCausalLM(replace(SMALL, **changes)))


PROMPT = torch.tensor([[5, 9, 2, 33, 7, 1, 2], [11, 4, 60, 3, 8, 8, 21]])


@pytest.mark.parametrize("changes", [{}, {"use_mla": False, "num_key_value_heads": 2}], ids=["mla", "mha"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_generating_in_a_window(changes: dict[str, Any], sinks: int) -> None:
    """As a loop that hides the rows from a full cache; the prompt itself is read whole."""
    model, last = model_of(**changes), 4
    found = model.generate(PROMPT, 9, policy=partial(window, sinks=sinks, last=last))
    (logits, caches), ids = model(PROMPT, use_cache=True), PROMPT
    for _ in range(9):
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        mask = window_mask(1, ids.shape[1], sinks, last + 1)
        logits, caches = model(ids[:, -1:], mask, past_key_values=caches, use_cache=True)
    assert torch.equal(found, ids)
    assert not torch.equal(found, model.generate(PROMPT, 9))  # or nothing was forgotten
    everything = model.generate(PROMPT, 9, policy=partial(window, sinks=50, last=50))
    assert torch.equal(everything, model.generate(PROMPT, 9))


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_generating_with_a_cache_of_fewer_bits(format: str) -> None:
    model = model_of()
    seen: list[LayerCache] = []
    watch = model.register_forward_hook(lambda _, args, outputs: seen.extend(outputs[1]))
    found = model.generate(PROMPT, 9, cache_format=format)
    watch.remove()
    caches, ids, new = model.empty_caches(2, 30, format), PROMPT, PROMPT
    for _ in range(9):
        with torch.no_grad():
            logits, caches = model(new, past_key_values=caches, use_cache=True)
        new = logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, new), dim=1)
    assert torch.equal(found, ids)
    assert all(isinstance(cache, QuantizedLatentCache) and cache.record.format == format for cache in seen)
    assert seen[-1].reserved_nbytes == 2 * 16 * seen[-1].stored.shape[-1]  # room for prompt and answer, made once
    seen.clear()
    model.generate(PROMPT, 9, cache_format=format, policy=lambda cache: seen.append(cache) or window(cache, 0, 3))
    assert seen[0].reserved_nbytes == seen[0].nbytes  # a window of a long answer needs no room for all of it


def test_a_policy_sees_every_layer_after_every_call() -> None:
    model, seen = model_of(), []

    def policy(cache: LayerCache) -> LayerCache:
        seen.append((cache.layer_idx, cache.length, cache.seen))
        return window(cache, 1, 3 + cache.layer_idx)

    list(model.stream(PROMPT, 3, policy=policy))
    assert seen == [(0, 7, 7), (1, 7, 7), (0, 5, 8), (1, 6, 8), (0, 5, 9), (1, 6, 9)]


def test_a_mask_without_padding_may_stand_beside_a_policy() -> None:
    model, policy = model_of(), partial(window, sinks=1, last=3)
    found = model.generate(PROMPT, 5, torch.ones_like(PROMPT), policy=policy)
    assert torch.equal(found, model.generate(PROMPT, 5, policy=policy))


# Errors


def other_positions(cache: LayerCache) -> LayerCache:
    shorter = window(cache, 0, 3)
    shorter.seen = shorter.length
    return shorter


PADDED = torch.ones_like(PROMPT).index_fill(1, torch.tensor([0]), 0)
KEPT = r"layer 0's LatentCache, perhaps with fewer rows \(`keep`\), and as many tokens seen"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: window(numbered(3), -1, 2), "sinks is -1; wanted a number of rows, 0 or more"),
        (lambda: window(numbered(3), 0, 2.5), "last is 2.5; wanted a number of rows, 0 or more"),
        (lambda: window(numbered(3), 0, 0), "sinks and last is 0; wanted a row at least"),
        (lambda: window(None, 0, 2), "cache is None; wanted the cache of a layer"),
        (lambda: window((numbered(3), numbered(3)), 0, 2), "cache is a tuple of 2; wanted the cache of a layer"),
        (lambda: HeavyHitters(2).step(None, torch.ones(2, 4, 1, 3)), "cache is None; wanted the cache of a layer"),
        (lambda: window_mask(5, 3, 0, 2), "kv_seq is 3; wanted at least the 5 queries"),
        (lambda: window_mask(0, 3, 0, 2), "seq is 0; wanted at least one query"),
        (
            lambda: model_of().stream(PROMPT, 2, policy=HeavyHitters(2).step),
            "policy is <bound method .*; wanted None, or a callable that takes a layer's cache alone: attention weights",
        ),
        (
            lambda: model_of().stream(PROMPT, 2, policy=partial(window, sinks=1)),
            "policy is functools.partial.*; wanted None",
        ),
        (lambda: window_mask(1, 3, True, 1), "sinks is True; wanted a number of rows, 0 or more"),
        (lambda: HeavyHitters(3, 4), "recent is 4; wanted from 0 to the 3 rows"),
        (lambda: HeavyHitters(3, -1), "recent is -1; wanted from 0 to the 3 rows"),
        (lambda: HeavyHitters(0), "budget is 0; wanted a row at least"),
        (
            lambda: HeavyHitters(2).step(numbered(3), torch.ones(2, 4, 1, 2)),
            r"weights is \(2, 4, 1, 2\) torch.float32 on cpu; wanted \(2, heads, seq, 3\): a weight for each row",
        ),
        (lambda: HeavyHitters(2).step(numbered(3), None), "weights is None; wanted a tensor"),
        (
            lambda: HeavyHitters(2).step(numbered(3), torch.ones(2, 4, 1, 3).cfloat()),
            "weights is .*; wanted attention weights",
        ),
        (
            lambda: HeavyHitters(2).step(numbered(3), torch.full((2, 4, 1, 3), torch.nan)),
            "weights is infinite or NaN somewh",
        ),
        (
            lambda: twice(HeavyHitters(2), numbered(3), numbered(5)),
            r"cache is LatentCache\(layer 0, \(2, 5, 3\) .*; wanted one with the rows kept last time .* \(2, 2 \+ 1, …\)",
        ),
        (
            lambda: twice(HeavyHitters(2), numbered(3), numbered(3, batch=1)),
            r"cache is LatentCache\(layer 0, \(1, 3, 3\) .*; wanted one with the rows kept last time .* \(2, 2 \+ 1, …\)",
        ),
        (
            lambda: chosen_mask(torch.ones(2, 3).long(), 4),
            r"rows is \(2, 3\) .*; wanted integers \(batch, seq, chosen\)",
        ),
        (lambda: chosen_mask(torch.ones(2, 3, 1), 4), r"rows is \(2, 3, 1\) torch.float32 .*; wanted integers"),
        (lambda: chosen_mask(torch.ones(2, 3, 1).short(), 4), r"rows is \(2, 3, 1\) torch.int16 .*; wanted integers"),
        (lambda: chosen_mask(torch.ones(2, 3, 1).long(), 2), "kv_seq is 2; wanted at least the 3 queries"),
        (
            lambda: chosen_mask(torch.tensor([[[4]]]), 4),
            "rows is beyond the cached tokens somewhere; wanted from 0 to 3",
        ),
        (lambda: model_of().stream(PROMPT, 2, policy=3), "policy is 3; wanted None, or a callable"),
        (
            lambda: model_of().generate(PROMPT, 2, PADDED, policy=partial(window, sinks=0, last=2)),
            r"attention_mask is .*; wanted True everywhere, without padding, where there is a policy",
        ),
        (
            lambda: model_of().stream(PROMPT, 2, cache_format="fp4"),
            "cache_format is 'fp4'; wanted None or one of fp8, int8, int4",
        ),
        (
            lambda: model_of(use_mla=False).stream(PROMPT, 2, cache_format="fp8"),
            "cache_format is 'fp8'; wanted None: multi-head attention caches no latent",
        ),
        (
            lambda: model_of(use_mla=False).empty_caches(1, 4, "fp8"),
            "format is 'fp8'; wanted None: multi-head attention",
        ),
        (lambda: model_of().stream([[1]], 2, cache_format="fp8"), "input_ids is a list of 1; wanted a tensor"),
        (lambda: model_of().generate(PROMPT, 2, policy=lambda cache: None), f"policy is None; wanted {KEPT}"),
        (lambda: model_of().generate(PROMPT, 2, policy=other_positions), f"policy is LatentCache.*; wanted {KEPT}"),
        (lambda: model_of().generate(PROMPT, 2, policy=lambda c: c.select(torch.tensor([0]))), f"policy is .*{KEPT}"),
    ],
)
def test_what_is_rejected(call: Callable[[], object], message: str, as_shipped: None) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def twice(policy: HeavyHitters, *caches: LayerCache) -> None:
    for cache in caches:
        policy.step(cache, torch.full((len(cache.stored), 4, 1, len(cache)), 0.25))


def test_a_rejected_step_changes_nothing() -> None:
    policy = HeavyHitters(2)
    policy.step(numbered(3), torch.full((2, 4, 1, 3), 0.25))
    assert policy.totals is not None
    before: Tensor = policy.totals.clone()
    with pytest.raises(ValueError, match=r"^cache is"):
        policy.step(numbered(5), torch.full((2, 4, 1, 5), 0.25))
    assert torch.equal(policy.totals, before)
