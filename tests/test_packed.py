"""Packed weights: the same layer, the same names and values, and no way to use them wrongly in silence."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.utils import prune

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM, MoEGate, pack_weights
from dsv2_ref.fast.processor import has_bfloat16
from dsv2_ref.quantize import quantize

HAS_BFLOAT16 = has_bfloat16()
BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no bfloat16 instructions for oneDNN"),
    id="bfloat16",
)
DTYPES = pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="float32"), BFLOAT16])


def plain_and_packed(
    dtype: torch.dtype, layer_idx: int = 1, **fields: Any
) -> tuple[DeepseekV2DecoderLayer, DeepseekV2DecoderLayer]:
    torch.manual_seed(0)
    config = DeepseekV2Config.tiny()
    plain = DeepseekV2DecoderLayer(DeepseekV2Config(**config.to_dict() | fields), layer_idx).to(dtype).eval()
    return plain, pack_weights(copy.deepcopy(plain))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Sums in another order may round to the neighbouring number, here at a stream of size 1 to 4: in bfloat16 2**-6 is
    one step, and float32 has 16 bits more."""
    step = 2**-6 if expected.dtype == torch.bfloat16 else 2**-20
    torch.testing.assert_close(actual, expected, rtol=0, atol=step)


@DTYPES
@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("layer_idx", [0, 1])
@pytest.mark.parametrize("seq", [1, 7, 40])
@torch.no_grad()
def test_a_packed_layer_computes_the_same(layer_idx: int, seq: int, form: str, dtype: torch.dtype) -> None:
    plain, packed = plain_and_packed(dtype, layer_idx, mla_form=form)
    tokens = torch.randn(2, seq, 64).to(dtype)
    expected, expected_cache = plain(tokens, use_cache=True)
    output, cache = packed(tokens, use_cache=True)
    assert_near(output, expected)
    assert_near(cache.tokens, expected_cache.tokens)
    output, _ = packed(tokens[:, :1], past_key_value=cache, use_cache=True)
    expected, _ = plain(tokens[:, :1], past_key_value=cache, use_cache=True)
    assert_near(output, expected)


@DTYPES
@torch.no_grad()
def test_multi_head_attention_and_biases_are_packed_too(dtype: torch.dtype) -> None:
    plain, packed = plain_and_packed(dtype, use_mla=False, num_key_value_heads=2, attention_bias=True)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
    packed = pack_weights(copy.deepcopy(plain))
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    tokens = torch.randn(2, 7, 64).to(dtype)
    assert_near(packed(tokens)[0], plain(tokens)[0])
    cache = packed.self_attn.empty_cache(2, capacity=8)
    assert (cache.tokens.dtype, cache.tokens.device) == (dtype, tokens.device)
    _, cache = packed(tokens[:, :6], past_key_value=cache, use_cache=True)
    assert_near(packed(tokens[:, 6:], past_key_value=cache)[0], plain(tokens)[0][:, 6:])


@DTYPES
def test_the_state_dict_keeps_its_names_and_values(dtype: torch.dtype) -> None:
    plain, packed = plain_and_packed(dtype)
    expected, got = plain.state_dict(), packed.state_dict()
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name
    plain.load_state_dict(got, strict=True)


@DTYPES
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@torch.no_grad()
def test_a_copy_is_packed_and_computes_the_same(copied: Callable[..., Any], dtype: torch.dtype) -> None:
    _, packed = plain_and_packed(dtype)
    twin, tokens = copied(packed), torch.randn(2, 5, 64).to(dtype)
    assert torch.equal(twin(tokens)[0], packed(tokens)[0])
    assert not any(isinstance(module, torch.nn.Linear) for module in twin.modules())
    assert {name: tuple(w.shape) for name, w in twin.state_dict().items()} == (
        {name: tuple(w.shape) for name, w in packed.state_dict().items()}
    )


@DTYPES
def test_loading_into_packed_weights_is_refused(dtype: torch.dtype) -> None:
    plain, packed = plain_and_packed(dtype)
    with pytest.raises(RuntimeError, match=r"self_attn\.q_a_proj holds packed weights; wanted a layer to load into"):
        packed.load_state_dict(plain.state_dict())


