"""Attention of one token to a long cache on CPUs, in C++: whom it serves, and that it gives what the definition does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref import DeepseekV2Attention, DeepseekV2Config, ops
from dsv2_ref.attention import attend
from dsv2_ref.fast import decode, native
from dsv2_ref.fast.decode import LONG
from dsv2_ref.masks import Visibility
from dsv2_ref.records import CACHE_FORMATS, attend_records

pytestmark = pytest.mark.skipif(bool(native.cannot_build()), reason=native.cannot_build())

WAY = "cpu one token"
FORMATS = [None, *CACHE_FORMATS]


@pytest.fixture(autouse=True)
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "has_amx", lambda: False)


def layer() -> DeepseekV2Attention:
    torch.manual_seed(0)
    return DeepseekV2Attention(DeepseekV2Config.tiny(), 0).bfloat16().eval()


def call(attention: Any, format: str | None, keys: int = LONG, batch: int = 1, seq: int = 1) -> Callable[[], Tensor]:
    """Decoding after some tokens."""
    config = attention.config
    torch.manual_seed(1)
    cache = attention.empty_cache(batch, keys, format=format)
    cache = cache.append(torch.randn(batch, keys - seq, *attention.cache_features).bfloat16())
    hidden_states = torch.randn(batch, seq, config.hidden_size).bfloat16()
    return lambda: attention(hidden_states, past_key_value=cache)[0]


def served(run: Callable[[], Any], device: str | None = None) -> str:
    with torch.no_grad(), ops.watch(device) as made:
        run()
    return next(choice.way for choice in made if choice.definition in ("attend", "attend_records"))


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [1, 3])
def test_it_gives_what_the_definition_gives(format: str | None, batch: int) -> None:
    run = call(layer(), format, batch=batch)
    assert served(run) == WAY
    with ops.plain():
        expected = run()
    # Both round weights and results to bfloat16 once, and what follows multiplies them by random matrices.
    torch.testing.assert_close(run(), expected, rtol=2**-6, atol=2**-7 * float(expected.float().std()) * 4)


@pytest.mark.parametrize("format", FORMATS)
def test_only_long_caches_are_worth_a_compiler(format: str | None) -> None:
    assert served(call(layer(), format, keys=LONG - 1)) != WAY
    assert served(call(layer(), format, seq=2)) != WAY


def test_what_hides_keys_goes_the_usual_way() -> None:
    attention = layer()
    cache = attention.empty_cache(2, LONG, format="int8")
    cache = cache.append(torch.randn(2, LONG - 1, *attention.cache_features).bfloat16())
    hidden_states = torch.randn(2, 1, attention.config.hidden_size).bfloat16()
    mask = torch.ones(2, LONG, dtype=torch.bool)
    assert served(lambda: attention(hidden_states, past_key_value=cache)) == WAY
    assert served(lambda: attention(hidden_states, attention_mask=mask, past_key_value=cache)) != WAY


@pytest.mark.parametrize("format", FORMATS)
def test_counters_of_operations_see_all(format: str | None) -> None:
    run = call(layer(), format)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counted:
            run()
        with FlopCounterMode(display=False) as expected, ops.plain():
            run()
    assert counted.get_total_flops() == expected.get_total_flops()


def test_gradients_go_the_usual_way() -> None:
    attention = layer()
    run = call(attention, None)
    with ops.watch() as made:
        run().float().sum().backward()
    assert all(choice.way != WAY for choice in made)
    assert attention.q_a_proj.weight.grad is not None


def test_tiles_are_faster_for_keys_that_need_no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "has_amx", lambda: True)
    assert served(call(layer(), None)) != WAY
    assert served(call(layer(), "fp8")) == WAY


def test_keys_that_do_not_lie_side_by_side_go_the_usual_way() -> None:
    query, rows = torch.randn(1, 4, 1, 24).bfloat16(), torch.randn(1, 24, LONG).bfloat16().mT[:, None]
    visible = Visibility(1, LONG, query.device)
    assert served(lambda: attend(query, rows, rows[..., :16], visible, 0.3, implementation="products")) != WAY


def attended(query: Tensor, cache: Any, latent: int) -> Tensor:
    visible = Visibility(1, cache.length, query.device)
    if cache.record is not None:
        return attend_records(query, cache, visible, 0.3, implementation="products")[0]
    key = cache.tokens[:, None]
    return attend(query, key, key[..., :latent], visible, 0.3, implementation="products")[0]


@torch.no_grad()
@pytest.mark.parametrize("format", CACHE_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_records_of_another_dtype_go_the_usual_way(format: str, dtype: torch.dtype) -> None:
    attention = layer().to(dtype)
    features = attention.cache_features
    cache = attention.empty_cache(1, LONG, format).append(torch.randn(1, LONG, *features, dtype=dtype))
    query = torch.randn(1, 4, 1, *features).bfloat16()
    assert served(lambda: attended(query, cache, attention.kv_lora_rank)) != WAY


@torch.no_grad()
@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_a_cache_for_all_sequences_goes_the_usual_way(format: str) -> None:
    attention = layer()
    features = attention.cache_features
    cache = attention.empty_cache(1, LONG, format=format).append(torch.randn(1, LONG, *features).bfloat16())
    query = torch.randn(2, 4, 1, *features).bfloat16()
    assert served(lambda: attended(query[:1], cache, attention.kv_lora_rank)) == WAY
    assert served(lambda: attended(query, cache, attention.kv_lora_rank)) != WAY


@pytest.mark.parametrize(
    "error", [OSError("no room left"), RuntimeError("cc1plus: unknown flag\nmore"), TimeoutError()]
)
def test_where_it_cannot_be_built_others_serve(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: str) -> Any:
        raise error

    monkeypatch.setattr(native, "build", fail)
    native.why_not_built.cache_clear()
    try:
        run = call(layer(), "fp8")
        with torch.no_grad(), ops.watch() as made:
            run()
    finally:
        native.why_not_built.cache_clear()
    (choice,) = (choice for choice in made if choice.definition == "attend_records")
    line = (str(error) or "TimeoutError").splitlines()[0]
    assert (WAY, f"attend.cpp cannot be built: {line}") in choice.passed_over


def test_nothing_is_built_to_list_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build", None)
    with torch.device("meta"):
        run = call(layer(), "fp8")
    assert served(run, "cpu") == WAY


def test_it_is_an_operator_of_torch() -> None:
    cache = layer().empty_cache(2, 20, format="int4")
    cache = cache.append(torch.randn(2, 20, *layer().cache_features).bfloat16())
    record = cache.record
    query = torch.randn(2, 4, record.latent + record.rope).bfloat16()
    utils: Any = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    arguments = query, cache.stored, record.latent, 0.3, CACHE_FORMATS.index("int4"), record.tile
    torch.library.opcheck(decode.attend_to_keys, arguments, test_utils=utils)


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
def test_sequences_of_a_batch_keep_apart(format: str | None) -> None:
    attention = layer()
    torch.manual_seed(2)
    tokens = torch.randn(3, LONG, *attention.cache_features).bfloat16()
    query = torch.randn(3, 4, 1, tokens.shape[-1]).bfloat16()

    def of(some: slice) -> Tensor:
        cache = attention.empty_cache(len(tokens[some]), LONG, format=format).append(tokens[some])
        return attended(query[some], cache, attention.kv_lora_rank)

    assert torch.equal(of(slice(1, 2)), of(slice(None))[1:2])
