"""One token through a layer in C++: the same numbers, and whatever it cannot keep goes the usual way. `test_layer` runs these
in a process without the checker of signatures.
"""

import contextlib
import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref import (
    DeepseekV2Attention,
    DeepseekV2Config,
    DeepseekV2DecoderLayer,
    DeepseekV2ForCausalLM,
    DeepseekV2MLP,
    DeepseekV2MoE,
    LatentCache,
    ops,
    pack_weights,
)
from dsv2_ref.fast import as_packed, compiled, native, packed
from dsv2_ref.fast.layer import as_parts, attended, use_large_pages
from dsv2_ref.moe import MoEGate
from dsv2_ref.quantize import quantize
from dsv2_ref.quantized import in_rows
from dsv2_ref.records import CACHE_FORMATS, QuantizedLatentCache, Record
from dsv2_ref.rope import position_tables

TOKEN = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()


def layer_of(weights: str | None = None, layer_idx: int = 1, **fields: Any) -> DeepseekV2DecoderLayer:
    torch.manual_seed(0)
    config = DeepseekV2Config(**DeepseekV2Config.tiny().to_dict() | fields)
    layer = DeepseekV2DecoderLayer(config, layer_idx).bfloat16().eval()
    return layer if weights is None else quantize(layer, weights, group=32 if "kv_lora_rank" in fields else 16)


def ways(call: Callable[[], Any]) -> dict[str, str]:
    with ops.watch() as choices:
        call()
    return {choice.definition: choice.way for choice in choices}


WIDE = {  # widths that blocks of torch's kernel for four bits divide
    "kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "num_attention_heads": 2, "moe_intermediate_size": 64,
}  # fmt: skip
V3 = {
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "n_routed_experts": 8, "norm_topk_prob": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "layer_idx", "fields"),
    [
        pytest.param(None, 1, {}, id="bfloat16"),
        pytest.param(None, 0, {}, id="dense"),
        pytest.param("int8", 1, {}, id="int8"),
        pytest.param("int4", 1, WIDE, id="int4"),
        pytest.param("int8", 1, V3, id="V3's gate"),
        pytest.param(None, 1, {"n_shared_experts": None}, id="nothing shared"),
    ],
)
@torch.no_grad()
def test_a_step_gives_what_the_definition_gives(weights: str | None, layer_idx: int, fields: dict[str, Any]) -> None:
    plain = layer_of(weights, layer_idx, **fields).mlp
    step = pack_weights(copy.deepcopy(plain), compiled=True)
    exact = copy.deepcopy(plain).double()
    assert ways(lambda: step(TOKEN))[type(step).__qualname__ + ".forward"] == "cpu compiled"
    for seed in range(4):
        token = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        with ops.plain():
            expected, rounded = exact(token.double()), plain(token)
        # Roundings to bfloat16 on the way: as near to the exact result as the definition comes, within one step of it.
        error = (rounded - expected).abs().max() + expected.abs().max() * 2**-7
        assert (step(token) - expected).abs().max() <= error
        assert torch.equal(step(token), step(token))


@pytest.mark.parametrize(
    ("weights", "cache_format", "fields"),
    [
        pytest.param(None, None, {}, id="bfloat16"),
        pytest.param(None, "fp8", {"attention_bias": True, "mla_form": "absorbed"}, id="bfloat16, biases, fp8 cache"),
        pytest.param("int8", None, {"q_lora_rank": None}, id="int8"),
        pytest.param("int4", "int8", WIDE, id="int4, int8 cache"),
    ],
)
@torch.no_grad()
def test_a_layer_gives_what_the_definition_gives(
    weights: str | None, cache_format: str | None, fields: dict[str, Any]
) -> None:
    plain = layer_of(weights, **fields)
    for name, bias in plain.named_parameters():
        if name.endswith("bias"):
            bias.normal_()
    step, exact = pack_weights(copy.deepcopy(plain), compiled=True), copy.deepcopy(plain).double()
    attention = plain.self_attn
    start = attention.empty_cache(1, 40, *([cache_format] * (cache_format is not None)))
    prompt = torch.randn(1, 30, 64).bfloat16()
    with ops.plain():
        cache = plain(prompt, past_key_value=start, use_cache=True)[1]
        wide = exact(prompt.double(), use_cache=True)[1]
    for seed in range(5):
        token = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        served = ways(lambda token=token, cache=cache: step(token, past_key_value=cache))
        assert served["DeepseekV2DecoderLayer.forward"] == "cpu compiled"
        out, longer = step(token, past_key_value=cache, use_cache=True)
        with ops.plain():
            rounded, cache = plain(token, past_key_value=cache, use_cache=True)
            expected, wide = exact(token.double(), past_key_value=wide, use_cache=True)
        # As near to the exact result as the definition comes, within a step of bfloat16.
        error = (rounded - expected).abs().max() + expected.abs().max() * 2**-7
        assert (out - expected).abs().max() <= error
        assert len(longer) == len(cache)
        if cache_format is None:
            torch.testing.assert_close(longer.tokens, cache.tokens, rtol=2**-6, atol=2**-6)


@torch.no_grad()
def test_other_calls_of_a_layer_go_the_usual_way() -> None:
    layer = pack_weights(layer_of(_attn_implementation="eager"), compiled=True)
    name = "DeepseekV2DecoderLayer.forward"
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    assert ways(lambda: layer(TOKEN, past_key_value=cache))[name] == "cpu compiled"
    calls: list[dict[str, Any]] = [
        {"attention_mask": torch.ones(1, 8, dtype=torch.bool)},
        {"output_attentions": True},
        {"past_key_value": None},
        {"hidden_states": TOKEN.expand(1, 2, -1)},
    ]
    for change in calls:
        call = {"hidden_states": TOKEN, "past_key_value": cache} | change
        assert ways(lambda call=call: layer(**call))[name] == "definition"
    for part in (layer, layer.self_attn, layer.self_attn.kv_b_proj, layer.input_layernorm, layer.self_attn.o_proj):
        with part.register_forward_pre_hook(lambda *_: None):
            assert ways(lambda: layer(TOKEN, past_key_value=cache))[name] == "definition"
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert ways(lambda: layer(TOKEN, past_key_value=cache))[name] == "definition"
    layer.self_attn.train()
    assert ways(lambda: layer(TOKEN, past_key_value=cache))[name] == "definition"
    layer.eval()
    layer.self_attn.form = "expanded"
    assert ways(lambda: layer(TOKEN, past_key_value=cache))[name] == "definition"
    assert ways(lambda: layer(TOKEN))["DeepseekV2MoE.forward"] == "cpu compiled"


