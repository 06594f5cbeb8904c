"""Bad input is refused before anything changes, by an error that names the argument, the value given and the value wanted."""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nested import nested_tensor as nested
from transformers import DynamicCache

from dsv2_ref import (
    ATTENTION_CLASSES,
    DeepseekV2Attention,
    DeepseekV2Config,
    DeepseekV2DecoderLayer,
    DeepseekV2FlashAttention2,
    DeepseekV2MLP,
    DeepseekV2MoE,
    DeepseekV2RMSNorm,
    KeyValueCache,
    LatentCache,
    MoEGate,
)
from dsv2_ref.cache import LayerCache
from dsv2_ref.mha import MultiHeadAttention, MultiHeadFlashAttention2
from tests.peers import SMALL, assert_close, tokens

pytestmark = pytest.mark.usefixtures("as_shipped")

MHA = replace(SMALL, use_mla=False)
HIDDEN, HEADS = SMALL.hidden_size, SMALL.num_attention_heads
BATCH, PAST, SEQ = 2, 3, 2
KV_SEQ = PAST + SEQ


def check_refusal(
    call: Callable[[], object], argument: str, given: str, wanted: str, error: type[Exception] = ValueError
) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{argument} is ")
    value, _, want = message.removeprefix(f"{argument} is ").partition("; wanted ")
    assert given in value
    assert wanted in want


def stream(batch: int = BATCH, seq: int = SEQ, dtype: torch.dtype = torch.float32, width: int = HIDDEN) -> Tensor:
    return tokens(batch, seq, dtype, width=width)


# Every call below is right but for one argument: (argument, bad value, what is said of it, what is said to be wanted).

