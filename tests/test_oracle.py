"""The package in float64 against `oracle`, the papers' equations in NumPy: above all where transformers departs from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsv2_ref import ATTENTION_CLASSES, DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2MoE, MoEGate
from tests import oracle
from tests.peers import (
    CALLS,
    COMMON,
    SMALL,
    V3_GATE,
    YARN,
    Calls,
    assert_close,
    native_config,
    native_of,
    native_weights,
    randomised,
    run_theirs,
    tokens,
    with_weights_of,
)

PLAIN_ATTENTION = replace(
    SMALL, use_mla=False, kv_lora_rank=None, q_lora_rank=None, qk_rope_head_dim=0, qk_nope_head_dim=0, v_head_dim=0
)

# Where transformers' `deepseek_v2` does not do what the published code does, or cannot do it at all.
PUBLISHED_ONLY: Mapping[str, DeepseekV2Config] = {
    "yarn_mscale_alone": replace(SMALL, rope_scaling={**YARN, "mscale": 0.707}),
    "yarn_mscale_all_dim_alone": replace(SMALL, rope_scaling={**YARN, "mscale_all_dim": 0.707}),
    "yarn_without_mscales": replace(SMALL, rope_scaling=YARN),
    "dynamic_ntk": replace(SMALL, rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=5),
    "norm_topk_prob": replace(SMALL, norm_topk_prob=True, num_experts_per_tok=3),
    "norm_topk_prob_scaled": replace(SMALL, norm_topk_prob=True, routed_scaling_factor=2.5),
    "norm_topk_prob_of_one": replace(SMALL, norm_topk_prob=True, num_experts_per_tok=1),
    "sigmoid_greedy": replace(SMALL, scoring_func="sigmoid", norm_topk_prob=True, num_experts_per_tok=3),
    "bias_of_softmax": replace(V3_GATE, scoring_func="softmax"),
    "v3_one_expert": replace(V3_GATE, num_experts_per_tok=1),
    "no_shared_experts": replace(SMALL, n_shared_experts=None),
    "no_routed_experts": replace(SMALL, n_routed_experts=None),
    "moe_layer_freq": replace(SMALL, moe_layer_freq=2),
    "mha": PLAIN_ATTENTION,
    "mha_grouped": replace(PLAIN_ATTENTION, num_key_value_heads=2),
    "mha_one_kv_head": replace(PLAIN_ATTENTION, num_key_value_heads=1, attention_bias=True),
    "mha_linear": replace(PLAIN_ATTENTION, rope_scaling={"type": "linear", "factor": 4.0}),
    "mha_dynamic_ntk": replace(
        PLAIN_ATTENTION, rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=5
    ),
    "mha_yarn": replace(PLAIN_ATTENTION, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
}
ALL = {**COMMON, **PUBLISHED_ONLY}

ROUTES = [
    {"mla_form": "expanded", "_attn_implementation": "eager"},
    {"mla_form": "expanded", "_attn_implementation": "sdpa"},
    {"mla_form": "absorbed", "_attn_implementation": "eager"},
    {"mla_form": "absorbed", "_attn_implementation": "sdpa"},
]


def by_every_route(*names: str) -> list[Any]:
    """Cases (name, route) for every way to compute attention; plain attention knows no absorbed form."""
    return [
        pytest.param(name, route, id="-".join((name, *route.values())))
        for name in names
        for route in ROUTES
        if ALL[name].use_mla or route["mla_form"] == "expanded"
    ]


def arrays(module: nn.Module) -> dict[str, oracle.Array]:
    return {name: weight.double().numpy() for name, weight in module.state_dict().items()}


def layer_by_oracle(
    config: DeepseekV2Config, layer_idx: int, weights: oracle.Weights, x: Tensor, calls: Calls
) -> Tensor:
    """Every sequence by itself, without its padding, whose places are zero."""
    contexts = np.repeat([piece.stop for piece in calls.pieces], calls.lengths)
    out = np.zeros(x.shape)
    for row, skipped in enumerate(calls.padding):
        positions = calls.position_ids[row, skipped:].numpy()
        options: Any = {"positions": positions, "contexts": contexts[skipped:]}
        out[row, skipped:] = oracle.layer(x[row, skipped:].numpy(), weights, config, layer_idx, **options)
    return torch.from_numpy(out)


def layer_and_oracle(
    config: DeepseekV2Config, layer_idx: int, calls: Calls, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """What the real tokens become in the layer, computed in ``dtype``, and in the oracle."""
    layer = randomised(DeepseekV2DecoderLayer(config, layer_idx), dtype)
    x = tokens(len(calls.padding), sum(calls.lengths), dtype)
    outputs, present = [], None
    with torch.no_grad():
        for piece in calls.pieces:
            out, present = layer(
                x[:, piece],
                attention_mask=calls.real[:, : piece.stop],
                position_ids=calls.position_ids[:, piece],
                past_key_value=present,
                use_cache=True,
            )
            outputs.append(out)
    expected = layer_by_oracle(config, layer_idx, arrays(layer), x.double(), calls)
    return torch.cat(outputs, 1)[calls.real], expected[calls.real]


def check_layer(config: DeepseekV2Config, layer_idx: int, calls: Calls) -> None:
    assert_close(*layer_and_oracle(config, layer_idx, calls), "output")


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("name", "route"), by_every_route("plain", "everything", *PUBLISHED_ONLY))
def test_layer(name: str, calls: Calls, route: dict[str, str]) -> None:
    check_layer(replace(ALL[name], **route), 1, calls)


@pytest.mark.parametrize("layer_idx", range(5))
def test_moe_layer_freq_and_first_k_dense_replace_choose_the_layers_with_experts(layer_idx: int) -> None:
    config = replace(SMALL, num_hidden_layers=5, first_k_dense_replace=2, moe_layer_freq=2)
    layer = DeepseekV2DecoderLayer(config, layer_idx)
    assert isinstance(layer.mlp, DeepseekV2MoE) == (layer_idx in (2, 4))
    check_layer(config, layer_idx, CALLS["prefill"])


@pytest.mark.parametrize("name", COMMON)
def test_oracle_itself_against_transformers(name: str) -> None:
    ours = randomised(DeepseekV2DecoderLayer(COMMON[name], layer_idx=1))
    theirs = with_weights_of(ours, native_of(COMMON[name]).layer(native_config(COMMON[name]), layer_idx=1))
    calls = CALLS["left_padding"]
    x = tokens(3, 11, torch.float64)
    expected = run_theirs(theirs, x, calls).output[calls.real]
    assert_close(layer_by_oracle(COMMON[name], 1, arrays(ours), x, calls)[calls.real], expected, "output")


def check_gradients(config: DeepseekV2Config, layer_idx: int = 1) -> None:
    """All gradients together: along random directions of input and weights, the layer changes as the oracle does."""
    layer = randomised(DeepseekV2DecoderLayer(config, layer_idx))
    x = tokens(1, 9, torch.float64).requires_grad_()
    cotangent = tokens(1, 9, torch.float64, seed=2)
    layer(x)[0].backward(cotangent)
    gradients = {name: weight.grad for name, weight in layer.named_parameters()} | {"input": x.grad}

    weights = arrays(layer)
    generator = np.random.default_rng(3)
    for _ in range(3):
        direction = {name: generator.normal(size=weight.shape) for name, weight in weights.items()}
        of_input = generator.normal(size=x.shape[1:])

        def along(distance: float, direction: oracle.Weights = direction, of_input: oracle.Array = of_input) -> float:
            moved = {name: weight + distance * direction[name] for name, weight in weights.items()}
            out = oracle.layer(x.detach()[0].numpy() + distance * of_input, moved, config, layer_idx)
            return float((out * cotangent[0].numpy()).sum())

        step = 1e-6  # no token changes its experts within it; the difference is rounded by 1e-16 / step, some 1e-10
        expected = (along(step) - along(-step)) / (2 * step)
        stacked = native_weights({name: torch.from_numpy(part) for name, part in direction.items()})
        stacked["input"] = torch.from_numpy(of_input)[None]
        parts = torch.cat([(gradient * stacked[name]).flatten() for name, gradient in gradients.items()])
        actual = float(parts.sum())
        assert abs(actual - expected) <= 1e-7 * float(parts.norm()), f"{actual} against {expected}"


@pytest.mark.parametrize(("name", "route"), by_every_route(*PUBLISHED_ONLY))
def test_gradients(name: str, route: dict[str, str]) -> None:
    check_gradients(replace(PUBLISHED_ONLY[name], **route))


# What a mask means


def attention_and_oracle(
    config: DeepseekV2Config,
    pieces: Sequence[tuple[slice, Tensor | None]],
    bias: Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention over pieces of a sequence, each under its mask, and the oracle over the whole under what they mean.

    ``bias`` is (batch, heads, seq, seq).
    """
    kind = ("mla_" if config.use_mla else "mha_") + config._attn_implementation
    attention = randomised(ATTENTION_CLASSES[kind](config, layer_idx=0), dtype)
    x = tokens(2, 7, dtype)
    outputs, present = [], None
    with torch.no_grad():
        for piece, mask in pieces:
            output, _, present = attention(x[:, piece], attention_mask=mask, past_key_value=present, use_cache=True)
            outputs.append(output)
    weights = arrays(attention)
    expected = [oracle.attention(x[row].double().numpy(), weights, config, bias[row].numpy()) for row in range(len(x))]
    return torch.cat(outputs, 1), torch.from_numpy(np.stack(expected))


