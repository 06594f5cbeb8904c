"""The accounting of fewer bits and fewer rows, against quantised modules and live caches."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM, DeepseekV2MLP
from dsv2_ref import accounting as acc
from dsv2_ref.__main__ import main
from dsv2_ref.accounting import cached, stored
from dsv2_ref.forget import chosen_mask, window
from dsv2_ref.quantize import KINDS, quantize
from dsv2_ref.records import CACHE_FORMATS
from tests.examples import fewer, thorough
from tests.peers import SMALL
from tests.test_accounting import configs, counted, preset

pytestmark = pytest.mark.slow

DTYPES = ("float64", "float32", "bfloat16", "float16")
LITE = DeepseekV2Config.deepseek_v2_lite()


@st.composite
def wide_configs(draw: st.DrawFn) -> DeepseekV2Config:
    """Models of `configs`, with widths that groups divide or not, and that take several blocks or only cut ones."""
    config, factor = draw(configs()), draw(st.sampled_from([1, 2, 8, 43, 128]))
    names = ("hidden_size", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "intermediate_size")
    sizes = {name: factor * getattr(config, name) for name in (*names, "moe_intermediate_size")}
    return replace(config, **sizes, q_lora_rank=config.q_lora_rank and factor * config.q_lora_rank)


@st.composite
def fewer_bits(draw: st.DrawFn) -> acc.Call:
    group = draw(st.sampled_from([2, 4, 6, 16, 64]))
    return acc.Call(dtype=draw(st.sampled_from(DTYPES)), weights=draw(st.sampled_from(KINDS)), group=group)


def quantized(module: Any, call: acc.Call) -> Any:
    """A module on the meta device, in the dtype of the call and quantised as it says."""
    module = module.to(getattr(torch, call.dtype))
    return quantize(module, call.weights, call.group) if call.weights else module


def bytes_by_name(module: torch.nn.Module) -> dict[str, int]:
    """Bytes of a layer's state dict, under the names of the accounting."""
    sizes: dict[str, int] = {}
    for name, held in module.state_dict().items():
        name = re.sub(r"\.(codes|scales)$", ".weight", name)
        name = re.sub(r"^mlp\.(experts|shared_experts)\..*", r"mlp.\1", name)
        name = re.sub(r"^mlp\.(gate|up|down)_proj\..*", "mlp", name)
        sizes[name] = sizes.get(name, 0) + held.nbytes
    return sizes


@given(config=wide_configs(), call=fewer_bits(), layer_idx=st.integers(0, 2))
def test_bytes_of_quantized_layers(config: DeepseekV2Config, call: acc.Call, layer_idx: int) -> None:
    """Name by name; what cannot be quantised is rejected in the same words."""
    with torch.device("meta"):
        layer = DeepseekV2DecoderLayer(config, layer_idx)
    try:
        layer = quantized(layer, call)
    except ValueError as error:
        with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
            acc.weight_bytes(config, layer_idx, call)
        return
    assert acc.weight_bytes(config, layer_idx, call) == bytes_by_name(layer)


def bytes_of_model(config: DeepseekV2Config, call: acc.Call) -> tuple[int, int]:
    """Bytes of a built model, and those that one token passes through."""
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(config)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    model = quantized(model, call)
    held = {name: x.nbytes for name, x in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    ends = model.model.embed_tokens.weight
    met = sum(held.values()) - (0 if tied else ends.nbytes - ends.nbytes // len(ends))
    for layer in model.model.layers:
        if not isinstance(layer.mlp, DeepseekV2MLP):
            experts = sum(x.nbytes for x in layer.mlp.experts.state_dict().values())
            met -= experts // len(layer.mlp.gate.weight) * (len(layer.mlp.gate.weight) - layer.mlp.gate.top_k)
    return sum(held.values()), met


@fewer(2)
@given(config=wide_configs(), call=fewer_bits())
def test_bytes_of_quantized_models(config: DeepseekV2Config, call: acc.Call) -> None:
    try:
        whole, met = bytes_of_model(config, call)
    except ValueError as error:
        with pytest.raises(ValueError, match=f"^{str(error).split()[0]} is .*; wanted "):
            acc.report(config, call)
        return
    found = acc.report(config, call)["bytes"]
    assert found["weights"] == whole == sum(acc.model_weight_bytes(config, call).values())
    assert sum(acc.model_weight_bytes(config, call, active=True).values()) == met == found["weights_read"]


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ("int4", 8_965_299_200),
        *thorough((None, 31_412_968_448), ("int8", 16_146_612_352), ("fp8", 16_133_181_248)),
    ],
)
def test_bytes_of_v2_lite(weights: str | None, whole: int) -> None:
    """Of 15.7 billion weights 419 million stay: embedding and head, gates and norms."""
    call = acc.Call(weights=weights)
    assert bytes_of_model(LITE, call)[0] == sum(acc.model_weight_bytes(LITE, call).values()) == whole
    stay = 2 * 102_400 * 2048 + 26 * 64 * 2048 + 27 * (512 + 2 * 2048) + 2048
    bits = {None: 16, "int8": 8, "int4": 4 + 16 / 64, "fp8": 8}[weights]
    # The scales of rows and blocks are less than one in a thousand of the bytes: the shortest row has 512 weights.
    least = 2 * stay + (15_706_484_224 - stay) * bits / 8
    assert least <= whole < 1.005 * least