@torch.no_grad()
def test_a_model_generates_with_compiled_layers() -> None:
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(DeepseekV2Config.tiny()).bfloat16().eval()
    expected = copy.deepcopy(model)
    pack_weights(model, compiled=True)
    ids = torch.randint(256, (1, 9))
    with ops.watch() as choices:
        written = model.generate(ids, 4)
    served = [choice.way for choice in choices if choice.definition == "DeepseekV2DecoderLayer.forward"]
    assert served == ["definition"] * 4 + ["cpu compiled"] * 12
    with ops.plain():
        logits = expected(written)[0]
    for at in range(9, 13):  # what was written is the most probable, or as near to it as roundings come
        best = logits[0, at - 1].max()
        assert logits[0, at - 1, written[0, at]] >= best - best.abs() * 2**-5 - 2**-6


@torch.no_grad()
def test_what_is_no_single_token_goes_the_usual_way() -> None:
    moe = pack_weights(layer_of().mlp, compiled=True)
    name = "DeepseekV2MoE.forward"
    assert ways(lambda: moe(TOKEN))[name] == "cpu compiled"
    assert ways(lambda: moe(TOKEN.expand(1, 2, -1)))[name] == "definition"
    assert ways(lambda: moe(TOKEN.expand(2, 1, -1)))[name] == "definition"
    with torch.autocast("cpu"):
        assert ways(lambda: moe(TOKEN))[name] == "definition"
    with torch.enable_grad():
        assert ways(lambda: moe(TOKEN))[name] == "definition"
    with ops.without("cpu compiled"):
        assert ways(lambda: moe(TOKEN))[name] == "definition"
    moe.train()
    assert ways(lambda: moe(TOKEN))[name] == "definition"


@torch.no_grad()
def test_hooks_and_forwards_that_came_later_keep_their_effect() -> None:
    moe = pack_weights(layer_of().mlp, compiled=True)
    before = moe(TOKEN)
    for part in (moe, moe.gate, moe.experts, moe.shared_experts, moe.shared_experts.down_proj):
        seen: list[Any] = []
        for register in (part.register_forward_hook, part.register_forward_pre_hook):
            with register(lambda *_, seen=seen: seen.append(1)):
                assert "cpu compiled" not in {ways(lambda: moe(TOKEN)).get("DeepseekV2MoE.forward")}
            assert seen.pop()
        own = part.forward
        part.forward = lambda *args, own=own, seen=seen: (seen.append(1), own(*args))[1]
        moe(TOKEN)
        assert seen
        del part.forward
    assert ways(lambda: moe(TOKEN))["DeepseekV2MoE.forward"] == "cpu compiled"
    torch.testing.assert_close(moe(TOKEN), before)


@torch.no_grad()
def test_what_changes_after_the_first_token_counts() -> None:
    moe = pack_weights(layer_of().mlp, compiled=True)
    for weight in (*moe.experts.parameters(), *moe.shared_experts.parameters()):
        weight.mul_(8)  # so that what is chosen, and what is shared, both show
    moe(TOKEN)
    changes: list[Callable[[], Any]] = [
        lambda: setattr(moe.gate, "routed_scaling_factor", 3.0),
        lambda: setattr(moe.gate, "norm_topk_prob", True),
        lambda: setattr(moe.gate, "top_k", 1),
        lambda: moe.experts.down_proj.mul_(2),
        lambda: setattr(moe.shared_experts, "down_proj", nn.Linear(64, 64, bias=True, dtype=torch.bfloat16)),
        lambda: setattr(moe, "shared_experts", None),
    ]
    for change in changes:
        earlier = moe(TOKEN)
        change()
        with ops.plain():
            expected = moe(TOKEN)
        rounding = float(expected.abs().max()) * 2**-6
        assert (earlier - expected).abs().max() > 4 * rounding, "the change shows"
        torch.testing.assert_close(moe(TOKEN), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@torch.no_grad()
def test_copies_have_weights_of_their_own(copied: Callable[[Any], Any]) -> None:
    moe = pack_weights(layer_of().mlp, compiled=True)
    expected = moe(TOKEN)
    other = copied(moe)
    moe.experts.down_proj.zero_()
    assert torch.equal(other(TOKEN), expected)


def test_what_is_saved_stays() -> None:
    plain = layer_of("int8")
    expected = {name: x.clone() for name, x in plain.state_dict().items()}
    given = pack_weights(plain, compiled=True).state_dict()
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "prepared",
    [
        lambda: layer_of().float(),
        lambda: layer_of("fp8", moe_intermediate_size=128),
        lambda: layer_of("int8").float(),
    ],
    ids=["float32", "fp8", "int8 over float32"],
)
def test_what_cpp_does_not_take_is_packed_as_ever(prepared: Callable[[], Any]) -> None:
    layer = pack_weights(prepared(), compiled=True)
    assert not any(getattr(part, "token_in_cpp", None) for part in layer.modules())


@torch.no_grad()
def test_parts_that_became_others_go_the_usual_way() -> None:
    name = "DeepseekV2MoE.forward"
    layer = pack_weights(layer_of(), compiled=True)
    quantize(layer, "int4", group=32, parts=["experts"])
    assert ways(lambda: layer.mlp(TOKEN))[name] == "definition"
    layer = pack_weights(layer_of(), compiled=True)
    layer.mlp.shared_experts.up_proj = nn.Sequential(layer.mlp.shared_experts.up_proj)
    assert ways(lambda: layer.mlp(TOKEN))[name] == "definition"
    layer = pack_weights(pack_weights(layer_of(), compiled=True))
    assert ways(lambda: layer.mlp(TOKEN))[name] == "definition"
    assert type(layer.mlp.shared_experts.up_proj) is packed.PackedLinear


def test_without_bfloat16_instructions_maps_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "has_bfloat16", lambda: False)
    with pytest.raises(RuntimeError, match="pack_weights needs a processor with bfloat16 instructions"):
        pack_weights(layer_of())
    layer = pack_weights(layer_of(), compiled=True)
    assert type(layer.self_attn.o_proj) is nn.Linear
    assert layer.token_in_cpp


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> None:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    layer = layer_of()
    with pytest.raises(RuntimeError, match=r"^compiled is True; wanted a C\+\+ compiler that torch can call"):
        pack_weights(layer, compiled=True)
    assert type(layer.self_attn.o_proj) is nn.Linear
    assert not hasattr(layer.mlp, "token_in_cpp")


def test_without_headers_of_python_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^compiled is True; wanted Python's headers .*python3-dev.* is missing$"):
        pack_weights(layer_of(), compiled=True)