def as_bias(keep: Tensor) -> Tensor:
    """Minus infinity where a key is hidden; (batch, heads, seq, kv_seq)."""
    hidden = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, float("-inf"))
    return hidden.expand(2, SMALL.num_attention_heads, 7, 7)


def random_keep(heads: int) -> Tensor:
    """Any keys, the future included; the third query of the first sequence sees none."""
    keep = torch.rand(2, heads, 7, 7, generator=torch.Generator().manual_seed(4)) < 0.5
    keep |= torch.eye(7, dtype=torch.bool)
    keep[0, :, 2] = False
    return keep


CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()
REAL = torch.arange(7) >= torch.tensor([[0], [3]])
SLOPES = -torch.rand(
    1, SMALL.num_attention_heads, 7, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64
)
LOWEST = torch.finfo(torch.float64).min

# A mask, and the bias it should mean. A query that sees nothing must give zeros in either convention.
MASKS: Mapping[str, tuple[Tensor | None, Tensor]] = {
    "none_is_causal": (None, as_bias(CAUSAL)),
    "padding_is_beside_causal_order": (REAL, as_bias(CAUSAL & REAL[:, None, None])),
    "padding_as_integers": (REAL.long(), as_bias(CAUSAL & REAL[:, None, None])),
    "bool_true_keeps": (random_keep(1), as_bias(random_keep(1))),
    "bool_for_each_head": (random_keep(4), as_bias(random_keep(4))),
    "bool_for_all_sequences": (random_keep(1)[1:], as_bias(random_keep(1)[1:])),
    "float_is_added": (SLOPES, SLOPES.expand(2, -1, -1, -1)),
    "float_minus_infinity_hides": (as_bias(random_keep(1)), as_bias(random_keep(1))),
    "float_lowest_hides": (as_bias(random_keep(1)).clamp(min=LOWEST), as_bias(random_keep(1))),
    "float_added_and_hidden": (SLOPES + as_bias(random_keep(1)), SLOPES + as_bias(random_keep(1))),
}