def test_the_kinds_are_the_packages() -> None:
    assert set(acc.WEIGHTS) == set(KINDS)
    assert set(acc.CACHES) == set(CACHE_FORMATS)
    assert all(acc.cache_bytes(LITE, 1, layers=1, cache=kind) == size for kind, size in
               {None: 1152, "fp8": 656, "int8": 656, "int4": 400}.items())  # fmt: skip


# Caches


@st.composite
def cached_calls(draw: st.DrawFn) -> acc.Call:
    batch, seq, past = (draw(st.integers(1, 5)) for _ in range(3))
    kept = draw(st.none() | st.integers(seq + 1, seq + past))
    read = draw(st.none() | st.integers(1, seq + past if kept is None else kept))
    kind, dtype = draw(st.none() | st.sampled_from(acc.CACHES)), draw(st.sampled_from(DTYPES))
    form = draw(st.sampled_from(["expanded", "absorbed"]))
    return acc.Call(
        batch=batch, seq=seq, kv=seq + past, dtype=dtype, cache=kind, kept=kept, read=read, form=form, causal=False
    )


def cache_before(layer: DeepseekV2DecoderLayer, call: acc.Call) -> Any:
    """The cache of a layer before a call: all past tokens have passed, as many are left as the call leaves room for."""
    attention = layer.self_attn
    kind = {} if call.cache is None else {"format": call.cache}
    cache = attention.empty_cache(call.batch, capacity=call.kv, **kind)
    new = call.batch, call.kv - call.seq, *attention.cache_features
    cache = cache.append(torch.randn(new).to(attention.o_proj.weight.dtype))
    return cache if call.kept is None else window(cache, 0, call.kept - call.seq)


@given(config=configs(), call=cached_calls(), latent=st.integers(1, 9) | st.sampled_from([128, 130, 256, 384]))
def test_bytes_of_live_caches(config: DeepseekV2Config, call: acc.Call, latent: int) -> None:
    """One scale for a latent that tiles of 128 do not divide, else one for each tile."""
    if not config.use_mla:
        call = replace(call, cache=None)
    config = replace(config, kv_lora_rank=latent)
    if call.cache == "int4" and config.kv_lora_rank % 2:
        with torch.device("meta"), pytest.raises(ValueError, match="cannot be halved") as theirs:
            DeepseekV2DecoderLayer(config, 0).self_attn.empty_cache(1, 1, format="int4")
        with pytest.raises(ValueError, match="cannot be halved") as ours:
            acc.report(config, call)
        assert str(ours.value) == str(theirs.value).replace("format", "cache")
        return
    layer = DeepseekV2DecoderLayer(config, 0).to(getattr(torch, call.dtype)).eval()
    before = cache_before(layer, call)
    with torch.no_grad():
        x = torch.zeros(call.batch, call.seq, config.hidden_size, dtype=getattr(torch, call.dtype))
        _, after = layer(x, past_key_value=before, use_cache=True)
    assert after.seen == call.kv
    assert after.length == call.rows
    sizes = acc.report(config, call, 0)["bytes"]
    assert sizes["kv_cache"] == after.nbytes
    assert sizes["kv_cache_written"] == after.nbytes - before.nbytes
    assert sizes["kv_cache_read"] == after.nbytes // call.rows * call.rows_read
    rows = call.batch * call.rows
    assert sizes["kv_cache"] == acc.cache_bytes(config, rows, call.dtype, layers=1, cache=call.cache)
    plain = acc.cache_bytes(config, rows, call.dtype, layers=1)
    assert sizes["kv_cache_by_kind"].get("latent", plain) == plain

    moved = acc.activations_moved(config, 0, call)
    if config.use_mla and call.cache and call.form == "absorbed":
        codes, scales, rope = after.record.parts  # type: ignore[attr-defined]
        width, queries = layer.self_attn.o_proj.weight.itemsize, call.tokens * config.num_attention_heads
        query = queries * (config.kv_lora_rank + config.qk_rope_head_dim) * width
        keys, scores = call.batch * call.rows_read, moved["softmax"][0]
        assert moved["self_attn.scores"] == (query + keys * (codes + scales + rope), scores)
        assert moved["self_attn.values"][0] == scores + keys * (codes + scales)


