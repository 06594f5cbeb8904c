"""Weights come and go under the names of the published checkpoints, whatever the storage."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer
from tests.peers import SMALL, native_config, randomised, tokens
from tests.test_oracle import PLAIN_ATTENTION

NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
DENSE = {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}
EXPERTS = {
    f"mlp.experts.{expert}.{name}.weight" for expert in range(12) for name in ("gate_proj", "up_proj", "down_proj")
}
SHARED = {f"mlp.shared_experts.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
MOE = EXPERTS | SHARED | {"mlp.gate.weight"}
LATENT = {
    "self_attn.kv_a_proj_with_mqa.weight",
    "self_attn.kv_a_layernorm.weight",
    "self_attn.kv_b_proj.weight",
    "self_attn.o_proj.weight",
}
QUERY = {"self_attn.q_a_proj.weight", "self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight"}
MULTI_HEAD = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
LATENT_BIASES = {"self_attn.q_a_proj.bias", "self_attn.kv_a_proj_with_mqa.bias", "self_attn.o_proj.bias"}
MULTI_HEAD_BIASES = {f"self_attn.{name}_proj.bias" for name in "qkvo"}

D, E, H, WIDE = 48, 12, 4, 20  # hidden, experts, heads, expert_hidden of SMALL
SHAPES = {
    "input_layernorm.weight": (D,),
    "post_attention_layernorm.weight": (D,),
    "self_attn.q_a_proj.weight": (28, D),
    "self_attn.q_a_layernorm.weight": (28,),
    "self_attn.q_b_proj.weight": (H * (12 + 8), 28),
    "self_attn.kv_a_proj_with_mqa.weight": (16 + 8, D),
    "self_attn.kv_a_layernorm.weight": (16,),
    "self_attn.kv_b_proj.weight": (H * (12 + 10), 16),
    "self_attn.o_proj.weight": (D, H * 10),
    "mlp.gate.weight": (E, D),
    "mlp.shared_experts.gate_proj.weight": (3 * WIDE, D),
    "mlp.shared_experts.up_proj.weight": (3 * WIDE, D),
    "mlp.shared_experts.down_proj.weight": (D, 3 * WIDE),
    **{f"mlp.experts.{expert}.gate_proj.weight": (WIDE, D) for expert in range(E)},
    **{f"mlp.experts.{expert}.up_proj.weight": (WIDE, D) for expert in range(E)},
    **{f"mlp.experts.{expert}.down_proj.weight": (D, WIDE) for expert in range(E)},
}


def moe_layer(config: DeepseekV2Config = SMALL) -> DeepseekV2DecoderLayer:
    return DeepseekV2DecoderLayer(config, layer_idx=1)


def published(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A checkpoint as it would be read from a file: every tensor in a storage of its own."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def assert_holds(layer: DeepseekV2DecoderLayer, weights: dict[str, Tensor]) -> None:
    held = layer.state_dict()
    assert held.keys() == weights.keys()
    for name, weight in weights.items():
        assert held[name].dtype == weight.dtype, name
        assert torch.equal(held[name], weight), name


@pytest.mark.parametrize(
    ("config", "layer_idx", "names"),
    [
        (SMALL, 0, NORMS | LATENT | QUERY | DENSE),
        (SMALL, 1, NORMS | LATENT | QUERY | MOE),
        (replace(SMALL, q_lora_rank=None), 0, NORMS | LATENT | {"self_attn.q_proj.weight"} | DENSE),
        (replace(SMALL, attention_bias=True), 0, NORMS | LATENT | QUERY | LATENT_BIASES | DENSE),
        (replace(SMALL, n_shared_experts=None), 1, NORMS | LATENT | QUERY | MOE - SHARED),
        (PLAIN_ATTENTION, 1, NORMS | MULTI_HEAD | MOE),
        (replace(PLAIN_ATTENTION, attention_bias=True), 0, NORMS | MULTI_HEAD | MULTI_HEAD_BIASES | DENSE),
    ],
    ids=["dense", "moe", "no_q_lora", "bias", "no_shared_experts", "mha", "mha_bias"],
)
def test_names_are_the_published_ones(config: DeepseekV2Config, layer_idx: int, names: set[str]) -> None:
    assert DeepseekV2DecoderLayer(config, layer_idx).state_dict().keys() == names


def test_shapes_are_the_published_ones() -> None:
    assert {name: tuple(weight.shape) for name, weight in moe_layer().state_dict().items()} == SHAPES


def test_transformers_reads_the_weights_as_a_published_checkpoint(tmp_path: Path) -> None:
    """Two layers saved as model files: transformers turns the published names into its own and computes the same."""
    layers = torch.nn.ModuleList(DeepseekV2DecoderLayer(SMALL, layer_idx) for layer_idx in range(2))
    weights = randomised(torch.nn.ModuleDict({"layers": layers}), torch.float32).state_dict()
    weights |= {"norm.weight": torch.ones(D), "embed_tokens.weight": torch.zeros(SMALL.vocab_size, D)}
    save_file({f"model.{name}": w for name, w in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    config = native_config(SMALL).to_dict() | {"architectures": ["DeepseekV2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))

    theirs, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="sdpa")
    assert not any(loading.values()), loading
    x = tokens(2, 7, torch.float32)
    hidden = x
    for layer in layers:
        (hidden,) = layer(hidden)
    theirs.norm = torch.nn.Identity()
    with torch.no_grad():
        # A bound for single precision through two layers; a weight in a wrong place is off by about 1.
        torch.testing.assert_close(hidden, theirs(inputs_embeds=x).last_hidden_state, rtol=0, atol=1e-4)


def test_strict_load_of_a_published_layer() -> None:
    layer, weights = moe_layer(), published()
    storage = layer.mlp.experts.gate_up_proj
    assert str(layer.load_state_dict(weights, strict=True)) == "<All keys matched successfully>"
    assert_holds(layer, weights)
    assert layer.mlp.experts.gate_up_proj is storage


def test_loading_converts_to_the_dtype_of_the_layer() -> None:
    layer, weights = moe_layer().to(torch.bfloat16), published()
    layer.load_state_dict(weights)
    assert_holds(layer, {name: weight.to(torch.bfloat16) for name, weight in weights.items()})


def test_assigning_takes_the_dtype_of_the_checkpoint() -> None:
    layer, weights = moe_layer(), published(torch.float64)
    for parameter in layer.mlp.experts.parameters():
        parameter.requires_grad_(False)
    layer.load_state_dict(weights, assign=True)
    assert_holds(layer, weights)
    assert [parameter.requires_grad for parameter in layer.mlp.experts.parameters()] == [False, False]
    assert layer.mlp.gate.weight.requires_grad


def test_a_layer_without_memory_takes_a_checkpoint() -> None:
    with torch.device("meta"):
        layer = moe_layer()
    assert all(weight.is_meta for weight in layer.state_dict().values())
    weights = published()
    layer.load_state_dict(weights, assign=True)
    assert_holds(layer, weights)
    loaded = moe_layer()
    loaded.load_state_dict(weights)
    x = tokens(1, 5, torch.float32)
    assert torch.equal(layer.eval()(x)[0], loaded.eval()(x)[0])


MISSING = ["mlp.experts.3.gate_proj.weight", "mlp.gate.weight", "self_attn.kv_b_proj.weight", "input_layernorm.weight"]
UNEXPECTED = [
    "mlp.experts.12.up_proj.weight",
    "mlp.experts.gate_up_proj",
    "mlp.up_proj.weight",
    "self_attn.q_proj.weight",
]
ASSIGN = pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])


@ASSIGN
@pytest.mark.parametrize("name", MISSING)
def test_a_missing_weight_is_reported(name: str, assign: bool) -> None:
    weights = published()
    del weights[name]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        moe_layer().load_state_dict(weights, assign=assign)
    layer = moe_layer()
    keys = layer.load_state_dict(weights, strict=False, assign=assign)
    assert (keys.missing_keys, keys.unexpected_keys) == ([name], [])
    held = layer.state_dict()
    assert all(torch.equal(held[other], weight) for other, weight in weights.items())


@ASSIGN
@pytest.mark.parametrize("name", UNEXPECTED)
def test_an_unexpected_weight_is_reported(name: str, assign: bool) -> None:
    weights = published() | {name: torch.zeros(1)}
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{name}"'):
        moe_layer().load_state_dict(weights, assign=assign)
    keys = moe_layer().load_state_dict(weights, strict=False, assign=assign)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [name])


@ASSIGN
@pytest.mark.parametrize("name", ["mlp.experts.3.down_proj.weight", "mlp.gate.weight", "self_attn.o_proj.weight"])
def test_a_weight_of_another_shape_is_reported(name: str, assign: bool) -> None:
    weights = published()
    weights[name] = weights[name].T.contiguous()
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        moe_layer().load_state_dict(weights, assign=assign)


def through_torch(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    torch.save(weights, path)
    return torch.load(path, weights_only=True)


def through_safetensors(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    save_file(weights, path)
    return load_file(path)


@pytest.mark.parametrize("through", [through_torch, through_safetensors])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_through_a_file(
    through: Callable[[dict[str, Tensor], Path], dict[str, Tensor]], dtype: torch.dtype, tmp_path: Path
) -> None:
    layer = randomised(moe_layer(), dtype)
    other = randomised(moe_layer(), dtype, seed=1)
    read = through(layer.state_dict(), tmp_path / "layer")
    other.load_state_dict(read)
    assert_holds(other, layer.state_dict())
    numbers = sum(parameter.numel() for parameter in layer.parameters())
    # Names, shapes and alignment take some 300 bytes a tensor; the stacked experts must not be written once for each.
    assert (tmp_path / "layer").stat().st_size < numbers * dtype.itemsize + 1000 * len(SHAPES)


def test_published_names_are_views_of_the_stacked_experts() -> None:
    """They take no memory of their own and change with the parameters."""
    layer = moe_layer()
    held = layer.state_dict()
    with torch.no_grad():
        layer.mlp.experts.gate_up_proj[3, :WIDE].fill_(7.0)
    assert (held["mlp.experts.3.gate_proj.weight"] == 7.0).all()
    assert not (held["mlp.experts.3.up_proj.weight"] == 7.0).any()
