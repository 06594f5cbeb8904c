"""Balance without a loss: the bias of DeepSeek-V3's gate, and what moves it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, MoEGate
from dsv2_ref.loss_free import LossFreeBalancing, updated_bias

BIASED = DeepseekV2Config(
    hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, n_routed_experts=8,
    n_shared_experts=1, num_experts_per_tok=2, n_group=4, topk_group=2, first_k_dense_replace=0, aux_loss_alpha=0.0,
    scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True,
)  # fmt: skip
NAME = "e_score_correction_bias"


def skewed_gate(seed: int = 0) -> tuple[MoEGate, Tensor]:
    """A gate in training that likes some experts much more than others, and tokens for it."""
    generator = torch.Generator().manual_seed(seed)
    gate = MoEGate(BIASED).train()
    tokens = torch.randn(4, 128, 16, generator=generator)
    tokens[..., 0] = 1
    with torch.no_grad():
        gate.weight.copy_(torch.randn(8, 16, generator=generator) / 4)
        gate.weight[:, 0] = torch.linspace(1, -1, 8)
    return gate, tokens


def counts(gate: MoEGate, tokens: Tensor) -> Tensor:
    return gate(tokens)[0].flatten().bincount(minlength=8)


def test_an_expert_above_an_even_share_goes_down_one_below_goes_up_and_one_at_it_stays() -> None:
    bias = torch.tensor([-3.0, 0.0, 0.0, 6.0], dtype=torch.float64)
    load = torch.tensor([6, 4, 5, 1])
    assert updated_bias(bias, load, 1.0).tolist() == [-4, 0, -1, 7]
    assert updated_bias(bias, 1000 * load, 1.0).tolist() == [-4, 0, -1, 7]
    assert updated_bias(bias, load, 0.0).tolist() == bias.tolist()
    assert bias.tolist() == [-3, 0, 0, 6]


def test_a_step_moves_the_bias_of_every_gate_and_counts_anew() -> None:
    layers = nn.ModuleList(DeepseekV2DecoderLayer(BIASED, index) for index in range(2)).train()
    balancing = LossFreeBalancing(layers, speed=0.25)
    gates = [layer.mlp.gate for layer in layers]
    assert list(balancing.gates.values()) == gates
    _, tokens = skewed_gate()
    expected = []
    for gate, load in zip(gates, balancing.loads.values(), strict=True):
        counted = counts(gate, tokens) + counts(gate, tokens[:1])  # two batches before one step
        assert load.tolist() == counted.tolist()
        expected.append(0.25 * (counted.double().mean() - counted).sign())
    balancing.step()
    for gate, load, wanted in zip(gates, balancing.loads.values(), expected, strict=True):
        assert gate.e_score_correction_bias.tolist() == wanted.tolist()
        assert load.tolist() == 8 * [0]
    balancing.step()  # nothing was counted since
    for gate, wanted in zip(gates, expected, strict=True):
        assert gate.e_score_correction_bias.tolist() == wanted.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_bias_in_16_bits_becomes_one_that_small_steps_move(dtype: torch.dtype) -> None:
    gate, tokens = skewed_gate()
    gate = gate.to(dtype)
    getattr(gate, NAME).fill_(0.5)
    balancing = LossFreeBalancing(gate, speed=1e-4)
    load = counts(gate, tokens.to(dtype))
    balancing.step()
    bias = getattr(gate, NAME)
    assert bias.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal((bias - 0.5).sign(), (load.double().mean() - load).sign().to(bias.dtype))
    assert gate.weight.dtype == dtype


def test_what_a_gate_chooses_outside_of_training_is_not_counted() -> None:
    gate, tokens = skewed_gate()
    balancing = LossFreeBalancing(gate)
    gate.eval()(tokens)
    assert balancing.loads[""].tolist() == 8 * [0]
    gate.train()(tokens)
    assert balancing.loads[""].sum() == tokens[..., 0].numel() * BIASED.num_experts_per_tok


@pytest.mark.parametrize("seed", range(3))
def test_a_skewed_gate_is_even_after_200_steps(seed: int) -> None:
    gate, tokens = skewed_gate(seed)
    balancing = LossFreeBalancing(gate, speed=0.005)
    share = tokens[..., 0].numel() * BIASED.num_experts_per_tok / 8
    before = counts(gate, tokens) / share
    assert before.max() > 2
    for _ in range(200):
        gate(tokens)
        balancing.step()
    after = counts(gate, tokens) / share
    assert after.max() < 1.15
    assert after.min() > 0.85


def test_the_bias_chooses_but_does_not_weigh() -> None:
    gate, tokens = skewed_gate()
    picked, weights, _ = gate(tokens)
    gate.e_score_correction_bias += 1  # the same for all chooses the same
    for found, wanted in zip(gate(tokens)[:2], (picked, weights), strict=True):
        torch.testing.assert_close(found, wanted)
    gate.e_score_correction_bias[7] += 2  # the idlest
    picked, weights, _ = gate(tokens)
    assert (picked == 7).any(dim=1).all()
    scores = (tokens.flatten(0, 1) @ gate.weight.T).sigmoid().gather(1, picked)
    torch.testing.assert_close(weights, scores / scores.sum(dim=1, keepdim=True))


def test_no_gradient_reaches_the_bias_and_the_optimizer_does_not_see_it() -> None:
    gate, tokens = skewed_gate()
    LossFreeBalancing(gate)
    _, weights, loss = gate(tokens)
    assert loss is None
    weights[:, 0].sum().backward()
    assert gate.weight.grad.abs().sum() > 0
    assert not gate.e_score_correction_bias.requires_grad
    assert gate.e_score_correction_bias.grad is None
    assert dict(gate.named_parameters()).keys() == {"weight"}


def test_the_bias_is_stored_under_its_published_name() -> None:
    gate, tokens = skewed_gate()
    balancing = LossFreeBalancing(gate, speed=0.5)
    gate(tokens)
    balancing.step()
    stored = copy.deepcopy(gate.state_dict())
    assert stored.keys() == {"weight", NAME}
    assert set(stored[NAME].abs().tolist()) <= {0.0, 0.5}
    fresh = MoEGate(BIASED)
    fresh.load_state_dict(stored)
    assert torch.equal(fresh.eval()(tokens)[0], gate.eval()(tokens)[0])
    layer = DeepseekV2DecoderLayer(BIASED, 0).state_dict()
    assert f"mlp.gate.{NAME}" in layer


def test_a_model_without_such_a_gate_and_a_negative_speed_are_rejected() -> None:
    greedy = DeepseekV2Config(hidden_size=16, n_routed_experts=8, num_experts_per_tok=2, topk_method="greedy")
    with pytest.raises(ValueError, match="noaux_tc"):
        LossFreeBalancing(MoEGate(greedy))
    for speed in (-0.001, float("inf"), float("nan"), None):
        with pytest.raises(ValueError, match=f"speed is {speed}; wanted a finite number, 0 or more"):
            LossFreeBalancing(MoEGate(BIASED), speed=speed)
    for model in (None, {}):
        with pytest.raises(TypeError, match=r"model is .*; wanted a torch\.nn\.Module"):
            LossFreeBalancing(model)


@pytest.mark.parametrize(
    ("bias", "load", "speed", "said"),
    [
        (torch.zeros(4), torch.ones(1), 0.1, r"load is \(1,\) .*; wanted \(4,\) on cpu, as the bias"),
        (torch.zeros(4), torch.ones(4, 4), 0.1, r"load is \(4, 4\) .*; wanted \(4,\)"),
        (torch.zeros(4), [1, 2, 3, 4], 0.1, "load is a list of 4; wanted a tensor"),
        (None, torch.ones(4), 0.1, "bias is None; wanted a tensor"),
        (torch.zeros(4).long(), torch.ones(4), 0.1, r"bias is \(4,\) torch.int64 .*; wanted \(experts,\), floating"),
        (torch.zeros(4), torch.ones(4), float("inf"), "speed is inf; wanted a finite number, 0 or more"),
        (torch.zeros(4), torch.ones(4), None, "speed is None; wanted a finite number, 0 or more"),
    ],
)
def test_a_load_that_does_not_fit_the_bias_is_rejected(
    bias: Any, load: Any, speed: Any, said: str, as_shipped: None
) -> None:
    with pytest.raises(ValueError, match=said):
        updated_bias(bias, load, speed)
