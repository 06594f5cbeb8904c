"""The accounting against built layers, PyTorch's FLOP counter, live caches and published totals; its command."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM
from dsv2_ref import accounting as acc
from dsv2_ref.__main__ import main
from dsv2_ref.accounting import weights
from tests.examples import fewer
from tests.peers import COMMON, SMALL

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("card", "tiny", "deepseek_v2", "deepseek_v2_lite", "deepseek_ocr")
PUBLISHED = {"deepseek_v2": 235_741_434_880, "deepseek_v2_lite": 15_706_484_224, "deepseek_ocr": 2_934_734_080}


def preset(name: str) -> DeepseekV2Config:
    return getattr(DeepseekV2Config, name)()


def built(config: DeepseekV2Config) -> dict[str, int]:
    """Parameters of a model on the meta device, under the names of the accounting."""
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(replace(config, num_hidden_layers=min(config.num_hidden_layers, 3)))
    counts: dict[str, int] = {}
    for name, weight in model.named_parameters():
        name = name.removeprefix("model.")
        if name.startswith("layers."):
            _, _, name = name.split(".", 2)
            for part in ("mlp.experts", "mlp.shared_experts"):
                name = part if name.startswith(part + ".") else name
            name = "mlp" if name in {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")} else name
            name = f"layers.{name}"
        counts[name] = counts.get(name, 0) + weight.numel()
    return counts


@pytest.mark.parametrize("name", [*PRESETS, *COMMON])
def test_parameters_are_those_of_built_models_name_by_name(name: str) -> None:
    config = COMMON[name] if name in COMMON else preset(name)
    shorter = replace(config, num_hidden_layers=min(config.num_hidden_layers, 3))
    assert acc.model_parameters(shorter) == built(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    assert sum(acc.model_parameters(preset(name)).values()) == PUBLISHED[name]


@st.composite
def configs(draw: st.DrawFn) -> DeepseekV2Config:
    """Models that no one has built: every size and switch that the counts depend on."""
    size, heads = st.integers(1, 9), draw(st.integers(1, 4))
    mla = draw(st.booleans())
    experts = draw(st.none() | st.integers(2, 6))
    return replace(
        SMALL,
        hidden_size=2 * heads * draw(size),
        num_attention_heads=heads,
        use_mla=mla,
        num_key_value_heads=None if mla else draw(st.sampled_from([h for h in (1, 2, 3, 4) if heads % h == 0])),
        q_lora_rank=draw(st.none() | size),
        kv_lora_rank=draw(size),
        qk_nope_head_dim=draw(size),
        qk_rope_head_dim=2 * draw(size),
        v_head_dim=draw(size),
        intermediate_size=draw(size),
        moe_intermediate_size=draw(size),
        n_routed_experts=experts,
        n_shared_experts=draw(st.none() | st.integers(1, 3)),
        num_experts_per_tok=draw(st.integers(1, experts or 1)),
        num_hidden_layers=3,
        first_k_dense_replace=draw(st.integers(0, 3)),
        moe_layer_freq=draw(st.integers(1, 3)),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        _attn_implementation="eager",
    )


@given(config=configs())
def test_parameters_of_any_model(config: DeepseekV2Config) -> None:
    assert acc.model_parameters(config) == built(config)


@given(config=configs())
def test_matrices_are_those_of_built_layers(config: DeepseekV2Config) -> None:
    """By the names of the state dict: shapes, how many there are, and how many a token passes through."""
    for layer_idx in range(config.num_hidden_layers):
        layer = DeepseekV2DecoderLayer(config, layer_idx)
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for name, weight in layer.state_dict().items():
            shapes.setdefault(re.sub(r"experts\.\d+\.", "experts.*.", name), []).append(tuple(weight.shape))
        assert sum(math.prod(one) for each in shapes.values() for one in each) == sum(
            p.numel() for p in layer.parameters()
        )
        found = acc.matrices(config, layer_idx)
        assert {name: [one.shape] * one.number for name, one in found.items()} == shapes
        for name, one in found.items():
            met = config.num_experts_per_tok if ".*." in name else 1
            assert one.active == (met or 0) * math.prod(one.shape)
            assert one.stored == one.number * math.prod(one.shape)


@fewer(2)
@given(config=configs(), layer_idx=st.none() | st.integers(0, 2))
def test_the_reports_parts_add_up(config: DeepseekV2Config, layer_idx: int | None) -> None:
    call = acc.Call(batch=2, seq=3, kv=5)
    found = acc.report(config, call, layer_idx)
    parameters, flops, sizes = found["parameters"], found["flops"], found["bytes"]
    for total, module, matrix in (
        ("total", "by_module", "stored"), ("active_per_token", "active_by_module", "active")
    ):  # fmt: skip
        assert sum(parameters[module].values()) == parameters[total]
        assert sum(one[matrix] for one in parameters["by_matrix"].values()) == parameters[total]
    assert parameters["by_module"].keys() == parameters["active_by_module"].keys()
    assert all(one["stored"] == one["number"] * math.prod(one["shape"]) for one in parameters["by_matrix"].values())
    assert sum(flops["by_operation"].values()) == flops["total"]
    for way in ("read", "written"):
        assert sum(part[way] for part in sizes["activations_by_operation"].values()) == sizes[f"activations_{way}"]
    if layer_idx is None:
        assert parameters["by_module"] == acc.model_parameters(config)
        each = [acc.report(config, call, i)["flops"]["by_operation"] for i in range(config.num_hidden_layers)]
        for name, count in flops["by_operation"].items():
            if name not in ("lm_head", "last_norm"):
                assert count == sum(one.get(name, 0) for one in each)


def grouped(rows: Any, weights: Any, group_ends: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * rows[0] * weights[1] * weights[2]


def prepared(layer: DeepseekV2DecoderLayer, config: DeepseekV2Config, call: acc.Call) -> Callable[[], object]:
    """The call of a layer that ``call`` describes, ready to be made; on the meta device."""
    if config.use_mla:
        layer.self_attn.form = call.form
    cache = layer.self_attn.empty_cache(call.batch, capacity=call.kv)
    past = call.kv - call.seq
    if past:
        cache = cache.append(torch.empty(call.batch, past, *layer.self_attn.cache_features))
    x = torch.empty(call.batch, call.seq, config.hidden_size)
    return lambda: layer(x, past_key_value=cache)


def counted(config: DeepseekV2Config, layer_idx: int, call: acc.Call) -> int:
    """FLOPs of the products of one call, as PyTorch counts them on the meta device."""
    mapping = {torch.ops.dsv2_ref.grouped_product: grouped}
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        layer = DeepseekV2DecoderLayer(config, layer_idx).eval().requires_grad_(False)
        prepared(layer, config, call)()
    return counter.get_total_flops()


@given(config=configs(), data=st.data())
def test_products_of_any_layer_are_what_pytorch_counts(config: DeepseekV2Config, data: st.DataObject) -> None:
    batch, seq, past = (data.draw(st.integers(low, 5)) for low in (1, 1, 0))
    layer_idx = data.draw(st.integers(0, 2))
    form = data.draw(st.sampled_from(["expanded", "absorbed"])) if config.use_mla else "auto"
    call = acc.Call(batch=batch, seq=seq, kv=seq + past, form=form, causal=False)
    assert sum(acc.products(config, layer_idx, call).values()) == counted(config, layer_idx, call)


@given(config=configs(), batch=st.integers(1, 3), seq=st.integers(1, 5), past=st.integers(0, 5))
def test_fused_attention_pads_what_is_narrower(config: DeepseekV2Config, batch: int, seq: int, past: int) -> None:
    """On the meta device torch takes sdpa apart: keys and values are both as wide as the wider, which is not counted."""
    assume(config.use_mla)
    config = replace(config, _attn_implementation="sdpa")
    call = acc.Call(batch=batch, seq=seq, kv=seq + past, form="expanded", causal=False)
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    padding = 2 * batch * config.num_attention_heads * call.pairs * (2 * max(key, value) - key - value)
    assert sum(acc.products(config, 1, call).values()) + padding == counted(config, 1, call)


class Moved(TorchDispatchMode):
    """Bytes that matrix products read and write, the weights of the layer apart; a repeated number is read once."""

    PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "dsv2_ref::grouped_product")

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {StorageWeakRef(p.untyped_storage()) for p in layer.parameters()}
        self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if name in self.PRODUCTS:
            given = args[:2] if "grouped" in name else args[-2:]
            self.read += sum(self.bytes_of(x) for x in given if StorageWeakRef(x.untyped_storage()) not in self.weights)
            self.written += self.bytes_of(out)
        return out

    @staticmethod
    def bytes_of(x: torch.Tensor) -> int:
        sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
        return math.prod(sizes) * x.element_size()


@given(config=configs(), data=st.data())
def test_bytes_of_products_are_those_of_live_ones(config: DeepseekV2Config, data: st.DataObject) -> None:
    """Eager in float32, in which the gate needs no copies; keys that heads share are copied there, so none are."""
    config = replace(config, num_key_value_heads=None, attention_bias=False)
    batch, seq, past = (data.draw(st.integers(low, 5)) for low in (1, 1, 0))
    layer_idx = data.draw(st.integers(0, 2))
    form = data.draw(st.sampled_from(["expanded", "absorbed"])) if config.use_mla else "auto"
    call = acc.Call(batch=batch, seq=seq, kv=seq + past, form=form, dtype="float32")
    with torch.device("meta"):
        layer = DeepseekV2DecoderLayer(config, layer_idx).eval().requires_grad_(False)
        run = prepared(layer, config, call)
        with Moved(layer) as live:
            run()
    moved = acc.activations_moved(config, layer_idx, call)
    products = [moved[name] for name in acc.products(config, layer_idx, call)]
    assert (live.read, live.written) == tuple(map(sum, zip(*products, strict=True)))


def test_bytes_of_other_operations_and_of_fused_attention() -> None:
    """By hand: 3 tokens of 64 numbers, 4 heads; three experts of 32 and two shared ones, of which each token takes 2 and all."""
    config = replace(preset("tiny"), _attn_implementation="eager")
    heads, top_k, shared = config.num_attention_heads, config.num_experts_per_tok, config.n_shared_experts
    assert top_k is not None
    assert shared is not None
    call = acc.Call(seq=3, kv=3, form="expanded")
    moved = acc.activations_moved(config, 1, call)
    assert set(moved) == set(acc.products(config, 1, call)) | set(acc.elementwise(config, 1, call))
    assert moved["residual"] == (2 * 2 * 2 * 3 * 64, 2 * 2 * 3 * 64)
    assert moved["softmax"] == (2 * heads * 9, 2 * heads * 9)
    assert moved["combine"] == (2 * 3 * 64 * (top_k + 1), 2 * 3 * 64)
    assert moved["swiglu"][0] == 2 * moved["swiglu"][1] == 2 * 2 * 3 * 32 * (top_k + shared)
    fused = acc.activations_moved(replace(config, _attn_implementation="sdpa"), 1, call)
    assert fused["softmax"] == (0, 0)
    assert fused["self_attn.scores"] == (moved["self_attn.scores"][0], 0)
    assert fused["self_attn.values"][0] == moved["self_attn.values"][0] - 2 * heads * 9
    assert {n for n in moved if moved[n] != fused[n]} == {"softmax", "self_attn.scores", "self_attn.values"}
    dense = acc.activations_moved(config, 0, call)
    assert dense["swiglu"] == (2 * 2 * 3 * config.intermediate_size, 2 * 3 * config.intermediate_size)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize(("seq", "kv"), [(1, 8192), (16, 64)])
def test_products_of_the_cards_layers(seq: int, kv: int, form: str) -> None:
    config = replace(preset("card"), _attn_implementation="eager")
    call = acc.Call(seq=seq, kv=kv, form=form, causal=False)
    for layer_idx in (0, 1):
        assert sum(acc.products(config, layer_idx, call).values()) == counted(config, layer_idx, call)


@given(seq=st.integers(1, 40), past=st.integers(0, 40))
def test_causal_pairs_are_those_that_see_each_other(seq: int, past: int) -> None:
    seen = sum(key <= past + query for query in range(seq) for key in range(seq + past))
    assert acc.Call(seq=seq, kv=seq + past).pairs == seen
    assert acc.Call(seq=seq, kv=seq + past, causal=False).pairs == seq * (seq + past)


@given(config=configs(), seq=st.integers(1, 300), past=st.integers(0, 300))
def test_auto_is_the_form_that_the_layer_takes(config: DeepseekV2Config, seq: int, past: int) -> None:
    assume(config.use_mla)
    with torch.device("meta"):
        attention = DeepseekV2DecoderLayer(config, 0).self_attn
    call = acc.Call(seq=seq, kv=seq + past)
    taken = attention.cheaper_form(seq, seq + past)
    assert acc.products(config, 0, call) == acc.products(config, 0, replace(call, form=taken))
    call = replace(call, causal=False)
    assert acc.products(config, 0, call) == acc.products(config, 0, replace(call, form=taken))
    for form in ("expanded", "absorbed"):
        named = replace(config, mla_form=form)
        assert acc.products(named, 0, call) == acc.products(config, 0, replace(call, form=form))
        assert acc.products(named, 0, replace(call, form=taken)) == acc.products(config, 0, replace(call, form=taken))


def test_pairs_that_are_counted_do_not_choose_the_form() -> None:
    lite, call = preset("deepseek_v2_lite"), acc.Call(seq=92, kv=189)
    forms = {acc.report(lite, replace(call, causal=causal))["config"]["call"]["form"] for causal in (False, True)}
    with torch.device("meta"):
        assert forms == {DeepseekV2DecoderLayer(lite, 0).self_attn.cheaper_form(92, 189)}


@given(config=configs(), batch=st.integers(1, 3), tokens=st.integers(1, 50))
def test_cache_bytes_are_those_of_live_caches(config: DeepseekV2Config, batch: int, tokens: int) -> None:
    layer = DeepseekV2DecoderLayer(config, 0).bfloat16()
    with torch.no_grad():
        _, cache = layer(torch.zeros(batch, tokens, config.hidden_size, dtype=torch.bfloat16), use_cache=True)
    assert acc.cache_bytes(config, batch * tokens, layers=1) == cache.nbytes


def test_what_a_token_would_take_in_every_kind_of_cache() -> None:
    v2 = preset("deepseek_v2")
    numbers = {kind: acc.cache_numbers(v2, kind) for kind in acc.CACHE_KINDS}
    assert numbers == {"own": 576, "latent": 576, "expanded": 40960, "mha": 32768, "gqa": 2048, "mqa": 256}
    assert acc.cache_bytes(v2, 1) == 69_120  # DeepSeek-V2's 60 layers in bfloat16
    with pytest.raises(ValueError, match="kind is 'latent'; wanted own, mha, gqa or mqa"):
        acc.cache_numbers(preset("deepseek_ocr"), "latent")
    for heads, shared, groups in ((10, None, 5), (10, 10, 5), (10, 2, 2), (7, None, 7), (16, None, 8), (22, None, 2)):
        config = replace(preset("deepseek_ocr"), hidden_size=64 * heads, num_attention_heads=heads)
        config = replace(config, num_key_value_heads=shared)
        assert acc.cache_numbers(config, "gqa") == 2 * groups * 64
    with_room = acc.report(v2, acc.Call(kv=100))["bytes"]
    assert with_room["kv_cache_by_kind"] == {
        kind: acc.cache_bytes(v2, 100, kind=kind) for kind in ("latent", "expanded", "mha", "gqa", "mqa")
    }
    assert list(acc.report(preset("deepseek_ocr"), acc.Call())["bytes"]["kv_cache_by_kind"]) == ["mha", "gqa", "mqa"]


def test_caches_that_cannot_be_are_refused() -> None:
    for given_, said in (
        ({"tokens": -1}, "tokens is -1"), ({"tokens": 1, "layers": -2}, "layers is -2"),
        ({"tokens": 1.5}, r"tokens is 1\.5; wanted an integer"), ({"tokens": True}, "tokens is True"),
        ({"tokens": 1, "layers": 1.0}, r"layers is 1\.0"),
        ({"tokens": 1, "dtype": "fp3"}, "dtype is 'fp3'; wanted float64"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            acc.cache_bytes(preset("card"), **given_)
    with pytest.raises(ValueError, match="layer is True"):
        acc.parameters(preset("card"), True)


@pytest.mark.parametrize(
    "given_", [{"batch": True}, {"seq": 1.0}, {"kv": 0}, {"kv": 10**15 + 1}, {"causal": "no"}, {"dtype": []}]
)
def test_calls_that_cannot_be_are_refused(given_: dict[str, Any], as_shipped: None) -> None:
    ((name, value),) = given_.items()
    shown = "a list of 0" if value == [] else repr(value)
    with pytest.raises(ValueError, match=f"{name} is {shown}; wanted "):
        acc.Call(**given_)


OF_A_CONFIG: dict[str, Callable[[Any], object]] = {
    "cache_bytes": lambda config: acc.cache_bytes(config, 1),
    "cache_numbers": acc.cache_numbers,
    "elementwise": lambda config: acc.elementwise(config, 1, acc.Call()),
    "experts_read": lambda config: acc.experts_read(config, 1),
    "matrices": lambda config: acc.matrices(config, 1),
    "model_flops": lambda config: acc.model_flops(config, acc.Call()),
    "model_parameters": acc.model_parameters,
    "most_ranks_reached": lambda config: acc.most_ranks_reached(config, 2),
    "products": lambda config: acc.products(config, 1, acc.Call()),
    "report": lambda config: acc.report(config, acc.Call()),
    "state_bytes": lambda config: acc.state_bytes(config, acc.Call()),
}


@pytest.mark.parametrize("count", OF_A_CONFIG.values(), ids=OF_A_CONFIG)
def test_what_is_no_configuration_is_told_what_reads_one(count: Callable[[Any], object], as_shipped: None) -> None:
    """A name of a preset, or the fields alone."""
    for config, what in (("deepseek_v2", "a str"), (None, "a NoneType"), (SMALL.to_dict(), "a dict")):
        with pytest.raises(ValueError, match=f"config is {what}; wanted a DeepseekV2Config; .*from_published reads"):
            count(config)


OF_A_CALL: dict[str, Callable[[Any], object]] = {
    "activation_peak": lambda call: acc.activation_peak(SMALL, call),
    "activations_moved": lambda call: acc.activations_moved(SMALL, 1, call),
    "bytes_per_token": lambda call: acc.bytes_per_token(SMALL, call, 2),
    "elementwise": lambda call: acc.elementwise(SMALL, 1, call),
    "mfu": lambda call: acc.mfu(SMALL, call, 1.0, 1.0),
    "model_weight_bytes": lambda call: acc.model_weight_bytes(SMALL, call),
    "products": lambda call: acc.products(SMALL, 1, call),
    "read_by_part": lambda call: acc.read_by_part(SMALL, 1, call),
    "recomputed": lambda call: acc.recomputed(SMALL, 1, call),
    "report": lambda call: acc.report(SMALL, call),
    "state_bytes": lambda call: acc.state_bytes(SMALL, call),
    "weights_read": lambda call: acc.weights_read(SMALL, 1, call),
}


@pytest.mark.parametrize("count", OF_A_CALL.values(), ids=OF_A_CALL)
def test_what_is_no_call_is_told_apart(count: Callable[[Any], object], as_shipped: None) -> None:
    for call, what in ((None, "None"), ({"seq": 3}, "an object of 1"), (8192, "8192")):
        with pytest.raises(ValueError, match=f"call is {what}; wanted a Call of dsv2_ref.accounting"):
            count(call)


def test_a_step_is_trained_or_not(as_shipped: None) -> None:
    for count in (acc.report, acc.activation_peak):
        with pytest.raises(ValueError, match="training is 'no'; wanted True or False"):
            count(SMALL, acc.Call(), 1, "no")


def test_a_model_of_any_depth_is_counted_at_once() -> None:
    """The most layers that are read, here in 10 s at most, and with the card's 40 what 40 times one gives."""
    deep = replace(preset("card"), num_hidden_layers=10**15, moe_layer_freq=3)
    found = acc.report(deep, acc.Call(seq=8, kv=8), training=True)
    mixed = 333_333_333_333_333  # multiples of 3 above 0 and below 10^15
    assert acc.call.moe_layers(deep, deep.num_hidden_layers) == mixed
    assert found["parameters"]["by_module"]["layers.mlp"] == (10**15 - mixed) * acc.parameters(deep, 1)["mlp"]
    assert found["bytes"]["activations_peak"] > 10**20


