"""The layer as a whole: what it is made of and returns, checkpointing, compiling, exporting, autocast."""

import copy
import inspect
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv2_ref import (
    ATTENTION_CLASSES,
    DeepseekV2Attention,
    DeepseekV2Config,
    DeepseekV2DecoderLayer,
    DeepseekV2FlashAttention2,
    DeepseekV2MLP,
    DeepseekV2MoE,
)
from dsv2_ref.mha import MultiHeadAttention, MultiHeadFlashAttention2
from dsv2_ref.rope import position_tables
from tests.examples import thorough
from tests.peers import SMALL, assert_close, randomised, tokens

MHA = replace(SMALL, use_mla=False, num_key_value_heads=2)
KINDS = {"mla": SMALL, "mha": MHA}
WAYS = {
    f"{kind}-{form}-{kernel}": replace(config, mla_form=form, _attn_implementation=kernel)
    for kind, config, forms in (("mla", SMALL, ("expanded", "absorbed")), ("mha", MHA, ("expanded",)))
    for form in forms
    for kernel in ("eager", "sdpa")
}
both_kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
every_way = pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)


def layer_of(
    config: DeepseekV2Config, layer_idx: int = 1, dtype: torch.dtype = torch.float64
) -> DeepseekV2DecoderLayer:
    return randomised(DeepseekV2DecoderLayer(config, layer_idx), dtype)


# What it is made of


def test_the_classes_of_attention() -> None:
    assert dict(ATTENTION_CLASSES) == {
        "mla_eager": DeepseekV2Attention,
        "mla_sdpa": DeepseekV2Attention,
        "mla_flash_attention_2": DeepseekV2FlashAttention2,
        "mha_eager": MultiHeadAttention,
        "mha_sdpa": MultiHeadAttention,
        "mha_flash_attention_2": MultiHeadFlashAttention2,
    }


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@both_kinds
def test_the_configuration_chooses_the_attention(config: DeepseekV2Config, kernel: str) -> None:
    attention = DeepseekV2DecoderLayer(replace(config, _attn_implementation=kernel), 0).self_attn
    assert type(attention) is ATTENTION_CLASSES[("mla_" if config.use_mla else "mha_") + kernel]
    assert attention.implementation == kernel


@pytest.mark.parametrize(
    ("fields", "with_experts"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7]),
        ({"first_k_dense_replace": 0}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"first_k_dense_replace": 3}, [3, 4, 5, 6, 7]),
        ({"moe_layer_freq": 3}, [3, 6]),
        ({"first_k_dense_replace": 0, "moe_layer_freq": 3}, [0, 3, 6]),
        ({"first_k_dense_replace": 4, "moe_layer_freq": 3}, [6]),
        ({"n_routed_experts": None}, []),
    ],
)
def test_the_index_chooses_mlp_or_experts(fields: dict[str, Any], with_experts: list[int]) -> None:
    config = replace(SMALL, num_hidden_layers=8, **fields)
    kinds = [type(DeepseekV2DecoderLayer(config, layer_idx).mlp) for layer_idx in range(8)]
    assert kinds == [DeepseekV2MoE if layer_idx in with_experts else DeepseekV2MLP for layer_idx in range(8)]
    assert [config.is_moe_layer(layer_idx) for layer_idx in range(8)] == [kind is DeepseekV2MoE for kind in kinds]


def test_sizes_of_the_feed_forward_networks() -> None:
    dense, sparse = (DeepseekV2DecoderLayer(SMALL, layer_idx).mlp for layer_idx in (0, 1))
    assert dense.gate_proj.weight.shape == (SMALL.intermediate_size, SMALL.hidden_size)
    assert sparse.experts.down_proj.shape == (12, SMALL.hidden_size, SMALL.moe_intermediate_size)
    assert sparse.shared_experts.up_proj.weight.shape == (3 * SMALL.moe_intermediate_size, SMALL.hidden_size)


