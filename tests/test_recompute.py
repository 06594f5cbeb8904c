"""Layers that are run again in the backward pass: same gradients, less memory, and a router that may not change its mind."""

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from dsv2_ref import (
    DeepseekV2Config,
    DeepseekV2DecoderLayer,
    DeepseekV2ForCausalLM,
    DeepseekV2Model,
    MoEGate,
    ops,
    recompute,
)
from dsv2_ref.balance import LossFreeBalancing
from dsv2_ref.capacity import TokenDropping
from dsv2_ref.checks import CHECKPOINTING
from dsv2_ref.quantize import quantize
from dsv2_ref.recompute import checkpointed
from tests.live_bytes import LiveBytes

TINY = replace(DeepseekV2Config.tiny(), num_hidden_layers=2)
V3 = {
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}  # fmt: skip
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "eager": {"_attn_implementation": "eager"},
    "absorbed": {"mla_form": "absorbed"},
    "mha": {"use_mla": False},
    "dropout": {"attention_dropout": 0.3},
    "eager dropout": {"attention_dropout": 0.3, "_attn_implementation": "eager"},
    "v3": V3,
    "losses": LIMITED | {"aux_loss_alpha": 0.1, "device_aux_loss_alpha": 0.2, "communication_aux_loss_alpha": 0.3},
}
Gradients = dict[str, Tensor]
modes = pytest.mark.parametrize("mode", CHECKPOINTING)


def tokens(batch: int = 2, seq: int = 24) -> Tensor:
    return torch.randint(TINY.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(1))


def model_of(dtype: torch.dtype = torch.float64, **variant: Any) -> DeepseekV2ForCausalLM:
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(replace(TINY, **variant)).train().to(dtype)
    for module in model.modules():  # no ties of a bias
        if (bias := getattr(module, "e_score_correction_bias", None)) is not None:
            nn.init.uniform_(bias)
    return model


def gradients(
    model: nn.Module, mode: str | None, call: Callable[[], Any] | None = None, around: Any = nullcontext
) -> Gradients:
    """The gradients of a step, in a mode; ``around`` is open in the forward pass alone."""
    model.zero_grad()
    if mode is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable(mode)
    torch.manual_seed(2)
    with around():
        logits, _ = model(tokens()) if call is None else call()
        loss = logits.square().mean()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def same(found: Gradients, wanted: Gradients) -> bool:
    """To the bit: the same operations ran on the same numbers."""
    assert found.keys() == wanted.keys()
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def calls(model: DeepseekV2ForCausalLM) -> Counter[str]:
    """How often each layer begins to run, from now on."""
    counts: Counter[str] = Counter()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: counts.update(["layers"]))
    return counts


@modes
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_a_model_that_keeps_everything(name: str, mode: str) -> None:
    """Balance losses and dropout included, of which the first count once and the second repeats itself."""
    model = model_of(**VARIANTS[name])
    wanted = gradients(model, None)
    counted = calls(model)
    assert same(gradients(model, mode), wanted)
    assert counted["layers"] == 2 * TINY.num_hidden_layers
    if name == "losses":
        without = model_of(**LIMITED | {"aux_loss_alpha": 0.0})
        assert not same(gradients(without, mode), wanted)
    if "dropout" in name:
        model.model.layers[0].self_attn.attention_dropout = 0.0
        assert not same(gradients(model, mode), wanted)


@modes
def test_exempt_sequences_take_no_random_numbers_from_dropout(mode: str) -> None:
    """They are drawn once, and dropout in a later layer of the same checkpoint repeats itself all the same."""
    model = model_of(**LIMITED, attention_dropout=0.3, first_k_dense_replace=0)

    def step(run: Callable[..., Any]) -> Gradients:
        model.zero_grad()
        torch.manual_seed(2)
        dropping = TokenDropping(model, 0.8, 0.5)
        run(tokens())[0].square().mean().backward()
        dropping.remove()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    assert same(step(checkpointed(model, mode)), step(model))