@DTYPES
@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_refused_model_has_loaded_nothing(copied: Callable[..., Any], dtype: torch.dtype) -> None:
    """Its embedding would come before the first packed weight."""
    config = DeepseekV2Config.tiny()
    model = copied(pack_weights(DeepseekV2ForCausalLM(config).to(dtype)))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"model\.layers\.0\.self_attn\.q_a_proj holds packed weights; wanted a layer"
    ):
        model.load_state_dict(DeepseekV2ForCausalLM(config).to(dtype).state_dict())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@DTYPES
def test_gradients_are_refused_rather_than_lost(dtype: torch.dtype) -> None:
    _, packed = plain_and_packed(dtype)
    with pytest.raises(ValueError, match="packed weights give none"):
        packed(torch.randn(1, 3, 64).to(dtype))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in forward mode
@pytest.mark.parametrize("layer_idx", [0, 1])
@torch.no_grad()
def test_tangents_are_refused_rather_than_lost(layer_idx: int) -> None:
    _, packed = plain_and_packed(torch.float32, layer_idx)
    tokens = torch.randn(1, 3, 64)
    with pytest.raises(ValueError, match="no derivatives: packed weights give none"):
        jvp(lambda x: packed(x)[0], (tokens,), (tokens,))
    with (
        forward_ad.dual_level(),
        pytest.raises(ValueError, match="no derivatives: packed weights give none"),
    ):
        packed(forward_ad.make_dual(tokens, tokens))


@torch.no_grad()
def test_batches_of_torch_func_are_taken_where_no_expert_is_chosen() -> None:
    many = torch.randn(2, 1, 3, 64)
    plain, packed = plain_and_packed(torch.float32, 0)
    assert_near(vmap(lambda x: packed(x)[0])(many)[:, 0], plain(many[:, 0])[0])
    _, packed = plain_and_packed(torch.float32, 1)
    with pytest.raises(ValueError, match=r"hidden_states is .*; wanted none that a transform of torch\.func holds"):
        vmap(lambda x: packed(x)[0])(many)


@torch.no_grad()
def test_another_weight_is_refused_rather_than_ignored() -> None:
    """In `kv_b_proj` the absorbed form reads another copy, which would stay."""
    plain, packed = plain_and_packed(torch.float32, 0, mla_form="absorbed")
    tokens = torch.randn(1, 3, 64)
    expected = packed(tokens)[0]
    weights = {f"self_attn.kv_b_proj.{name}": 2 * x for name, x in plain.self_attn.kv_b_proj.named_parameters()}
    with pytest.raises(RuntimeError, match="weight is packed; wanted no other in its place: change the weights first"):
        functional_call(packed, weights, (tokens,))
    assert torch.equal(packed(tokens)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("to", [torch.float16, torch.float64, "meta"], ids=str)
def test_conversion_is_refused_before_anything_is_converted(to: Any) -> None:
    _, packed = plain_and_packed(torch.float32, 1)
    tokens = torch.randn(1, 3, 64)
    expected = packed(tokens)[0]
    with pytest.raises(RuntimeError, match=r"packed weights would become .*; wanted torch.float32 on cpu, as they are"):
        packed.to(to)
    assert torch.equal(packed.float().to("cpu")(tokens)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_weights_of_another_dtype_are_refused_before_anything_is_packed(dtype: torch.dtype) -> None:
    layer = DeepseekV2DecoderLayer(DeepseekV2Config.tiny(), 1)
    layer.self_attn.o_proj.to(dtype)
    wanted = rf"the weight of o_proj is .*{dtype} on cpu; wanted bfloat16 or float32 on cpu"
    with pytest.raises(ValueError, match=wanted):
        pack_weights(layer)
    assert isinstance(layer.mlp.shared_experts.gate_proj, torch.nn.Linear)
    assert isinstance(layer.self_attn.q_a_proj, torch.nn.Linear)


def test_weights_elsewhere_are_refused() -> None:
    with torch.device("meta"):
        layer = DeepseekV2DecoderLayer(DeepseekV2Config.tiny(), 1)
    with pytest.raises(ValueError, match="on meta; wanted bfloat16 or float32 on cpu"):
        pack_weights(layer)


@pytest.mark.skipif(HAS_BFLOAT16, reason="this processor has bfloat16 instructions")
def test_bfloat16_is_refused_where_the_processor_has_no_instructions_for_it() -> None:
    layer = DeepseekV2DecoderLayer(DeepseekV2Config.tiny(), 1).bfloat16()
    with pytest.raises(RuntimeError, match="pack_weights needs a processor with bfloat16 instructions"):
        pack_weights(layer)
    assert isinstance(layer.self_attn.q_a_proj, torch.nn.Linear)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}], ids=["V2", "V3"])