def test_signatures_are_the_cards() -> None:
    """But for what a model makes once for all its layers, and for the card's ``**kwargs``, of which none was known: Python
    itself refuses them by name."""
    assert list(inspect.signature(DeepseekV2DecoderLayer).parameters) == ["config", "layer_idx"]
    forward = inspect.signature(DeepseekV2DecoderLayer.forward).parameters
    assert {name: parameter.default for name, parameter in forward.items()} == {
        "self": inspect.Parameter.empty,
        "hidden_states": inspect.Parameter.empty,
        "attention_mask": None,
        "position_ids": None,
        "past_key_value": None,
        "output_attentions": False,
        "use_cache": False,
        "position_embeddings": None,
    }


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, use_mla=False)], ids=["mla", "mha"])
@torch.no_grad()
def test_tables_of_positions_may_be_given(config: DeepseekV2Config, as_shipped: None) -> None:
    layer, x = randomised(DeepseekV2DecoderLayer(config, 1), torch.float64), torch.randn(2, 5, 48).double()
    places = torch.arange(7, 12).expand(2, -1)
    tables = position_tables(config, x, places)
    assert torch.equal(layer(x, position_embeddings=tables)[0], layer(x, position_ids=places)[0])
    for wrong in (tables[0], tables[:1], (tables[0], tables[1][:, :4]), (tables[0].bfloat16(), tables[1]), "tables"):
        with pytest.raises(ValueError, match=r"position_embeddings is .*; wanted cosines and sines of position_tables"):
            layer(x, position_embeddings=wrong)


def test_initial_weights() -> None:
    """A normal distribution of the configured deviation; norms of ones; biases of zeros; the gate as torch's Linear."""
    torch.manual_seed(0)
    layer = DeepseekV2DecoderLayer(replace(DeepseekV2Config.tiny(), attention_bias=True, initializer_range=0.3), 1)
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        elif "gate.weight" in name:
            assert parameter.abs().max() <= parameter.shape[-1] ** -0.5
        else:
            # The deviation of n numbers is known to 0.3 / √(2n): four times that for the least n, 64 · 40.
            assert abs(parameter.std() - 0.3) < 4 * 0.3 / (2 * 64 * 40) ** 0.5


# What it returns


@pytest.mark.parametrize("cache", [False, True, None])
@pytest.mark.parametrize("weights", [False, True, None])
@both_kinds
def test_outputs_are_the_cards_tuples(config: DeepseekV2Config, weights: bool | None, cache: bool | None) -> None:
    layer = layer_of(replace(config, _attn_implementation="eager"))
    x = tokens(2, 5, torch.float64)
    hidden_states, *rest = layer(x, output_attentions=weights, use_cache=cache)
    assert hidden_states.shape == x.shape
    assert hidden_states.dtype == x.dtype
    if weights:
        assert rest.pop(0).shape == (2, config.num_attention_heads, 5, 5)
    if cache:
        assert len(rest.pop(0)) == 5
    assert not rest


def test_the_residual_stream_passes_where_nothing_is_added() -> None:
    layer, x = layer_of(SMALL), tokens(2, 5, torch.float64)
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.experts.down_proj.zero_()
        layer.mlp.shared_experts.down_proj.weight.zero_()
    assert torch.equal(layer(x)[0], x)


def test_each_part_reads_its_own_norm_of_the_stream() -> None:
    layer, x = layer_of(SMALL), tokens(2, 5, torch.float64)
    h = x + layer.self_attn(layer.input_layernorm(x))[0]
    assert torch.equal(layer(x)[0], h + layer.mlp(layer.post_attention_layernorm(h)))


@every_way
def test_dropout_is_on_attention_weights_in_training(config: DeepseekV2Config) -> None:
    rate = 0.4
    layer = layer_of(replace(config, attention_dropout=rate))
    plain, x = layer_of(config), tokens(2, 5, torch.float64)
    assert torch.equal(layer(x)[0], plain(x)[0])
    torch.manual_seed(0)
    first = layer.train()(x)[0]
    second = layer(x)[0]
    torch.manual_seed(0)
    assert torch.equal(layer(x)[0], first)
    assert not torch.equal(first, second)
    if config._attn_implementation == "eager":
        weights, dropped = (m.self_attn(x, output_attentions=True)[1] for m in (plain, layer))
        kept = dropped != 0
        assert_close(dropped, (weights / (1 - rate)).where(kept, 0), "weights")
        assert 0 < kept.sum() < (weights > 0).sum()


