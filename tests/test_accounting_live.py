"""Whatever the accounting says besides products: counted once more on a live layer, module by module.

Parameters, products, caches and peaks have tests of their own. Here the small operations, the parameters and weights that
tokens use, and the sums of the report are held against what modules hold, are given and return.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dsv2_ref import (
    DeepseekV2Config,
    DeepseekV2DecoderLayer,
    DeepseekV2ForCausalLM,
    DeepseekV2MLP,
    DeepseekV2RMSNorm,
)
from dsv2_ref import accounting as acc
from dsv2_ref.__main__ import main
from tests.examples import fewer
from tests.test_accounting import PRESETS, configs, preset

pytestmark = pytest.mark.slow

BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "int8": 8}


@st.composite
def calls(draw: st.DrawFn) -> acc.Call:
    batch, seq, past = (draw(st.integers(least, 5)) for least in (1, 1, 0))
    form = draw(st.sampled_from(["expanded", "absorbed"]))
    return acc.Call(batch=batch, seq=seq, kv=seq + past, form=form, dtype=draw(st.sampled_from(sorted(BITS))))


class Rotated(TorchDispatchMode):
    """Elements that rotations multiply by a cosine: each of a rotated tensor, once."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self._cosines: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        tensors = [x for x in args if isinstance(x, Tensor) and x.ndim > 0]
        by_cosine = name == "mul" and any(StorageWeakRef(x.untyped_storage()) in self._cosines for x in tensors)
        if name == "cos" or (by_cosine and len(tensors) == 1):  # a scaled table of cosines is one too
            self._cosines.add(StorageWeakRef(out.untyped_storage()))
        elif by_cosine:
            self.elements += out.numel()
        return out


def numbers(layer: DeepseekV2DecoderLayer, call: acc.Call) -> dict[str, int]:
    """How many numbers each small operation of a call makes, from what the layer's modules take and give."""
    found = {"swiglu": 0}

    def note(module: Any, given: Any, result: Any) -> None:
        found["swiglu"] += call.tokens * module.down_proj.in_features

    hooks = [module.register_forward_hook(note) for module in layer.modules() if isinstance(module, DeepseekV2MLP)]
    hidden = layer.hidden_size
    cache = layer.self_attn.empty_cache(call.batch, capacity=call.kv)
    if past := call.kv - call.seq:
        cache = cache.append(torch.randn(call.batch, past, *layer.self_attn.cache_features).double())
    x = torch.randn(call.batch, call.seq, hidden).double()
    with torch.no_grad(), Rotated() as rotated:
        out, weights = layer(x, past_key_value=cache, output_attentions=True)
    for hook in hooks:
        hook.remove()
    norms = [module for module in layer.modules() if isinstance(module, DeepseekV2RMSNorm)]
    found |= {
        "norms": call.tokens * sum(norm.weight.numel() for norm in norms),
        "rotary": rotated.elements,
        "softmax": int((weights > 0).sum()),
        "scores": weights.numel(),
        "residual": 2 * out.numel(),
    }
    if not isinstance(layer.mlp, DeepseekV2MLP):
        chosen: Tensor = layer.mlp.gate(x)[0]
        found["swiglu"] += chosen.numel() * layer.mlp.experts.down_proj.shape[-1]
        found["router_softmax"] = call.tokens * len(layer.mlp.gate.weight)
        found["combine"] = chosen.numel() * hidden
    return found


def live_layer(config: DeepseekV2Config, layer_idx: int, call: acc.Call) -> DeepseekV2DecoderLayer:
    layer = DeepseekV2DecoderLayer(config, layer_idx).double().eval()
    if config.use_mla:
        layer.self_attn.form = call.form
    return layer


OPERATIONS = {"norms": 4, "rotary": 3, "softmax": 6, "residual": 1, "swiglu": 5, "router_softmax": 6, "combine": 2}
"""FLOPs for each number, as the accounting states them."""


@given(config=configs(), call=calls(), layer_idx=st.integers(0, 2))
def test_small_operations_are_those_of_a_live_layer(config: DeepseekV2Config, call: acc.Call, layer_idx: int) -> None:
    made = numbers(live_layer(config, layer_idx, call), call)
    expected = {name: OPERATIONS[name] * made[name] for name in made.keys() & OPERATIONS.keys()}
    assert acc.elementwise(config, layer_idx, call) == expected


@given(config=configs(), call=calls(), layer_idx=st.integers(0, 2))
def test_bytes_of_small_operations_are_those_of_a_live_layer(
    config: DeepseekV2Config, call: acc.Call, layer_idx: int
) -> None:
    """A norm, a rotation and a softmax read and write every number; two streams become one; gate and up become one."""
    layer = live_layer(config, layer_idx, call)
    made, width = numbers(layer, call), BITS[call.dtype] // 8
    reads = {"norms": 1, "rotary": 1, "residual": 2, "swiglu": 2, "router_softmax": 1}
    expected = {name: (reads[name] * made[name], made[name]) for name in made.keys() & reads.keys()}
    expected["softmax"] = (made["scores"],) * 2  # hidden ones are in memory as well
    if "combine" in made:
        stream = call.tokens * config.hidden_size
        shared = 0 if layer.mlp.shared_experts is None else stream
        expected["combine"] = made["combine"] + shared, stream
    moved = acc.activations_moved(config, layer_idx, call)
    assert {name: moved[name] for name in expected} == {
        name: (read * width, written * width) for name, (read, written) in expected.items()
    }