def test_without_a_folder_to_write_to_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.joinpath("file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.raises(RuntimeError, match=r"^compiled is True; wanted a folder .* TORCHINDUCTOR_CACHE_DIR: .*file"):
        pack_weights(layer_of(), compiled=True)


def test_what_is_packed_already_is_refused_by_name() -> None:
    layer = pack_weights(layer_of())
    before = dict(layer.named_modules())
    with pytest.raises(
        ValueError, match=r"^compiled is True, and self_attn.*; wanted weights that are not packed yet$"
    ):
        pack_weights(layer, compiled=True)
    assert dict(layer.named_modules()) == before
    twice = pack_weights(pack_weights(layer_of(), compiled=True), compiled=True)
    assert twice.token_in_cpp


@torch.no_grad()
def test_whoever_counts_operations_sees_all_of_them() -> None:
    moe = pack_weights(layer_of().mlp, compiled=True)
    with FlopCounterMode(display=False) as counted:
        moe(TOKEN)
    config = DeepseekV2Config.tiny()
    experts = config.num_experts_per_tok + config.n_shared_experts
    products = 3 * experts * config.moe_intermediate_size + config.n_routed_experts
    assert counted.get_total_flops() == 2 * 64 * products


@torch.no_grad()
def test_classes_of_others_go_the_usual_way() -> None:
    class Louder(DeepseekV2Attention):
        def up_matrices(self) -> Any:
            w_uk, w_uv = super().up_matrices()
            return w_uk, 2 * w_uv

    layer = pack_weights(layer_of(), compiled=True)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    layer.self_attn.__class__ = Louder
    assert ways(lambda: layer(TOKEN, past_key_value=cache))["DeepseekV2DecoderLayer.forward"] == "definition"


@torch.no_grad()
def test_a_part_of_another_dtype_is_rejected_as_by_the_definition() -> None:
    layer = pack_weights(layer_of(), compiled=True)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    layer.mlp.shared_experts.down_proj.float()
    for way in (ops.plain, contextlib.nullcontext):
        with way(), pytest.raises(RuntimeError, match="dtype"):
            layer(TOKEN, past_key_value=cache)


@torch.no_grad()
def test_what_is_exported_needs_no_compiler_of_its_own() -> None:
    mlp = layer_of(layer_idx=0).mlp
    exported = torch.export.export(mlp, (TOKEN,))
    assert not [node for node in exported.graph.nodes if "dsv2_ref" in str(node.target)]
    served: list[str] = []

    def look(graph: Any, _: Any) -> Any:
        served.extend(str(node.target) for node in graph.graph.nodes if "dsv2_ref" in str(node.target))
        return graph.forward

    torch.compile(mlp, backend=look)(TOKEN)
    assert served == 3 * ["dsv2_ref.row_products.default"], "a user's graph has them"


class Halved(torch.Tensor):
    """Halves what linear maps with such a weight give."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [x.as_subclass(torch.Tensor) if isinstance(x, cls) else x for x in args]
        out = func(*plain, **kwargs or {})
        return out / 2 if func is F.linear else out


def bfloat16(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape).bfloat16(), requires_grad=False)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "experts that take fewer features": lambda x: setattr(x.mlp.experts, "down_proj", bfloat16(8, 64, 16)),
    "experts that take all choices": lambda x: setattr(x.mlp.experts, "down_proj", bfloat16(8, 64, 64)),
    "experts that take half a token": lambda x: setattr(x.mlp.experts, "gate_up_proj", bfloat16(8, 64, 32)),
    "an odd number of gates and ups": lambda x: setattr(x.mlp.experts, "gate_up_proj", bfloat16(8, 65, 64)),
    "a narrower shared MLP": lambda x: setattr(x.mlp.shared_experts, "down_proj", linear(64, 32)),
    "a shared MLP of one feature": lambda x: setattr(x.mlp.shared_experts, "down_proj", linear(64, 1)),
    "a wider shared MLP": lambda x: setattr(x.mlp.shared_experts, "down_proj", linear(64, 128)),
    "a norm without a weight": lambda x: setattr(x.self_attn.q_a_layernorm, "weight", None),
    "the first norm without a weight": lambda x: setattr(x.input_layernorm, "weight", None),
    "a linear map in place of a MoE": lambda x: setattr(x, "mlp", linear(64, 64)),
    "a linear map in place of an MLP": lambda x: setattr(x.mlp, "shared_experts", linear(64, 64)),
    "a linear map in place of a norm": lambda x: setattr(x, "post_attention_layernorm", linear(64, 64)),
    "a norm on no device": lambda x: x.post_attention_layernorm.to("meta"),
    "a weight of another class": lambda x: x.mlp.shared_experts.down_proj._parameters.update(
        weight=x.mlp.shared_experts.down_proj.weight.detach().as_subclass(Halved)
    ),
}


@pytest.mark.filterwarnings("ignore:.*is not a leaf Tensor")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", [True, False], ids=["before packing", "after packing"])
@torch.no_grad()
def test_whatever_a_layer_became_gives_what_the_definition_gives(change: str, before: bool) -> None:
    layer = layer_of(mla_form="absorbed")
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    if before:
        CHANGES[change](layer)
    layer = pack_weights(layer, compiled=True)
    if not before:
        layer(TOKEN, past_key_value=cache)
        CHANGES[change](layer)

    def outcome() -> Any:
        try:
            return layer(TOKEN, past_key_value=cache)[0]
        except Exception as error:
            return type(error)

    with ops.plain():
        expected = outcome()
    found = outcome()
    if isinstance(expected, Tensor) and expected.device.type == "cpu":
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-5)
    else:
        assert found is expected or isinstance(found, Tensor) or issubclass(found, expected)


@torch.no_grad()
@pytest.mark.parametrize(("weights", "fields"), [("int8", {}), ("int4", WIDE)])
def test_codes_may_come_in_any_strides(weights: str, fields: dict[str, Any]) -> None:
    plain, other = layer_of(weights, **fields).mlp, layer_of(weights, **fields).mlp
    turned = {name: x.mT.contiguous().mT if "codes" in name else x for name, x in plain.state_dict().items()}
    other.load_state_dict(turned, assign=True)
    expected, found = (pack_weights(mlp, compiled=True)(TOKEN) for mlp in (plain, other))
    assert torch.equal(found, expected)


def test_a_cache_that_wants_gradients_gets_them() -> None:
    layer = layer_of(mla_form="absorbed").requires_grad_(False)
    tokens = torch.randn(1, 7, 40).bfloat16()
    grads = []
    for step in (copy.deepcopy(layer), pack_weights(layer, compiled=True)):
        leaf = tokens.clone()[..., : sum(layer.self_attn.cache_features)].requires_grad_()
        step(TOKEN, past_key_value=LatentCache(1, leaf))[0].sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=2**-5, atol=2**-7)


@torch.no_grad()
def test_a_layer_is_two_operators() -> None:
    layer = pack_weights(layer_of(), compiled=True)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    tables = position_tables(layer.self_attn.config, TOKEN, None, cache)
    with torch.profiler.profile(acc_events=True) as seen:
        layer(TOKEN, past_key_value=cache, position_embeddings=tables)
    assert [x.name for x in seen.events() if "dsv2_ref" in x.name] == ["dsv2_ref::attended", "dsv2_ref::fed_forward"]
    assert not [x.name for x in seen.events() if x.name in ("aten::mm", "aten::linear", "aten::softmax", "aten::topk")]


GATES: dict[str, dict[str, Any]] = {
    "V2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "V2, as many as there are": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    "V2-Lite": {"topk_method": "greedy", "norm_topk_prob": True},
    "V3": V3 | {"num_experts_per_tok": 3},
    "V3, one group": V3 | {"n_group": 1, "topk_group": 1},
    "one expert": {"topk_method": "greedy", "num_experts_per_tok": 1, "norm_topk_prob": True},
}  # fmt: skip


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_a_gate_chooses_and_weighs_as_the_definition_does(gate: str) -> None:
    fields = {"n_routed_experts": 8, "routed_scaling_factor": 2.5} | GATES[gate]
    plain = layer_of(**fields, n_shared_experts=None).mlp
    plain.gate.weight.mul_(20)
    if plain.gate.e_score_correction_bias is not None:
        plain.gate.e_score_correction_bias.normal_(std=0.3)
    # Each expert gives a feature of its own, which then shows by what it was multiplied.
    plain.experts.gate_up_proj.fill_(1 / 8)
    plain.experts.down_proj.zero_()
    for expert, down in enumerate(plain.experts.down_proj):
        down[expert] = 1 / 8
    step, seen = pack_weights(copy.deepcopy(plain), compiled=True), set()
    for _ in range(20):
        token = torch.randn(1, 1, 64).bfloat16()
        with ops.plain():
            expected = plain(token)
        assert ways(lambda token=token: step(token))["DeepseekV2MoE.forward"] == "cpu compiled"
        torch.testing.assert_close(step(token), expected, rtol=2**-6, atol=0)
        seen.add(tuple(expected[0, 0, :8].nonzero().flatten().tolist()))
    assert len(seen) > 3, "it chooses by the token"


@torch.no_grad()
def test_a_token_that_is_nan_is_nan_afterwards() -> None:
    for fields in ({}, V3):
        moe = pack_weights(layer_of(**fields).mlp, compiled=True)
        assert moe(TOKEN * torch.nan).isnan().all()


def test_large_pages_change_no_value() -> None:
    weights = torch.randint(256, (10 * 2**20 + 5,), dtype=torch.uint8)[3:]
    expected = weights.clone()
    assert use_large_pages([weights, torch.ones(3)]) in (0, 8 * 2**20), "whole pages, where the system has them"
    assert torch.equal(weights, expected)


@torch.no_grad()
def test_data_of_another_layout_goes_the_usual_way() -> None:
    for change in (lambda x: x.mT, lambda x: x.float(), lambda x: x[:, ::2]):
        mlp = pack_weights(layer_of(layer_idx=0).mlp, compiled=True)
        mlp.up_proj.weight.data = change(mlp.up_proj.weight.data)
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            assert ways(lambda mlp=mlp: mlp(TOKEN))["DeepseekV2MLP.forward"] == "definition"
        assert not mlp.token_in_cpp.holds(mlp)
    mlp = pack_weights(layer_of(layer_idx=0).mlp, compiled=True)
    mlp.up_proj.weight.data = mlp.up_proj.weight.data * 2
    with ops.plain():
        expected = mlp(TOKEN)
    assert ways(lambda: mlp(TOKEN))["DeepseekV2MLP.forward"] == "cpu compiled"
    torch.testing.assert_close(mlp(TOKEN), expected, rtol=2**-6, atol=2**-8)


@torch.no_grad()
def test_a_shallow_copy_has_parts_of_its_own() -> None:
    mlp = pack_weights(layer_of(layer_idx=0).mlp, compiled=True)
    other = copy.copy(mlp)
    other._modules = dict(mlp._modules)
    other.up_proj = linear(64, mlp.up_proj.out_features)
    with ops.plain():
        expected = other(TOKEN)
    assert not torch.allclose(mlp(TOKEN), expected, rtol=0.1)
    torch.testing.assert_close(other(TOKEN), expected, rtol=2**-6, atol=2**-8)


@torch.no_grad()
def test_every_norm_has_an_epsilon_of_its_own() -> None:
    for fields in ({}, {"q_lora_rank": None}):
        layer = pack_weights(layer_of(mla_form="absorbed", **fields), compiled=True)
        attention = layer.self_attn
        norms = [layer.input_layernorm, attention.kv_a_layernorm, layer.post_attention_layernorm]
        norms += [] if attention.config.q_lora_rank is None else [attention.q_a_layernorm]
        cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
        for norm in norms:
            norm.weight.mul_(16)  # so that what it gives counts
            before, norm.variance_epsilon = norm.variance_epsilon, 10.0
            with ops.plain():
                expected, wanted = layer(TOKEN, past_key_value=cache, use_cache=True)
            found, longer = layer(TOKEN, past_key_value=cache, use_cache=True)
            for given, of_definition in ((found, expected), (longer.tokens, wanted.tokens)):
                rounding = float(of_definition.abs().max()) * 2**-7
                torch.testing.assert_close(given, of_definition, rtol=0, atol=rounding)
            norm.variance_epsilon = before


@torch.no_grad()
def test_a_layer_that_became_float32_goes_the_usual_way() -> None:
    layer = pack_weights(layer_of(), compiled=True)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    layer.float()
    token = TOKEN.float()
    wide = layer(token.expand(1, 7, -1), use_cache=True)[1]
    for past, given in ((wide, token), (cache, TOKEN)):
        try:
            with ops.plain():
                expected = layer(given, past_key_value=past)
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error)):
                layer(given, past_key_value=past)
        else:
            torch.testing.assert_close(layer(given, past_key_value=past)[0], expected[0])


@torch.no_grad()
@pytest.mark.parametrize("format", [None, "fp8", "int4"])
def test_a_cache_of_another_dtype_is_refused_as_ever(format: str | None) -> None:
    layer = pack_weights(layer_of(), compiled=True)
    others = layer_of().half().self_attn
    cache = others.empty_cache(1, 8, format).append(torch.randn(1, 5, *others.cache_features).half())
    with pytest.raises(ValueError, match=r"past_key_value is .*; wanted one that fits the new tokens"):
        layer(TOKEN, past_key_value=cache)


@torch.no_grad()
def test_attention_in_cpp_can_be_left_out() -> None:
    layer = pack_weights(layer_of(), compiled=True)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    expected = layer(TOKEN, past_key_value=cache)[0]
    with ops.without("cpu one token"):
        assert ways(lambda: layer(TOKEN, past_key_value=cache))["DeepseekV2DecoderLayer.forward"] == "definition"
        torch.testing.assert_close(layer(TOKEN, past_key_value=cache)[0], expected, rtol=2**-6, atol=2**-8)


@torch.no_grad()
def test_a_copy_on_a_machine_without_a_compiler_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = pickle.loads(pickle.dumps(pack_weights(layer_of().mlp, compiled=True)))
    monkeypatch.setattr(compiled, "why_not_built", lambda _: "no C++ compiler")
    assert ways(lambda: moe(TOKEN))["DeepseekV2MoE.forward"] == "definition"


def test_a_moe_is_what_it_was() -> None:
    """Packing with ``compiled`` leaves classes and weights of an MoE in place."""
    layer = layer_of()
    weights = dict(layer.mlp.named_parameters())
    layer = pack_weights(layer, compiled=True)
    assert type(layer.mlp) is DeepseekV2MoE
    assert type(layer.mlp.shared_experts) is DeepseekV2MLP
    kept = dict(layer.mlp.named_parameters())
    assert all(kept[name] is weight for name, weight in weights.items() if name != "gate.weight")


@torch.no_grad()
def test_a_token_may_be_a_part_of_a_longer_text() -> None:
    layer = pack_weights(layer_of(), compiled=True)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    text = torch.randn(64, 5).bfloat16().mT[None]
    token = text[:, -1:]
    assert not token.is_contiguous()
    assert torch.equal(layer(token, past_key_value=cache)[0], layer(token.contiguous(), past_key_value=cache)[0])


@torch.no_grad()
def test_many_threads_may_call_and_be_called() -> None:
    layer, before = pack_weights(layer_of("int8"), compiled=True), torch.get_num_threads()
    caches = [layer(TOKEN.expand(1, 7, -1), use_cache=True)[1] for _ in range(8)]
    expected = layer(TOKEN, past_key_value=layer(TOKEN.expand(1, 7, -1), use_cache=True)[1])[0]

    def run(cache: Any, threads: int) -> Any:
        torch.set_num_threads(threads)
        with torch.no_grad():
            return layer(TOKEN, past_key_value=cache)[0]

    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(run, caches, range(1, 9)))
    finally:
        torch.set_num_threads(before)
    for out in found:  # attention shares its keys between threads
        torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-8)


@torch.no_grad()
@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_records_are_those_of_the_definition(format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for latent in (512, 24, 130):
        record = Record(format, latent, 8, torch.bfloat16)
        size, place = sum(record.parts), (CACHE_FORMATS.index(format), record.tile)
        for case in range(20):
            token, gains = torch.randn(latent + 8, generator=generator), torch.randn(latent, generator=generator)
            if case % 4 == 1:
                token[:latent] *= torch.logspace(-30, 3, latent)  # down to the smallest codes
            if case % 4 == 2:
                token[: latent // 2] = 0
            if case % 4 == 3:
                gains *= 1e38  # to infinity
            # A token of one feature, and maps of which the column is what they make of it.
            token, gains = token.bfloat16(), gains.bfloat16()
            x, one = torch.ones(1, 1, 1).bfloat16(), torch.ones(1).bfloat16()
            query, out = torch.randn(24, 1).bfloat16(), torch.randn(1, 8).bfloat16()
            tables = torch.rand(1, 1, 4, generator=generator), torch.rand(1, 1, 4, generator=generator)
            up = torch.randn(2, 8, latent, generator=generator).bfloat16().split(4, dim=1)
            rest = *up, [one, gains, one], [0.0, 1e-6, 0.0, 1.0], *as_parts(query, token[:, None], out)
            tokens = torch.zeros(1, 3, latent + 8).bfloat16()
            found = torch.zeros(1, 3, size, dtype=torch.uint8)
            attended(x, *tables, tokens, len(CACHE_FORMATS), latent, *rest)
            attended(x, *tables, found, *place, *rest)
            assert not tokens[:, :2].any()
            assert not found[:, :2].any(), "only the last is written"
            assert torch.equal(found[:, 2:], record.encode(tokens[:, 2:]))


@torch.no_grad()
def test_matrices_of_up_projections_may_be_wide() -> None:
    """As `pack_weights` keeps them where the processor has no products in bfloat16."""
    layer = pack_weights(layer_of("int8"), compiled=True)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    expected = layer(TOKEN, past_key_value=cache)[0]
    held = layer.self_attn.kv_b_proj
    held.kept = tuple(x.float() for x in held.kept)
    torch.testing.assert_close(layer(TOKEN, past_key_value=cache)[0], expected, rtol=2**-7, atol=2**-8)


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, "int8"])
def test_weights_that_came_later_in_other_strides_go_the_usual_way(weights: str | None) -> None:
    mlp = pack_weights(layer_of(weights, layer_idx=0).mlp, compiled=True)
    expected = mlp(TOKEN)
    if weights is None:
        mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.mT.contiguous().mT)
    else:
        mlp.up_proj.codes = mlp.up_proj.codes.mT.contiguous().mT
    assert ways(lambda: mlp(TOKEN))["DeepseekV2MLP.forward"] == "definition"
    torch.testing.assert_close(mlp(TOKEN), expected, rtol=2**-6, atol=2**-8)


@torch.no_grad()
def test_a_head_reads_its_weight_as_it_lies() -> None:
    model = DeepseekV2ForCausalLM(DeepseekV2Config.tiny()).bfloat16().eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    expected = copy.deepcopy(model)
    pack_weights(model, compiled=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied as before"
    assert model.state_dict().keys() == expected.state_dict().keys()
    row = torch.randn(1, 1, 64).bfloat16()
    assert ways(lambda: model.lm_head(row)) == {"Linear.forward": "cpu compiled"}
    assert ways(lambda: model.lm_head(row[0].expand(2, -1))) == {"Linear.forward": "definition"}
    for x in (row, row[0], row[0, 0]):
        exact = expected.lm_head(x).double()
        torch.testing.assert_close(model.lm_head(x).double(), exact, rtol=2**-7, atol=2**-16)
    with torch.enable_grad():
        model.lm_head(row).sum().backward()
    assert model.lm_head.weight.grad is not None


def test_what_cannot_be_built_is_said_before_anything_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "why_not_built", lambda file: f"{file} cannot be built: no room")
    layer = layer_of()
    with pytest.raises(RuntimeError, match=r"^compiled is True; layer.cpp cannot be built: no room$"):
        pack_weights(layer, compiled=True)
    assert not hasattr(layer, "token_in_cpp")


class Emptied(LatentCache):
    """Keeps nothing of what it is given."""

    def append(self, new: Tensor) -> Any:
        return super().append(new * 0)


class EmptiedRecords(QuantizedLatentCache):
    """Keeps nothing of what it is given."""

    def append(self, new: Tensor) -> Any:
        return super().append(new * 0)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "format"), [(Emptied, None), (EmptiedRecords, "fp8")])
def test_caches_of_others_keep_their_effect(kind: Any, format: str | None) -> None:
    layer = pack_weights(layer_of(mla_form="absorbed"), compiled=True)
    cache = kind.of(layer.self_attn, 1, 20, format)
    cache = layer(TOKEN.expand(1, 7, -1), past_key_value=cache, use_cache=True)[1]
    _, longer = layer(TOKEN, past_key_value=cache, use_cache=True)
    assert not longer.tokens[0, -1].any()


class NoMaps(TorchFunctionMode):
    """Linear maps give zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        return out * 0 if func is F.linear else out


@torch.no_grad()
def test_modes_that_change_operations_see_them() -> None:
    mlp = pack_weights(layer_of(layer_idx=0).mlp, compiled=True)
    expected = mlp(TOKEN)
    with NoMaps():
        assert not mlp(TOKEN).any()
    with torch.device("cpu"):
        assert ways(lambda: mlp(TOKEN))["DeepseekV2MLP.forward"] == "cpu compiled"
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(mlp, TOKEN)
    torch.testing.assert_close(traced(TOKEN.expand(1, 3, -1)), expected.expand(1, 3, -1), rtol=2**-6, atol=2**-8)


@torch.no_grad()
def test_tables_of_positions_may_be_wide_or_lie_apart() -> None:
    layer = pack_weights(layer_of(), compiled=True)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    tables = position_tables(layer.self_attn.config, TOKEN, None, cache)
    expected = layer(TOKEN, past_key_value=cache, position_embeddings=tables)[0]
    assert torch.equal(layer(TOKEN, past_key_value=cache)[0], expected)
    apart = torch.complex(*tables)
    for given in ((apart.real, apart.imag), [x.double() for x in tables]):
        assert torch.equal(layer(TOKEN, past_key_value=cache, position_embeddings=tuple(given))[0], expected)


def test_gradients_of_scales_and_tables_are_given() -> None:
    layer = pack_weights(layer_of("int8", mla_form="absorbed"), compiled=True).requires_grad_(False)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    tables = [x.requires_grad_() for x in position_tables(layer.self_attn.config, TOKEN, None, cache)]
    layer(TOKEN, past_key_value=cache, position_embeddings=tuple(tables))[0].sum().backward()
    assert tables[0].grad is not None
    scales = layer.mlp.shared_experts.down_proj.scales.requires_grad_()
    layer.mlp(TOKEN).sum().backward()
    assert scales.grad is not None


@torch.no_grad()
def test_what_had_a_hook_can_be_packed_again() -> None:
    mlp = layer_of(layer_idx=0).mlp
    with mlp.down_proj.register_forward_hook(lambda *_: None):
        pack_weights(mlp, compiled=True)
    assert ways(lambda: mlp(TOKEN))["DeepseekV2MLP.forward"] == "definition"
    assert ways(lambda: pack_weights(mlp, compiled=True)(TOKEN)) == {"DeepseekV2MLP.forward": "cpu compiled"}


@torch.no_grad()
def test_a_packed_layer_tells_what_would_serve_it_elsewhere() -> None:
    mlp = pack_weights(layer_of(layer_idx=0).mlp, compiled=True).to("meta")
    with ops.watch("cpu") as choices:
        mlp(TOKEN.to("meta"))
    assert choices[0].way == "definition"


@torch.no_grad()
def test_a_head_takes_its_input_by_name() -> None:
    head = pack_weights(nn.Sequential(linear(64, 10)).eval(), compiled=True)[0]
    assert torch.equal(head(input=TOKEN), head(TOKEN))
    with pytest.raises(RuntimeError):
        head(TOKEN[0, 0, 0])


@torch.no_grad()
def test_an_mlp_may_give_another_width() -> None:
    mlp = layer_of(layer_idx=0).mlp
    mlp.down_proj = linear(mlp.intermediate_size, 32)
    with ops.plain():
        expected = mlp(TOKEN)
    found = pack_weights(mlp, compiled=True)(TOKEN)
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-8)