def test_the_gate_is_widened_once_and_saved_as_it_was(fields: dict[str, Any]) -> None:
    """In a layer of quantised weights, which is packed on every processor."""
    torch.manual_seed(0)
    config = DeepseekV2Config(**DeepseekV2Config.tiny().to_dict() | fields)
    plain = quantize(DeepseekV2DecoderLayer(config, 1).bfloat16().eval(), "int8")
    called: list[Tensor] = []
    plain.mlp.gate.register_forward_hook(lambda _, __, out: called.append(out[0]))
    packed, tokens = pack_weights(copy.deepcopy(plain)), torch.randn(2, 5, 64).bfloat16()
    gate, before = packed.mlp.gate, plain.mlp.gate
    assert isinstance(gate, type(before))
    assert (before.weight.dtype, gate.weight.dtype) == (torch.bfloat16, torch.float32)
    for twin in (gate, copy.deepcopy(gate), pickle.loads(pickle.dumps(copy.deepcopy(without_hooks(gate))))):
        for one, other in zip(twin(tokens)[:2], before(tokens)[:2], strict=True):
            assert torch.equal(one, other)
        for name, weight in before.state_dict().items():
            found = twin.state_dict()[name]
            assert found.dtype == weight.dtype
            assert torch.equal(found, weight)
    assert len(called) > 4  # the hook went along
    gate.load_state_dict({name: 2 * weight for name, weight in before.state_dict().items()})
    assert torch.equal(gate.weight, 2 * before.weight.float())
    assert gate.to(torch.float64).state_dict()["weight"].dtype == torch.float64


@torch.no_grad()
def test_a_packed_mixture_takes_the_tokens_that_it_took(as_shipped: None) -> None:
    """Called by itself, where only its gate tells a dtype."""
    plain = quantize(DeepseekV2DecoderLayer(DeepseekV2Config.tiny(), 1).bfloat16().eval(), "int8").mlp
    packed, tokens = pack_weights(copy.deepcopy(plain)), torch.randn(2, 5, 64).bfloat16()
    assert_near(packed(tokens), plain(tokens))
    with pytest.raises(ValueError, match=r"hidden_states is .*float32.*; wanted .*bfloat16 on cpu, as the weights"):
        packed(tokens.float())


@torch.no_grad()
def test_a_gate_that_others_changed_stays_as_it_is() -> None:
    layer = DeepseekV2DecoderLayer(DeepseekV2Config.tiny(), 1).bfloat16().eval()
    prune.l1_unstructured(layer.mlp.gate, "weight", 0.5)
    tokens = torch.randn(2, 5, 64).bfloat16()
    expected, gate = layer.mlp.gate(tokens)[1], layer.mlp.gate
    pack_weights(quantize(layer, "int8"))
    assert layer.mlp.gate is gate
    assert torch.equal(gate(tokens)[1], expected)


def test_a_gate_that_two_share_stays_one() -> None:
    layers = torch.nn.ModuleList(DeepseekV2DecoderLayer(DeepseekV2Config.tiny(), 1).bfloat16() for _ in range(2))
    layers[1].mlp.gate = layers[0].mlp.gate
    layers.append(torch.nn.ModuleDict({"one": layers[0].mlp.gate, "other": MoEGate(DeepseekV2Config.tiny())}))
    layers[2]["other"].weight = layers[0].mlp.gate.weight
    pack_weights(quantize(layers, "int8"))
    assert layers[1].mlp.gate is layers[0].mlp.gate is layers[2]["one"]
    assert layers[2]["other"].weight is layers[0].mlp.gate.weight
    assert layers[1].mlp.gate.weight.dtype == torch.float32


def without_hooks(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that can be pickled."""
    twin = copy.deepcopy(module)
    twin._forward_hooks.clear()
    return twin