HIDDEN_STATES = {
    "None": (None, "None", "a tensor"),
    "list": ([[[0.0] * HIDDEN]], "a list of 1", "a tensor"),
    "integers": (stream().long(), "torch.int64", "float"),
    "complex": (stream().to(torch.complex64), "torch.complex64", "float"),
    "float8": (stream().to(torch.float8_e4m3fn), "torch.float8_e4m3fn", "float64, float32, float16 or bfloat16"),
    "sparse": (stream().to_sparse(), f"(2, 2, {HIDDEN})", "a dense tensor"),
    "nested": (nested([stream()[0], stream(seq=1)[0]], layout=torch.jagged), "a nested tensor", "a dense tensor"),
    "width": (stream(width=HIDDEN - 1), f"(2, 2, {HIDDEN - 1})", str(HIDDEN)),
    "device": (stream().to("meta"), "on meta", "on cpu"),
    "no tokens": (stream(seq=0), f"(2, 0, {HIDDEN})", "at least one token"),
    "no sequences": (stream(batch=0), f"(0, 2, {HIDDEN})", "at least one token"),
}
SHAPES = {
    "two axes": (stream()[0], f"(2, {HIDDEN})", "(batch, seq, "),
    "four axes": (stream()[None], f"(1, 2, 2, {HIDDEN})", "(batch, seq, "),
}
DTYPES = {
    "wider than the weights": (stream(dtype=torch.float64), "torch.float64", "torch.float32"),
}
MASKS = {
    "list": ([[True] * KV_SEQ] * BATCH, "a list of 2", "a tensor"),
    "no axes": (torch.tensor(True), "()", f"({BATCH}, {KV_SEQ})"),
    "padding without the cache": (torch.ones(BATCH, SEQ), f"({BATCH}, {SEQ})", f"({BATCH}, {KV_SEQ}), cache included"),
    "padding of one sequence for all": (torch.ones(1, KV_SEQ), f"(1, {KV_SEQ})", f"({BATCH}, {KV_SEQ})"),
    "padding in floating point": (torch.ones(BATCH, KV_SEQ), "torch.float32", "bool or integers"),
    "three axes": (torch.ones(BATCH, SEQ, KV_SEQ).bool(), f"({BATCH}, {SEQ}, {KV_SEQ})", f"{SEQ}, {KV_SEQ})"),
    "keys": (torch.ones(BATCH, 1, SEQ, SEQ).bool(), f"({BATCH}, 1, {SEQ}, {SEQ})", f"{SEQ}, {KV_SEQ})"),
    "queries": (torch.ones(BATCH, 1, 1, KV_SEQ).bool(), f"({BATCH}, 1, 1, {KV_SEQ})", f"{SEQ}, {KV_SEQ})"),
    "batch": (torch.ones(3, 1, SEQ, KV_SEQ).bool(), f"(3, 1, {SEQ}, {KV_SEQ})", f"({BATCH} or 1, {HEADS} or 1"),
    "heads": (torch.ones(1, 3, SEQ, KV_SEQ).bool(), f"(1, 3, {SEQ}, {KV_SEQ})", f"({BATCH} or 1, {HEADS} or 1"),
    "integers for each query": (torch.ones(1, 1, SEQ, KV_SEQ).long(), "torch.int64", "bool (True keeps) or float64"),
    "complex": (torch.ones(1, 1, SEQ, KV_SEQ).cfloat(), "torch.complex64", "bool (True keeps) or float64"),
    "float8": (
        torch.zeros(1, 1, SEQ, KV_SEQ).to(torch.float8_e5m2),
        "torch.float8_e5m2",
        "bool (True keeps) or float64",
    ),
    "complex padding": (torch.ones(BATCH, KV_SEQ).cfloat(), "torch.complex64", "bool or integers"),
    "device": (torch.ones(BATCH, KV_SEQ, dtype=torch.bool, device="meta"), "on meta", "on cpu"),
    "tril of ones": (torch.ones(1, 1, SEQ, KV_SEQ).tril(3), "masks nothing", "must be bool"),
    "zeros": (torch.zeros(1, 1, SEQ, KV_SEQ), "masks nothing", "None is causal"),
    "NaN": (torch.full((1, 1, SEQ, KV_SEQ), float("nan")), "infinite or NaN", "below infinity"),
    "one infinity": (
        torch.tensor([float("-inf")] * (KV_SEQ - 1) + [float("inf")]).expand(1, 1, SEQ, -1),
        "infinite",
        "below",
    ),
}
POSITIONS = {
    "list": ([[3, 4]], "a list of 1", "a tensor"),
    "floating": (torch.tensor([[3.0, 4.0]]), "torch.float32", "integers"),
    "bool": (torch.tensor([[False, True]]), "torch.bool", "integers"),
    "complex": (torch.tensor([[3, 4]]).cfloat(), "torch.complex64", "integers"),
    "unsigned": (torch.tensor([[3, 4]]).to(torch.uint64), "torch.uint64", "int64"),
    "one axis": (torch.tensor([3, 4]), "(2,)", f"({BATCH} or 1, {SEQ})"),
    "batch": (torch.arange(SEQ).expand(3, SEQ), f"(3, {SEQ})", f"({BATCH} or 1, {SEQ})"),
    "the cache's too": (torch.arange(KV_SEQ)[None], f"(1, {KV_SEQ})", f"({BATCH} or 1, {SEQ})"),
    "negative": (torch.tensor([[-1, 0]]), "negative somewhere", "positions from 0 on"),
    "device": (torch.arange(SEQ, device="meta")[None], "on meta", "on cpu"),
}
WRONG_ARGUMENTS = [
    pytest.param(argument, *case, id=f"{argument}-{name}")
    for argument, cases in {
        "hidden_states": HIDDEN_STATES | SHAPES | DTYPES,
        "attention_mask": MASKS,
        "position_ids": POSITIONS,
        "use_cache": {"string": ("no", "'no'", "True or False"), "mask": (torch.ones(1, 2), "(1, 2)", "True or False")},
        "output_attentions": {"number": (0.5, "0.5", "True or False")},
    }.items()
    for name, case in cases.items()
]