def check_mask(config: DeepseekV2Config, name: str) -> None:
    mask, bias = MASKS[name]
    assert_close(*attention_and_oracle(config, [(slice(0, 7), mask)], bias), name)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("name", "route"), by_every_route("bias", "mha_grouped"))
def test_mask(name: str, route: dict[str, str], mask: str) -> None:
    check_mask(replace(ALL[name], **route), mask)


@pytest.mark.parametrize("as_mask", [lambda keep: keep, as_bias], ids=["bool", "float"])
@pytest.mark.parametrize(("name", "route"), by_every_route("bias", "mha_grouped"))
def test_mask_after_a_cache(name: str, route: dict[str, str], as_mask: Callable[[Tensor], Tensor]) -> None:
    """Queries are rows of the mask from the top, keys its columns, those in the cache first."""
    keep = random_keep(1) & CAUSAL
    pieces = [slice(0, 3), slice(3, 6), slice(6, 7)]
    masked = [(piece, as_mask(keep)[:, :, piece, : piece.stop]) for piece in pieces]
    assert_close(*attention_and_oracle(replace(ALL[name], **route), masked, as_bias(keep)), "output")


# The gate


def check_choices(config: DeepseekV2Config) -> None:
    """The gate gives the oracle's experts, best first."""
    gate = randomised(MoEGate(config))
    x = tokens(1, 60, torch.float64)
    topk_idx, _, _ = gate(x)
    weights = {f"gate.{name}": weight for name, weight in arrays(gate).items()}
    scores = oracle.affinities(x[0].numpy(), weights, config)
    assert topk_idx.tolist() == [oracle.chosen_experts(s, weights, config) for s in scores]


