"""In bfloat16 the package is as close to the float64 oracle as transformers is, from the same rounded weights."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
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
from tests import oracle
from tests import test_oracle as oracle_tests
from tests.peers import COMMON, Calls, native_config, randomised, run_ours, run_theirs, tokens, with_weights_of

# Sums long enough for their rounding to be that of a real layer.
CONFIG = replace(
    COMMON["everything"], hidden_size=256, intermediate_size=384, moe_intermediate_size=96, num_attention_heads=8,
    q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16,
    n_group=4, topk_group=2, num_experts_per_tok=4, routed_scaling_factor=2.5,
)  # fmt: skip
CALLS = Calls((46, 1, 1), padding=(0,))
SEEDS = range(4)

SLACK = 1.03
"""Where two implementations round in the same places, the mean errors of the tokens below agree to 1 %."""


def ours_and_theirs(kind: str, config: DeepseekV2Config, seed: int) -> tuple[nn.Module, nn.Module]:
    builders: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
        "mlp": (lambda: DeepseekV2MLP(config), lambda: native.DeepseekV2MLP(native_config(config))),
        "moe": (lambda: DeepseekV2MoE(config), lambda: native.DeepseekV2Moe(native_config(config))),
        "attention": (
            lambda: DeepseekV2Attention(config, 0),
            lambda: native.DeepseekV2Attention(native_config(config), 0),
        ),
        "dense layer": (
            lambda: DeepseekV2DecoderLayer(config, 0),
            lambda: native.DeepseekV2DecoderLayer(native_config(config), 0),
        ),
        "moe layer": (
            lambda: DeepseekV2DecoderLayer(config, 1),
            lambda: native.DeepseekV2DecoderLayer(native_config(config), 1),
        ),
    }
    ours = randomised(builders[kind][0](), torch.bfloat16, seed)
    return ours, with_weights_of(ours, builders[kind][1]())


def exact(kind: str, x: Tensor, weights: oracle.Weights) -> oracle.Array:
    sequence = x[0].double().numpy()
    if kind == "mlp":
        return oracle.mlp(sequence, weights)
    if kind == "moe":
        return oracle.moe(sequence, weights, CONFIG)
    if kind == "attention":
        return oracle.attention(sequence, weights, CONFIG)
    return oracle.layer(sequence, weights, CONFIG, layer_idx=int(kind == "moe layer"))


@functools.cache
def errors(kind: str, kernel: str, form: str | None) -> Tensor:
    """Relative error of every token: of ours in one form, or of transformers if ``form`` is None."""
    config = replace(CONFIG, _attn_implementation=kernel, mla_form=form or "auto")
    of_all = []
    for seed in SEEDS:
        ours, theirs = ours_and_theirs(kind, config, seed)
        x = tokens(1, sum(CALLS.lengths), torch.bfloat16, seed=100 + seed, width=CONFIG.hidden_size)
        weights = {name: weight.double().numpy() for name, weight in ours.state_dict().items()}
        truth = torch.from_numpy(exact(kind, x, weights))
        with torch.no_grad():
            if kind in ("mlp", "moe"):
                output = (ours if form else theirs)(x)
            else:
                output = run_ours(ours, x, CALLS).output if form else run_theirs(theirs, x, CALLS).output
        of_all.append((output[0].double() - truth).norm(dim=-1) / truth.norm(dim=-1))
    return torch.cat(of_all)


def mean_error(kind: str, kernel: str, form: str | None) -> float:
    """Root mean square over tokens. The median in a layer with experts, where rounding sends a few tokens elsewhere."""
    of_tokens = errors(kind, kernel, form)
    return float(of_tokens.median() if kind == "moe layer" else of_tokens.square().mean().sqrt())


@pytest.mark.parametrize("kind", ["mlp", "moe"])
def test_feed_forward_errs_no_more_than_transformers(kind: str) -> None:
    assert mean_error(kind, "eager", "auto") <= SLACK * mean_error(kind, "eager", None)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("kind", ["attention", "dense layer", "moe layer"])
def test_attention_errs_no_more_than_the_published_products(kind: str, form: str, kernel: str) -> None:
    """The published code is what transformers calls eager: scores in bfloat16, their softmax in float32."""
    assert mean_error(kind, kernel, form) <= SLACK * mean_error(kind, "eager", None)


BOUND = 0.02
"""Ten roundings of 2^-9, of which a token meets about that many one after the other; a wrong mask errs by 0.09 and more."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.dtype == torch.bfloat16
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("mask", oracle_tests.MASKS)
@pytest.mark.parametrize(("name", "route"), oracle_tests.by_every_route("bias", "mha_grouped"))
def test_mask(name: str, route: dict[str, str], mask: str) -> None:
    """Half precision takes ways of its own through the kernels."""
    given, bias = oracle_tests.MASKS[mask]
    if given is not None and given.is_floating_point():
        given = given.to(torch.bfloat16)
    pieces = [(slice(0, 7), given)]
    output, expected = oracle_tests.attention_and_oracle(
        replace(oracle_tests.ALL[name], **route), pieces, bias, torch.bfloat16
    )
    assert relative_error(output, expected) < BOUND


@pytest.mark.parametrize(("name", "route"), oracle_tests.by_every_route("plain", "mha_grouped"))
def test_long_and_short_pieces_with_padding(name: str, route: dict[str, str]) -> None:
    """Long enough for more than one block of queries, then pieces behind a cache."""
    calls = Calls((300, 5, 1), padding=(0, 7))
    config = replace(oracle_tests.ALL[name], **route)
    assert relative_error(*oracle_tests.layer_and_oracle(config, 0, calls, torch.bfloat16)) < BOUND


def check_norm_rounds_as_published() -> None:
    """Bit by bit: rounded before the weight and after it."""
    ours = randomised(DeepseekV2RMSNorm(256), torch.bfloat16)
    theirs = with_weights_of(ours, native.DeepseekV2RMSNorm(256))
    x = tokens(4, 64, torch.bfloat16, width=256)
    different = int((ours(x) != theirs(x)).sum())
    assert different == 0, f"{different} of {x.numel()} numbers differ"


def test_norm_rounds_as_published() -> None:
    check_norm_rounds_as_published()


def check_gate_is_not_rounded() -> None:
    """Of 2000 tokens in bfloat16 none goes elsewhere than in float64, where a gate in bfloat16 misplaces dozens."""
    config = replace(CONFIG, topk_method="greedy")
    gate = randomised(MoEGate(config), torch.bfloat16)
    x = tokens(1, 2000, torch.bfloat16, width=256)
    topk_idx, topk_weight, _ = gate(x)
    weights = {"gate.weight": gate.weight.detach().double().numpy()}
    scores = oracle.affinities(x[0].double().numpy(), weights, config)
    assert topk_weight.dtype == torch.float32
    expected = torch.tensor([oracle.chosen_experts(s, weights, config) for s in scores])
    elsewhere = int((topk_idx != expected).any(dim=1).sum())
    assert elsewhere == 0, f"{elsewhere} of {len(expected)} tokens go elsewhere"


def test_gate_is_not_rounded() -> None:
    check_gate_is_not_rounded()
