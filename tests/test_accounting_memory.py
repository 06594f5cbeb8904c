"""Activations as the accounting counts them, against the live storages of real layers and models.

Almost everything agrees to the byte. What may differ are tables and indices of a few bytes a token, which these sizes make
as large as they ever are; hence the tolerances.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import dsv2_ref.attend
from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM
from dsv2_ref import accounting as acc
from dsv2_ref.accounting.memory import attention
from dsv2_ref.accounting.memory.ledger import Ledger
from dsv2_ref.accounting.memory.parts import norm
from tests.flash_double import install_front_end
from tests.live_bytes import LiveBytes

TINY = DeepseekV2Config.tiny()
LATENT, PLAIN = TINY, replace(TINY, use_mla=False)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager(config: DeepseekV2Config) -> DeepseekV2Config:
    return replace(config, _attn_implementation="eager")


def device(config: DeepseekV2Config) -> str:
    """Where attention runs as it is counted: on the meta device, torch takes its fused kernel apart."""
    return "meta" if config._attn_implementation == "eager" or config.mla_form == "absorbed" else "cpu"


def seen(module: nn.Module, call: Callable[[], Tensor], training: bool) -> int:
    """The most bytes alive in a call, and on the way back; gradients of weights are not activations."""
    with torch.set_grad_enabled(training):
        gradient = torch.empty_like(call()) if training else None
        with LiveBytes() as live:
            out = call()
            if training:
                out.backward(gradient)
    return live.peak(p.grad for p in module.parameters() if p.grad is not None)


def of_layer(
    config: DeepseekV2Config, call: acc.Call, layer_idx: int, training: bool = False, checkpointing: bool = False
) -> int:
    dtype, past = DTYPES[call.dtype], call.kv - call.seq
    with torch.device(device(config)):
        layer = DeepseekV2DecoderLayer(config, layer_idx).to(dtype).train(training)
        x = torch.zeros(call.batch, call.seq, config.hidden_size, dtype=dtype, requires_grad=training)
        cache = None
        if past:
            cache = layer.self_attn.empty_cache(call.batch, capacity=call.kv + 3)
            cache = cache.append(torch.zeros(call.batch, past, *layer.self_attn.cache_features, dtype=dtype))
    run: Callable[..., Tensor] = lambda hidden_states: layer(hidden_states, past_key_value=cache)[0]  # noqa: E731
    if checkpointing:
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    return seen(layer, lambda: run(x), training)


def of_model(config: DeepseekV2Config, call: acc.Call, training: bool = False, checkpointing: bool = False) -> int:
    with torch.device(device(config)):
        model = DeepseekV2ForCausalLM(config).to(DTYPES[call.dtype]).train(training)
        ids = torch.zeros(call.batch, call.seq, dtype=torch.long)
    if checkpointing:
        for layer in model.model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return seen(model, lambda: model(ids)[0], training)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision on the CPU has a way of its own through attention, without gradients (`attend_blocks`)."""
    monkeypatch.setattr(dsv2_ref.attend, "suits_cpu_products", lambda *tensors: False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "variant",
    [
        {}, {"q_lora_rank": None}, {"attention_bias": True}, {"n_shared_experts": None}, {"num_experts_per_tok": 1},
        {"norm_topk_prob": True}, {"seq_aux": False}, {"aux_loss_alpha": 0.0}, {"v_head_dim": 24}, {"v_head_dim": 32},
        {"num_attention_heads": 1}, {"use_mla": False}, {"use_mla": False, "num_key_value_heads": 2},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    ],
    ids=lambda variant: " ".join(f"{name}={value}" for name, value in variant.items()) or "plain",
)  # fmt: skip
def test_a_layer_takes_what_is_counted(variant: dict[str, object], dtype: str) -> None:
    call = acc.Call(batch=2, seq=40, kv=40, form="expanded", dtype=dtype)
    for config in (replace(TINY, **variant), eager(replace(TINY, **variant))):
        for layer_idx, training in ((0, False), (1, False), (0, True), (1, True)):
            found = of_layer(config, call, layer_idx, training)
            counted = acc.activation_peak(config, call, layer_idx, training)
            assert counted == pytest.approx(found, rel=1e-3), (config._attn_implementation, layer_idx, training)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [LATENT, PLAIN, eager(LATENT), eager(PLAIN)], ids=["mla", "mha", "mla e", "mha e"])