def mixed_caches(config: DeepseekV2Config) -> dict[str, tuple[Any, str, str]]:
    """What is not the cache that this layer returned for this batch."""
    own, other = (LatentCache, KeyValueCache) if config.use_mla else (KeyValueCache, LatentCache)
    features = DeepseekV2DecoderLayer(config, 1).self_attn.cache_features
    shape = (BATCH, PAST, *features)
    good = torch.zeros(shape)
    return {
        "tuple of tensors": ((good, good), "a tuple of 2", f"{own.__name__} that layer 1 returned"),
        "tensor": (good, str(shape), f"{own.__name__} that layer 1 returned"),
        "of transformers": (DynamicCache(), "DynamicCache", f"{own.__name__} that layer 1 returned"),
        "of another layer": (own(0, good), f"{own.__name__}(layer 0", "that layer 1 returned"),
        "of another class": (other(1, good), other.__name__, f"{own.__name__} that layer 1 returned"),
        "of another batch": (own(1, good[:1]), f"(1, {PAST}, ", f"({BATCH}, "),
        "of another model": (own(1, good[..., 1:]), str(tuple(good[..., 1:].shape)), f"({BATCH}, "),
        "in another dtype": (own(1, good.double()), "torch.float64", "torch.float32"),
        "on another device": (own(1, good.to("meta")), "on meta", "on cpu"),
    }


MIXED_CACHES = [
    pytest.param(config, "past_key_value", *case, id=f"{kind}-{name}")
    for kind, config in {"mla": SMALL, "mha": MHA}.items()
    for name, case in mixed_caches(config).items()
]


def place_of(cache: LayerCache) -> int:
    """Where the storage of the cached tokens begins in memory."""
    return cache.tokens.untyped_storage().data_ptr()


def bits_of(cache: LayerCache) -> Tensor:
    """All of the storage, the room after the tokens included, byte by byte."""
    return torch.empty(0, dtype=torch.uint8).set_(cache.tokens.untyped_storage())


class Decoding:
    """A layer in the middle of a sequence, and a check that nothing of what it has cached has changed."""

    def __init__(self, config: DeepseekV2Config) -> None:
        torch.manual_seed(0)
        self.layer = DeepseekV2DecoderLayer(config, 1).eval().requires_grad_(False)
        self.start = stream(seq=PAST)
        _, self.cache = self.layer(
            self.start, past_key_value=self.layer.self_attn.empty_cache(BATCH, 8), use_cache=True
        )
        self.place = place_of(self.cache)
        self.before = bits_of(self.cache).clone()

    def refuses(self, argument: str, value: object, given: str, wanted: str) -> None:
        arguments = {"hidden_states": stream(), "past_key_value": self.cache, "use_cache": True} | {argument: value}
        error = TypeError if wanted in ("a tensor", "a dense tensor") else ValueError
        for module in (self.layer, self.layer.self_attn):
            check_refusal(lambda module=module: module(**arguments), argument, given, wanted, error)
            self.check_memory()

    def check_memory(self) -> None:
        assert len(self.cache) == PAST
        assert place_of(self.cache) == self.place
        assert torch.equal(bits_of(self.cache), self.before)

    def check_continuation(self) -> None:
        out, longer = self.layer(stream(), past_key_value=self.cache, use_cache=True)
        assert place_of(longer) == self.place  # the room after the tokens was not given away before
        whole = self.layer(torch.cat((self.start, stream()), dim=1))[0]
        assert_close(out, whole[:, PAST:], "continuation")


@pytest.mark.parametrize("config", [SMALL, MHA], ids=["mla", "mha"])
@pytest.mark.parametrize(("argument", "value", "given", "wanted"), WRONG_ARGUMENTS)
def test_layer_and_attention(config: DeepseekV2Config, argument: str, value: Any, given: str, wanted: str) -> None:
    decoding = Decoding(config)
    decoding.refuses(argument, value, given, wanted)
    decoding.check_continuation()


@pytest.mark.parametrize(("config", "argument", "value", "given", "wanted"), MIXED_CACHES)
def test_mixed_caches(config: DeepseekV2Config, argument: str, value: Any, given: str, wanted: str) -> None:
    decoding = Decoding(config)
    decoding.refuses(argument, value, given, wanted)
    decoding.check_continuation()


@pytest.mark.parametrize("config", [SMALL, MHA], ids=["mla", "mha"])
def test_attention_weights_where_none_exist(config: DeepseekV2Config) -> None:
    decoding = Decoding(config)
    decoding.refuses("output_attentions", True, "True", "'eager' does")
    decoding.check_continuation()


@pytest.mark.parametrize("config", [SMALL, MHA], ids=["mla", "mha"])
def test_unknown_arguments(config: DeepseekV2Config) -> None:
    decoding = Decoding(config)
    with pytest.raises(TypeError, match="cache_position"):
        decoding.layer(stream(), past_key_value=decoding.cache, cache_position=torch.tensor([3, 4]))
    decoding.check_memory()