NAME = "DeepseekV2DecoderLayer.forward"


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize(
    "changed",
    [
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: (torch.save(x, file := io.BytesIO()), file.seek(0), torch.load(file, weights_only=False))[-1],
        lambda x: x.to("cpu"),
        lambda x: x.share_memory(),
        lambda x: x.requires_grad_(False),
    ],
    ids=["deepcopy", "pickle", "torch.save", "to cpu", "share_memory", "requires_grad"],
)
@torch.no_grad()
def test_what_only_moves_a_layer_leaves_it_its_way(weights: str | None, changed: Callable[[Any], Any]) -> None:
    layer = pack_weights(layer_of(weights, **(WIDE if weights == "int4" else {}), mla_form="absorbed"), compiled=True)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    expected = layer(TOKEN, past_key_value=cache)[0]
    size = len(pickle.dumps(layer))
    layer = changed(layer)
    assert ways(lambda: layer(TOKEN, past_key_value=cache))[NAME] == "cpu compiled"
    assert torch.equal(layer(TOKEN, past_key_value=cache)[0], expected)
    assert len(pickle.dumps(layer)) < 1.1 * size, "no tensor is stored twice"


def test_what_is_saved_is_saved_once() -> None:
    layer = layer_of("int8")
    before = len(pickle.dumps(layer))
    after = len(pickle.dumps(pack_weights(layer, compiled=True)))
    kept = sum(x.nbytes for x in layer.self_attn.kv_b_proj.kept)
    assert after < before + kept + layer.mlp.gate.weight.nbytes + 20_000


