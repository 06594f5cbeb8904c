"""Weights in fewer bits: the layer with rounded weights in every form, every weight of it or a clear line, by name."""

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import jvp

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM, ops, pack_weights
from dsv2_ref.codes import from_codes, pack_nibbles, to_codes, unpack_nibbles
from dsv2_ref.moe import RoutedExperts
from dsv2_ref.quantize import KINDS, parts_of, quantize
from dsv2_ref.quantized import FP8_BLOCK, QuantizedWeight
from dsv2_ref.quantized_modules import QuantizedExperts, QuantizedLinear, quantized_places
from tests.examples import thorough
from tests.peers import SMALL, V3_GATE, assert_close, randomised, tokens

GROUP = 4  # of SMALL's widths 48, 40, 28, 20 and 16 a divisor
# A block of 128 may not hold gates and ups: the experts are as wide. Other widths are no multiples of it.
WIDE = replace(SMALL, moe_intermediate_size=128, intermediate_size=132, n_routed_experts=4)
LAYERS: dict[str, tuple[DeepseekV2Config, int]] = {
    "mla": (WIDE, 1),
    "mla dense": (WIDE, 0),
    "no q_lora, biases": (replace(WIDE, q_lora_rank=None, attention_bias=True), 1),
    "mha": (replace(WIDE, use_mla=False, num_key_value_heads=2, attention_bias=True), 1),
    "v3": (replace(V3_GATE, moe_intermediate_size=128, n_routed_experts=8), 1),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_kind = pytest.mark.parametrize("kind", KINDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def layer_of(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> DeepseekV2DecoderLayer:
    config, index = LAYERS[name]
    return randomised(DeepseekV2DecoderLayer(replace(config, **fields), index), dtype)


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Every weight that is to become codes, by its published name."""
    weights = {name: weight.detach() for name, weight in module.state_dict().items() if weight.ndim > 1}
    return {name: weight for name, weight in weights.items() if not name.endswith(KEPT)}


KEPT = ("mlp.gate.weight", "embed_tokens.weight", "lm_head.weight")


def dense_twin(plain: Any, quantised: nn.Module) -> Any:
    """A copy of the plain module with the weights that the codes stand for."""
    twin, weights = copy.deepcopy(plain), plain.state_dict()
    for name, (held, place) in quantized_places(quantised).items():
        expert, rows = place if isinstance(place, tuple) else (place, slice(None))
        weights[name] = held.dense(expert)[rows]
    twin.load_state_dict(weights)
    return twin


# By hand


def test_four_bits_by_hand() -> None:
    """With one scale 0.5 is a tie between 0 and 1, and goes to the even one, as 2.5 steps of 0.2 do."""
    x = torch.tensor([7, -3, 0.5, 1.4])
    codes, scales = to_codes(x, "int4", 4)
    assert (codes.tolist(), scales.tolist()) == ([7, -3, 0, 1], [1])
    x[0] = 70
    codes, scales = to_codes(x, "int4", 4)
    assert (codes.tolist(), scales.tolist(), from_codes(codes, scales).tolist()) == (
        [7, 0, 0, 0],
        [10],
        [70, 0, 0, 0],
    )
    codes, scales = to_codes(x, "int4", 2)
    assert codes.tolist() == [7, 0, 2, 7]
    torch.testing.assert_close(from_codes(codes, scales), torch.tensor([70, 0, 0.4, 1.4]), rtol=2**-23, atol=0)


def test_eight_bit_floats_by_hand() -> None:
    """448 makes the scale 1. 17 lies between 16 and 18, 19 between 18 and 20, in the middle: the even mantissa wins."""
    codes, scales = to_codes(torch.tensor([448, 0.3, 17, 19, 300, -448]), "fp8", 6)
    assert codes.float().tolist() == [448, 0.3125, 16, 20, 288, -448]
    assert scales.tolist() == [1]


def test_bits_between_two_and_eight_and_the_largest_code() -> None:
    x = torch.linspace(-1, 1, 4096)
    for bits in range(2, 9):
        codes, scales = to_codes(x, f"int{bits}", 4096)
        assert sorted(set(codes.tolist())) == list(range(1 - 2 ** (bits - 1), 2 ** (bits - 1)))
        assert scales.tolist() == [pytest.approx(1 / (2 ** (bits - 1) - 1))]


def test_two_codes_in_a_byte() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8)[None]
    packed = pack_nibbles(codes)
    assert packed[0].tolist() == [16 * (2 * i + 1) + 2 * i for i in range(8)]
    assert torch.equal(unpack_nibbles(packed), codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_every_element_becomes_its_nearest_code(kind: str, dtype: torch.dtype) -> None:
    """Against a search through all codes."""
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[1, 32:64] = 0
    codes, scales = to_codes(x, kind, 32)
    if kind == "fp8":
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        every = every[every.isfinite()]
    else:
        every = torch.arange(-(2 ** (int(kind[3:]) - 1)) + 1, 2 ** (int(kind[3:]) - 1)).double()
    for row in range(3):
        for group in range(3):
            place = slice(32 * group, 32 * group + 32)
            scale = scales[row, group].double()
            assert scale == (x[row, place].abs().max().double() / every.max()).to(torch.float32 if kind else dtype)
            nearest = (x[row, place].double()[:, None] - every * scale).abs().argmin(dim=1)
            assert torch.equal(codes[row, place].double() * scale, every[nearest] * scale)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_too_large_saturates_and_is_never_nan(dtype: torch.dtype, kind: str) -> None:
    """Up to infinity, with scales in float32. Of NaN nothing else can be said."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([[0, 0, 0, 0], [largest, 1, 0, -1], [-largest] * 4, [math.inf, 1, -math.inf, 0]], dtype=dtype)
    back = from_codes(*to_codes(x, kind, 4))
    assert back.isfinite().all()
    assert (back[0] == 0).all()
    most = min(largest, torch.finfo(torch.float32).max)
    assert back[1, 0] == pytest.approx(most, rel=2**-22)
    assert back[2, 3] == pytest.approx(-most, rel=2**-22)
    assert back[3, 0] > most / 2 > -most / 2 > back[3, 2]
    assert from_codes(*to_codes(torch.tensor([math.nan, 1]), kind, 2)).isnan().all()


# What a layer computes


@every_layer
@every_kind
@pytest.mark.parametrize("form", ["expanded", "absorbed", "auto"])
@torch.no_grad()
def test_it_is_the_layer_with_the_weights_that_the_codes_stand_for(form: str, kind: str, name: str) -> None:
    plain = layer_of(name, mla_form=form)
    quantised = quantize(copy.deepcopy(plain), kind, GROUP)
    assert not any(isinstance(module, nn.Linear | RoutedExperts) for module in quantised.modules())
    twin = dense_twin(plain, quantised)
    x = tokens(2, 9, torch.float64)
    mask = torch.arange(9) >= torch.tensor([[0], [3]])
    assert_close(quantised(x, mask)[0], twin(x, mask)[0], "output")
    outputs, cache = [], None
    for piece in x.split([5, 1, 3], dim=1):
        out, cache = quantised(piece, past_key_value=cache, use_cache=True)
        outputs.append(out)
    assert_close(torch.cat(outputs, dim=1), twin(x)[0], "output in pieces")
    apart = (quantised(x)[0] - plain(x)[0]).norm() / plain(x)[0].norm()
    assert 1e-4 < apart < 0.3  # a part of it was rounded


@every_kind
@torch.no_grad()
def test_a_model_is_the_model_with_the_weights_that_the_codes_stand_for(kind: str) -> None:
    plain = randomised(DeepseekV2ForCausalLM(WIDE))
    quantised = quantize(copy.deepcopy(plain), kind, GROUP)
    ids = torch.arange(9)[None] * 5
    assert_close(quantised(ids)[0], dense_twin(plain, quantised)(ids)[0], "logits")


@every_layer
@every_kind
def test_nothing_is_left_out_and_nothing_else_is_changed(kind: str, name: str) -> None:
    plain = layer_of(name)
    quantised = quantize(copy.deepcopy(plain), kind, GROUP)
    assert quantized_places(quantised).keys() == matrices(plain).keys()
    left = {name: weight for name, weight in quantised.named_parameters() if weight.ndim > 1}
    assert left.keys() == ({"mlp.gate.weight"} if "dense" not in name else set())
    codes = [module.codes for module in quantised.modules() if isinstance(module, QuantizedWeight)]
    held = sum(code.numel() for code in codes) * (2 if kind == "int4" else 1)
    assert held == sum(weight.numel() for weight in matrices(plain).values())
    kept = quantised.state_dict()
    for path, weight in plain.state_dict().items():
        assert path in matrices(plain) or torch.equal(kept[path], weight), path


def test_a_model_keeps_embedding_head_gates_and_norms() -> None:
    plain = randomised(DeepseekV2ForCausalLM(WIDE))
    quantised = quantize(copy.deepcopy(plain), "int8")
    left = {name for name, weight in quantised.named_parameters() if weight.ndim > 1}
    assert left == {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"}
    assert all(torch.equal(weight, plain.get_parameter(name)) for name, weight in quantised.named_parameters())
    assert quantized_places(quantised).keys() == matrices(plain).keys()


@pytest.mark.parametrize("parts", [["attention"], ("experts",), {"mlp"}, ["attention", "mlp"]])
def test_parts(parts: Any) -> None:
    plain = randomised(DeepseekV2ForCausalLM(WIDE))
    quantised = quantize(copy.deepcopy(plain), "int4", GROUP, parts)
    assert set(parts_of(quantised)) == set(parts)
    expected = {
        name
        for name in matrices(plain)
        if ("attention" if ".self_attn." in name else "experts" if ".experts." in name else "mlp") in parts
    }
    assert quantized_places(quantised).keys() == expected
    ids = torch.arange(9)[None] * 5
    assert_close(quantised(ids)[0], dense_twin(plain, quantised)(ids)[0], "logits")


def check_half_a_step(kind: str, dtype: torch.dtype) -> None:
    """Of its own scale; and what scales in bfloat16 and the dtype itself round: eps / 2 of the largest of its group
    for the scale, eps / 2 of the element for the product, each. Floats of 3 bits after the first are 2**-4 of
    themselves off, subnormal ones (below 2**-6 of 448) 2**-10."""
    plain = layer_of("mla", dtype)
    before = matrices(plain)
    quantised = quantize(plain, kind, GROUP)
    eps = torch.finfo(dtype).eps
    for name, (held, place) in list(quantized_places(quantised).items())[::2]:
        expert, rows = place if isinstance(place, tuple) else (place, slice(None))
        found, weight = held.dense(expert)[rows].double(), before[name].double()
        assert held.dense(expert).dtype == dtype
        sides = (FP8_BLOCK, FP8_BLOCK) if kind == "fp8" else (1, held.group)
        largest = torch.zeros_like(weight)
        for row in range(0, len(weight), sides[0]):
            for column in range(0, weight.shape[1], sides[1]):
                at = slice(row, row + sides[0]), slice(column, column + sides[1])
                largest[at] = weight[at].abs().max()
        if kind == "fp8":
            half = torch.maximum(weight.abs() * 2**-4, largest / 448 * 2**-10)
        else:
            half = largest / {"int8": 127, "int4": 7}[kind] / 2
        within = (found - weight).abs() <= half + largest * 1.5 * max(eps, 2**-23)
        assert within.all(), f"{name}: {int((~within).sum())} of its weights are more than half a step off"
        assert float((found == 0).double().mean()) < 0.25, name


@DTYPES
@every_kind
def test_no_element_is_farther_off_than_half_a_step(kind: str, dtype: torch.dtype) -> None:
    check_half_a_step(kind, dtype)


# What is wrong


def with_adapter(layer: Any) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base

    layer.self_attn.o_proj = Adapter(layer.self_attn.o_proj)


def with_wrapped_experts(layer: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    layer.mlp.experts = Wrapper(layer.mlp.experts)


def with_subclass(layer: Any) -> None:
    class Loud(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer.self_attn.q_a_proj.__class__ = Loud


def with_experts_of_another_class(layer: Any) -> None:
    layer.mlp.experts.__class__ = type("OtherExperts", (RoutedExperts,), {})


def with_own_forward(layer: Any) -> None:
    layer.mlp.shared_experts.up_proj.forward = lambda x: x


def with_a_parametrization(layer: Any) -> None:
    nn.utils.parametrizations.spectral_norm(layer.self_attn.q_b_proj)


def with_nan(layer: Any) -> None:
    layer.mlp.experts.down_proj.data[3, 1, 1] = math.nan


def with_infinity(layer: Any) -> None:
    layer.mlp.shared_experts.down_proj.weight.data[0, 0] = -math.inf


def packed(layer: Any) -> None:
    pack_weights(layer.float())


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "adapter": (with_adapter, r"o_proj is a Adapter; wanted a plain torch.nn.Linear"),
    "wrapped experts": (with_wrapped_experts, r"experts is a Wrapper; wanted a plain .* or the package's own experts"),
    "subclass": (with_subclass, r"q_a_proj is a Loud; wanted a plain"),
    "experts of another class": (with_experts_of_another_class, r"experts is a OtherExperts; wanted"),
    "forward replaced": (with_own_forward, r"up_proj is a Linear; wanted a plain torch.nn.Linear"),
    "parametrization": (with_a_parametrization, r"q_b_proj is a ParametrizedLinear; wanted a plain"),
    "forward hook": (
        lambda layer: layer.self_attn.kv_b_proj.register_forward_hook(print),
        r"kv_b_proj is a Linear; wanted a plain .* before an adapter, a wrapper or a hook is put on",
    ),
    "hook before": (lambda layer: layer.mlp.experts.register_forward_pre_hook(print), r"experts is a RoutedExperts"),
    "backward hook": (lambda layer: layer.mlp.experts.register_full_backward_hook(print), r"experts is a RoutedExp"),
    "backward hook before": (
        lambda layer: layer.mlp.experts.register_full_backward_pre_hook(print),
        r"experts is a RoutedExperts",
    ),
    "NaN": (with_nan, r"the weight of experts is infinite or NaN somewhere; wanted finite"),
    "infinity": (with_infinity, r"the weight of down_proj is infinite or NaN somewhere; wanted finite"),
    "integers": (
        lambda layer: setattr(layer.self_attn.o_proj, "weight", nn.Parameter(torch.ones(48, 40).int(), False)),
        r"the weight of o_proj is \(48, 40\) torch.int32 on cpu; wanted float64, float32, float16 or bfloat16",
    ),
    "eight bits already": (
        lambda layer: layer.self_attn.o_proj.to(torch.float8_e4m3fn),
        r"the weight of o_proj is \(48, 40\) torch.float8_e4m3fn on cpu; wanted float64, float32, float16 or bfloat16",
    ),
    "quantised": (lambda layer: quantize(layer, "int8"), r"is a Quantized\w+; wanted a plain .* quantise before pack"),
    "experts quantised": (
        lambda layer: quantize(layer, "int8", parts=["experts"]),
        r"experts is a QuantizedExperts; wanted a plain",
    ),
    "packed": (packed, r"is a Packed\w+; wanted a plain .* quantise before packing"),
}


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("name", WRONG)
def test_what_would_be_left_out_or_lost_is_rejected_by_name_and_nothing_is_changed(name: str) -> None:
    change, message = WRONG[name]
    layer = layer_of("mla", torch.float32)
    change(layer)
    before = dict(layer.named_modules())
    with pytest.raises(ValueError, match=message) as caught:
        quantize(layer, "int4", GROUP)
    assert "\n" not in str(caught.value)
    assert dict(layer.named_modules()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int3"}, r"weights is 'int3'; wanted int8, int4, fp8"),
        ({"weights": None}, r"weights is None; wanted int8"),
        ({"group": 7}, r"group is 7; wanted an even number"),
        ({"group": 0}, r"group is 0; wanted an even number"),
        ({"group": 8.0}, r"group is 8.0; wanted an even number"),
        ({"group": True}, r"group is True; wanted an even number"),
        ({"group": 16}, r"group is 16; wanted a divisor of 28, the inputs of q_b_proj, such as 4"),
        ({"parts": ()}, r"parts is a tuple of 0; wanted one or more of attention, experts, mlp, in a tuple or a list"),
        ({"parts": "experts"}, r"parts is 'experts'; wanted one or more of attention, experts, mlp"),
        ({"parts": None}, r"parts is None; wanted one or more of"),
        ({"parts": ["gate"]}, r"parts is 'gate'; wanted one or more of attention, experts, mlp"),
    ],
)
@pytest.mark.usefixtures("as_shipped")
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    layer = layer_of("mla")
    with pytest.raises(ValueError, match=message):
        quantize(layer, **{"group": GROUP} | arguments)
    assert not quantized_places(layer)


def test_a_width_that_no_group_divides_names_one_that_does() -> None:
    """V2-Lite's dense width 10,944 is 85.5 times 128, and 171 times 64."""
    with torch.device("meta"):
        layer = DeepseekV2DecoderLayer(DeepseekV2Config.deepseek_v2_lite(), 0)
    with pytest.raises(
        ValueError, match="group is 128; wanted a divisor of 10944, the inputs of down_proj, such as 64"
    ):
        quantize(layer, "int4", 128)
    quantize(layer, "int4", 64)
    assert layer.mlp.down_proj.scales.shape == (2048, 171)


def test_a_block_that_would_hold_gates_and_ups() -> None:
    layer = randomised(DeepseekV2DecoderLayer(SMALL, 1))
    with pytest.raises(
        ValueError, match="weights is 'fp8'; wanted int8 or int4: 128 does not divide the experts' width"
    ):
        quantize(layer, "fp8")
    assert not quantized_places(layer)
    quantize(layer, "fp8", parts=["attention", "mlp"])


@pytest.mark.parametrize("module", [nn.Linear(4, 4), RoutedExperts(SMALL), nn.Identity()])
def test_a_module_that_holds_nothing_to_quantise(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"module is a \w+; wanted one that holds a layer's weights"):
        quantize(module, "int8")


@pytest.mark.parametrize("change", [lambda module: quantize(module, "int8"), pack_weights], ids=["quantize", "pack"])
@pytest.mark.parametrize("module", [None, {"weight": torch.ones(2, 2)}, [nn.Identity()]], ids=["None", "dict", "list"])
@pytest.mark.usefixtures("as_shipped")
def test_what_is_no_module(module: Any, change: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"^module is .*; wanted a torch.nn.Module$"):
        change(module)


@torch.no_grad()
def test_a_bias_that_the_absorbed_form_would_leave_out() -> None:
    plain = layer_of("mla", mla_form="auto")
    bias = nn.Linear(16, 88).double()
    bias.weight.copy_(plain.self_attn.kv_b_proj.weight)
    plain.self_attn.kv_b_proj = bias
    quantised = quantize(copy.deepcopy(plain), "int8")
    assert type(quantised.self_attn.kv_b_proj) is QuantizedLinear
    twin, x = dense_twin(plain, quantised), tokens(1, 9, torch.float64)
    _, cache = twin(x, use_cache=True)
    assert_close(quantised(x[:, :1], past_key_value=cache)[0], twin(x[:, :1], past_key_value=cache)[0], "output")
    quantised.self_attn.form = "absorbed"
    with pytest.raises(ValueError, match="kv_b_proj is a QuantizedLinear; wanted"):
        quantised(x)


def test_hooks_on_quantised_maps_run_in_both_forms() -> None:
    quantised, called = quantize(layer_of("mla", mla_form="auto"), "int8"), []
    x = tokens(1, 9, torch.float64)
    _, cache = quantised(x, use_cache=True)
    quantised.self_attn.kv_b_proj.register_forward_hook(lambda *_: called.append(1))
    quantised(x[:, :1], past_key_value=cache)
    assert called


@pytest.mark.usefixtures("as_shipped")
def test_inputs_that_do_not_fit_a_quantised_layer() -> None:
    layer = quantize(layer_of("mla", torch.float32), "int4", GROUP)
    with pytest.raises(ValueError, match=r"hidden_states is .*float64.*; wanted .*float32"):
        layer(tokens(1, 3, torch.float64))
    with pytest.raises(ValueError, match=r"hidden_states is \(1, 3, 47\).*; wanted at least one token of 48"):
        layer(tokens(1, 3, torch.float32)[..., 1:])
    with pytest.raises(ValueError, match=r"hidden_states is .*; wanted .*torch.float32 on cpu, as the weights"):
        layer.self_attn(tokens(1, 3, torch.bfloat16))
    with pytest.raises(ValueError, match=r"hidden_states is .*; wanted .*torch.float32 on cpu, as the weights"):
        layer.mlp.shared_experts(tokens(1, 3, torch.bfloat16))


# State dicts and copies


def bytes_of(kind: str, shape: torch.Size, itemsize: int, group: int) -> int:
    rows, columns = shape
    if kind == "fp8":
        return rows * columns + 4 * math.ceil(rows / 128) * math.ceil(columns / 128)
    if kind == "int8":
        return rows * columns + rows * itemsize
    return rows * columns // 2 + rows * columns // group * itemsize


@every_layer
@every_kind
@DTYPES
def test_the_state_dict_to_the_byte(dtype: torch.dtype, kind: str, name: str) -> None:
    plain = layer_of(name, dtype)
    weights, own = plain.state_dict(), matrices(plain)
    scale = 4 if dtype == torch.float16 else dtype.itemsize
    kept = sum(weight.nbytes for path, weight in weights.items() if path not in own)
    wanted = kept + sum(bytes_of(kind, weight.shape, scale, GROUP) for weight in own.values())
    state = quantize(plain, kind, GROUP).state_dict()
    assert sum(value.nbytes for value in state.values()) == wanted
    code = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}[kind]
    scales = torch.float32 if kind == "fp8" or dtype == torch.float16 else dtype
    assert {value.dtype for path, value in state.items() if path.endswith(".codes")} == {code}
    assert {value.dtype for path, value in state.items() if path.endswith(".scales")} == {scales}


def test_names_in_the_state_dict() -> None:
    state = quantize(layer_of("mla"), "int4", GROUP).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items() if "experts" in name or "o_proj" in name} == {
        "self_attn.o_proj.codes": (48, 20),
        "self_attn.o_proj.scales": (48, 10),
        "mlp.experts.gate_up_proj.codes": (4, 256, 24),
        "mlp.experts.gate_up_proj.scales": (4, 256, 12),
        "mlp.experts.down_proj.codes": (4, 48, 64),
        "mlp.experts.down_proj.scales": (4, 48, 32),
        "mlp.shared_experts.gate_proj.codes": (384, 24),
        "mlp.shared_experts.gate_proj.scales": (384, 12),
        "mlp.shared_experts.up_proj.codes": (384, 24),
        "mlp.shared_experts.up_proj.scales": (384, 12),
        "mlp.shared_experts.down_proj.codes": (48, 192),
        "mlp.shared_experts.down_proj.scales": (48, 96),
    }


def through_torch_save(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    torch.save(state, folder / "weights.pt")
    return torch.load(folder / "weights.pt", weights_only=True)


def through_safetensors(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    save_file(state, folder / "weights.safetensors")
    return load_file(folder / "weights.safetensors")


@pytest.mark.slow
@every_layer
@every_kind
@pytest.mark.parametrize(
    "through",
    [lambda state, _: state, through_torch_save, through_safetensors],
    ids=["as it is", "torch", "safetensors"],
)
@pytest.mark.parametrize("assign", [True, *thorough(False)])
def test_codes_are_saved_and_loaded(assign: bool, through: Any, kind: str, name: str, tmp_path: Path) -> None:
    quantised = quantize(layer_of(name, torch.bfloat16), kind, GROUP)
    state = through(quantised.state_dict(), tmp_path)
    config, index = LAYERS[name]
    other = quantize(DeepseekV2DecoderLayer(config, index).bfloat16(), kind, GROUP).eval()
    other.load_state_dict(state, strict=True, assign=assign)
    x = tokens(1, 4, torch.bfloat16)
    assert torch.equal(other(x)[0], quantised(x)[0])
    with torch.device("meta"):
        empty = quantize(DeepseekV2DecoderLayer(config, index).bfloat16(), kind, GROUP).eval()
    assert all(value.is_meta for value in empty.state_dict().values())
    empty.load_state_dict(state, strict=True, assign=True)
    held = [value for name, value in empty.state_dict().items() if name.endswith(("codes", "scales"))]
    assert held
    assert not any(value.is_meta for value in held)
    assert torch.equal(empty(x)[0], quantised(x)[0])


@pytest.mark.parametrize("name", ["mla", "v3", "mha"])
@every_kind
def test_weights_in_floating_point_are_quantised_while_they_are_loaded(kind: str, name: str) -> None:
    """As `from_pretrained` does; whatever the checkpoint's dtype, in the module's own."""
    plain = layer_of(name, torch.float64)
    config, index = LAYERS[name]
    target = quantize(DeepseekV2DecoderLayer(config, index), kind, GROUP)
    target.load_state_dict(plain.state_dict(), strict=True)
    expected = quantize(plain.float(), kind, GROUP).state_dict()
    assert all(torch.equal(value, expected[path]) for path, value in target.state_dict().items())
    with torch.device("meta"):
        empty = quantize(DeepseekV2DecoderLayer(config, index), kind, GROUP)
    empty.load_state_dict(layer_of(name, torch.float32).state_dict(), strict=True, assign=True)
    assert all(torch.equal(value, expected[path]) for path, value in empty.state_dict().items())


def test_loading_what_does_not_fit() -> None:
    target, weights = quantize(layer_of("mla", torch.float32), "int8"), layer_of("mla", torch.float32).state_dict()
    name = "mlp.experts.2.up_proj.weight"
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
        target.load_state_dict({path: weight for path, weight in weights.items() if path != name})
    with pytest.raises(
        RuntimeError, match=rf"size mismatch for {name}: the checkpoint has \(48, 128\), not \(128, 48\)"
    ):
        target.load_state_dict(weights | {name: weights[name].T})
    with pytest.raises(RuntimeError, match=rf"{name} is infinite or NaN in torch.float32 somewhere"):
        target.load_state_dict(weights | {name: weights[name] / 0})
    half = quantize(layer_of("mla", torch.float16), "int8")
    with pytest.raises(RuntimeError, match=rf"{name} is infinite or NaN in torch.float16 somewhere"):
        half.load_state_dict(weights | {name: torch.full_like(weights[name], 1e5)})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*mlp.experts.9.up_proj.weight"):
        target.load_state_dict(weights | {"mlp.experts.9.up_proj.weight": weights[name]})
    with pytest.raises(RuntimeError, match=r"size mismatch for self_attn.o_proj.weight"):
        target.load_state_dict(weights | {"self_attn.o_proj.weight": torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"size mismatch for codes"):
        target.self_attn.o_proj.load_state_dict({"codes": torch.zeros(3).char(), "scales": torch.zeros(48, 1)})


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_layer
@every_kind
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), through_a_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(copied: Callable[[Any], Any], kind: str, name: str) -> None:
    quantised, x = quantize(layer_of(name), kind, GROUP), tokens(1, 4, torch.float64)
    twin = copied(quantised)
    assert torch.equal(twin(x)[0], quantised(x)[0])
    for held in twin.modules():
        if isinstance(held, QuantizedWeight):
            held.codes.zero_()
    assert quantised(x)[0].isfinite().all()
    assert not torch.equal(twin(x)[0], quantised(x)[0])


ORDER = list(pairwise([torch.float32, torch.float16, torch.float64, torch.bfloat16]))


@every_kind
@pytest.mark.parametrize(("first", "second"), ORDER)
def test_another_dtype_is_that_of_what_the_codes_stand_for(first: torch.dtype, second: torch.dtype, kind: str) -> None:
    """Codes keep their bits, and a scale of 1e-7 does not vanish in float16."""
    quantised = quantize(layer_of("mla", first), kind, GROUP)
    held = quantised.self_attn.o_proj
    held.scales.mul_(1e-6)
    codes, scales = held.codes.clone(), held.scales.clone()
    moved = copy.deepcopy(quantised).to(second)
    own = moved.self_attn.o_proj
    assert torch.equal(own.codes.view(torch.uint8), codes.view(torch.uint8))
    assert own.codes.dtype == codes.dtype
    assert own.scales.dtype == (torch.float32 if kind == "fp8" or second == torch.float16 else second)
    assert torch.equal(own.scales, scales.to(own.scales.dtype))
    assert own.dense().dtype == second
    moved.self_attn.o_proj = torch.nn.Linear(40, 48, dtype=second)
    assert moved(tokens(1, 3, second))[0].dtype == second


@every_kind
def test_devices(kind: str) -> None:
    quantised = quantize(layer_of("mla"), kind, GROUP)
    on_meta = copy.deepcopy(quantised).to("meta")
    assert all(value.is_meta for value in on_meta.state_dict().values())
    empty = on_meta.to_empty(device="cpu")
    expected = {name: (value.shape, value.dtype) for name, value in quantised.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in empty.state_dict().items()} == expected

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no such device")

    before, x = {name: value.clone() for name, value in quantised.state_dict().items()}, tokens(1, 3, torch.float64)
    with pytest.raises(RuntimeError, match="no such device"):
        quantised._apply(fails)
    assert all(value.dtype == before[name].dtype for name, value in quantised.state_dict().items())
    assert quantised(x)[0].isfinite().all()


def test_printed() -> None:
    layer = layer_of("mla")
    assert "o_proj): QuantizedLinear(int4, (48, 40), a scale per 4 of a row)" in repr(quantize(layer, "int4", GROUP))
    assert "up_proj): QuantizedWeight(fp8, (4, 256, 48), a scale per 128 x 128)" in repr(
        quantize(layer_of("mla"), "fp8")
    )


# Beside other things


@every_layer
@every_kind
def test_inputs_get_gradients_and_codes_none(kind: str, name: str) -> None:
    plain = layer_of(name)
    quantised = quantize(copy.deepcopy(plain), kind, GROUP)
    gradients = []
    for layer in (quantised, dense_twin(plain, quantised)):
        x = tokens(2, 5, torch.float64).requires_grad_()
        layer(x)[0].square().sum().backward()
        gradients.append(x.grad)
        assert layer.input_layernorm.weight.grad is not None
    assert_close(gradients[0], gradients[1], "gradient of the input")
    assert not any(value.requires_grad for name, value in quantised.named_buffers())
    if LAYERS[name][0].attention_bias:
        assert quantised.self_attn.o_proj.bias.grad.abs().max() > 0


def test_transforms() -> None:
    plain = layer_of("mla dense")
    quantised = quantize(copy.deepcopy(plain), "int4", GROUP)
    twin, x, v = dense_twin(plain, quantised), tokens(1, 4, torch.float64), tokens(1, 4, torch.float64, seed=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        actual, expected = (jvp(lambda y, layer=layer: layer(y)[0], (x,), (v,))[1] for layer in (quantised, twin))
    assert_close(actual, expected, "tangent", roundings=1e3)
    many = torch.stack((x, 2 * x))
    assert_close(torch.func.vmap(lambda y: quantised(y)[0])(many)[1], quantised(2 * x)[0], "second input")


@every_kind
@torch.no_grad()
def test_definitions_alone_compute_the_same(kind: str) -> None:
    quantised, x = quantize(layer_of("mla"), kind, GROUP), tokens(2, 5, torch.float64)
    expected = quantised(x)[0]
    with ops.plain(), ops.watch() as choices:
        assert_close(quantised(x)[0], expected, "output")
    assert "quantized_product" in {choice.definition for choice in choices}
    assert {choice.way for choice in choices} == {"definition"}


@torch.no_grad()
def test_autocast_gives_the_dtypes_of_the_plain_layer() -> None:
    plain = layer_of("mha", torch.float32)
    quantised, x = quantize(copy.deepcopy(plain), "int8"), tokens(1, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantised.self_attn.q_proj(x).dtype == plain.self_attn.q_proj(x).dtype == torch.bfloat16
        out, expected = quantised(x)[0], dense_twin(plain, quantised)(x)[0]
    # bfloat16 products here and there, whose sums may round to the neighbour.
    assert (out - expected).norm() <= 2**-7 * expected.norm()


# An independent peer


@pytest.fixture(scope="module")
def torchao() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(
            "torchao.quantization",
            reason="torchao is not installed, or does not import with this torch",
            exc_type=ImportError,
        )
        yield module


def random_linear(dtype: torch.dtype, inputs: int = 64) -> nn.Linear:
    linear = nn.Linear(inputs, 48, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(48, inputs, generator=torch.Generator().manual_seed(0)))
    return linear.to(dtype)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_numbers_of_torchao_have_one_code_more(dtype: torch.dtype, kind: str, torchao: Any) -> None:
    """It divides the largest by 127.5 or 7.5, half of all codes from -128 or -8 on, where the package's codes are
    symmetric and the largest is one of them. Zero points are 0. With scales made so and codes clamped so, ours are its
    own. Half a step is the bound for both, of steps that are 0.4 or 7 % apart."""
    linear = random_linear(dtype)
    weight, group = linear.weight.detach().clone(), {"int8": 64, "int4": 32}[kind]
    config = torchao.Int8WeightOnlyConfig()
    if kind == "int4":
        config = torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(group))
    torchao.quantize_(linear, config)
    theirs, (codes, scales) = linear.weight, to_codes(weight, kind, group, dtype)
    assert (theirs.zero_point == 0).all()
    most = int(codes.max())
    groups = weight.float().unflatten(-1, (-1, group))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        theirs.scale.float(), groups.abs().amax(-1) / (most + 0.5), rtol=2 * max(eps, 2**-23), atol=0
    )
    units = (groups / theirs.scale.float()[..., None]).flatten(-2)
    differ = (theirs.qdata.float() - units.round().clamp(-most - 1, most)).abs()
    # The largest lies in the middle of two codes, and it divides in another way, in bfloat16 with less bits.
    assert differ.max() <= 1
    from_the_middle = (units - units.floor() - 0.5).abs()
    assert (from_the_middle[differ > 0] <= 2 * most * eps).all()
    assert (differ > 0).float().mean() < 0.1
    for values, scale in ((theirs.dequantize().float(), theirs.scale), (from_codes(codes, scales).float(), scales)):
        half = scale.float().repeat_interleave(group, -1) / 2
        assert ((values - weight.float()).abs() <= half + 3 * eps * weight.float().abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bit_floats_of_torchao_are_the_same(dtype: torch.dtype, torchao: Any) -> None:
    """Per row in both. Its scale for bfloat16 is rounded to bfloat16; the package's is not."""
    linear = random_linear(dtype)
    weight = linear.weight.detach().clone()
    torchao.quantize_(linear, torchao.Float8WeightOnlyConfig())
    codes, scales = to_codes(weight, "fp8", 64)
    if dtype == torch.float32:
        assert torch.equal(linear.weight.qdata.float(), codes.float())
    torch.testing.assert_close(linear.weight.scale, scales, rtol=torch.finfo(dtype).eps, atol=0)
    rounded = scales.to(dtype).float()
    assert torch.equal(linear.weight.scale, rounded)
    assert torch.equal(linear.weight.qdata.float(), (weight.float() / rounded).to(torch.float8_e4m3fn).float())


def test_torchao_leaves_stacked_experts_in_silence(torchao: Any) -> None:
    """The trap: its default filter takes `nn.Linear`, and experts in a stack are parameters of three axes. Of the layer
    that is 9 of 10 weights. `quantize` takes them, and says so where others were there before."""
    layer = layer_of("mla", torch.float32, n_routed_experts=64)
    whole = sum(weight.numel() for weight in matrices(layer).values())
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    assert type(layer.self_attn.o_proj.weight).__name__ == "Int8Tensor"
    experts = layer.mlp.experts
    left = [experts.gate_up_proj, experts.down_proj]
    assert [type(weight) for weight in left] == [nn.Parameter] * 2
    assert {weight.dtype for weight in left} == {torch.float32}
    assert sum(weight.numel() for weight in left) > 0.9 * whole
    with pytest.raises(ValueError, match=r"is a Linear; wanted a plain torch.nn.Linear or the package's own experts"):
        quantize(layer, "int8")
    quantize(layer, "int8", parts=["experts"])
    assert isinstance(layer.mlp.experts, QuantizedExperts)
    assert layer(tokens(1, 3, torch.float32))[0].isfinite().all()