@given(config=configs(), call=calls())
def test_heads_that_share_keys_read_them_once(config: DeepseekV2Config, call: acc.Call) -> None:
    """What attention reads is its queries and the live cache: keys for the scores, values behind the softmax."""
    config = replace(config, use_mla=False, _attn_implementation="sdpa", attention_bias=False)
    attention = live_layer(config, 0, call).self_attn
    remembered = call.batch * call.kv * torch.empty(attention.cache_features).numel() // 2
    queries, width = call.tokens * config.hidden_size, BITS[call.dtype] // 8
    moved = acc.activations_moved(config, 0, call)
    assert moved["self_attn.scores"] == ((queries + remembered) * width, 0)
    assert moved["self_attn.values"] == (remembered * width, queries * width)


def met_by_a_token(config: DeepseekV2Config) -> int:
    """Parameters of a built model that a token passes through: one row of an embedding, the experts it chooses.

    An embedding that is the head as well is one matrix, all of which it passes through.
    """
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(config)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    met = (0 if tied else config.hidden_size) + model.lm_head.weight.numel() + model.model.norm.weight.numel()
    for layer in model.model.layers:
        met += sum(p.numel() for p in layer.parameters())
        if not isinstance(layer.mlp, DeepseekV2MLP):
            stored = sum(p.numel() for p in layer.mlp.experts.parameters())
            idle = len(layer.mlp.gate.weight) - layer.mlp.gate.top_k
            met -= stored // len(layer.mlp.gate.weight) * idle
    return met


@fewer(2)
@given(config=configs(), call=calls())
def test_the_report_of_any_model(config: DeepseekV2Config, call: acc.Call) -> None:
    found, width = acc.report(config, call), BITS[call.dtype] // 8
    met = met_by_a_token(config)
    assert found["parameters"]["active_per_token"] == met <= found["parameters"]["total"]
    alone = acc.report(config, replace(call, batch=1, seq=1, kv=1))
    assert alone["bytes"]["weights_read"] == met * width
    sizes = found["bytes"]
    assert sizes["weights"] == found["parameters"]["total"] * width

    layer = live_layer(config, 0, call)
    with torch.no_grad():
        _, cache = layer(torch.zeros(call.batch, call.kv, config.hidden_size).double(), use_cache=True)
    remembered = cache.nbytes // 8 * width * config.num_hidden_layers
    assert sizes["kv_cache"] == remembered
    assert sizes["kv_cache_written"] * call.kv == remembered * call.seq

    assert found["flops"]["total"] == sum(found["flops"]["by_operation"].values())
    assert found["intensity"] == round(found["flops"]["total"] / (sizes["weights_read"] + remembered), 3)
    apart = [acc.report(config, call, index) for index in range(config.num_hidden_layers)]
    ends = 2 * call.tokens * config.hidden_size * config.vocab_size + 4 * call.tokens * config.hidden_size
    assert found["flops"]["total"] == sum(one["flops"]["total"] for one in apart) + ends
    rows = 0 if config.tie_word_embeddings else call.tokens
    read = config.hidden_size * (config.vocab_size + rows + 1) * width
    assert sizes["weights_read"] == sum(one["bytes"]["weights_read"] for one in apart) + read


@pytest.mark.parametrize("name", PRESETS)
def test_active_parameters_of_the_presets(name: str) -> None:
    assert sum(acc.model_parameters(preset(name), active=True).values()) == met_by_a_token(preset(name))


def test_the_table_says_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["account", "--preset", "deepseek_v2_lite", "--batch", "3", "--seq", "2", "--kv", "100"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    call = acc.Call(batch=3, seq=2, kv=100)
    found = acc.report(preset("deepseek_v2_lite"), call)
    printed = [
        tuple(int(number.replace(",", "")) for number in row if number)
        for row in re.findall(r"^  \S.*?  +([\d,]+)(?:  +([\d,]+))?(?=  |$)", table, re.M)
    ]
    parameters, flops, sizes = found["parameters"], found["flops"], found["bytes"]
    stored, active, cached = parameters["by_module"], parameters["active_by_module"], sizes["kv_cache_by_kind"]
    assert printed[: len(stored) + 1] == [
        *((stored[name], active[name]) for name in stored), (parameters["total"], parameters["active_per_token"])
    ]  # fmt: skip
    rest = ("kv_cache_written", "activations_read", "activations_written", "activations_peak")
    told = [sizes["weights"], sizes["weights_read"], sizes["kv_cache"], *cached.values(), *(sizes[n] for n in rest)]
    assert len(set(told)) == len(told) - 1  # its own cache is the latent one
    assert [row[0] for row in printed[len(stored) + 1 :]] == [
        *flops["by_operation"].values(), flops["products"], flops["total"], *told
    ]  # fmt: skip
    assert table.startswith("model: 3 x 2 tokens over 100, causal, bfloat16, sdpa, absorbed\n")
    assert f"intensity: {found['intensity']:,} FLOP" in table
