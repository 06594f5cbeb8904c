"""What the accounting says of training, against what PyTorch counts while real layers and models are trained."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM
from dsv2_ref import accounting as acc
from dsv2_ref.__main__ import main
from dsv2_ref.accounting import training
from dsv2_ref.fast import products
from dsv2_ref.recompute import checkpointed
from tests.examples import fewer
from tests.test_accounting import configs, grouped, preset

pytestmark = pytest.mark.slow

MODES = (None, *acc.CHECKPOINTING)
Shape = tuple[int, ...]


def outer(left: Shape, right: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def attention(query: Shape, key: Shape, value: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Scores and values of all pairs, as torch counts them for its kernels on GPUs."""
    batch, heads, seq, width = query
    return 2 * batch * heads * seq * key[2] * (width + value[3])


def attention_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Scores once more; the gradients of queries, keys and values, and of the weights."""
    batch, heads, seq, width = query
    return 2 * batch * heads * seq * key[2] * (3 * width + 2 * value[3])


MAPPING: dict[Any, Callable[..., int]] = {
    products._grouped_product.overloadpacket: grouped,
    products._grouped_outer.overloadpacket: outer,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def seen_in_a_layer(config: DeepseekV2Config, layer_idx: int, call: acc.Call, mode: str | None) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass of a real layer, whose input wants a gradient."""
    layer = DeepseekV2DecoderLayer(config, layer_idx).train()
    if config.use_mla:
        layer.self_attn.form = call.form
    x = torch.randn(call.batch, call.seq, config.hidden_size, requires_grad=True)
    run = layer if mode is None else checkpointed(layer, mode)
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        out = run(x)[0]
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def seen_in_a_model(config: DeepseekV2Config, call: acc.Call, mode: str | None) -> tuple[int, int]:
    model = DeepseekV2ForCausalLM(replace(config, mla_form=call.form)).train()
    if mode is not None:
        model.gradient_checkpointing_enable(mode)
    ids = torch.randint(config.vocab_size, (call.batch, call.seq))
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        out = model(ids)[0]
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def padding(config: DeepseekV2Config, call: acc.Call) -> tuple[int, int]:
    """What a layer's fused attention computes with the zeros that make keys and values equally wide: in a forward pass, and
    in a backward pass, where widths of keys count three times and those of values twice."""
    if not config.use_mla or not training.is_fused(config, call):
        return 0, 0
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    more_keys, more_values = max(key, value) - key, max(key, value) - value
    pairs = 2 * call.batch * config.num_attention_heads * call.pairs
    return pairs * (more_keys + more_values), pairs * (3 * more_keys + 2 * more_values)


@st.composite
def steps(draw: st.DrawFn) -> tuple[DeepseekV2Config, acc.Call, str | None]:
    config = replace(
        draw(configs()), _attn_implementation=draw(st.sampled_from(["eager", "sdpa"])), aux_loss_alpha=0.01
    )
    seq = draw(st.integers(1, 5))
    form = draw(st.sampled_from(["expanded", "absorbed"])) if config.use_mla else "expanded"
    call = acc.Call(batch=draw(st.integers(1, 3)), seq=seq, kv=seq, form=form, causal=False)
    return config, call, draw(st.sampled_from(MODES))


Step = tuple[DeepseekV2Config, acc.Call, str | None]


def counted(config: DeepseekV2Config, layer_idx: int | None, call: acc.Call, mode: str | None) -> tuple[int, int]:
    """What the accounting says of both passes, with the zeros that the fused kernel multiplies."""
    flops = {part: sum(counts.values()) for part, counts in acc.step_flops(config, call, layer_idx, mode).items()}
    layers = config.num_hidden_layers if layer_idx is None else 1
    forward, backward = padding(config, call)
    backward += forward if mode == "full" else 0
    return flops["forward"] + layers * forward, flops["backward"] + flops["recomputed"] + layers * backward


@given(step=steps(), layer_idx=st.integers(0, 2))
def test_both_passes_of_any_layer_are_what_pytorch_counts(step: Step, layer_idx: int) -> None:
    config, call, mode = step
    assert counted(config, layer_idx, call, mode) == seen_in_a_layer(config, layer_idx, call, mode)
    flops = acc.step_flops(config, call, layer_idx, mode)
    assert flops["forward"] == acc.products(config, layer_idx, call)
    assert flops["backward"] == acc.backward(config, layer_idx, call)
    assert flops["recomputed"] == acc.recomputed(config, layer_idx, call, mode)


