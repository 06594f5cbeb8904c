"""The package against transformers' own `deepseek_v2` and `deepseek_v3` with the same weights: outputs, caches and all gradients.

In float64 the casts to float32 that transformers makes whatever the input are lifted (`peers.Float64Inside`).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as native

from dsv2_ref import (
    DeepseekV2Attention,
    DeepseekV2Config,
    DeepseekV2DecoderLayer,
    DeepseekV2MLP,
    DeepseekV2MoE,
    DeepseekV2RMSNorm,
    MoEGate,
)
from tests.peers import (
    CALLS,
    COMMON,
    SMALL,
    Calls,
    assert_close,
    assert_same_gradients,
    inside,
    native_config,
    native_of,
    native_weights,
    randomised,
    run_ours,
    run_theirs,
    tokens,
    with_weights_of,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
FORMS = pytest.mark.parametrize("form", ["expanded", "absorbed"])
KERNELS = pytest.mark.parametrize("kernel", ["eager", "sdpa"])
V3_CONFIGS = [name for name in COMMON if name.startswith("v3")]
CONFIGS = pytest.mark.parametrize("name", COMMON)
WAYS = pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)


def check_function(ours: nn.Module, theirs: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> None:
    """Two modules that map tokens one by one: outputs and gradients."""
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    output = call(ours, inputs[0])
    with inside(x.dtype):
        expected = call(theirs, inputs[1])
    assert_close(output, expected, "output")
    cotangent = tokens(*output.shape[:2], x.dtype, seed=2, width=output.shape[2])
    output.backward(cotangent)
    expected.backward(cotangent)
    assert_close(inputs[0].grad, inputs[1].grad, "gradient of the input")
    assert_same_gradients(ours, theirs)


def check_sequence(ours: nn.Module, theirs: nn.Module, calls: Calls, x: Tensor, with_weights: bool = False) -> None:
    """Two modules that attend: outputs of real tokens, caches and gradients, all through the cache."""
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    ran, expected = run_ours(ours, inputs[0], calls, with_weights), run_theirs(theirs, inputs[1], calls)
    real = calls.real
    assert_close(ran.output[real], expected.output[real], "output")
    assert_close(ran.latent[real], expected.latent[real], "cached latent")
    assert_close(ran.rotated_key[real], expected.rotated_key[real], "cached rotated key")
    if with_weights:
        assert_close(ran.weights, expected.weights, "attention weights of the last call")
    cotangent = tokens(*x.shape[:2], x.dtype, seed=2) * real[..., None]
    ran.output.backward(cotangent)
    expected.output.backward(cotangent)
    assert_close(inputs[0].grad, inputs[1].grad, "gradient of the input")
    assert_same_gradients(ours, theirs)
    with torch.no_grad():  # where the cache grows in place
        assert_close(run_ours(ours, x, calls).output[real], expected.output[real], "output without gradients")


def check_norm(dtype: torch.dtype) -> None:
    ours = randomised(DeepseekV2RMSNorm(48, eps=1e-3), dtype)
    theirs = with_weights_of(ours, native.DeepseekV2RMSNorm(48, eps=1e-3))
    check_function(ours, theirs, lambda module, x: module(x), tokens(2, 5, dtype) / 10)


def check_mlp(dtype: torch.dtype) -> None:
    ours = randomised(DeepseekV2MLP(SMALL), dtype)
    theirs = with_weights_of(ours, native.DeepseekV2MLP(native_config(SMALL)))
    check_function(ours, theirs, lambda module, x: module(x), tokens(2, 5, dtype))


def weight_of_every_expert(gate: nn.Module, x: Tensor) -> Tensor:
    """What each expert counts for each token, zero where it was not chosen: the order of choices does not matter."""
    if isinstance(gate, MoEGate):
        topk_idx, topk_weight, _ = gate(x)
    else:
        _, topk_weight, topk_idx = gate(x)
    weight = topk_weight.new_zeros(len(topk_idx), SMALL.n_routed_experts)
    return weight.scatter(1, topk_idx, topk_weight).view(*x.shape[:2], -1)


def check_gate(config: DeepseekV2Config, dtype: torch.dtype) -> None:
    ours = randomised(MoEGate(config), dtype)
    theirs = with_weights_of(ours, native_of(config).gate(native_config(config)))
    check_function(ours, theirs, weight_of_every_expert, tokens(3, 20, dtype))


def check_moe(config: DeepseekV2Config, dtype: torch.dtype) -> None:
    ours = randomised(DeepseekV2MoE(config), dtype)
    theirs = with_weights_of(ours, native_of(config).moe(native_config(config)))
    check_function(ours, theirs, lambda module, x: module(x), tokens(3, 20, dtype))


def check_attention(config: DeepseekV2Config, calls: Calls, dtype: torch.dtype) -> None:
    ours = randomised(DeepseekV2Attention(config, layer_idx=0), dtype)
    theirs = with_weights_of(ours, native_of(config).attention(native_config(config), layer_idx=0))
    x = tokens(len(calls.padding), sum(calls.lengths), dtype)
    check_sequence(ours, theirs, calls, x, with_weights=config._attn_implementation == "eager")


def check_layer(config: DeepseekV2Config, layer_idx: int, calls: Calls, dtype: torch.dtype) -> None:
    ours = randomised(DeepseekV2DecoderLayer(config, layer_idx), dtype)
    theirs = with_weights_of(ours, native_of(config).layer(native_config(config), layer_idx))
    check_sequence(ours, theirs, calls, tokens(len(calls.padding), sum(calls.lengths), dtype))


@DTYPES
def test_norm(dtype: torch.dtype) -> None:
    check_norm(dtype)


@DTYPES
def test_mlp(dtype: torch.dtype) -> None:
    check_mlp(dtype)


@DTYPES
@pytest.mark.parametrize("name", ["plain", "group_limited", "everything", *V3_CONFIGS])
def test_gate(name: str, dtype: torch.dtype) -> None:
    check_gate(COMMON[name], dtype)


@DTYPES
@pytest.mark.parametrize("name", ["plain", "group_limited", "everything", *V3_CONFIGS])
def test_moe(name: str, dtype: torch.dtype) -> None:
    check_moe(COMMON[name], dtype)


@WAYS
@CONFIGS
@FORMS
@KERNELS
@DTYPES
def test_attention(name: str, calls: Calls, form: str, kernel: str, dtype: torch.dtype) -> None:
    check_attention(replace(COMMON[name], mla_form=form, _attn_implementation=kernel), calls, dtype)


@WAYS
@CONFIGS
@pytest.mark.parametrize("layer_idx", [0, 1], ids=["dense", "moe"])
@DTYPES
def test_layer(name: str, calls: Calls, layer_idx: int, dtype: torch.dtype) -> None:
    check_layer(COMMON[name], layer_idx, calls, dtype)


@DTYPES
@pytest.mark.parametrize("name", ["plain", "everything", "v3", "v3_yarn"])
@KERNELS
def test_two_layers_in_their_own_model(name: str, kernel: str, dtype: torch.dtype) -> None:
    """Here transformers itself makes masks and positions and carries the cache."""
    config = replace(COMMON[name], _attn_implementation=kernel)
    layers = nn.ModuleList(DeepseekV2DecoderLayer(config, layer_idx) for layer_idx in range(2))
    ours = randomised(nn.ModuleDict({"layers": layers, "norm": DeepseekV2RMSNorm(48, config.rms_norm_eps)}), dtype)
    with inside(dtype):
        theirs = native_of(config).model(native_config(config)).to(dtype).eval()
    weights = native_weights(ours.state_dict()) | {"embed_tokens.weight": theirs.embed_tokens.weight}
    theirs.load_state_dict(weights, strict=True)

    calls = Calls((6, 3, 1), padding=(0, 2))
    x, cache, presents = tokens(2, 10, dtype), DynamicCache(config=theirs.config), [None, None]
    for piece in calls.pieces:
        padding = calls.real[:, : piece.stop]
        hidden: Any = x[:, piece]
        for index, layer in enumerate(ours["layers"]):
            hidden, presents[index] = layer(
                hidden, attention_mask=padding, past_key_value=presents[index], use_cache=True
            )
        with inside(dtype):
            expected = theirs(inputs_embeds=x[:, piece], attention_mask=padding.long(), past_key_values=cache)
        real = calls.real[:, piece]
        assert_close(ours["norm"](hidden)[real], expected.last_hidden_state[real], f"tokens {piece}")
