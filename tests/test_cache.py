"""What a layer caches: its size to the byte, appending without copying, values that stay, gradients."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2_ref import DeepseekV2Attention, DeepseekV2Config, DeepseekV2DecoderLayer, KeyValueCache, LatentCache, ops
from dsv2_ref.attention import Visibility, attend
from dsv2_ref.cache import LayerCache
from tests.peers import SMALL, assert_close, randomised, tokens

GROUPED = replace(SMALL, use_mla=False, num_key_value_heads=2)
KINDS = {"mla": SMALL, "mha": GROUPED}
both_kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def elements_per_token(config: DeepseekV2Config) -> int:
    if config.use_mla:
        return (config.kv_lora_rank or 0) + config.qk_rope_head_dim
    heads = config.num_key_value_heads or config.num_attention_heads
    return 2 * heads * (config.hidden_size // config.num_attention_heads)


def layer_of(config: DeepseekV2Config, dtype: torch.dtype = torch.float64) -> DeepseekV2DecoderLayer:
    return randomised(DeepseekV2DecoderLayer(config, 1), dtype)


def latent_cache(length: int, capacity: int | None = None, batch: int = 2, width: int = 3) -> LatentCache:
    """Tokens numbered from 0, with room for ``capacity`` of them."""
    room = length if capacity is None else capacity
    empty = LatentCache.empty(0, batch, (width,), capacity=room, dtype=torch.float32, device="cpu")
    return empty.append(numbered(0, length, batch, width))


def place_of(cache: LayerCache) -> int:
    """Where the storage of the cached tokens begins in memory."""
    return cache.tokens.untyped_storage().data_ptr()


def numbered(start: int, stop: int, batch: int = 2, width: int = 3) -> Tensor:
    return torch.arange(start, stop, dtype=torch.float32)[:, None].expand(batch, -1, width)


# Size


@both_kinds
@DTYPES
def test_bytes_equal_the_formula(config: DeepseekV2Config, dtype: torch.dtype) -> None:
    layer = layer_of(config, dtype)
    _, cache = layer(tokens(3, 5, dtype), use_cache=True)
    assert type(cache) is (LatentCache if config.use_mla else KeyValueCache)
    assert cache.tokens.dtype == dtype
    assert len(cache) == cache.length == 5
    assert cache.nbytes == 3 * 5 * elements_per_token(config) * dtype.itemsize
    _, cache = layer(tokens(3, 2, dtype), past_key_value=cache, use_cache=True)
    assert cache.nbytes == 3 * 7 * elements_per_token(config) * dtype.itemsize
    assert cache.nbytes <= cache.reserved_nbytes == cache.tokens.untyped_storage().nbytes()


@both_kinds
def test_a_cache_made_to_measure_reserves_nothing_else(config: DeepseekV2Config) -> None:
    layer = layer_of(config, torch.bfloat16).requires_grad_(False)
    cache = layer.self_attn.empty_cache(batch=2, capacity=9)
    assert cache.nbytes == 0
    for chunk in (4, 1, 4):
        _, cache = layer(tokens(2, chunk, torch.bfloat16), past_key_value=cache, use_cache=True)
    assert cache.nbytes == cache.reserved_nbytes == 2 * 9 * elements_per_token(config) * 2


@both_kinds
def test_a_call_that_keeps_nothing_reserves_nothing(config: DeepseekV2Config) -> None:
    out = layer_of(config)(tokens(1, 4, torch.float64))
    assert len(out) == 1


def test_views_of_what_is_cached() -> None:
    _, cache = layer_of(SMALL)(tokens(2, 5, torch.float64), use_cache=True)
    compressed_kv, k_pe = cache.split(SMALL.kv_lora_rank)
    assert compressed_kv.shape == (2, 5, SMALL.kv_lora_rank)
    assert k_pe.shape == (2, 5, SMALL.qk_rope_head_dim)
    _, cache = layer_of(GROUPED)(tokens(2, 5, torch.float64), use_cache=True)
    assert cache.keys.shape == cache.values.shape == (2, 5, 2, 12)
    for view in (compressed_kv, k_pe, cache.keys, cache.values):
        assert view._base is not None


def test_repr_says_what_it_is() -> None:
    assert repr(latent_cache(4)) == "LatentCache(layer 0, (2, 4, 3) torch.float32 on cpu, 96 bytes)"


# Appending


def test_appending_within_the_room_copies_nothing() -> None:
    cache = latent_cache(2, capacity=10)
    place = place_of(cache)
    for length in range(2, 10):
        cache = cache.append(numbered(length, length + 1))
        assert place_of(cache) == place
    assert torch.equal(cache.tokens, numbered(0, 10))


def test_growing_copies_each_token_five_times_at_most() -> None:
    """Room grows by a quarter each time, so that copies sum to 1 + 4/5 + (4/5)² + … = 5 times the tokens."""
    appended, copied, cache = 3000, 0, latent_cache(0)
    for length in range(appended):
        place = place_of(cache)
        cache = cache.append(numbered(length, length + 1))
        copied += length * (place_of(cache) != place)
    assert torch.equal(cache.tokens, numbered(0, appended))
    assert copied <= 5 * appended
    assert cache.reserved_nbytes <= 1.25 * cache.nbytes + 64 * cache.nbytes / appended


def test_an_older_cache_keeps_its_value_and_its_room_is_given_away_once() -> None:
    old = latent_cache(3, capacity=10)
    first = old.append(numbered(3, 5))
    second = old.append(numbered(7, 8))
    assert place_of(first) == place_of(old)
    assert place_of(second) != place_of(old)
    assert torch.equal(old.tokens, numbered(0, 3))
    assert torch.equal(first.tokens, numbered(0, 5))
    assert second.tokens[0, :, 0].tolist() == [0, 1, 2, 7]
    assert place_of(first.append(numbered(5, 6))) == place_of(first)


def test_selected_sequences_are_a_copy() -> None:
    cache = latent_cache(2, capacity=8)
    cache.tokens[1].neg_()
    chosen = cache.select(torch.tensor([1, 1, 0]))
    assert chosen.tokens[:, 1, 0].tolist() == [-1, -1, 1]
    assert chosen.layer_idx == cache.layer_idx
    longer = chosen.append(numbered(2, 3, batch=3))
    assert len(longer) == 3
    assert cache.append(numbered(2, 3)).tokens[1, :, 0].tolist() == [0, -1, 2]


@both_kinds
def test_an_empty_cache_is_no_cache(config: DeepseekV2Config) -> None:
    layer, x = layer_of(config), tokens(2, 4, torch.float64)
    empty = layer.self_attn.empty_cache(2)
    assert len(empty) == 0
    assert torch.equal(layer(x, past_key_value=empty)[0], layer(x)[0])


# Gradients


@both_kinds
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_gradients_flow_through_the_cache(config: DeepseekV2Config, form: str) -> None:
    """Chunks that attend to one another train what one pass trains."""
    layer = layer_of(replace(config, mla_form=form))
    inputs = [tokens(2, 6, torch.float64).requires_grad_() for _ in range(2)]
    cotangent = tokens(2, 6, torch.float64, seed=2)
    parts, cache = [], None
    for chunk in inputs[0].split([3, 2, 1], dim=1):
        part, cache = layer(chunk, past_key_value=cache, use_cache=True)
        parts.append(part)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    chunked = torch.autograd.grad((torch.cat(parts, dim=1) * cotangent).sum(), [inputs[0], *parameters])
    whole = torch.autograd.grad((layer(inputs[1])[0] * cotangent).sum(), [inputs[1], *parameters])
    for index, (actual, expected) in enumerate(zip(chunked, whole, strict=True)):
        assert_close(actual, expected, f"gradient {index}")


@both_kinds
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("batch", [1, 2])
def test_queries_are_trained_over_keys_that_are_not(config: DeepseekV2Config, form: str, batch: int) -> None:
    """Tokens without gradients are written in place; what autograd saved of the storage before must stay valid."""
    layer = layer_of(replace(config, mla_form=form))
    for name, parameter in layer.self_attn.named_parameters():
        parameter.requires_grad_(not name.startswith(("kv_a", "k_proj", "v_proj")))
    layer.input_layernorm.requires_grad_(False)
    x = tokens(batch, 4, torch.float64)
    parts, cache = [], layer.self_attn.empty_cache(batch, capacity=4)
    place = place_of(cache)
    for chunk in x.split([2, 1, 1], dim=1):
        part, _, cache = layer.self_attn(chunk, past_key_value=cache, use_cache=True)
        parts.append(part)
        assert place_of(cache) == place
    weight = layer.self_attn.get_parameter("q_b_proj.weight" if config.use_mla else "q_proj.weight")
    (chunked,) = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), weight)
    (whole,) = torch.autograd.grad(layer.self_attn(x)[0].square().sum(), weight)
    assert_close(chunked, whole, "gradient of the queries")


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@both_kinds
@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_modes_can_be_mixed(config: DeepseekV2Config, first: str, second: str) -> None:
    layer, x = layer_of(config), tokens(1, 4, torch.float64)
    with MODES[first]():
        _, cache = layer(x[:, :2], past_key_value=layer.self_attn.empty_cache(1, 8), use_cache=True)
    with MODES[second]():
        out, cache = layer(x[:, 2:3], past_key_value=cache, use_cache=True)
    with MODES[first]():
        last, _ = layer(x[:, 3:], past_key_value=cache, use_cache=True)
    assert_close(torch.cat((out, last), dim=1), layer(x)[0][:, 2:], "output")


# Copies of a cache


def saved_and_loaded(cache: LayerCache) -> LayerCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@both_kinds
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), saved_and_loaded])
def test_a_copy_goes_on_by_itself(config: DeepseekV2Config, copied: Callable[[LayerCache], LayerCache]) -> None:
    layer, x = layer_of(config).requires_grad_(False), tokens(1, 4, torch.float64)
    _, cache = layer(x[:, :2], use_cache=True)
    twin = copied(cache)
    assert twin.tokens.data_ptr() != cache.tokens.data_ptr()
    assert torch.equal(twin.tokens, cache.tokens)
    layer(-x[:, 2:], past_key_value=cache, use_cache=True)
    assert_close(layer(x[:, 2:], past_key_value=twin)[0], layer(x)[0][:, 2:], "output")


# Room after the cached tokens, which a way for one query in half precision reads along

ROUNDED, OTHERS = "cpu rounded keys", ("cpu float32", "cpu fused query")


def ways_of_attend(choices: list[ops.Choice]) -> list[str]:
    return [choice.way for choice in choices if choice.definition == "attend"]


def absorbed_attention() -> DeepseekV2Attention:
    return randomised(DeepseekV2Attention(replace(SMALL, mla_form="absorbed"), 0), torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, "padding", "additive"])
def test_rounding_up_changes_no_output(mask: str | None) -> None:
    """One query in half precision, over a cache with room to round up to and over one without."""
    attention = absorbed_attention()
    x = tokens(2, 71, torch.bfloat16)
    given = {
        None: None,
        "padding": torch.arange(71) >= torch.tensor([[0], [9]]),
        "additive": torch.zeros(2, 1, 1, 71).masked_fill(torch.arange(71) % 3 == 1, -1e4),
    }[mask]
    outputs = []
    for capacity, way in ((71, "products"), (128, ROUNDED)):
        cache = attention.empty_cache(batch=2, capacity=capacity)
        _, _, cache = attention(x[:, :70], past_key_value=cache, use_cache=True)
        with ops.without(*OTHERS), ops.watch() as choices:
            output, _, cache = attention(x[:, 70:], given, past_key_value=cache, use_cache=True)
        assert ways_of_attend(choices) == [way]
        outputs.append(output.float())
    # Sums in another order round differently at a few places; 57 zero keys in the softmax would be another result.
    assert (outputs[0] - outputs[1]).norm() < 2**-7 * outputs[0].norm()


@torch.no_grad()
@pytest.mark.parametrize("after", [3.0, float("inf"), float("nan")])
def test_what_another_cache_wrote_into_the_room_is_never_seen(after: float) -> None:
    """An old cache is attended to again, after a later one has put tokens of its own behind the cached ones."""
    attention = absorbed_attention()
    x = tokens(2, 5, torch.bfloat16)
    cache = attention(x[:, :4], past_key_value=attention.empty_cache(2, capacity=64), use_cache=True)[2]
    query = tokens(2, SMALL.num_attention_heads, torch.bfloat16, width=cache.tokens.shape[-1])[:, :, None]

    def attend_to_all() -> tuple[Tensor, list[str]]:
        key = cache.tokens[:, None]
        value = key[..., : SMALL.kv_lora_rank]
        with ops.without(*OTHERS), ops.watch() as choices:
            out, _ = attend(query, key, value, Visibility(1, 4, x.device), 0.25, implementation="products")
        return out, ways_of_attend(choices)

    before, _ = attend_to_all()
    grown = cache.append(torch.full_like(cache.tokens[:, :1], after))
    assert place_of(grown) == place_of(cache)
    out, ways = attend_to_all()
    # Sums over 4 keys and over 64, of which 60 count nothing, may round differently.
    assert (out.float() - before.float()).norm() <= 2**-7 * before.float().norm()
    assert ways == [ROUNDED]


@both_kinds
def test_room_comes_with_the_first_token_that_is_appended(config: DeepseekV2Config) -> None:
    """A prompt without a cache reserves what it takes: in training nothing more is ever needed."""
    layer, x = layer_of(config).requires_grad_(False), tokens(2, 6, torch.float64)
    _, cache = layer(x[:, :4], use_cache=True)
    assert cache.reserved_nbytes == cache.nbytes
    _, cache = layer(x[:, 4:5], past_key_value=cache, use_cache=True)
    assert cache.reserved_nbytes > cache.nbytes
    _, longer = layer(x[:, 5:], past_key_value=cache, use_cache=True)
    assert place_of(longer) == place_of(cache)