@fewer(2)
@given(step=steps())
def test_both_passes_of_any_model_are_what_pytorch_counts(step: Step) -> None:
    config, call, mode = step
    assert counted(config, None, call, mode) == seen_in_a_model(config, call, mode)
    assert (
        acc.model_flops(config, call)
        == 3 * seen_in_a_model(config, call, None)[0] - 3 * config.num_hidden_layers * padding(config, call)[0]
    )


PLANTED = {
    "one product per weight": ("backward", lambda *args: acc.products(*args)),
    "no kernel computes scores again": ("is_fused", lambda *_: False),
    "the last product runs again": ("recomputed", lambda config, index, call, mode: acc.products(config, index, call)),
    "nothing runs again": ("recomputed", lambda *_: {}),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(preset("tiny"), num_hidden_layers=2, v_head_dim=24)
    call = acc.Call(batch=2, seq=5, kv=5, form="expanded", causal=False)
    right = [counted(config, 1, call, mode) == seen_in_a_layer(config, 1, call, mode) for mode in MODES]
    assert all(right)
    monkeypatch.setattr(training, *PLANTED[fault])
    wrong = [counted(config, 1, call, mode) != seen_in_a_layer(config, 1, call, mode) for mode in MODES]
    assert any(wrong)


# The rule 6ND, and utilisation


@given(step=steps())
def test_six_nd_and_its_error_make_the_sum(step: Step) -> None:
    config, call, _ = step
    rule = acc.six_nd(config, call)
    assert rule["6ND"] == 6 * sum(acc.model_parameters(config, active=True).values()) * call.tokens
    assert sum(rule.values()) == acc.model_flops(config, call)
    longer = replace(call, seq=2 * call.seq, kv=2 * call.seq)
    more = acc.six_nd(config, longer)
    assert more["6ND"] == 2 * rule["6ND"]
    assert more["attention"] == 4 * rule["attention"] > 0 > more["not multiplied"] == 2 * rule["not multiplied"]


def test_what_the_rule_does_not_multiply() -> None:
    """By hand, for V2: an embedding's row, and the norms."""
    v2 = preset("deepseek_v2")
    vectors = 5120 + 60 * (2 * 5120 + 1536 + 512) + 5120
    assert acc.six_nd(v2, acc.Call(seq=64, kv=64))["not multiplied"] == -6 * 64 * vectors


def test_utilisation_in_the_training_of_v2() -> None:
    """172.8 thousand hours of H800s for a trillion tokens (DeepSeek-V2, section 3.2.3), at 989 TFLOP/s each: 20 % by 6ND."""
    v2, call, peak = preset("deepseek_v2"), acc.Call(seq=4096, kv=4096), 989e12
    each = 1e12 / (172_800 * 3600)
    by_rule = acc.six_nd(v2, call)["6ND"] / call.tokens * each / peak
    assert by_rule == pytest.approx(0.2, abs=0.01)
    assert acc.mfu(v2, call, each, peak) == pytest.approx(
        by_rule * acc.model_flops(v2, call) / acc.six_nd(v2, call)["6ND"]
    )
    assert acc.mfu(v2, call, 8 * each, 8 * peak) == pytest.approx(acc.mfu(v2, call, each, peak), rel=1e-15)
    assert acc.mfu(v2, replace(call, batch=7), each, peak) == acc.mfu(v2, call, each, peak)


# Bytes from step to step


def optimised(optimizer: str, weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    if optimizer == "adamw":
        return torch.optim.AdamW(weights)
    return torch.optim.SGD(weights, lr=0.1, momentum=0.9 if optimizer == "momentum" else 0)


@pytest.mark.parametrize("optimizer", acc.OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("layer_idx", [None, 0, 1])
def test_states_are_those_of_pytorchs_optimizers(layer_idx: int | None, dtype: str, optimizer: str) -> None:
    """After a step; what is one number per tensor is left out."""
    config, call = replace(preset("tiny"), num_hidden_layers=2), acc.Call(seq=9, kv=9, dtype=dtype)
    whole = DeepseekV2ForCausalLM(config).to(getattr(torch, dtype)).train()
    module = whole if layer_idx is None else whole.model.layers[layer_idx]
    whole(torch.randint(config.vocab_size, (1, 9)))[0].square().mean().backward()
    weights = list(module.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    masters = [weight.detach().float().requires_grad_() for weight in weights] if dtype == "bfloat16" else []
    for master, weight in zip(masters, weights, strict=False):
        master.grad = weight.grad.float()
    stepped = optimised(optimizer, masters or weights)
    stepped.step()
    states = [x for state in stepped.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.ndim]

    def size(tensors: list[Any]) -> int:
        return sum(x.nbytes for x in tensors)

    assert acc.state_bytes(config, call, layer_idx, optimizer) == {
        "weights": size(weights),
        "gradients": size([weight.grad for weight in weights]),
        "master_weights": size(masters),
        "optimizer": size(states),
    }


def test_sixteen_bytes_per_parameter_of_v2_lite() -> None:
    lite, call = preset("deepseek_v2_lite"), acc.Call(seq=4096, kv=4096)
    for dtype in ("bfloat16", "float32"):
        found = acc.state_bytes(lite, replace(call, dtype=dtype))
        assert sum(found.values()) == 16 * sum(acc.model_parameters(lite).values())


# What is printed


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["account", "--training", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
def test_the_command_tells_of_training(mode: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, call = preset("tiny"), acc.Call(batch=2, seq=24, kv=24)
    arguments = ["--preset", "tiny", "--batch", "2", "--seq", "24", "--optimizer", "momentum"]
    arguments += [] if mode is None else ["--checkpointing", mode]
    found = json.loads(printed(capsys, *arguments, "--json"))
    step, flops = found["training"], acc.step_flops(tiny, call, None, mode)
    sums = {part: sum(counts.values()) for part, counts in flops.items()}
    by_operation = step["flops"].pop("by_operation")
    assert step["flops"] == sums | {"total": sum(sums.values())}
    assert sums["forward"] == found["flops"]["products"]
    assert {part: {n: one[part] for n, one in by_operation.items() if one[part]} for part in sums} == flops
    assert step["six_nd"] == acc.six_nd(tiny, call)
    sizes = acc.state_bytes(tiny, call, None, "momentum")
    peak = acc.activation_peak(tiny, call, None, True, mode)
    assert step["bytes"] == sizes | {"activations": peak, "total": sum(sizes.values()) + peak}
    assert sizes["weights"] == found["bytes"]["weights"]
    assert found["config"]["call"]["checkpointing"] == mode
    table = printed(capsys, *arguments)
    for name, number in (step["flops"] | step["bytes"]).items():
        assert f"{name.replace('_', ' '):46}".strip() in table
        assert f"{number:,}" in table, name
    assert max(map(len, table.splitlines())) < 100


def test_one_layer_has_no_rule_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "--preset", "tiny", "--layer", "1", "--seq", "5", "--json"))["training"]
    assert found["six_nd"] is None
    assert found["optimizer"] == "adamw"
    assert "6ND" not in printed(capsys, "--preset", "tiny", "--layer", "1", "--seq", "5")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda config, call: acc.mfu(config, call, -1.0, 1.0), r"tokens_per_second is -1\.0; wanted a finite"),
        (lambda config, call: acc.mfu(config, call, 1.0, 0.0), r"peak is 0\.0; wanted a finite number above 0"),
        (lambda config, call: acc.mfu(config, call, 1.0, float("inf")), "peak is inf; wanted a finite number above 0"),
        (lambda config, call: acc.mfu(config, call, "9", 1.0), "tokens_per_second is '9'; wanted a finite number"),
        (lambda config, call: acc.state_bytes(config, call, None, ["sgd"]), "optimizer is a list of 1; wanted adamw"),
        (lambda config, call: acc.recomputed(config, 1, call, "some"), "checkpointing is 'some'; wanted None, full or"),
        (lambda config, call: acc.backward(config, 4, call), "layer is 4; wanted from 0 to 3"),
        (lambda config, call: acc.backward(config, 0, replace(call, kv=9)), "kv is 9; wanted the 4 new tokens"),
        (lambda config, call: acc.state_bytes(config, call, None, "adam"), "optimizer is 'adam'; wanted adamw, momentum"),
        (lambda config, call: acc.state_bytes(config, replace(call, dtype="int8")), "no layer is trained in int8"),
        (lambda config, call: acc.six_nd(config, replace(call, weights="int8")), "weights is 'int8'; wanted None"),
    ],
)  # fmt: skip
def test_what_is_rejected(call: Callable[..., Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(preset("tiny"), acc.Call(seq=4, kv=4))
