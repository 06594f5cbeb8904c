"""What the accounting says of training, against what PyTorch counts while real layers and models are trained."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM
from dsv2_ref import accounting as acc
from dsv2_ref.accounting import training
from dsv2_ref.fast import products
from dsv2_ref.recompute import checkpointed
from tests.test_accounting import configs, grouped, preset

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
    products._grouped_product._opoverload.overloadpacket: grouped,
    products._grouped_outer._opoverload.overloadpacket: outer,
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


@settings(max_examples=20)
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