ROUTINGS = ["plain", "group_limited", "everything", "norm_topk_prob", "v3", "v3_one_group", "sigmoid_greedy"]


@pytest.mark.parametrize("name", [*ROUTINGS, "bias_of_softmax"])
def test_choices(name: str) -> None:
    check_choices(ALL[name])


def check_balance_loss(config: DeepseekV2Config) -> None:
    """The loss in training, and that its gradient joins at full strength, whatever the gradient from above."""
    moe = randomised(DeepseekV2MoE(config))
    x = tokens(3, 8, torch.float64)
    weights = arrays(moe)
    _, _, loss = moe.train().gate(x)
    expected = oracle.balance_loss(list(x.numpy()), weights, config)
    assert_close(loss, torch.tensor(expected, dtype=torch.float64), "balance loss")

    direction = tokens(1, config.n_routed_experts, torch.float64, seed=6)[0]
    step = 1e-6  # small enough that no token changes its experts; errors as in `check_gradients`

    def along(distance: float) -> float:
        moved = weights | {"gate.weight": weights["gate.weight"] + distance * direction.numpy()}
        return oracle.balance_loss(list(x.numpy()), moved, config)

    slope = (along(step) - along(-step)) / (2 * step)
    for strength in (1.0, 1e-3):
        gradients = []
        for training in (True, False):
            moe.train(training).zero_grad()
            moe(x).backward(torch.full_like(x, strength))
            gradients.append(moe.gate.weight.grad.clone())
        assert float(((gradients[0] - gradients[1]) * direction).sum()) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("seq_aux", [True, False], ids=["by_sequence", "pooled"])
@pytest.mark.parametrize("name", ["plain", "everything", "norm_topk_prob_scaled"])
def test_balance_loss(name: str, seq_aux: bool) -> None:
    check_balance_loss(replace(ALL[name], seq_aux=seq_aux, aux_loss_alpha=0.5))


def test_balance_loss_at_alpha_zero_is_none_and_training_goes_on() -> None:
    moe = randomised(DeepseekV2MoE(replace(SMALL, aux_loss_alpha=0.0))).train()
    x = tokens(2, 5, torch.float64)
    assert moe.gate(x)[2] is None
    moe(x).sum().backward()
    assert moe.gate.weight.grad.abs().max() > 0


# The oracle against numbers of the paper


def test_temperature_at_the_published_yarn() -> None:
    """DeepSeek-V2, section 3.1.4: √t = 0.0707 ln s + 1 at s = 40, and cos and sin keep their size."""
    config = replace(SMALL, rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707})
    assert oracle.temperature(config) == pytest.approx((0.0707 * np.log(40) + 1) ** 2, rel=1e-12)
    assert oracle.magnitude(config) == 1.0


def test_scores_depend_on_distance_alone() -> None:
    """What rotary positions are for: equal shifts of all positions change nothing."""
    x = tokens(1, 6, torch.float64)[0].numpy()
    for config in (SMALL, PLAIN_ATTENTION, COMMON["yarn"]):
        kind = ("mla_" if config.use_mla else "mha_") + config._attn_implementation
        weights = arrays(randomised(ATTENTION_CLASSES[kind](config, layer_idx=0)))
        here, there = (oracle.attention(x, weights, config, positions=np.arange(6) + at) for at in (0, 1000))
        # An angle of 1000 radians is rounded by 1e-13.
        np.testing.assert_allclose(here, there, atol=1e-11)
