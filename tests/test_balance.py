"""The paper's three balance losses, the devices a token reaches, and dropping: by hand, against a slow reading, by property."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dsv2_ref import DeepseekV2Config, MoEGate
from dsv2_ref.balance import communication_balance_loss, device_balance_loss, expert_balance_loss, inject_loss
from dsv2_ref.capacity import TokenDropping, choices_within_budget, devices_reached

# Four experts on two devices, {0, 1} and {2, 3}; two tokens choose two experts each.
SCORES = torch.tensor([[[0.5, 0.2, 0.2, 0.1], [0.4, 0.3, 0.1, 0.2]]], dtype=torch.float64)
CHOSEN = torch.tensor([[[0, 1], [0, 3]]])


def test_the_three_losses_by_hand() -> None:
    # f = 4 / (2 · 2) · (2, 1, 0, 1), P = (0.45, 0.25, 0.15, 0.15): 0.9 + 0.25 + 0 + 0.15.
    assert expert_balance_loss(SCORES, CHOSEN, 1.0).item() == pytest.approx(1.3)
    # f' = (1.5, 0.5), P' = (0.7, 0.3): 1.05 + 0.15.
    assert device_balance_loss(SCORES, CHOSEN, 1.0, devices=2).item() == pytest.approx(1.2)
    # Both tokens are sent to device 0, one to device 1: f'' = 2 / (2 · 2) · (2, 1) = (1, 0.5): 0.7 + 0.15.
    assert communication_balance_loss(SCORES, CHOSEN, 1.0, 2, topk_devices=2).item() == pytest.approx(0.85)


def slow_losses(scores: np.ndarray, chosen: np.ndarray, devices: int, most: int) -> tuple[float, float, float]:
    """Equations 23 to 31 with α = 1, for one sequence, sum by sum."""
    tokens, experts = scores.shape
    top_k, group = chosen.shape[1], experts // devices
    f = [experts / (top_k * tokens) * sum(i in chosen[t] for t in range(tokens)) for i in range(experts)]
    p = [sum(scores[t, i] for t in range(tokens)) / tokens for i in range(experts)]
    own = [range(d * group, (d + 1) * group) for d in range(devices)]
    f_device = [sum(f[j] for j in own[d]) / group for d in range(devices)]
    p_device = [sum(p[j] for j in own[d]) for d in range(devices)]
    sent = [sum(any(j in chosen[t] for j in own[d]) for t in range(tokens)) for d in range(devices)]
    f_sent = [devices / (most * tokens) * sent[d] for d in range(devices)]
    return tuple(
        sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((f, p), (f_device, p_device), (f_sent, p_device))
    )


def routed(batch: int, seq: int, groups: int, group: int, top_k: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, seq, groups * group, generator=generator, dtype=torch.float64)
    scores = (2 * logits).softmax(-1)
    return scores, scores.topk(top_k, dim=-1).indices


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))


@given(sizes=SIZES, seq_aux=st.booleans(), data=st.data())
def test_the_losses_are_the_papers_sums(
    sizes: tuple[int, int, int, int, int], seq_aux: bool, data: st.DataObject
) -> None:
    batch, seq, groups, group, seed = sizes
    top_k = data.draw(st.integers(1, groups * group))
    most = data.draw(st.integers(1, groups))
    scores, chosen = routed(batch, seq, groups, group, top_k, seed)
    parts = list(zip(scores, chosen, strict=True)) if seq_aux else [(scores.flatten(0, 1), chosen.flatten(0, 1))]
    expected = np.mean([slow_losses(s.numpy(), c.numpy(), groups, most) for s, c in parts], axis=0)
    ours = (
        expert_balance_loss(scores, chosen, 1.0, seq_aux),
        device_balance_loss(scores, chosen, 1.0, groups, seq_aux),
        communication_balance_loss(scores, chosen, 1.0, groups, most, seq_aux),
    )
    # Sums of at most 18 tokens and 16 experts in float64, in another order.
    np.testing.assert_allclose([loss.item() for loss in ours], expected, rtol=1e-12)


def test_one_device_and_devices_of_one_expert_are_the_extremes() -> None:
    scores, chosen = routed(2, 8, 4, 2, 3, seed=1)
    torch.testing.assert_close(device_balance_loss(scores, chosen, 0.7, 8), expert_balance_loss(scores, chosen, 0.7))
    assert device_balance_loss(scores, chosen, 0.7, 1).item() == pytest.approx(0.7)


def test_communication_can_be_even_where_work_is_not() -> None:
    # Every token is sent to both devices, but does three of its four parts of work on the first.
    scores = torch.full((1, 4, 8), 1 / 8, dtype=torch.float64)
    scores[..., :4] *= 1.5
    scores[..., 4:] *= 0.5
    chosen = torch.tensor([[[0, 1, 2, 4]] * 4])
    assert communication_balance_loss(scores, chosen, 1.0, 2, 2).item() == pytest.approx(1.0)
    assert device_balance_loss(scores, chosen, 1.0, 2).item() == pytest.approx(1.5 * 0.75 + 0.5 * 0.25)


def test_gradients_reach_the_scores_and_push_down_what_is_used_most() -> None:
    for loss in (
        lambda s: expert_balance_loss(s, CHOSEN, 1.0),
        lambda s: device_balance_loss(s, CHOSEN, 1.0, 2),
        lambda s: communication_balance_loss(s, CHOSEN, 1.0, 2, 2),
    ):
        scores = SCORES.clone().requires_grad_()
        loss(scores).backward()
        gradient = scores.grad[0]
        assert torch.equal(gradient[0], gradient[1])  # f is a constant: every token is pushed alike
        assert gradient[0, 0] == gradient[0].max()
        assert gradient[0, 0] > gradient[0, 2]


GROUPED = replace(
    DeepseekV2Config.tiny(), topk_method="group_limited_greedy", n_group=4, topk_group=2, num_experts_per_tok=3
)


@pytest.mark.parametrize("seq_aux", [True, False])
def test_the_gate_adds_up_the_losses_that_are_weighted(seq_aux: bool) -> None:
    weights = {"aux_loss_alpha": 0.003, "device_aux_loss_alpha": 0.05, "communication_aux_loss_alpha": 0.02}
    torch.manual_seed(0)
    gate = MoEGate(replace(GROUPED, seq_aux=seq_aux, **weights)).double()
    x = torch.randn(2, 5, GROUPED.hidden_size, dtype=torch.float64)
    chosen, _, loss = gate(x)
    scores = (x @ gate.weight.T).softmax(-1)
    chosen = chosen.view(2, 5, -1)
    expected = (
        expert_balance_loss(scores, chosen, 0.003, seq_aux)
        + device_balance_loss(scores, chosen, 0.05, 4, seq_aux)
        + communication_balance_loss(scores, chosen, 0.02, 4, 2, seq_aux)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert gate.eval()(x)[2] is None


def test_losses_over_devices_want_groups() -> None:
    for name in ("device_aux_loss_alpha", "communication_aux_loss_alpha"):
        with pytest.raises(ValueError, match=f"{name} is 0.1; wanted 0 with greedy, which has no groups"):
            replace(DeepseekV2Config.tiny(), **{name: 0.1})
        with pytest.raises(ValueError, match=f"{name} is -1"):
            replace(GROUPED, **{name: -1})


def test_devices_reached_counts_each_device_once() -> None:
    assert devices_reached(torch.tensor([[0, 1, 4], [0, 2, 5], [3, 2, 3]]), experts=6, devices=3).tolist() == [2, 3, 1]


def test_group_limited_routing_reaches_no_more_devices_than_it_may() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64, GROUPED.hidden_size)
    limited, _, _ = MoEGate(GROUPED)(x)
    free, _, _ = MoEGate(replace(GROUPED, topk_method="greedy"))(x)
    assert devices_reached(limited, 8, 4).max() == 2
    assert devices_reached(free, 8, 4).max() == 3


def slow_kept(
    chosen: Tensor, affinity: Tensor, group: int, devices: int, factor: float, safe: Tensor
) -> list[list[bool]]:
    """Section 2.2.4, device by device: of the choices that arrive, the strongest until the budget is used up."""
    kept = [[False] * chosen.shape[1] for _ in chosen]
    budget = int(factor * chosen.numel() / devices)
    for device in range(devices):
        here = [
            (not safe[t], -affinity[t, c].item(), t, c)
            for t in range(len(chosen))
            for c in range(chosen.shape[1])
            if chosen[t, c] // group == device
        ]
        for place, (unsafe, _, t, c) in enumerate(sorted(here)):
            kept[t][c] = place < budget or not unsafe
    return kept


@given(sizes=SIZES, factor=st.sampled_from([0.0, 0.5, 1.0, 1.25, 8.0]), data=st.data())
def test_what_is_kept_is_what_the_section_says(
    sizes: tuple[int, int, int, int, int], factor: float, data: st.DataObject
) -> None:
    batch, seq, devices, group, seed = sizes
    top_k = data.draw(st.integers(1, devices * group))
    scores, chosen = (x.flatten(0, 1) for x in routed(batch, seq, devices, group, top_k, seed))
    affinity = scores.gather(1, chosen)
    safe = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch * seq, max_size=batch * seq)))
    kept = choices_within_budget(chosen, affinity, devices * group, devices, factor, protected=safe)
    assert kept.tolist() == slow_kept(chosen, affinity, group, devices, factor, safe)
    unsafe = choices_within_budget(chosen, affinity, devices * group, devices, factor)
    assert unsafe.tolist() == slow_kept(chosen, affinity, group, devices, factor, torch.zeros_like(safe))


def test_the_budget_is_the_devices_not_the_experts() -> None:
    # Expert 0 gets four choices and expert 1 none; expert 2 gets three, expert 3 one. Both devices are within budget.
    chosen = torch.tensor([[0, 2], [0, 2], [0, 2], [0, 3]])
    assert choices_within_budget(chosen, torch.rand(4, 2), experts=4, devices=2).all()
    # As four devices of one expert each, two choices of expert 0 and one of expert 2 are dropped.
    assert (~choices_within_budget(chosen, torch.rand(4, 2), experts=4, devices=4)).sum(0).tolist() == [2, 1]


def losses(seq_aux: bool = True, ranks: Any = None) -> list[Callable[..., Tensor]]:
    """The three, of scores and choices."""
    return [
        lambda scores, chosen: expert_balance_loss(scores, chosen, 1.0, seq_aux, ranks),
        lambda scores, chosen: device_balance_loss(scores, chosen, 1.0, 2, seq_aux, ranks),
        lambda scores, chosen: communication_balance_loss(scores, chosen, 1.0, 2, 2, seq_aux, ranks),
    ]


def test_what_does_not_fit_is_refused(as_shipped: None) -> None:
    with pytest.raises(ValueError, match="devices is 3; wanted a divisor of the 4 experts"):
        device_balance_loss(SCORES, CHOSEN, 1.0, devices=3)
    with pytest.raises(ValueError, match="topk_devices is 3; wanted from 1 to the 2 devices"):
        communication_balance_loss(SCORES, CHOSEN, 1.0, 2, topk_devices=3)
    with pytest.raises(ValueError, match="devices is 0"):
        devices_reached(CHOSEN, 4, 0)
    for factor in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"capacity_factor is {factor}; wanted a finite number, 0 or more"):
            choices_within_budget(CHOSEN[0], SCORES[0, :, :2], 4, 2, capacity_factor=factor)
    with pytest.raises(ValueError, match=r"scores is \(2, 4\).*; wanted \(batch, seq, experts\)"):
        expert_balance_loss(SCORES[0, :2], CHOSEN[0, :2], 1.0)
    few = CHOSEN[:, :1]
    for loss in (
        lambda: expert_balance_loss(SCORES, few, 1.0),
        lambda: device_balance_loss(SCORES, few, 1.0, 2, seq_aux=False),
        lambda: communication_balance_loss(SCORES, few, 1.0, 2, 2),
    ):
        with pytest.raises(ValueError, match=r"topk_idx is \(1, 1, 2\).*of the 1 sequences of 2 tokens in scores"):
            loss()
    for seq_aux in (True, False):
        for scores, chosen in ((SCORES[:0], CHOSEN[:0]), (SCORES[:, :0], CHOSEN[:, :0])):
            for loss in losses(seq_aux):
                with pytest.raises(ValueError, match=r"scores is \(.*0.*; wanted .*with at least one token"):
                    loss(scores, chosen)
    wrong: dict[str, tuple[object, object]] = {
        "scores is None; wanted a tensor": (None, CHOSEN),
        "topk_idx is None; wanted a tensor": (SCORES, None),
        r"topk_idx is \(1, 2, 2\) torch.float64.*; wanted integers": (SCORES, CHOSEN.double()),
        r"topk_idx is \(1, 2, 0\).*; wanted \(batch, seq, top_k\)": (SCORES, CHOSEN[..., :0]),
        "topk_idx is beyond the experts somewhere; wanted from 0 to 3": (SCORES, CHOSEN + 1),
        "topk_idx is beyond the experts somewhere; .*": (SCORES, CHOSEN - 1),
    }
    for said, routed_wrongly in wrong.items():
        for loss in losses():
            with pytest.raises(ValueError, match=said):
                loss(*routed_wrongly)
    for alpha in (None, float("nan"), -1.0):
        with pytest.raises(ValueError, match=f"alpha is {alpha}; wanted a finite number, 0 or more"):
            expert_balance_loss(SCORES, CHOSEN, alpha)
    for devices in (None, 2.0):
        with pytest.raises(ValueError, match=f"devices is {devices}; wanted a divisor of the 4 experts"):
            device_balance_loss(SCORES, CHOSEN, 1.0, devices)
        with pytest.raises(ValueError, match=f"topk_devices is {devices}; wanted from 1 to the 2 devices"):
            communication_balance_loss(SCORES, CHOSEN, 1.0, 2, devices)
    for ranks in (4, "all"):
        for loss in (
            lambda ranks: expert_balance_loss(SCORES, CHOSEN, 1.0, ranks=ranks),
            lambda ranks: device_balance_loss(SCORES, CHOSEN, 1.0, 2, ranks=ranks),
            lambda ranks: communication_balance_loss(SCORES, CHOSEN, 1.0, 2, 1, ranks=ranks),
        ):
            with pytest.raises(ValueError, match=f"ranks is {ranks!r}; wanted None or the Ranks that"):
                loss(ranks)
    for experts in (None, "4", 0):
        with pytest.raises(ValueError, match=f"experts is {experts!r}; wanted a number of experts"):
            devices_reached(CHOSEN, experts, 2)
    for count in (
        lambda idx: devices_reached(idx, 4, 2),
        lambda idx: choices_within_budget(idx, SCORES[0, :, :2], 4, 2),
    ):
        with pytest.raises(ValueError, match="topk_idx is beyond the experts somewhere; wanted from 0 to 3"):
            count(CHOSEN[0] + 1)
    with pytest.raises(ValueError, match=r"topk_idx is \(1, 2, 2\).*; wanted \(tokens, top_k\)"):
        choices_within_budget(CHOSEN, SCORES[..., :2], 4, 2)
    with pytest.raises(ValueError, match=r"protected is \(2,\) torch.int64.*; wanted None or one for each of 2 tokens"):
        choices_within_budget(CHOSEN[0], SCORES[0, :, :2], 4, 2, protected=torch.ones(2).long())
    with pytest.raises(ValueError, match=r"affinity is \(2, 4\).*; wanted \(2, 2\)"):
        choices_within_budget(CHOSEN[0], SCORES[0], 4, 2)
    with pytest.raises(ValueError, match=r"protected is \(3,\).*; wanted None or one for each of 2 tokens"):
        choices_within_budget(CHOSEN[0], SCORES[0, :, :2], 4, 2, protected=torch.ones(3, dtype=torch.bool))


def test_a_loss_is_injected_as_one_number(as_shipped: None) -> None:
    for hidden_states, loss, said in (
        (None, torch.tensor(1.0), "hidden_states is None; wanted a tensor"),
        (SCORES, 0.5, "loss is 0.5; wanted a tensor"),
        (SCORES, None, "loss is None; wanted a tensor"),
        (SCORES, torch.ones(2), r"loss is \(2,\) torch.float32 on cpu; wanted one floating-point number"),
        (SCORES, torch.tensor(1), r"loss is \(\) torch.int64 on cpu; wanted one floating-point number"),
    ):
        with pytest.raises(ValueError, match=said):
            inject_loss(hidden_states, loss)


class Alone:
    """A rank without others."""

    total = 1

    def sum(self, x: Tensor) -> Tensor:
        return x


def test_a_step_in_which_no_rank_has_tokens_has_a_loss_of_0(as_shipped: None) -> None:
    for seq_aux in (True, False):
        for loss in losses(seq_aux, Alone()):
            assert loss(SCORES[:0], CHOSEN[:0]).item() == 0
            assert loss(SCORES, CHOSEN).item() > 0


# Dropping in training


def routed_twice(gate: MoEGate, x: Tensor, dropping: TokenDropping) -> tuple[Tensor, Tensor, Tensor]:
    """The choices, their weights without dropping, and with it."""
    _, dropped, _ = gate(x)
    dropping.remove()
    chosen, weights, _ = gate(x)
    return chosen, weights, dropped


def test_dropped_choices_weigh_nothing_and_push_nothing() -> None:
    torch.manual_seed(0)
    gate, x = MoEGate(GROUPED).double(), torch.randn(6, 9, GROUPED.hidden_size, dtype=torch.float64)
    dropping = TokenDropping(gate, 0.9, 0.4, torch.Generator().manual_seed(7))
    chosen, weights, dropped = routed_twice(gate, x, dropping)
    exempt = torch.rand(6, generator=torch.Generator().manual_seed(7)) < 0.4
    assert exempt.any()
    kept = choices_within_budget(chosen, weights, 8, 4, 0.9, exempt.repeat_interleave(9))
    assert not kept.all()
    assert torch.equal(dropped, weights * kept)
    assert not torch.autograd.grad(dropped[~kept].sum(), gate.weight)[0].any()


def test_exempt_sequences_are_drawn_once_for_each_step_and_are_a_tenth() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(MoEGate(GROUPED) for _ in range(2))
    dropping, x = TokenDropping(model, 0.0), torch.randn(50, 4, GROUPED.hidden_size)
    drawn = []
    for _ in range(40):
        exempt = [gate(x)[1].view(50, 12).bool().any(dim=1) for gate in (*model, *model)]  # a budget of nothing
        assert all(torch.equal(one, exempt[0]) for one in exempt)
        drawn.append(exempt[0])
        dropping.step()
    share, error = torch.cat(drawn).double().mean(), (0.1 * 0.9 / 2000) ** 0.5
    assert abs(share - 0.1) < 4 * error
    assert any(not torch.equal(one, drawn[0]) for one in drawn)


def test_nothing_is_dropped_in_evaluation_or_within_the_budget() -> None:
    gate, x = MoEGate(GROUPED), torch.randn(2, 5, GROUPED.hidden_size)
    weights = gate(x)[1]
    TokenDropping(gate, 0.0, 0.0)
    assert not gate(x)[1].any()
    assert torch.equal(gate.eval()(x)[1], weights)
    other = MoEGate(GROUPED)
    weights = other(x)[1]
    TokenDropping(other, 4.0, 0.0)  # as many devices
    assert torch.equal(other(x)[1], weights)


def test_dropping_wants_devices_and_shares(as_shipped: None) -> None:
    with pytest.raises(ValueError, match="model is a MoEGate; wanted gates with more than one n_group"):
        TokenDropping(MoEGate(DeepseekV2Config.tiny()))
    with pytest.raises(ValueError, match="capacity_factor is -1"):
        TokenDropping(MoEGate(GROUPED), -1.0)
    with pytest.raises(ValueError, match="exempt is 2; wanted from 0 to 1"):
        TokenDropping(MoEGate(GROUPED), exempt=2)
    with pytest.raises(ValueError, match="capacity_factor is None; wanted a finite number"):
        TokenDropping(MoEGate(GROUPED), None)
    with pytest.raises(ValueError, match=r"exempt is '0\.1'; wanted from 0 to 1"):
        TokenDropping(MoEGate(GROUPED), exempt="0.1")
    with pytest.raises(ValueError, match=r"generator is 7; wanted None or a torch\.Generator"):
        TokenDropping(MoEGate(GROUPED), generator=7)
    for model in (None, {}):
        with pytest.raises(TypeError, match=r"model is .*; wanted a torch\.nn\.Module"):
            TokenDropping(model)