@given(config=configs(), call=cached_calls())
def test_a_call_over_kept_rows_is_a_call_over_so_many(config: DeepseekV2Config, call: acc.Call) -> None:
    call = replace(call, cache=None, read=None, form=call.form if config.use_mla else "auto")
    fewer = replace(call, kv=call.rows, kept=None)
    assert acc.products(config, 1, call) == acc.products(config, 1, fewer)
    assert acc.elementwise(config, 1, call) == acc.elementwise(config, 1, fewer)
    assert acc.activations_moved(config, 1, call) == acc.activations_moved(config, 1, fewer)
    assert acc.activation_peak(config, call, 1) == acc.activation_peak(config, fewer, 1)
    assert sum(acc.products(config, 1, call).values()) == counted(config, 1, fewer)
    if config.use_mla:
        with torch.device("meta"):
            taken = DeepseekV2DecoderLayer(config, 0).self_attn.cheaper_form(call.seq, call.rows)
        for read in (None, 1):  # the layer does not know what is not read
            auto = replace(call, form="auto", read=read)
            assert acc.products(config, 0, auto) == acc.products(config, 0, replace(auto, form=taken))


@given(config=configs(), kv=st.integers(1, 9), data=st.data())
def test_a_token_that_reads_fewer_rows_computes_as_over_so_many(
    config: DeepseekV2Config, kv: int, data: st.DataObject
) -> None:
    call = acc.Call(
        kv=kv, read=data.draw(st.integers(1, kv)), form=data.draw(st.sampled_from(["expanded", "absorbed"]))
    )
    alone = replace(call, kv=call.read, read=None)
    assert acc.products(config, 1, call) == acc.products(config, 1, alone)
    assert acc.elementwise(config, 1, call) == acc.elementwise(config, 1, alone)
    assert acc.activations_moved(config, 1, call) == acc.activations_moved(config, 1, alone)
    assert acc.read_by_part(config, 1, call) == acc.read_by_part(config, 1, alone)
    whole, few = acc.report(config, call, 1), acc.report(config, alone, 1)
    assert whole["bytes"]["kv_cache"] * alone.kv == few["bytes"]["kv_cache"] * kv  # no memory is saved
    assert whole["intensity"] == few["intensity"]
    assert whole["bytes"]["activations_peak"] == acc.activation_peak(config, replace(call, read=None), 1)


@given(seq=st.integers(1, 12), past=st.integers(0, 12), data=st.data())
def test_pairs_are_those_that_a_mask_of_chosen_rows_leaves(seq: int, past: int, data: st.DataObject) -> None:
    kv = seq + past
    read, seed = data.draw(st.integers(1, kv)), data.draw(st.integers(0, 99))
    scores = torch.rand(1, seq, kv, generator=torch.Generator().manual_seed(seed))
    chosen = scores.tril(past).topk(read).indices  # what is hidden has 0, and is chosen last
    mask = chosen_mask(chosen, kv)[0, 0]
    call = acc.Call(seq=seq, kv=kv, read=read)
    assert call.pairs == mask.sum()
    assert replace(call, causal=False).pairs == chosen.numel()
    assert len(chosen.unique()) <= call.rows_read <= min(kv, chosen.numel())
    assert seq > 1 or call.rows_read == mask.any(dim=0).sum()
    for other in (replace(call, read=kv), replace(call, kept=kv, read=kv)):
        assert other.pairs == replace(call, read=None).pairs
        assert other.rows_read == kv