@given(
    layers=st.integers(1, 20),
    first=st.integers(0, 22),
    every=st.integers(1, 6),
    experts=st.sampled_from([None, 8]),
)
def test_layers_alike(layers: int, first: int, every: int, experts: int | None) -> None:
    config = replace(
        preset("tiny"), num_hidden_layers=layers, first_k_dense_replace=first, moe_layer_freq=every,
        n_routed_experts=experts,
    )  # fmt: skip
    kinds = [config.is_moe_layer(i) for i in range(layers)]
    for end in range(layers + 1):
        assert acc.call.moe_layers(config, end) == sum(kinds[:end])
    last = {kind: i for i, kind in enumerate(kinds)}
    assert acc.call.layers_alike(config) == sorted((i, kinds.count(kind)) for kind, i in last.items())


def test_experts_that_a_batch_reads_on_average() -> None:
    card = preset("card")
    assert acc.experts_read(card, 1) == pytest.approx(2)
    drawn = torch.Generator().manual_seed(0)
    choices = torch.rand(400, 64, 160, generator=drawn).topk(2).indices.flatten(1)
    mean = sum(len(choice.unique()) for choice in choices) / 400
    # The mean of 400 batches is known to a twentieth of their standard deviation, which is below 5 experts.
    assert acc.experts_read(card, 64) == pytest.approx(mean, abs=1)
    assert acc.experts_read(card, 0) == acc.experts_read(replace(card, n_routed_experts=None), 64) == 0
    with pytest.raises(ValueError, match="tokens is -1; wanted 0 or more"):
        acc.experts_read(card, -1)


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "deepseek_v2"])
@pytest.mark.parametrize("batch", [1, 64])
def test_intensities_of_a_decode_step_follow_from_the_sizes(name: str, batch: int) -> None:
    config = preset(name)
    heads, latent, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    chosen = batch * config.num_experts_per_tok
    found = acc.intensities(config, 1, acc.Call(batch=batch, kv=8192))
    assert found.pop("projections") == pytest.approx(batch, rel=1e-3)  # their norms are read as well
    assert found == pytest.approx({
        "scores and values": heads * (2 * latent + rope) / (latent + rope),
        "gate": batch,
        "shared experts": batch,
        "routed experts": chosen / acc.experts_read(config, batch),
    })  # fmt: skip
    assert acc.intensities(config, 0, acc.Call(batch=batch, kv=8192))["MLP"] == batch
    one_byte = acc.intensities(config, 1, acc.Call(batch=batch, kv=8192, dtype="int8"))
    assert one_byte["routed experts"] == pytest.approx(2 * found["routed experts"])
    assert "scores and values" not in acc.intensities(config, 1, acc.Call(seq=8, kv=8, form="expanded"))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_cached_key_is_used_once_by_each_head_that_shares_it(groups: int) -> None:
    config = replace(preset("deepseek_v2_lite"), use_mla=False, num_attention_heads=8, num_key_value_heads=groups)
    found = acc.intensities(config, 1, acc.Call(batch=3, kv=100))
    assert found["scores and values"] == 8 / groups