def test_a_dtype_narrower_than_the_weights_is_left_to_the_norm_of_the_layer() -> None:
    """The layer's own norm widens it, as the published one does; a part called by itself has no norm before it."""
    layer = DeepseekV2DecoderLayer(SMALL, 1)
    narrow = stream(dtype=torch.bfloat16)
    assert layer(narrow)[0].dtype == torch.float32
    for part in (layer.self_attn, layer.mlp, DeepseekV2MLP(SMALL)):
        check_refusal(lambda part=part: part(narrow), "hidden_states", "torch.bfloat16", "torch.float32")


def test_unknown_form() -> None:
    decoding = Decoding(SMALL)
    attention = decoding.layer.self_attn
    attention.form = "folded"
    call = functools.partial(attention, stream(), past_key_value=decoding.cache, use_cache=True)
    check_refusal(call, "form", "'folded'", "expanded, absorbed or auto")
    decoding.check_memory()


@pytest.mark.parametrize(
    ("dtype", "given", "wanted"),
    [(torch.float32, "torch.float32", "float16 or bfloat16"), (torch.bfloat16, "on cpu", "a CUDA tensor")],
    ids=str,
)
@pytest.mark.parametrize("config", [replace(SMALL, mla_form="expanded"), MHA], ids=["mla", "mha"])
def test_what_flash_attn_cannot_take(
    config: DeepseekV2Config, dtype: torch.dtype, given: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With flash-attn installed, on a machine where it cannot run."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    layer = DeepseekV2DecoderLayer(replace(config, _attn_implementation="flash_attention_2"), 0).to(dtype)
    cache, x = layer.self_attn.empty_cache(BATCH, capacity=SEQ), stream(dtype=dtype)
    for module in (layer, layer.self_attn):
        call = functools.partial(module, x, past_key_value=cache, use_cache=True)
        check_refusal(call, "hidden_states", given, wanted)
        assert (bits_of(cache) == 0).all()
    first = torch.ones(BATCH, SEQ, *layer.self_attn.cache_features, dtype=dtype)
    assert place_of(cache.append(first)) == place_of(cache)  # its room was not given away before


PARTS = {
    "mlp": (lambda: DeepseekV2MLP(SMALL), HIDDEN_STATES | DTYPES),
    "moe": (lambda: DeepseekV2MoE(SMALL), HIDDEN_STATES | SHAPES | DTYPES),
    "gate": (lambda: MoEGate(SMALL), HIDDEN_STATES | SHAPES),
    "norm": (
        lambda: DeepseekV2RMSNorm(HIDDEN),
        {name: case for name, case in HIDDEN_STATES.items() if not name.startswith("no ")},
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("make", "value", "given", "wanted"),
    [
        pytest.param(make, value, given, wanted, id=f"{part}-{name}")
        for part, (make, cases) in PARTS.items()
        for name, (value, given, wanted) in cases.items()
    ],
)
def test_parts(make: Callable[[], nn.Module], value: Any, given: str, wanted: str, training: bool) -> None:
    error = TypeError if wanted in ("a tensor", "a dense tensor") else ValueError
    check_refusal(lambda: make().train(training)(value), "hidden_states", given, wanted, error)


NO_EXPERTS = replace(SMALL, n_routed_experts=None)


@pytest.mark.parametrize(
    ("make", "argument", "given", "wanted"),
    [
        (lambda: DeepseekV2DecoderLayer(SMALL, -1), "layer_idx", "-1", "0 or more"),
        (lambda: DeepseekV2DecoderLayer(SMALL, 1.0), "layer_idx", "1.0", "0 or more"),
        (lambda: DeepseekV2Attention(SMALL, "0"), "layer_idx", "'0'", "0 or more"),
        (lambda: DeepseekV2Attention(MHA, 0), "use_mla", "False", "True"),
        (lambda: MultiHeadAttention(SMALL, 0), "use_mla", "True", "False"),
        (lambda: DeepseekV2MoE(NO_EXPERTS), "n_routed_experts", "None", "a number of experts"),
        (lambda: MoEGate(NO_EXPERTS), "n_routed_experts", "None", "a number of experts"),
        (lambda: DeepseekV2MLP(SMALL, hidden_size=0), "hidden_size", "0", "positive"),
        (lambda: DeepseekV2MLP(SMALL, intermediate_size=-1), "intermediate_size", "-1", "positive"),
        (lambda: DeepseekV2RMSNorm(0), "hidden_size", "0", "positive"),
        (lambda: DeepseekV2RMSNorm("8"), "hidden_size", "'8'", "positive"),
        (lambda: DeepseekV2MLP(SMALL, intermediate_size=1.5), "intermediate_size", "1.5", "positive"),
        (lambda: DeepseekV2RMSNorm(8, eps="1e-6"), "eps", "'1e-6'", "finite"),
        (lambda: DeepseekV2RMSNorm(8, eps=0.0), "eps", "0.0", "at least"),
        (lambda: DeepseekV2RMSNorm(8, eps=float("inf")), "eps", "inf", "finite"),
        (lambda: DeepseekV2RMSNorm(8, eps=float("nan")), "eps", "nan", "finite"),
        (lambda: DeepseekV2Attention(SMALL, 0).empty_cache(0), "batch", "0", "at least one"),
        (lambda: DeepseekV2Attention(SMALL, 0).empty_cache(True), "batch", "True", "at least one"),
        (lambda: DeepseekV2Attention(SMALL, 0).empty_cache(1, capacity=-1), "capacity", "-1", "0 or more"),
        (lambda: LatentCache.empty(0, 1, 576, dtype=torch.float32, device="cpu"), "features", "576", "in a tuple"),
    ],
)
def test_construction(make: Callable[[], object], argument: str, given: str, wanted: str) -> None:
    check_refusal(make, argument, given, wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeepseekV2FlashAttention2(SMALL, 0),
        lambda: MultiHeadFlashAttention2(MHA, 0),
        lambda: ATTENTION_CLASSES["mla_flash_attention_2"](SMALL, 0),
        lambda: DeepseekV2DecoderLayer(replace(SMALL, _attn_implementation="flash_attention_2"), 0),
        lambda: DeepseekV2DecoderLayer(replace(MHA, _attn_implementation="flash_attention_2"), 0),
    ],
)
def test_flash_attn_not_installed(make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match=r"pip install flash-attn .* _attn_implementation='sdpa'"):
        make()


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (torch.zeros(2, 1, 7), r"\(2, 7\)"),
        (torch.zeros(1, 1, 8), r"\(1, 8\)"),
        (torch.zeros(2, 8), r"\(2,\)"),
        (torch.zeros(8), r"\(8,\)"),
        (torch.zeros(2, 1, 8, dtype=torch.float64), "torch.float64"),
        (torch.zeros(2, 1, 8, device="meta"), "meta"),
    ],
)
def test_cache_append(new: Tensor, said: str) -> None:
    cache = LatentCache.empty(0, 2, (8,), capacity=4, dtype=torch.float32, device="cpu").append(torch.ones(2, 2, 8))
    with pytest.raises(ValueError, match=rf"past_key_value is LatentCache\(layer 0, .*; wanted .*{said}"):
        cache.append(new)
    assert len(cache) == 2
    assert (cache.tokens == 1).all()
    assert place_of(cache.append(torch.ones(2, 1, 8))) == place_of(cache)


def test_cache_append_of_a_list() -> None:
    cache = LatentCache(0, torch.ones(2, 2, 8))
    check_refusal(lambda: cache.append([[1.0]]), "new", "a list of 1", "a tensor", TypeError)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (None, "stored is None; wanted a tensor"),
        (torch.ones(2), r"stored is \(2,\) torch.float32 on cpu; wanted \(batch, kv_seq, \*features\)"),
    ],
)
def test_a_cache_of_what_are_no_tokens(stored: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LatentCache(0, stored)


def test_a_wrong_type_may_be_caught_as_either_error() -> None:
    """It was a TypeError here and a ValueError there: whoever catches one of them catches it still."""
    for error in (TypeError, ValueError):
        with pytest.raises(error, match="hidden_states is None; wanted a tensor"):
            DeepseekV2DecoderLayer(SMALL, 0)(None)
        with pytest.raises(error, match=r"config is a dict; wanted a DeepseekV2Config"):
            DeepseekV2MLP(SMALL.to_dict())