def test_a_decode_step_of_v2_lite_by_hand() -> None:
    """Over 8,192 tokens: a record of 656 bytes, or 2,048 of them read; codes and a scale for 64 weights."""
    for call, size in (
        (acc.Call(kv=8192), 8192 * 1152),
        (acc.Call(kv=8192, cache="fp8"), 8192 * 656),
        (acc.Call(kv=8192, cache="fp8", read=2048), 2048 * 656),
        (acc.Call(kv=8192, cache="int4", kept=1024), 1024 * 400),
    ):
        assert acc.read_by_part(LITE, 1, call)["scores and values"] == size
        pairs = call.rows_per_query * 16 * (2 * 512 + 64)
        assert acc.intensities(LITE, 1, call)["scores and values"] == 2 * pairs / size
    four_bits = acc.read_by_part(LITE, 1, acc.Call(kv=8192, weights="int4"))
    assert four_bits["routed experts"] == 6 * 3 * 2048 * 1408 * (4 + 16 / 64) / 8
    assert four_bits["gate"] == 2 * 64 * 2048
    assert four_bits["projections"] < acc.read_by_part(LITE, 1, acc.Call(kv=8192))["projections"] / 3.7


# What is rejected


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"weights": "int3"}, "weights is 'int3'; wanted None or one of int8, int4, fp8"),
        ({"cache": "int3"}, "cache is 'int3'; wanted None or one of fp8, int8, int4"),
        (
            {"weights": "int4", "dtype": "int8"},
            "weights is 'int4'; wanted None for the dtype int8, which has no scales",
        ),
        ({"cache": "fp8", "dtype": "int8"}, "cache is 'fp8'; wanted None for the dtype int8, which has no scales"),
        ({"group": 3}, "group is 3; wanted an even number, 2 or more"),
        ({"group": 0}, "group is 0; wanted an even number, 2 or more"),
        ({"group": True}, "group is True; wanted an even number, 2 or more"),
        ({"kept": 9}, "kept is 9; wanted None, or from seq=2 to kv=8"),
        ({"kept": 1}, "kept is 1; wanted None, or from seq=2 to kv=8"),
        ({"kept": 4.0}, "kept is 4.0; wanted None, or from seq=2 to kv=8"),
        ({"read": 0}, "read is 0; wanted None, or from 1 to the 8 rows in the cache"),
        ({"read": 9}, "read is 9; wanted None, or from 1 to the 8 rows in the cache"),
        ({"kept": 4, "read": 5}, "read is 5; wanted None, or from 1 to the 4 rows in the cache"),
    ],
)
def test_calls_that_cannot_be_are_rejected(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        acc.Call(seq=2, kv=8, **given_)


def odd_latent() -> DeepseekV2Config:
    return replace(SMALL, use_mla=True, kv_lora_rank=7, q_lora_rank=None)


@pytest.mark.parametrize(
    ("config", "given_", "said"),
    [
        (LITE, {"weights": "int4", "group": 128},
         "group is 128; wanted a divisor of 10944, the inputs of down_proj, such as 64"),
        (LITE, {"weights": "int4", "group": 60}, "group is 60; wanted a divisor of 2048, the inputs of q_proj, such as 32"),
        (replace(LITE, moe_intermediate_size=1400, first_k_dense_replace=0), {"weights": "int4", "group": 64},
         "group is 64; wanted a divisor of 1400, the inputs of experts, such as 8"),
        (replace(LITE, moe_intermediate_size=1400), {"weights": "fp8"},
         "weights is 'fp8'; wanted int8 or int4: 128 does not divide the experts' width 1400"),
        (odd_latent(), {"weights": "int4", "group": 2},
         "weights is 'int4'; wanted int8 or fp8: 7, the inputs of kv_b_proj, is odd"),
        (odd_latent(), {"cache": "int4"}, "cache is 'int4'; wanted fp8 or int8: the latent of 7 features cannot be halved"),
        (preset("deepseek_ocr"), {"cache": "fp8"}, "cache is 'fp8'; wanted None: this model has no latent"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_quantized_so_are_rejected(
    config: DeepseekV2Config, given_: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        acc.report(config, acc.Call(kv=8, **given_))


def test_training_is_in_the_dtype() -> None:
    tiny = preset("tiny")
    for given_, said in (
        ({"cache": "fp8"}, "cache is 'fp8'; wanted None: training has no cache"),
        ({"weights": "int8"}, "weights is 'int8'; wanted None for training: rounded weights get no gradients"),
    ):
        with pytest.raises(ValueError, match=said):
            acc.activation_peak(tiny, acc.Call(**given_), training=True)
    with pytest.raises(ValueError, match="kind is 'mha'; wanted own or latent for a cache in fp8"):
        acc.cache_bytes(tiny, 1, kind="mha", cache="fp8")
    with pytest.raises(ValueError, match="cache is 'fp3'; wanted None or one of fp8"):
        acc.cache_bytes(tiny, 1, cache="fp3")


# The command


FEWER = ("--weights", "int4", "--group", "32", "--cache", "fp8", "--kept", "64", "--read", "8")


def test_the_command_prints_fewer_bits_and_rows(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["account", "--preset", "deepseek_v2_lite", "--kv", "100", *FEWER]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    fewer: dict[str, Any] = {"weights": "int4", "group": 32, "cache": "fp8", "kept": 64, "read": 8}
    call = acc.Call(kv=100, **fewer)
    assert found == acc.report(LITE, call)
    assert found["config"]["call"].items() >= fewer.items()
    assert DeepseekV2Config.from_published(found["config"]) == LITE
    assert main(arguments) == 0
    table = capsys.readouterr().out
    first, second = table.splitlines()[:2]
    assert first == "model: 1 x 1 tokens over 100, causal, bfloat16, sdpa, absorbed"
    assert second == "weights in int4 in groups of 32, cache in fp8, 64 rows kept, 8 read per query"
    sizes = found["bytes"]
    for label, name in {
        "weights": "weights", "weights that this call reads": "weights_read", "cache after the call": "kv_cache",
        "cache that this call reads": "kv_cache_read", "cache that this call writes": "kv_cache_written",
    }.items():  # fmt: skip
        assert re.search(rf"^  {label}  +{sizes[name]:,}  ", table, re.M)
    assert (sizes["kv_cache"], sizes["kv_cache_read"], sizes["kv_cache_written"]) == (
        27 * 64 * 656, 27 * 8 * 656, 27 * 656
    )  # fmt: skip
    assert max(map(len, table.splitlines())) < 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "int5"], "weights is 'int5'; wanted None or one of int8, int4, fp8"),
        (["--weights", "int4", "--group", "128"], "group is 128; wanted a divisor of 10944"),
        (["--group", "x"], "argument --group: invalid int value: 'x'"),
        (["--cache", "bf8"], "cache is 'bf8'"),
        (["--kept", "9"], "kept is 9; wanted None, or from seq=1 to kv=1"),
        (["--read", "2"], "read is 2; wanted None, or from 1 to the 1 rows"),
        (["--training", "--cache", "fp8"], "cache is 'fp8'; wanted None: training has no cache"),
        (["--training", "--weights", "fp8"], "weights is 'fp8'; wanted None for training"),
    ],
)
def test_the_command_rejects_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["account", "--preset", "deepseek_v2_lite", *arguments]) == 2
    streams = capsys.readouterr()
    assert (streams.out, streams.err.count("\n")) == ("", 1)
    assert said in streams.err


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [(stored, "FP8_BLOCK", 64), (stored, "QUANTIZED", re.compile("q_proj")), (cached, "TILE", 64)],
)
def test_a_wrong_count_would_be_seen(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, wrong: Any) -> None:
    monkeypatch.setattr(module, name, wrong)
    with torch.device("meta"):
        layer = quantized(DeepseekV2DecoderLayer(LITE, 1), acc.Call(weights="fp8"))
        cache = layer.self_attn.empty_cache(1, capacity=4, format="fp8")
    seen = acc.weight_bytes(LITE, 1, acc.Call(weights="fp8")) != bytes_by_name(layer)
    seen = seen or acc.cache_bytes(LITE, 4, layers=1, cache="fp8") != cache.reserved_nbytes
    assert seen