@given(config=configs(), layer_idx=st.integers(0, 2), form=st.sampled_from(acc.FORMS))
def test_parts_of_a_layer_add_up(config: DeepseekV2Config, layer_idx: int, form: str) -> None:
    call = acc.Call(batch=2, seq=3, kv=5, form=form)
    flops = acc.products(config, layer_idx, call)
    assert sum(acc.by_part(flops).values()) == sum(flops.values())
    read = acc.read_by_part(config, layer_idx, call)
    cache = read.pop("scores and values", 0)
    assert cache in (0, acc.cache_bytes(config, 2 * 5, layers=1))
    stream = 2 * 2 * config.hidden_size  # the two norms of the stream, in bfloat16
    assert sum(read.values()) + stream == acc.weights_read(config, layer_idx, call)


def test_active_parameters_are_all_but_the_experts_not_chosen() -> None:
    card = preset("card")
    stored, active = acc.parameters(card, 1), acc.parameters(card, 1, active=True)
    assert {name for name in stored if stored[name] != active[name]} == {"mlp.experts"}
    assert stored["mlp.experts"] == 80 * active["mlp.experts"]
    assert acc.parameters(card, 0) == acc.parameters(card, 0, active=True)


def test_the_accounting_and_its_command_need_no_torch() -> None:
    program = (
        "import sys; sys.modules.update(torch=None, jaxtyping=None, numpy=None);"
        "from dsv2_ref.__main__ import main; sys.exit(main(['account', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"]["total"] > 37e9


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Mapping[str, Any]:
    assert main(["account", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_prints_what_the_functions_say(capsys: pytest.CaptureFixture[str]) -> None:
    lite = preset("deepseek_v2_lite")
    found = printed(capsys, "--preset", "deepseek_v2_lite", "--batch", "1", "--seq", "1", "--kv", "8192")
    assert list(found) == ["config", "parameters", "flops", "bytes", "training", "intensity"]
    assert found["training"] is None
    assert found["parameters"]["total"] == PUBLISHED["deepseek_v2_lite"]
    assert found["parameters"]["by_module"] == acc.model_parameters(lite)
    assert found["bytes"]["kv_cache"] == acc.cache_bytes(lite, 8192) == 8192 * 31_104
    assert found["config"]["call"]["form"] == "absorbed"
    assert DeepseekV2Config.from_published(found["config"]) == lite
    call = acc.Call(seq=1, kv=8192)
    products = sum(sum(acc.products(lite, i, call).values()) for i in range(27)) + 2 * 2048 * 102400
    assert found["flops"]["products"] == products
    assert found["flops"]["total"] == sum(found["flops"]["by_operation"].values())
    one = printed(capsys, "--layer", "3", "--seq", "5", "--no-causal", "--form", "expanded", "--dtype", "float32")
    assert one["parameters"]["total"] == sum(acc.parameters(preset("card"), 3).values())
    assert one["bytes"]["weights"] == 4 * one["parameters"]["total"]
    assert one["config"]["call"] == {
        "batch": 1, "seq": 5, "kv": 5, "form": "expanded", "causal": False, "dtype": "float32", "weights": None,
        "group": 64, "cache": None, "kept": None, "read": None, "layer": 3, "training": False, "checkpointing": None,
    }  # fmt: skip
    eager = ("--attention", "eager", "--seq", "64", "--training", "--checkpointing")
    found = printed(capsys, "--preset", "tiny", *eager)
    config, call = replace(preset("tiny"), _attn_implementation="eager"), acc.Call(seq=64, kv=64)
    assert found["bytes"]["activations_peak"] == acc.activation_peak(config, call, None, True, True)
    assert found["config"]["call"]["checkpointing"] == "full"
    assert found["bytes"]["kv_cache_written"] == found["bytes"]["kv_cache"]
    moved = found["bytes"]["activations_by_operation"]
    assert moved["lm_head"] == {"read": 2 * 64 * 64, "written": 2 * 64 * config.vocab_size}
    assert set(moved) == set(found["flops"]["by_operation"]) | {"embed_tokens"}
    assert found["bytes"]["activations_read"] == sum(part["read"] for part in moved.values())
    assert found["bytes"]["activations_written"] == sum(part["written"] for part in moved.values())


def test_the_command_reads_a_published_file_and_prints_a_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(preset("deepseek_v2").to_dict()))
    assert main(["account", "--config", str(tmp_path / "config.json"), "--kv", "100"]) == 0
    table = capsys.readouterr().out
    assert "235,741,434,880" in table
    assert "cache after the call" in table
    assert "activations alive together" in table
    assert max(map(len, table.splitlines())) < 100


def test_the_command_names_keys_that_it_does_not_know(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v2", "zebra": 1}')
    assert main(["account", "--config", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().err == "warning: not known, and so not read from the configuration: zebra\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "gpt"], "preset is 'gpt'; wanted one of card"),
        (["--batch", "-1"], "batch is -1; wanted an integer of at least 1"),
        (["--seq", "8", "--kv", "4"], "kv is 4; wanted at least the 8 new tokens"),
        (["--layer", "40"], "layer is 40; wanted from 0 to 39"),
        (["--layer", "-1"], "layer is -1"),
        (["--dtype", "fp3"], "dtype is 'fp3'; wanted float64"),
        (["--form", "merged"], "form is 'merged'; wanted auto"),
        (["--attention", "fast"], "_attn_implementation is 'fast'"),
        (["--checkpointing"], "checkpointing is 'full'; wanted None where nothing is trained"),
        (["--training", "--checkpointing", "some"], "checkpointing is 'some'; wanted None, full or selective"),
        (["--optimizer", "sgd"], "optimizer is 'sgd'; wanted None where nothing is trained"),
        (["--training", "--optimizer="], "optimizer is ''; wanted adamw, momentum, sgd"),
        (["--training", "--optimizer", "lion"], "optimizer is 'lion'; wanted adamw, momentum, sgd"),
        (
            ["--training", "--dtype", "int8"],
            "dtype is 'int8'; wanted a floating-point dtype: no layer is trained in int8",
        ),
        (["--training", "--kv", "9"], "kv is 9; wanted the 1 new tokens"),
        (["--attention", "flash_attention_2", "--dtype", "float32"], "dtype is 'float32'; wanted float16 or bfloat16"),
        (["--batch", "9" * 400], "wanted an integer of at least 1, and at most 10^15"),
        (["--kv", "1000000000000001"], "kv is 1000000000000001"),
        (["--batch", "abc"], "argument --batch: invalid int value: 'abc'"),
        (["--batch", "1.5"], "invalid int value: '1.5'"),
        (["--seq", "1e3"], "invalid int value: '1e3'"),
        (["--batch", ""], "invalid int value: ''"),
        (["--layer", "x"], "argument --layer: invalid int value: 'x'"),
        (["--preset", "card", "--config", "b"], "argument --config: not allowed with argument --preset"),
        (["--sequences", "3"], "unrecognized arguments: --sequences 3"),
        (["a\r\nb\u2028c"], "unrecognized arguments: a b c"),
        (["--config", "BROKEN"], "BROKEN is not JSON"),
        (["--config", "NOWHERE"], "No such file"),
        (["--config", "WRONG"], "num_experts_per_tok"),
        (["--config", "LIST"], "LIST: the configuration is a list of 1; wanted a JSON object"),
        (["--config", "DEEP"], "DEEP is not JSON that can be read: nested too deeply"),
        (["--config", "LATIN"], "LATIN is not text in UTF-8"),
        (["--config", "HUGE"], "HUGE: hidden_size is 1000"),
        (["--config", "ROPE"], "ROPE: rope_theta is 1000"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "BROKEN").write_text("{")
    (tmp_path / "LIST").write_text("[1]")
    (tmp_path / "DEEP").write_text("[" * 200_000)
    (tmp_path / "LATIN").write_bytes(b"\xe9")
    (tmp_path / "HUGE").write_text(f'{{"model_type": "deepseek_v2", "hidden_size": {10**400}}}')
    (tmp_path / "ROPE").write_text(f'{{"model_type": "deepseek_v2", "rope_theta": {10**400}}}')
    (tmp_path / "WRONG").write_text(
        '{"model_type": "deepseek_v2", "n_routed_experts": 4, "num_experts_per_tok": 9, "hidden_size": 64}'
    )
    if arguments[0] == "--config":
        arguments = ["--config", str(tmp_path / arguments[1])]
    assert main(["account", *arguments]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert said in streams.err
    assert streams.err.count("\n") == 1


def account(into: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv2_ref", "account", "--json"]
    return subprocess.run(command, cwd=ROOT, stdout=into, stderr=subprocess.PIPE, text=True)


def test_a_pipe_that_nobody_reads_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = account(writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_told_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = account(full.fileno())
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert done.stderr.count("\n") == 1


def test_sizes_at_the_limit_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    most = str(10**15)
    assert main(["account", "--batch", most, "--seq", most, "--training"]) == 0
    capsys.readouterr()
    assert printed(capsys, "--batch", most, "--kv", most)["bytes"]["kv_cache"] == 10**30 * 40 * 1152


def test_a_wrong_count_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: one matrix left out, and the absorbed form for the expanded one."""
    right = weights.projections
    monkeypatch.setattr(weights, "projections", lambda c: {n: x for n, x in right(c).items() if "kv_b" not in n})
    assert acc.model_parameters(SMALL) != built(SMALL)
    monkeypatch.undo()
    config = replace(SMALL, _attn_implementation="eager")
    call = acc.Call(seq=2, kv=9, form="expanded", causal=False)
    wrong = sum(acc.products(config, 1, replace(call, form="absorbed")).values())
    assert wrong != counted(config, 1, call)