@torch.no_grad()
def test_replaced_weights_are_freed() -> None:
    layer = pack_weights(layer_of(), compiled=True)
    layer.mlp(TOKEN)
    old = weakref.ref(layer.mlp.experts.gate_up_proj)
    layer.mlp.experts.gate_up_proj = nn.Parameter(torch.zeros_like(layer.mlp.experts.gate_up_proj))
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("place", ["", "self_attn", "mlp", "mlp.gate", "self_attn.o_proj"])
@torch.no_grad()
def test_a_layer_with_more_parts_is_left_as_it_is(place: str) -> None:
    layer = layer_of(mla_form="absorbed")
    layer.get_submodule(place).capture = nn.Identity()
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    expected = layer(TOKEN, past_key_value=cache)[0]
    pack_weights(layer, compiled=True)
    assert ways(lambda: layer(TOKEN, past_key_value=cache))[NAME] == "definition"
    torch.testing.assert_close(layer(TOKEN, past_key_value=cache)[0], expected, rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("fields", [{}, V3, GATES["V2"]], ids=["V2-Lite", "V3", "V2"])
@torch.no_grad()
def test_equal_scores_choose_what_torch_chooses(fields: dict[str, Any]) -> None:
    plain = layer_of(**{"n_routed_experts": 8} | fields).mlp
    for weight in (*plain.experts.parameters(), *plain.shared_experts.parameters()):
        weight.mul_(8)
    for rows in ([0] * 8, [0, 0, 2, 2, 4, 4, 6, 6], [0, 1, 0, 1, 0, 1, 0, 1]):
        plain.gate.weight.copy_(torch.randn(8, 64)[rows])
        step = pack_weights(copy.deepcopy(plain), compiled=True)
        with ops.plain():
            expected = plain(TOKEN)
        rounding = float(expected.abs().max()) * 2**-6
        torch.testing.assert_close(step(TOKEN), expected, rtol=0, atol=rounding)


SETTINGS: dict[str, dict[str, Any]] = {
    "every group": {"topk_group": 9},
    "closed ones as well": {"top_k": 8},
    "none": {"top_k": 0},
    "too many": {"top_k": 9},
    "not normalised": {"norm_topk_prob": None},
    "a factor for each choice": {"routed_scaling_factor": torch.tensor([1.0, 2.0, 3.0])},
    "a whole factor": {"routed_scaling_factor": 2},
    "no whole number": {"top_k": 2.0},
}


@pytest.mark.parametrize("settings", SETTINGS)
@torch.no_grad()
def test_settings_of_a_gate_may_be_odd(settings: str) -> None:
    moe = pack_weights(layer_of(**{"n_routed_experts": 8} | GATES["V2"]).mlp, compiled=True)
    for weight in moe.experts.parameters():
        weight.mul_(8)
    for name, value in SETTINGS[settings].items():
        setattr(moe.gate, name, value)

    def outcome() -> Any:
        try:
            return moe(TOKEN)
        except Exception as error:
            return type(error)

    with ops.plain():
        expected = outcome()
    found = outcome()
    if isinstance(expected, Tensor):
        rounding = float(expected.abs().max()) * 2**-6
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding)
    else:
        assert found is expected