@pytest.mark.parametrize(("training", "checkpointing"), [(False, False), (True, False), (True, True)])
def test_a_model_takes_what_is_counted(
    config: DeepseekV2Config, dtype: str, training: bool, checkpointing: bool
) -> None:
    call = acc.Call(batch=2, seq=24, kv=24, form="expanded", dtype=dtype)
    counted = acc.activation_peak(config, call, None, training, checkpointing)
    assert counted == pytest.approx(of_model(config, call, training, checkpointing), rel=1e-3)
    one = acc.activation_peak(config, call, 1, training, checkpointing)
    assert one == pytest.approx(of_layer(config, call, 1, training, checkpointing), rel=1e-3)


@pytest.mark.parametrize("at_once", [2**24, 1400, 300])
@pytest.mark.parametrize(("batch", "seq", "kv"), [(1, 12, 12), (2, 12, 30), (3, 1, 30), (1, 7, 40)])
@pytest.mark.parametrize("form", ["expanded", "absorbed", "auto"])
def test_over_a_cache_and_by_blocks_of_queries(
    form: str, batch: int, seq: int, kv: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dsv2_ref.attend, "SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
    for dtype in DTYPES if form == "absorbed" else ("float32",):
        call = acc.Call(batch=batch, seq=seq, kv=kv, form=form, dtype=dtype)
        config = PLAIN if form == "auto" else replace(LATENT, mla_form=form)
        assert acc.activation_peak(config, call, 1) == pytest.approx(of_layer(config, call, 1), rel=1e-3)
        if at_once == 2**24 and form != "absorbed":
            config = eager(config)
            assert acc.activation_peak(config, call, 1) == pytest.approx(of_layer(config, call, 1), rel=1e-3)


@pytest.mark.parametrize("layer_idx", [0, 1])
@pytest.mark.parametrize(("batch", "seq", "kv"), [(2, 40, 40), (2, 12, 60), (1, 7, 90), (3, 1, 60)])
@pytest.mark.parametrize("config", [replace(LATENT, mla_form="expanded"), PLAIN], ids=["mla", "mha"])
def test_flash_attention_over_a_cache(
    config: DeepseekV2Config, batch: int, seq: int, kv: int, layer_idx: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes all queries at once and no mask, so it needs none of the blocks of sdpa."""
    install_front_end(monkeypatch)
    config = replace(config, _attn_implementation="flash_attention_2")
    call = acc.Call(batch=batch, seq=seq, kv=kv)
    assert acc.activation_peak(config, call, layer_idx) == pytest.approx(of_layer(config, call, layer_idx), rel=1e-3)
    if seq == kv:  # its state of random numbers takes 16 bytes
        trained = acc.activation_peak(config, call, layer_idx, training=True)
        assert trained == pytest.approx(of_layer(config, call, layer_idx, training=True), rel=5e-3)


def test_absorbed_with_one_head() -> None:
    config = replace(LATENT, num_attention_heads=1, mla_form="absorbed", n_routed_experts=None)
    call = acc.Call(batch=3, seq=60, kv=60, form="absorbed", dtype="float32")
    assert acc.activation_peak(config, call, 0) == of_layer(config, call, 0)


def test_a_query_whose_compression_is_wider_than_all_else() -> None:
    """Its norm then takes the most, and whoever calls a module holds what it is given."""
    config = replace(LATENT, num_attention_heads=1, hidden_size=16, intermediate_size=16, q_lora_rank=400)
    for dtype, training in itertools.product(DTYPES, (False, True)):
        call = acc.Call(batch=2, seq=5, kv=5, form="expanded", dtype=dtype)
        counted = acc.activation_peak(config, call, 0, training)
        assert counted == pytest.approx(of_layer(config, call, 0, training), rel=1e-3)


@pytest.mark.parametrize(
    "config", [LATENT, PLAIN, replace(LATENT, mla_form="absorbed")], ids=["mla", "mha", "absorbed"]
)
@pytest.mark.parametrize("seq", [1, 2, 3])
def test_a_few_queries_over_a_long_cache(config: DeepseekV2Config, seq: int) -> None:
    """Where the places of all keys, of which the mask is made, may take more than the scores."""
    form = "absorbed" if config.mla_form == "absorbed" else "expanded"
    config = replace(config, mla_form=form)
    call = acc.Call(seq=seq, kv=3000, form=form)
    assert acc.activation_peak(config, call, 0) == pytest.approx(of_layer(config, call, 0), rel=1e-3)


NARROW: dict[str, int | None] = {"hidden_size": 16, "intermediate_size": 8, "n_routed_experts": None}


@pytest.mark.parametrize(
    ("variant", "layer_idx", "at_once", "seq", "kv"),
    [
        (NARROW | {"mla_form": "absorbed"}, 0, 14_000, 12, 300),  # what a block of queries leaves to the next
        (NARROW | {"num_attention_heads": 1, "kv_lora_rank": 200}, 0, 2**24, 4, 64),  # a copy of what is remembered
        (
            NARROW | {"num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 2, "qk_nope_head_dim": 2,
                      "qk_rope_head_dim": 2, "v_head_dim": 3},
            0, 2**24, 1, 1,
        ),  # in training, results that are cut to values
        (
            {"hidden_size": 8, "num_attention_heads": 1, "moe_intermediate_size": 8, "n_routed_experts": 256,
             "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 2, "num_experts_per_tok": 6},
            1, 2**24, 20, 20,
        ),  # scores of the groups that are left
    ],
    ids=["blocks", "remembered", "cut", "groups"],
)  # fmt: skip
def test_what_takes_the_most_in_no_usual_layer(
    variant: dict[str, object], layer_idx: int, at_once: int, seq: int, kv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dsv2_ref.attend, "SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
    config = replace(TINY, **{"mla_form": "expanded"} | variant)
    call = acc.Call(batch=2, seq=seq, kv=kv, form=config.mla_form, dtype="float32")
    assert acc.activation_peak(config, call, layer_idx, seq == 1) == of_layer(config, call, layer_idx, seq == 1)


def test_a_checkpointed_model_whose_last_layer_is_narrow() -> None:
    """The way back then needs most where its gradient comes in: nobody holds it longer than it is read."""
    config = replace(eager(LATENT), n_routed_experts=None, hidden_size=512, intermediate_size=8, num_hidden_layers=2)
    call = acc.Call(batch=2, seq=24, kv=24, form="expanded", dtype="float32")
    found = of_model(config, call, training=True, checkpointing=True)
    assert acc.activation_peak(config, call, None, True, True) == pytest.approx(found, rel=1e-3)
    found = of_layer(config, call, 1, training=True, checkpointing=True)
    assert acc.activation_peak(config, call, 1, True, True) == pytest.approx(found, rel=1e-3)


def layer_by_layer(p: acc.memory.Pass, training: bool, checkpointing: bool) -> int:
    """The peak of a model that is gone through in all its layers."""
    config, ledger = p.config, Ledger(training)
    x = ledger.leaf(p.tokens * config.hidden_size, p.width, counted=True)
    for layer_idx in range(config.num_hidden_layers):
        x = acc.memory._run(ledger, p, layer_idx, x, checkpointing)
    normed = norm(ledger, x, config.hidden_size, p.wide)
    del x
    out = ledger.cast(ledger.linear(normed, config.hidden_size, config.vocab_size), p.wide)
    del normed
    ledger.backward(out)
    return ledger.peak


@given(
    layers=st.integers(1, 9), first=st.integers(0, 9), every=st.integers(1, 4), experts=st.sampled_from([None, 8]),
    training=st.booleans(), checkpointing=st.booleans(), dense=st.sampled_from([8, 128, 2000]),
    vocab=st.sampled_from([5, 3000]),
)  # fmt: skip
def test_layers_that_are_alike_need_not_be_gone_through(
    layers: int,
    first: int,
    every: int,
    experts: int | None,
    training: bool,
    checkpointing: bool,
    dense: int,
    vocab: int,
) -> None:
    config = replace(
        TINY, num_hidden_layers=layers, first_k_dense_replace=first, moe_layer_freq=every, n_routed_experts=experts,
        intermediate_size=dense, vocab_size=vocab,
    )  # fmt: skip
    checkpointing &= training
    p = acc.memory.Pass(config=config, batch=2, seq=9, kv=9, width=2, absorbed=False)
    assert acc.memory.peak(p, None, training, checkpointing) == layer_by_layer(p, training, checkpointing)


def test_blocks_are_as_large_as_the_references() -> None:
    assert attention.SCORES_AT_ONCE == dsv2_ref.attend.SCORES_AT_ONCE


@st.composite
def configs(draw: st.DrawFn) -> DeepseekV2Config:
    """Experts' rows are multiples of 16 bytes: grouped products pad others, which is not counted."""
    size, heads, mla = st.integers(4, 40), draw(st.integers(1, 5)), draw(st.booleans())
    form = draw(st.sampled_from(["expanded", "absorbed"])) if mla else "expanded"
    experts = draw(st.none() | st.integers(2, 9))
    return replace(
        TINY,
        hidden_size=8 * heads * draw(st.integers(1, 6)),
        num_attention_heads=heads,
        use_mla=mla,
        num_key_value_heads=None if mla else draw(st.sampled_from([h for h in range(1, 6) if heads % h == 0])),
        q_lora_rank=draw(st.none() | size),
        kv_lora_rank=draw(size),
        qk_nope_head_dim=draw(size),
        qk_rope_head_dim=2 * draw(size),
        v_head_dim=draw(size),
        intermediate_size=draw(size),
        moe_intermediate_size=8 * draw(st.integers(1, 5)),
        n_routed_experts=experts,
        n_shared_experts=draw(st.none() | st.integers(1, 3)),
        num_experts_per_tok=draw(st.integers(1, experts or 1)),
        norm_topk_prob=draw(st.booleans()),
        seq_aux=draw(st.booleans()),
        attention_bias=form == "expanded" and draw(st.booleans()),  # else see `LiveBytes`
        num_hidden_layers=draw(st.integers(2, 4)),
        first_k_dense_replace=draw(st.integers(0, 2)),
        vocab_size=draw(st.sampled_from([8, 400])),
        _attn_implementation=draw(st.sampled_from(["eager", "sdpa"])),
        mla_form=form,
    )


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=configs(), batch=st.integers(1, 3), seq=st.integers(1, 40), dtype=st.sampled_from([*DTYPES]), data=st.data()
)
def test_whatever_is_called_takes_what_is_counted(
    config: DeepseekV2Config, batch: int, seq: int, dtype: str, data: st.DataObject
) -> None:
    """The memory of any layer in any call, and of any model."""
    training = config.mla_form == "expanded" and data.draw(st.booleans())
    checkpointing = training and data.draw(st.booleans())
    layer_idx = data.draw(st.sampled_from([0, 1, None]))
    past = 0 if training or layer_idx is None else data.draw(st.sampled_from([0, 1, 30, 64]))
    call = acc.Call(batch=batch, seq=seq, kv=past + seq, form=config.mla_form, dtype=dtype)
    if layer_idx is None:
        found = of_model(config, call, training, checkpointing)
    else:
        found = of_layer(config, call, layer_idx, training, checkpointing)
    assert acc.activation_peak(config, call, layer_idx, training, checkpointing) == pytest.approx(found, rel=0.005)


@pytest.mark.parametrize("training", [False, True])
def test_a_published_layer(training: bool) -> None:
    """V2-Lite's sizes, where scores of 512 tokens take hundreds of megabytes, on the meta device, which has none."""
    config = eager(DeepseekV2Config.deepseek_v2_lite())
    call = acc.Call(batch=1, seq=512, kv=512, form="expanded")
    assert acc.activation_peak(config, call, 1, training) == of_layer(config, call, 1, training)


def test_pytorchs_own_allocator_gives_out_as_much() -> None:
    """A second witness, which has no part in the first: what the CPU's allocator hands out and takes back."""
    config, call = eager(LATENT), acc.Call(batch=2, seq=120, kv=120, form="expanded", dtype="float32")
    layer, x = DeepseekV2DecoderLayer(config, 1).eval(), torch.zeros(2, 120, config.hidden_size)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        layer(x)
    kineto = watched.profiler.kineto_results.events()  # torch's own list of events leaves allocations out
    moments = sorted((e for e in kineto if e.name() == "[memory]"), key=lambda e: e.start_ns())
    assert len(moments) > 200
    peak = max(itertools.accumulate(e.nbytes() for e in moments))
    assert acc.activation_peak(config, call, 1) == peak


def test_what_takes_memory_and_what_saves_it() -> None:
    """Relations that hold for any size worth the name."""
    v2 = DeepseekV2Config.deepseek_v2()
    prompt, twice = acc.Call(seq=2048, kv=2048), acc.Call(seq=4096, kv=4096)
    held = partial(acc.activation_peak, layer_idx=1)
    assert held(eager(v2), twice) > 3.5 * held(eager(v2), prompt)  # all pairs of tokens
    assert held(v2, twice) == pytest.approx(2 * held(v2, prompt), rel=0.01)  # fused: so much a token
    whole = partial(acc.activation_peak, v2, prompt)
    assert whole() < whole(training=True, checkpointing=True) < whole(training=True) / 10
    decode = acc.activation_peak(v2, acc.Call(seq=1, kv=8192))
    assert decode < acc.activation_peak(v2, acc.Call(seq=1, kv=8192, form="expanded")) / 20


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpointing is True; wanted False"):
        acc.activation_peak(TINY, acc.Call(), checkpointing=True)
    with pytest.raises(ValueError, match="kv is 9; wanted the 4 new tokens"):
        acc.activation_peak(TINY, acc.Call(seq=4, kv=9), training=True)
    with pytest.raises(ValueError, match="wanted expanded"):
        acc.activation_peak(TINY, acc.Call(seq=4, kv=4, form="absorbed"), training=True)
    absorbed = replace(TINY, mla_form="absorbed")
    with pytest.raises(ValueError, match="wanted expanded"):
        acc.activation_peak(absorbed, acc.Call(seq=4, kv=4), training=True)
    cheap = replace(TINY, kv_lora_rank=8)
    assert acc.report(cheap, acc.Call(seq=4, kv=4))["config"]["call"]["form"] == "absorbed"
    trained = acc.report(cheap, acc.Call(seq=4, kv=4), training=True)
    assert trained == acc.report(cheap, acc.Call(seq=4, kv=4, form="expanded"), training=True)
    noisy = replace(TINY, attention_dropout=0.1)
    assert acc.activation_peak(noisy, acc.Call(seq=4, kv=4)) == acc.activation_peak(TINY, acc.Call(seq=4, kv=4))
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1; wanted 0"):
        acc.activation_peak(noisy, acc.Call(seq=4, kv=4), training=True)
    crowd = replace(TINY, n_routed_experts=1_001, num_experts_per_tok=1_001)
    with pytest.raises(ValueError, match="num_experts_per_tok is 1001; wanted at most 1000"):
        acc.activation_peak(crowd, acc.Call())
    assert acc.activation_peak(replace(crowd, num_experts_per_tok=1_000), acc.Call(), training=True) > 0
    assert acc.activation_peak(replace(crowd, n_routed_experts=None), acc.Call()) > 0
    flash = replace(TINY, _attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="dtype is 'float32'; wanted float16 or bfloat16"):
        acc.activation_peak(flash, acc.Call(seq=4, kv=4, dtype="float32"))
    assert acc.activation_peak(flash, acc.Call(seq=1, kv=400, form="absorbed", dtype="float32")) > 0
    with pytest.raises(ValueError, match="layer is 4; wanted from 0 to 3"):
        acc.activation_peak(TINY, acc.Call(), 4)


def test_live_bytes_sees_what_is_alive() -> None:
    with LiveBytes() as live:
        first = torch.zeros(100)
        second = first + 1
        view = second[10:]
        del first, second
        third = torch.zeros(25)
        assert live.now() == 500
    assert live.peak() == 800
    assert live.peak(without=[view]) == 400
    assert third.shape == (25,)


def test_a_copy_forgotten_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: eager attention without its float32 copies, a norm that keeps nothing for its gradient."""
    call = acc.Call(batch=2, seq=40, kv=40, form="expanded", dtype="bfloat16")
    found = of_layer(eager(LATENT), call, 1)
    monkeypatch.setattr(attention, "_weights", lambda ledger, p, scores, mask: ledger.softmax(scores))
    assert acc.activation_peak(eager(LATENT), call, 1) < 0.9 * found
    monkeypatch.undo()
    found = of_layer(LATENT, call, 1, training=True)
    for name in ("mapped", "times_weight"):
        forgets = f"dsv2_ref.accounting.memory.ledger.Ledger.{name}"
        monkeypatch.setattr(forgets, lambda ledger, x: ledger.make(x.count, x.width, x))
    assert acc.activation_peak(LATENT, call, 1, training=True) < 0.98 * found


def test_all_of_this_where_signatures_are_not_checked() -> None:
    """Who checks a call holds what it passes on: layer and ledger could agree here, and for nobody else."""
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here.name, "-k", "not signatures"]
    unchecked = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    unchecked["DSV2_TEST_DEVICE"] = "cpu"  # see conftest.py
    done = subprocess.run(command, cwd=here.parent, env=unchecked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
