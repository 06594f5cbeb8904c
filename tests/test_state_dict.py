"""Weights come and go under the names of the published checkpoints, whatever the storage."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from transformers import AutoModel

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM, pack_weights
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


# In shards


def shards_of(weights: dict[str, Tensor], number: int = 3) -> list[dict[str, Tensor]]:
    """Every third name, so that the weights of each expert lie in different shards."""
    names = sorted(weights)
    return [{name: weights[name] for name in names[start::number]} for start in range(number)]


def one_after_the_other(layer: DeepseekV2DecoderLayer, weights: dict[str, Tensor], assign: bool) -> None:
    given: set[str] = set()
    for shard in shards_of(weights):
        keys = layer.load_state_dict(shard, strict=False, assign=assign)
        assert set(keys.missing_keys) == weights.keys() - shard.keys()
        assert not keys.unexpected_keys
        given |= shard.keys()
        held = layer.state_dict()
        for name in given:  # what an earlier shard brought is not lost
            assert torch.equal(held[name], weights[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("start", ["memory", "meta"])
def test_shards_are_assigned_one_after_the_other(start: str, dtype: torch.dtype) -> None:
    with torch.device("meta" if start == "meta" else "cpu"):
        layer = moe_layer()
    layer.mlp.experts.down_proj.requires_grad_(False)
    weights = published(dtype)
    one_after_the_other(layer, weights, assign=True)
    assert_holds(layer, weights)
    assert not any(parameter.is_meta for parameter in layer.parameters())
    assert not layer.mlp.experts.down_proj.requires_grad
    assert layer.mlp.experts.gate_up_proj.requires_grad
    assert layer(tokens(1, 3, dtype))[0].isfinite().all()


def test_shards_are_copied_one_after_the_other() -> None:
    layer, weights = moe_layer(), published()
    one_after_the_other(layer, weights, assign=False)
    assert_holds(layer, weights)


def test_a_shard_of_another_dtype_keeps_what_earlier_ones_brought() -> None:
    """The stacks take the dtype of the last shard that was assigned, as a whole."""
    layer, weights = moe_layer(), published()
    first, *others = shards_of(weights)
    layer.load_state_dict(first, strict=False)
    for shard in others:
        narrow = {name: weight.to(torch.bfloat16) for name, weight in shard.items()}
        layer.load_state_dict(narrow, strict=False, assign=True)
    held = layer.state_dict()
    for name, weight in weights.items():
        if ".experts." in name and "shared" not in name:
            assert torch.equal(held[name], weight.to(torch.bfloat16)), name


def test_experts_that_never_came_are_not_mistaken_for_weights() -> None:
    """A shard is missing: what it would have brought is NaN, so that nobody computes with whatever lay in memory."""
    with torch.device("meta"):
        layer = moe_layer()
    for shard in shards_of(published())[:2]:
        layer.load_state_dict(shard, strict=False, assign=True)
    missing = shards_of(published())[2]
    held = layer.state_dict()
    for name in missing:
        assert held[name].is_meta or held[name].isnan().all(), name


# Distributed checkpoints


def test_distributed_state_dicts() -> None:
    layer, other = moe_layer(), moe_layer()
    held = get_model_state_dict(layer)
    assert held.keys() == SHAPES.keys()
    assert all(torch.equal(weight, held[name]) for name, weight in layer.state_dict().items())
    keys = set_model_state_dict(other, held)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert_holds(other, layer.state_dict())
    assert get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)).keys() == (
        SHAPES.keys()
    )


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")  # that there is one process
@pytest.mark.parametrize("tied", [False, True], ids=["two matrices", "tied"])
def test_distributed_checkpoints_through_files(tmp_path: Path, tied: bool) -> None:
    config = replace(SMALL, tie_word_embeddings=tied)
    model, other = (randomised(DeepseekV2ForCausalLM(config), torch.float32, seed) for seed in (0, 1))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=tmp_path)
    into = {"model": get_model_state_dict(other)}
    dcp.load(into, checkpoint_id=tmp_path)
    set_model_state_dict(other, into["model"])
    ids = torch.arange(6)[None]
    assert torch.equal(other(ids)[0], model(ids)[0])


# Stacks that are computed from other parameters


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize(
    "compute",
    [
        lambda experts, name: parametrize.register_parametrization(experts, name, Twice()),
        lambda experts, name: prune.random_unstructured(experts, name, amount=0.5),
    ],
    ids=["parametrized", "pruned"],
)
@torch.no_grad()
def test_computed_stacks_are_saved_as_what_they_are_computed_from(compute: Callable[..., Any], name: str) -> None:
    """As those of a linear map are: under published names they would be loaded and then computed anew."""
    layer, other = randomised(moe_layer()), randomised(moe_layer(), seed=1)
    for each in (layer, other):
        compute(each.mlp.experts, name)
    x = tokens(2, 5, torch.float64)
    assert not torch.equal(layer(x)[0], other(x)[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], other(x)[0])
    with pytest.raises(RuntimeError, match=f"Missing key.*mlp.experts.*{name}"):
        other.load_state_dict(moe_layer().state_dict())


# torch.func.functional_call


def all_weights(layer: DeepseekV2DecoderLayer, names: str) -> dict[str, Tensor]:
    """By the names of parameters, or by the published ones, in which every expert has its own."""
    weights = dict(layer.named_parameters()) if names == "parameters" else layer.state_dict()
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.parametrize("names", ["parameters", "published"])
def test_functional_call(names: str) -> None:
    layer, other = randomised(moe_layer()), randomised(moe_layer(), seed=1)
    before, held = dict(layer.named_parameters()), layer.state_dict()
    values = {name: weight.clone() for name, weight in held.items()}
    weights = {name: weight.requires_grad_() for name, weight in all_weights(other, names).items()}
    x = tokens(2, 5, torch.float64)
    out = functional_call(layer, weights, (x,))[0]
    assert torch.equal(out, other(x)[0])

    out.square().sum().backward()
    other(x)[0].square().sum().backward()
    for name, weight in weights.items():
        if names == "parameters":
            expected = other.get_parameter(name).grad
        elif ".experts." in name and "shared" not in name:
            _, _, expert, projection, _ = name.split(".")
            stack = "down_proj" if projection == "down_proj" else "gate_up_proj"
            expected = other.mlp.experts.get_parameter(stack).grad[int(expert)]
            if stack == "gate_up_proj":
                expected = expected.chunk(2)[projection == "up_proj"]
        else:
            expected = other.get_parameter(name).grad
        assert weight.grad is not None, name
        torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)

    assert dict(layer.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())
    assert all(torch.equal(weight, values[name]) for name, weight in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert torch.equal(layer(x)[0], randomised(moe_layer())(x)[0])


def test_functional_call_with_some_experts_and_again_after_an_error() -> None:
    layer, x = randomised(moe_layer()), tokens(2, 5, torch.float64)
    expected = layer(x)[0]
    name = "mlp.experts.3.down_proj.weight"
    changed = {name: torch.zeros_like(layer.state_dict()[name])}
    with torch.no_grad():
        other = randomised(moe_layer())
        other.mlp.experts.down_proj[3].zero_()
    for _ in range(2):
        assert torch.equal(functional_call(layer, changed, (x,))[0], other(x)[0])
        assert torch.equal(layer(x)[0], expected)
        with pytest.raises(ValueError, match="hidden_states is"):
            functional_call(layer, changed, (x[0],))
        assert torch.equal(layer(x)[0], expected)
    assert not torch.equal(other(x)[0], expected)


# Copies


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("config", [SMALL, PLAIN_ATTENTION], ids=["mla", "mha"])
@torch.no_grad()
def test_a_copy_of_a_model(config: DeepseekV2Config, copied: Callable[..., Any], packed: bool) -> None:
    model = randomised(DeepseekV2ForCausalLM(config), torch.float32)
    names = model.state_dict().keys()
    if packed:
        pack_weights(model)
    twin, ids = copied(model), torch.arange(6)[None]
    logits, caches = model(ids, use_cache=True)
    twins_logits, twins_caches = twin(ids, use_cache=True)
    assert torch.equal(twins_logits, logits)
    step = torch.tensor([[7]])
    assert torch.equal(twin(step, past_key_values=twins_caches)[0], model(step, past_key_values=caches)[0])
    assert twin.state_dict().keys() == names
    if not packed:
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(ids)[0], logits)
        assert functional_call(twin, model.state_dict(), (ids,))[0].equal(logits)