@torch.no_grad()
def test_maps_that_lie_otherwise_are_packed_as_ever() -> None:
    wide = torch.randn(300, 128).bfloat16()
    weights = {
        "transposed": torch.randn(64, 300).bfloat16().mT,
        "every other": wide[:, ::2],
        "plain": wide[:, :64].clone(),
    }
    biases = {
        "none": None,
        "strided": torch.randn(600).bfloat16()[::2],
        "expanded": torch.randn(1).bfloat16().expand(300),
    }
    biases["one"] = torch.randn(1).bfloat16()
    for weight in weights.values():
        for bias in biases.values():
            plain = nn.Linear(64, 300, bias=bias is not None, dtype=torch.bfloat16)
            plain.weight = nn.Parameter(weight)
            if bias is not None:
                plain.bias = nn.Parameter(bias)
            for compiled_ in (False, True):
                made = pack_weights(nn.Sequential(copy.deepcopy(plain)).eval(), compiled=compiled_)
                torch.testing.assert_close(made(TOKEN), plain(TOKEN), rtol=2**-6, atol=2**-3)


@torch.no_grad()
def test_memory_that_was_given_away_is_said() -> None:
    mlp = pack_weights(layer_of(layer_idx=0).mlp, compiled=True)
    mlp.up_proj.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"^a tensor's memory was given away$"):
        mlp(TOKEN)