# Memory for time


@pytest.mark.parametrize("use_reentrant", [False, True])
@both_kinds
def test_gradient_checkpointing_changes_no_gradient(config: DeepseekV2Config, use_reentrant: bool) -> None:
    """The second forward pass must not inject the balance loss again."""
    layer = layer_of(replace(config, aux_loss_alpha=0.5, attention_dropout=0.2)).train()
    x = tokens(2, 7, torch.float64)

    def gradients(checkpointed: bool) -> dict[str, Tensor | None]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        out = checkpoint(layer, leaf, use_reentrant=use_reentrant) if checkpointed else layer(leaf)
        out[0].square().sum().backward()
        return {"input": leaf.grad} | {name: p.grad for name, p in layer.named_parameters()}

    plain = gradients(checkpointed=False)
    for name, gradient in gradients(checkpointed=True).items():
        assert gradient is not None
        assert torch.equal(gradient, plain[name]), name

    loss_alone = torch.autograd.grad(layer.mlp.gate(x)[2], layer.mlp.gate.weight)[0]
    assert loss_alone.abs().max() > 1e-3  # far more than rounding: the balance loss does count in what was compared


# Compiling


def run_without_signatures(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a file of tests in a process of its own: the compiler cannot see through the checker of signatures, even where
    it is off."""
    file = Path(__file__).with_name(name)
    options = ("-q", "--noconftest", "-p", "no:cacheprovider", "--color=no", *options)
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)], cwd=file.parent.parent, capture_output=True, text=True
    )


AT_LENGTH = "few_graphs and mha or records and int or compiled_training and expanded or checkpointed and full"
"""What takes long, and comes in another kind too."""


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [f"not ({AT_LENGTH})", *thorough(AT_LENGTH)])
def test_compiling_and_exporting(chosen: str) -> None:
    done = run_without_signatures("compiled_layer.py", "-k", chosen)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_one_token_through_compiled_parts() -> None:
    done = run_without_signatures("compiled_step.py")
    assert done.returncode == 0, done.stdout + done.stderr


# Dtypes


@every_way
@pytest.mark.parametrize("layer_idx", [0, 1], ids=["dense", "experts"])
def test_autocast(config: DeepseekV2Config, layer_idx: int) -> None:
    layer = layer_of(config, layer_idx, torch.float32).train()
    x = tokens(2, 7, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, cache = layer(x[:, :5], use_cache=True)
        last, _ = layer(x[:, 5:], past_key_value=cache, use_cache=True)
    actual = torch.cat((out, last), dim=1)
    assert actual.dtype == torch.float32
    actual.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    if layer_idx == 0:  # where a rounded score sends no token to another expert
        expected = layer(x)[0]
        # A dozen products, rounded to the 8 bits of bfloat16 (2**-9 of each); the stream itself stays float32.
        assert 1e-4 < (actual - expected).abs().max() < 12 * 2**-9 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_way
def test_half_precision(config: DeepseekV2Config, dtype: torch.dtype) -> None:
    layer, wide = layer_of(config, 0, dtype), layer_of(config, 0, dtype).double()
    x = tokens(2, 7, dtype)
    out = layer(x)[0]
    assert out.dtype == dtype
    expected = wide(x.double())[0]
    # A dozen roundings, one after the other, of numbers no larger than the largest in the stream.
    assert (out.double() - expected).abs().max() < 12 * torch.finfo(dtype).eps * expected.abs().max()


def test_the_default_dtype_and_device_are_those_of_the_weights() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = DeepseekV2DecoderLayer(SMALL, 1)
        with torch.device("meta"):
            elsewhere = DeepseekV2DecoderLayer(SMALL, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in elsewhere.parameters()} == {"meta"}
    assert layer(tokens(1, 3, torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@both_kinds
def test_a_copy_computes_the_same(config: DeepseekV2Config, copied: Any) -> None:
    layer, x = layer_of(config), tokens(2, 5, torch.float64)
    twin = copied(layer)
    assert torch.equal(twin(x)[0], layer(x)[0])
    assert all(a is not b for a, b in zip(twin.parameters(), layer.parameters(), strict=True))