@modes
def test_padding_positions_and_a_call_by_keywords(mode: str) -> None:
    model, ids = model_of(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    call = partial(model, input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    wanted = gradients(model, None, call)
    assert same(gradients(model, mode, call), wanted)
    assert not same(gradients(model, mode), wanted)


@modes
def test_under_autocast(mode: str) -> None:
    model = model_of(torch.float32)
    around = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    wanted = gradients(model, None, around=around)
    assert same(gradients(model, mode, around=around), wanted)
    assert not same(gradients(model, mode), wanted)


@modes
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_frozen_quantised_weights(kind: str, mode: str) -> None:
    """Gradients go through them to what is trained: the embedding, the norms, the gates and the head."""
    model = quantize(model_of(torch.float32, moe_intermediate_size=128), kind)
    wanted = gradients(model, None)
    assert wanted["model.embed_tokens.weight"].abs().sum() > 0
    assert same(gradients(model, mode), wanted)


@modes
def test_the_ways_of_the_forward_pass_are_taken_again(mode: str) -> None:
    """The backward pass may run outside of ``plain()``, and in a thread of its own, as on a GPU."""
    model = model_of()
    wanted = gradients(model, None, around=ops.plain)
    assert same(gradients(model, mode, around=ops.plain), wanted)
    with ops.plain():
        loss = model(tokens())[0].square().mean()
    model.zero_grad()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert same({name: weight.grad for name, weight in model.named_parameters()}, wanted)


def test_outside_of_training_and_with_caches_nothing_is_run_again() -> None:
    model = model_of()
    model.gradient_checkpointing_enable()
    layers, counted, ids = TINY.num_hidden_layers, calls(model), tokens()
    model.eval()
    model(ids)[0].sum().backward()
    assert counted.pop("layers") == layers
    model.train()
    model(ids, use_cache=True)[0].sum().backward()
    assert counted.pop("layers") == layers
    _, caches = model(ids, use_cache=True)
    model(ids, past_key_values=caches)[0].sum().backward()
    assert counted.pop("layers") == 2 * layers
    with torch.no_grad():
        model(ids)
    assert counted.pop("layers") == layers
    model(ids)[0].sum().backward()
    assert counted.pop("layers") == 2 * layers
    model.gradient_checkpointing_disable()
    model(ids)[0].sum().backward()
    assert counted.pop("layers") == layers


def test_a_model_without_a_head_and_a_layer_alone() -> None:
    model = DeepseekV2Model(TINY).train()
    model.gradient_checkpointing_enable("selective")
    assert model.gradient_checkpointing == "selective"
    layer, x = model.layers[1], torch.randn(2, 9, TINY.hidden_size, requires_grad=True)
    wanted = torch.autograd.grad(layer(x)[0].square().mean(), [x, *layer.parameters()])
    for mode in CHECKPOINTING:
        out = checkpointed(layer, mode)(x)[0].square().mean()
        found = torch.autograd.grad(out, [x, *layer.parameters()])
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("mode", ["none", True, 1, ""])
def test_other_modes_are_rejected(mode: Any) -> None:
    model = model_of()
    for use in (model.gradient_checkpointing_enable, partial(checkpointed, model.model.layers[0])):
        with pytest.raises(ValueError, match=rf"mode is {mode!r}; wanted full or selective"):
            use(mode)
    assert model.model.gradient_checkpointing is None


# What is run again


class Ran(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@modes
def test_selective_chooses_and_attends_once(mode: str) -> None:
    """``full`` does both again in the backward pass."""
    model = model_of(torch.float32, **V3)
    model.gradient_checkpointing_enable(mode)
    gates, layers = 1, TINY.num_hidden_layers
    loss = model(tokens())[0].square().mean()
    with Ran() as again:
        loss.backward()
    choices = 4 * gates  # the two best of each group, the groups, the experts; and the experts that the loss looks at
    assert again.counts["aten::topk"] == (0 if mode == "selective" else choices)
    assert again.counts[FUSED] == (0 if mode == "selective" else layers)
    assert again.counts["aten::silu"] == layers + gates  # of dense, routed and shared networks


def test_each_mode_holds_less_than_the_one_before() -> None:
    held = {}
    for mode in (None, "selective", "full"):
        model = model_of(torch.float32)
        if mode is not None:
            model.gradient_checkpointing_enable(mode)
        ids = tokens(2, 64)
        with LiveBytes() as live:
            out = model(ids)[0]
        held[mode] = live.now()
        del out
    assert held["full"] < held["selective"] < held[None] / 3


# The trap: a router that decides otherwise


NOISE = 1e-2
Around = Callable[[], AbstractContextManager[Any]]


def noisy(gate: MoEGate) -> None:
    """Make a gate decide a little differently at each call, as sums in another order would.

    V2's sees its tokens with noise; V3's has noise in the bias that chooses and weighs nothing.
    """
    generator, bias = torch.Generator().manual_seed(5), gate.e_score_correction_bias

    def add(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        x = given[0] if bias is None else bias
        moved = x + NOISE * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if bias is None:
            return (moved,)
        gate.e_score_correction_bias = moved
        return given

    gate.register_forward_pre_hook(add)


def of_noisy_layer(
    mode: str | None, around: Around, variant: dict[str, Any], capacity: float | None = None
) -> Gradients:
    """The gradients of the experts of a layer whose router is noisy, and may drop tokens."""
    torch.manual_seed(0)
    layer = DeepseekV2DecoderLayer(replace(TINY, aux_loss_alpha=0.0, **variant), 1).train().double()
    noisy(layer.mlp.gate)
    if capacity is not None:
        TokenDropping(layer, capacity)
    x = torch.randn(2, 64, TINY.hidden_size, dtype=torch.float64)
    with around():
        out = (layer if mode is None else checkpointed(layer, mode))(x)[0]
    out.square().mean().backward()
    return {name: weight.grad for name, weight in layer.mlp.experts.named_parameters()}


def error(mode: str, around: Around = nullcontext, capacity: float | None = None, **variant: Any) -> float:
    """The relative error of the experts' gradients, against those of the choices that were made."""
    wanted, found = (of_noisy_layer(each, around, variant, capacity) for each in (None, mode))
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


@pytest.mark.parametrize("variant", [{}, V3], ids=["v2", "v3"])
def test_full_stops_where_experts_get_other_numbers_of_tokens(variant: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="different metadata"):
        of_noisy_layer("full", ops.plain, variant)


def test_full_is_silently_wrong_where_the_shapes_fit() -> None:
    """Sorted by expert, all choices lie in one tensor, whose shape does not say to whom they belong. A token whose expert
    is another one the second time is wrong by all of its gradient: more than the noise by far."""
    assert error("full") > 5 * NOISE
    assert error("full", **V3) > 5 * NOISE


@pytest.mark.parametrize("around", [nullcontext, ops.plain], ids=["sorted", "plain"])
def test_selective_is_right(around: Around) -> None:
    """What is left in V2's is the noise of the scores that weigh; V3's choice is all that its noise touches."""
    assert 0 < error("selective", around) < NOISE
    assert error("selective", around, **V3) == 0


def test_without_the_choice_on_the_list_selective_falls_into_the_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "SAVED", recompute.SAVED - {"aten::topk"})
    assert error("selective", **V3) > 5 * NOISE
    with pytest.raises(RuntimeError):
        error("selective", ops.plain, **V3)


@pytest.mark.parametrize("around", [nullcontext, ops.plain], ids=["sorted", "plain"])
def test_selective_drops_what_it_dropped(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choices beyond a device's budget are those of the lowest weight, which has noise too."""
    assert 0 < error("selective", around, 0.7, **LIMITED) < NOISE
    monkeypatch.setattr(recompute, "SAVED", recompute.SAVED - {"aten::sort"})
    assert error("selective", around, 0.7, **LIMITED) > 5 * NOISE


# What counts in a forward pass counts once


@modes
def test_loads_are_counted_once(mode: str) -> None:
    model = model_of(**V3)
    balancing = LossFreeBalancing(model)
    gradients(model, mode)
    assert [int(load.sum()) for load in balancing.loads.values()] == [tokens().numel() * V3["num_experts_per_tok"]]
    layer, load = model.model.layers[1], next(iter(balancing.loads.values()))
    load.zero_()
    for use_reentrant in (False, True):  # torch's own, without this package's
        x = torch.randn(1, 5, TINY.hidden_size, dtype=torch.float64, requires_grad=True)
        checkpoint(layer, x, use_reentrant=use_reentrant)[0].sum().backward()
    assert int(load.sum()) == 2 * 5 * V3["num_experts_per_tok"]