def test_operators_say_what_they_are_for() -> None:
    with pytest.raises(NotImplementedError, match=r"^layer.cpp needs a tensor on the CPU$"):
        use_large_pages([])
    with pytest.raises(
        NotImplementedError, match=r"^layer.cpp is for plain tensors on the CPU, and not for torch.sparse"
    ):
        use_large_pages([torch.eye(3).to_sparse()])


@torch.no_grad()
def test_a_class_that_somebody_changed_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pack_weights(layer_of(mla_form="absorbed"), compiled=True)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    for kind in (DeepseekV2Attention, MoEGate, DeepseekV2MLP):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", lambda *args, own=kind.forward, **options: own(*args, **options))
            assert ways(lambda: layer(TOKEN, past_key_value=cache)).get(NAME) == "definition"
            assert not any(forward.__module__ == __name__ for forward in as_packed.FORWARDS)
    assert ways(lambda: layer(TOKEN, past_key_value=cache))[NAME] == "cpu compiled"


def test_a_class_that_was_changed_before_the_first_call_keeps_its_effect() -> None:
    program = """
import torch
from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, pack_weights
from dsv2_ref.moe import MoEGate
seen, own = [], MoEGate.forward
MoEGate.forward = lambda *args: (seen.append(1), own(*args))[1]
layer = pack_weights(DeepseekV2DecoderLayer(DeepseekV2Config.tiny(), 1).bfloat16().eval(), compiled=True)
with torch.no_grad():
    layer.mlp(torch.ones(1, 1, 64).bfloat16())
print(len(seen))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch's own: threads that wait for one another in every product would take all processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_threads_that_continue_one_cache_leave_each_other_alone() -> None:
    layer = pack_weights(layer_of(mla_form="absorbed"), compiled=True)
    tokens = [torch.randn(1, 1, 64).bfloat16() for _ in range(4)]
    with torch.no_grad():
        past = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
        wanted = [layer(token, past_key_value=past, use_cache=True)[1].tokens.clone() for token in tokens]

    def run(token: Tensor, past: Any) -> Any:
        with torch.no_grad():
            return layer(token, past_key_value=past, use_cache=True)[1]

    for _ in range(40):
        start = LatentCache.of(layer.self_attn, 1, 20).append(past.tokens)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(run, tokens, [start] * 4))
        for cache, expected in zip(found, wanted, strict=True):
            assert torch.equal(cache.tokens, expected)


def as_defined(module: nn.Module, *rest: Any, **options: Any) -> bool:
    """Whether a token gives what it gives by the definition."""
    with ops.plain():
        expected = module(TOKEN, *rest, **options)
    found = module(TOKEN, *rest, **options)
    expected, found = (x if isinstance(x, Tensor) else x[0] for x in (expected, found))
    return torch.allclose(found, expected, rtol=0, atol=float(expected.abs().max()) * 2**-6)


@torch.no_grad()
def test_tied_weights_may_be_untied() -> None:
    mlp = layer_of(layer_idx=0).mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    pack_weights(mlp, compiled=True)
    assert as_defined(mlp)
    mlp.up_proj.weight = nn.Parameter(8 * torch.randn_like(mlp.up_proj.weight))
    assert as_defined(mlp)
    layer = layer_of(mla_form="absorbed")
    layer.post_attention_layernorm.weight = layer.input_layernorm.weight
    cache = pack_weights(layer, compiled=True)(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    layer.post_attention_layernorm.weight = nn.Parameter(8 * torch.rand(64).bfloat16())
    assert as_defined(layer, past_key_value=cache)


@pytest.mark.usefixtures("one_thread")
def test_a_copy_may_be_called_first_by_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = pack_weights(layer_of(layer_idx=0).mlp, compiled=True)
    with torch.no_grad():
        expected = mlp(TOKEN)
        own = as_packed.as_parts
        monkeypatch.setattr(
            as_packed, "as_parts", lambda *args: (time.sleep(0.005), own(*args))[1]
        )  # others come in between
        for change in (lambda x: x, lambda x: setattr(x, "down_proj", copy.deepcopy(x.down_proj))):
            other = copy.deepcopy(mlp)
            other(TOKEN)
            change(other)
            start = threading.Barrier(4)

            def run(other: Any, start: Any = start) -> Any:
                start.wait()
                with torch.no_grad():
                    return other(TOKEN)

            with ThreadPoolExecutor(4) as pool:
                assert all(torch.equal(found, expected) for found in pool.map(run, [copy.deepcopy(other)] * 4))


@torch.no_grad()
def test_shallow_copies_do_not_take_what_is_the_others() -> None:
    mlp = pack_weights(layer_of(layer_idx=0).mlp, compiled=True)
    other = copy.copy(mlp)
    other._modules = {**mlp._modules, "down_proj": linear(mlp.down_proj.in_features, 64)}
    for _ in range(2):
        for module in (mlp, other):
            assert as_defined(module)


def test_a_packed_module_is_freed_at_once() -> None:
    with torch.no_grad():
        mlp = pack_weights(layer_of(layer_idx=0).mlp, compiled=True)
        mlp(TOKEN)  # the first call builds, and torch keeps its frames
    del mlp
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for made in (lambda: layer_of(layer_idx=0).mlp, lambda: layer_of(), lambda: nn.Sequential(linear(64, 64))):
                module = pack_weights(made(), compiled=True)
                if not isinstance(module, DeepseekV2DecoderLayer):
                    module(TOKEN)
                weight = weakref.ref(next(module.parameters()))
                del module
                assert weight() is None
            layer = pack_weights(layer_of(), compiled=True)
            experts = weakref.ref(layer.mlp.experts.gate_up_proj)
            layer.mlp = nn.Identity()
            gc.collect()  # experts know their parameters by hooks of their own, packed or not
            assert experts() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_bias_that_is_no_parameter_counts() -> None:
    for before in (True, False):
        mlp = layer_of("int8", layer_idx=0).mlp
        if before:
            mlp.down_proj.bias = torch.ones(64).bfloat16()
        pack_weights(mlp, compiled=True)
        mlp.down_proj.bias = torch.ones(64).bfloat16()
        assert as_defined(mlp)
        assert as_defined(copy.deepcopy(mlp))


@torch.no_grad()
def test_names_of_weights_may_change_and_come_back() -> None:
    layer = pack_weights(layer_of(mla_form="absorbed"), compiled=True)
    cache = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1]
    for part, name in (
        (layer.input_layernorm, "weight"),
        (layer.mlp.experts, "gate_up_proj"),
        (layer.self_attn.o_proj, "weight"),
    ):
        weight = getattr(part, name)
        delattr(part, name)
        setattr(part, name + "_orig", weight)
        setattr(part, name, weight.detach() * 2)
        assert as_defined(layer, past_key_value=cache)
        delattr(part, name)
        delattr(part, name + "_orig")
        setattr(part, name, weight)
        assert ways(lambda: layer(TOKEN, past_key_value=cache))[NAME] == "cpu compiled"


@torch.no_grad()
def test_no_features_are_no_token() -> None:
    with warnings.catch_warnings(action="ignore"):
        head = pack_weights(nn.Sequential(nn.Linear(0, 5, dtype=torch.bfloat16)).eval(), compiled=True)
    assert head(torch.zeros(3, 0).bfloat16()).shape == (3, 5)


@torch.no_grad()
def test_what_stays_where_it_is_keeps_its_parts_of_kv_b_proj() -> None:
    layer = pack_weights(layer_of("int8"), compiled=True)
    assert layer.to("cpu").self_attn.kv_b_proj.kept is not None
    assert layer.float().self_attn.kv_b_proj.kept is None


@torch.no_grad()
def test_codes_that_lie_in_rows_again_go_the_usual_way() -> None:
    mlp = pack_weights(layer_of("int4", layer_idx=0, **WIDE).mlp, compiled=True)
    assert ways(lambda: mlp(TOKEN))["DeepseekV2MLP.forward"] == "cpu compiled"
    for part in mlp.children():  # as those that come back from another device
        assert part.block_rows
        part.codes, part.block_rows = in_rows(part.codes, part.block_rows), 0
    assert as_defined(mlp)


@torch.no_grad()
def test_parts_may_exchange_their_names() -> None:
    mlp = pack_weights(layer_of(layer_idx=0).mlp, compiled=True)
    assert as_defined(mlp)
    gate, up, down = mlp.children()
    mlp._modules = {"up_proj": gate, "gate_proj": up, "down_proj": down}
    assert as_defined(mlp)


@torch.no_grad()
@pytest.mark.parametrize("place", ["input_layernorm", "self_attn.o_proj", "mlp.shared_experts.down_proj"])
def test_an_attribute_may_stand_before_a_weight(place: str) -> None:
    layer = pack_weights(layer_of(mla_form="absorbed"), compiled=True)
    cache, part = layer(TOKEN.expand(1, 7, -1), use_cache=True)[1], layer.get_submodule(place)
    assert as_defined(layer, past_key_value=cache)
    part.__dict__["weight"] = part.weight * 100
    assert as_defined(layer, past_key_value=cache)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_weight_is_seen(layout: torch.layout) -> None:
    mlp = pack_weights(layer_of(layer_idx=0).mlp, compiled=True)
    assert mlp.token_in_cpp.holds(mlp)
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.to_sparse(layout=layout))
    assert not mlp.token_in_cpp.holds(mlp)
