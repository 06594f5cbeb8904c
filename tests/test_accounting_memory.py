"""Bytes of activations, as the accounting counts them on the meta device: against storages
that are alive in real layers and models, recorded figures, and relations that must hold."""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile

from dsv2_ref import DeepseekV2Attention, DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM, ops
from dsv2_ref import accounting as acc
from dsv2_ref.__main__ import main
from dsv2_ref.recompute import checkpointed
from tests.examples import fewer, thorough
from tests.live_bytes import LiveBytes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TINY = DeepseekV2Config.tiny()
CARD = DeepseekV2Config.card()
LATENT, PLAIN = TINY, replace(TINY, use_mla=False)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager(config: DeepseekV2Config) -> DeepseekV2Config:
    return replace(config, _attn_implementation="eager")


# The witness: real layers on the CPU


def seen(module: nn.Module, call: Callable[[], Tensor], training: bool) -> int:
    """The most bytes alive in a call and its backward pass, less the gradients of weights."""
    with ops.without("cpu"), torch.set_grad_enabled(training):
        gradient = torch.empty_like(call()) if training else None
        with LiveBytes() as live:
            out = call()
            if training:
                out.backward(gradient)
    return live.peak(p.grad for p in module.parameters() if p.grad is not None)


def device(config: DeepseekV2Config, call: acc.Call) -> str:
    """The CPU; but there, the absorbed form multiplies one sequence after another."""
    return "meta" if config.use_mla and call.form == "absorbed" and call.batch > 1 else "cpu"


def of_layer(
    config: DeepseekV2Config, call: acc.Call, layer_idx: int, training: bool = False, checkpointing: str | None = None
) -> int:
    dtype, past = DTYPES[call.dtype], call.kv - call.seq
    with torch.device(device(config, call)):
        layer = DeepseekV2DecoderLayer(config, layer_idx).to(dtype).train(training)
        x = torch.zeros(call.batch, call.seq, config.hidden_size, dtype=dtype, requires_grad=training)
        cache = None
        if past:
            cache = layer.self_attn.empty_cache(call.batch, capacity=call.kv + 3)
            cache = cache.append(torch.zeros(call.batch, past, *layer.self_attn.cache_features, dtype=dtype))
    run: Callable[..., Tensor] = lambda hidden_states: layer(hidden_states, past_key_value=cache)[0]  # noqa: E731
    if checkpointing:
        run = checkpointed(run, checkpointing)
    return seen(layer, lambda: run(x), training)


def of_model(config: DeepseekV2Config, call: acc.Call, training: bool = False, checkpointing: str | None = None) -> int:
    """All layers run."""
    with torch.device(device(config, call)):
        model = DeepseekV2ForCausalLM(config).to(DTYPES[call.dtype]).train(training)
        ids = torch.zeros(call.batch, call.seq, dtype=torch.long)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    return seen(model, lambda: model(ids)[0], training)


@pytest.mark.parametrize("dtype", ["bfloat16", *thorough(*(dtype for dtype in DTYPES if dtype != "bfloat16"))])
@pytest.mark.parametrize(
    "variant",
    [
        {}, {"q_lora_rank": None}, {"n_shared_experts": None}, {"v_head_dim": 24}, {"use_mla": False},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
        *thorough(
            {"attention_bias": True}, {"num_experts_per_tok": 1}, {"norm_topk_prob": True}, {"seq_aux": False},
            {"aux_loss_alpha": 0.0}, {"v_head_dim": 32}, {"num_attention_heads": 1},
            {"use_mla": False, "num_key_value_heads": 2},
        ),
    ],
    ids=lambda variant: " ".join(f"{name}={value}" for name, value in variant.items()) or "plain",
)  # fmt: skip
def test_a_real_layer_takes_what_is_counted(variant: dict[str, Any], dtype: str) -> None:
    call = acc.Call(batch=2, seq=40, kv=40, form="expanded", dtype=dtype)
    plain = replace(TINY, mla_form="expanded", **variant)
    for config in (plain, eager(plain)):
        for layer_idx, training in ((0, False), (1, False), (0, True), (1, True)):
            found = of_layer(config, call, layer_idx, training)
            counted = acc.activation_peak(config, call, layer_idx, training)
            assert counted == pytest.approx(found, rel=1e-3), (config._attn_implementation, layer_idx, training)


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
        attention_bias=draw(st.booleans()),
        num_hidden_layers=draw(st.integers(2, 4)),
        first_k_dense_replace=draw(st.integers(0, 2)),
        vocab_size=draw(st.sampled_from([8, 400])),
        tie_word_embeddings=draw(st.booleans()),
        _attn_implementation=draw(st.sampled_from(["eager", "sdpa"])),
        mla_form=form,
    )


@given(
    config=configs(), batch=st.integers(1, 3), seq=st.integers(1, 40), dtype=st.sampled_from([*DTYPES]), data=st.data()
)
def test_whatever_is_called_takes_what_is_counted(
    config: DeepseekV2Config, batch: int, seq: int, dtype: str, data: st.DataObject
) -> None:
    """Any layer in any call, and any model; the absorbed form in training as well."""
    training = data.draw(st.booleans())
    checkpointing = data.draw(st.sampled_from([None, *acc.CHECKPOINTING])) if training else None
    layer_idx = data.draw(st.sampled_from([0, 1, None]))
    past = 0 if training or layer_idx is None else data.draw(st.sampled_from([0, 1, 30, 64]))
    call = acc.Call(batch=batch, seq=seq, kv=past + seq, form=config.mla_form, dtype=dtype)
    if layer_idx is None:
        found = of_model(config, call, training, checkpointing)
    else:
        found = of_layer(config, call, layer_idx, training, checkpointing)
    assert acc.activation_peak(config, call, layer_idx, training, checkpointing) == pytest.approx(found, rel=0.005)


def test_pytorchs_own_allocator_gives_out_as_much() -> None:
    """A second witness, which has no part in the first: what the CPU's allocator hands out and takes back."""
    config, call = eager(LATENT), acc.Call(batch=2, seq=120, kv=120, form="expanded", dtype="float32")
    layer, x = DeepseekV2DecoderLayer(config, 1).eval(), torch.zeros(2, 120, config.hidden_size)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        layer(x)
    kineto = watched.profiler.kineto_results.events()  # torch's own list of events leaves allocations out
    moments = sorted((e for e in kineto if e.name() == "[memory]"), key=lambda e: e.start_ns())
    assert len(moments) > 200
    peak = max(itertools.accumulate(e.nbytes() for e in moments))
    assert acc.activation_peak(config, call, 1) == peak


# Models: one layer of each kind stands for all


@fewer(2)
@given(
    layers=st.integers(1, 7), first=st.integers(0, 3), every=st.integers(1, 3), experts=st.sampled_from([None, 8]),
    training=st.booleans(), checkpointing=st.sampled_from([None, *acc.CHECKPOINTING]), dense=st.sampled_from([8, 128, 2000]),
    vocab=st.sampled_from([5, 3000]), tied=st.booleans(), attention=st.sampled_from(["eager", "sdpa"]),
    mla=st.booleans(), dtype=st.sampled_from([*DTYPES]),
)  # fmt: skip
def test_one_layer_of_each_kind_stands_for_all(
    layers: int, first: int, every: int, experts: int | None, training: bool, checkpointing: str | None, dense: int,
    vocab: int, tied: bool, attention: str, mla: bool, dtype: str,
) -> None:  # fmt: skip
    config = replace(
        TINY, num_hidden_layers=layers, first_k_dense_replace=first, moe_layer_freq=every, n_routed_experts=experts,
        intermediate_size=dense, vocab_size=vocab, tie_word_embeddings=tied, use_mla=mla, mla_form="expanded",
        _attn_implementation=attention,
    )  # fmt: skip
    checkpointing = checkpointing if training else None
    call = acc.Call(batch=2, seq=9, kv=9, dtype=dtype)
    assert acc.activation_peak(config, call, None, training, checkpointing) == of_model(
        config, call, training, checkpointing
    )


@pytest.mark.parametrize("config", [replace(LATENT, mla_form="expanded"), PLAIN], ids=["mla", "mha"])
def test_a_model_over_its_caches(config: DeepseekV2Config) -> None:
    """Of which each layer has its own."""
    model, ids, caches = DeepseekV2ForCausalLM(config).eval(), torch.zeros(2, 3, dtype=torch.long), []
    for layer in model.model.layers:
        cache = layer.self_attn.empty_cache(2, capacity=40)
        caches.append(cache.append(torch.zeros(2, 30, *layer.self_attn.cache_features)))
    found = seen(model, lambda: model(ids, past_key_values=caches)[0], training=False)
    assert acc.activation_peak(config, acc.Call(batch=2, seq=3, kv=33, dtype="float32")) == found


# Relations and recorded figures

RECORDED = """
import json, time, torch, torch.utils.checkpoint
from dataclasses import replace
from dsv2_ref import DeepseekV2Config, DeepseekV2ForCausalLM, accounting as acc
card, lite = DeepseekV2Config.card(), DeepseekV2Config.deepseek_v2_lite()
prompt, decode = acc.Call(seq=8192, kv=8192), acc.Call(seq=1, kv=8192)
cases = {
    "prompt, float32": (card, replace(prompt, dtype="float32"), 1),
    "prompt": (card, prompt, 1),
    "prompt, flash": (replace(card, _attn_implementation="flash_attention_2"), prompt, 1),
    "prompt, eager": (replace(card, _attn_implementation="eager"), acc.Call(seq=2048, kv=2048), 1),
    "decode": (card, decode, 1),
    "training": (card, prompt, 1, True),
    "training, absorbed": (card, acc.Call(seq=512, kv=512, form="absorbed"), 1, True),
    "model": (card, prompt),
    "model, training": (card, prompt, None, True),
    "model, checkpointed": (card, prompt, None, True, True),
    "model, selective": (card, prompt, None, True, "selective"),
}
found = {}
for name, case in cases.items():
    began = time.perf_counter()
    found[name] = acc.activation_peak(*case), time.perf_counter() - began
print(json.dumps(found))
"""
FIGURES = {
    "prompt, float32": 5_435_817_984,
    "prompt": 2_721_054_720,
    "prompt, flash": 2_721_054_720,
    "prompt, eager": 5_850_791_936,
    "decode": 4_673_408,
    "training": 3_488_710_656,
    "training, absorbed": 450_172_928,
    "model": 5_054_136_320,
    "model, training": 112_388_064_000,
    "model, checkpointed": 7_662_043_136,
    "model, selective": 23_536_566_272,
}


def test_figures_of_the_cards_layer_and_model() -> None:
    """Where signatures are not checked: who checks a call holds what it passes on. Each is counted in no time."""
    command = [sys.executable, "-c", RECORDED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: size for name, (size, _) in found.items()} == FIGURES
    for name, (_, seconds) in found.items():
        assert seconds < (20 if name.startswith("model") else 5), name


def test_what_takes_memory_and_what_saves_it() -> None:
    """Relations that hold for any size worth the name."""
    v2 = DeepseekV2Config.deepseek_v2()
    prompt, twice = acc.Call(seq=2048, kv=2048), acc.Call(seq=4096, kv=4096)
    held = partial(acc.activation_peak, layer_idx=1)
    assert held(eager(v2), twice) > 3.5 * held(eager(v2), prompt)  # all pairs of tokens
    assert held(v2, twice) == pytest.approx(2 * held(v2, prompt), rel=0.01)  # fused: the same per token
    whole = partial(acc.activation_peak, v2, prompt)
    assert whole() < whole(training=True, checkpointing=True) < whole(training=True) / 10
    decode = acc.activation_peak(v2, acc.Call(seq=1, kv=8192))
    assert decode < acc.activation_peak(v2, acc.Call(seq=1, kv=8192, form="expanded")) / 20


@fewer(4)
@given(
    config=configs(), batch=st.integers(1, 3), seq=st.integers(1, 30), past=st.integers(0, 30),
    layer_idx=st.sampled_from([None, 1]),
)  # fmt: skip
def test_more_takes_more(config: DeepseekV2Config, batch: int, seq: int, past: int, layer_idx: int | None) -> None:
    call = acc.Call(batch=batch, seq=seq, kv=seq + past, form=config.mla_form)
    held = partial(acc.activation_peak, config, layer_idx=layer_idx)
    least = held(call)
    assert held(replace(call, batch=batch + 1)) >= least
    # Not beside bfloat16, of which eager attention and norms hold copies in float32.
    assert held(replace(call, dtype="float64")) >= held(replace(call, dtype="float32"))
    prompt = replace(call, kv=seq)
    assert held(prompt, training=True) >= held(prompt)
    longer = replace(prompt, seq=2 * seq, kv=2 * seq)
    assert held(longer, training=True) >= held(prompt, training=True)
    if layer_idx is None:
        deeper = replace(config, num_hidden_layers=config.num_hidden_layers + 3)
        assert acc.activation_peak(deeper, call) >= least
        assert acc.activation_peak(deeper, prompt, training=True) > held(prompt, training=True)
        assert held(prompt, training=True, checkpointing="full") <= held(prompt, training=True)


@pytest.mark.parametrize("seq", [4, 96])
def test_head_and_embedding_in_one_matrix_have_two_gradients(seq: int) -> None:
    """The head's waits for the embedding's, of as many elements as a large vocabulary has."""
    tied = replace(TINY, tie_word_embeddings=True, vocab_size=2048)
    apart, call = replace(tied, tie_word_embeddings=False), acc.Call(seq=seq, kv=seq, dtype="float32")
    assert acc.activation_peak(tied, call) == acc.activation_peak(apart, call)
    counted, without = (acc.activation_peak(one, call, None, True) for one in (tied, apart))
    assert counted == of_model(tied, call, True)
    assert counted >= without + 4 * 2048 * TINY.hidden_size


@pytest.mark.parametrize("mode", [None, *thorough(*acc.CHECKPOINTING)])
def test_a_real_layer_of_the_cards_size_in_every_mode(mode: str | None) -> None:
    """All of its widths and heads; 8 of its experts, as what they compute does not depend on their number."""
    config, call = replace(CARD, n_routed_experts=8, num_hidden_layers=2), acc.Call(seq=8, kv=8, dtype="bfloat16")
    found = of_layer(config, call, 1, training=True, checkpointing=mode)
    assert acc.activation_peak(config, call, 1, training=True, checkpointing=mode) == found


# What was refused once


def test_the_absorbed_form_in_training() -> None:
    call = acc.Call(seq=40, kv=40, form="absorbed", dtype="float32")
    for layer_idx, checkpointing in itertools.product((0, 1), (None, *acc.CHECKPOINTING)):
        config = replace(LATENT, mla_form="absorbed")
        found = of_layer(config, call, layer_idx, True, checkpointing)
        assert acc.activation_peak(config, call, layer_idx, True, checkpointing) == found
        assert acc.activation_peak(LATENT, call, layer_idx, True, checkpointing) == found


def test_a_form_that_is_left_open_is_the_one_that_the_layer_takes() -> None:
    cheap, call = replace(TINY, kv_lora_rank=8), acc.Call(seq=40, kv=40, dtype="float32")
    assert DeepseekV2DecoderLayer(cheap, 1).self_attn.cheaper_form(40, 40) == "absorbed"
    for training in (False, True):
        found = of_layer(cheap, call, 1, training)
        assert acc.activation_peak(cheap, call, 1, training) == found
        report = acc.report(cheap, call, 1, training)
        assert report["config"]["call"]["form"] == "absorbed"
        assert report["bytes"]["activations_peak"] == found


@pytest.mark.parametrize("mla", [True, False])
def test_dropout_in_attention(mla: bool) -> None:
    """A fused kernel draws it again when it needs it; else a byte per score says which were kept."""
    config, call = replace(TINY, use_mla=mla, mla_form="expanded"), acc.Call(seq=200, kv=200, form="expanded")
    noisy = replace(config, attention_dropout=0.1)
    scores = TINY.num_attention_heads * 200 * 200
    for training in (False, True):
        held = partial(acc.activation_peak, call=call, layer_idx=1, training=training)
        assert held(noisy) == held(config)
        more = held(eager(noisy)) - held(eager(config))
        assert more >= scores if training else more == 0
        assert more <= 3 * scores


@pytest.mark.thorough
def test_more_than_a_thousand_experts_per_token() -> None:
    crowd = replace(TINY, n_routed_experts=1_200, num_experts_per_tok=1_100)
    call = acc.Call(batch=4, form="expanded")
    found = of_layer(crowd, call, 1)
    assert acc.activation_peak(crowd, call, 1) == found < acc.activation_peak(crowd, call, 1, training=True)


def test_flash_attention_takes_what_sdpa_takes() -> None:
    """Which is not installed here, and writes no scores either."""
    for config in (replace(LATENT, mla_form="expanded"), LATENT, PLAIN):
        flash = replace(config, _attn_implementation="flash_attention_2")
        for call in (acc.Call(batch=2, seq=40, kv=40), acc.Call(batch=2, seq=1, kv=40)):
            for training in (False, True) if call.kv == call.seq else (False,):
                same = [acc.activation_peak(c, call, 1, training) for c in (flash, config)]
                assert same[0] == same[1]
                assert acc.activation_peak(eager(config), call, 1, training) >= same[0]


# What cannot be counted


@pytest.mark.parametrize(
    ("config", "call", "how", "said"),
    [
        (TINY, {}, {"checkpointing": True}, "checkpointing is True; wanted None where nothing is trained"),
        (TINY, {"seq": 4, "kv": 9}, {"training": True}, "kv is 9; wanted the 4 new tokens: training has no cache"),
        (TINY, {}, {"layer_idx": 4}, "layer is 4; wanted from 0 to 3"),
        (TINY, {"dtype": "int8"}, {}, "dtype is 'int8'; wanted a floating-point dtype: no layer runs in int8"),
        (
            replace(TINY, _attn_implementation="flash_attention_2"),
            {"seq": 4, "kv": 4, "dtype": "float32"},
            {},
            "dtype is 'float32'; wanted float16 or bfloat16 for flash_attention_2",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    config: DeepseekV2Config, call: dict[str, Any], how: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        acc.activation_peak(config, acc.Call(**call), **how)
    assert str(error.value) == said


def test_flash_attention_has_no_part_in_the_absorbed_form() -> None:
    flash = replace(TINY, _attn_implementation="flash_attention_2")
    assert acc.activation_peak(flash, acc.Call(seq=1, kv=400, form="absorbed", dtype="float32")) > 0


@pytest.mark.parametrize(
    ("config", "call", "said"),
    [
        (CARD, acc.Call(batch=10**15, seq=10**15, kv=10**15), "too large for torch"),
        (CARD, acc.Call(batch=10**15), "too large for torch"),
        (
            replace(TINY, n_routed_experts=10**9, num_experts_per_tok=10**9),
            acc.Call(),
            "1,000,000,000 experts: at most",
        ),
        (CARD, acc.Call(seq=10**9, kv=10**12, form="absorbed"), "1,000,000,000 blocks of queries: at most 10,000"),
        (CARD, acc.Call(seq=10**9, kv=10**12, form="expanded"), "1,000,000,000 blocks of queries"),
    ],
)
def test_a_call_beyond_all_machines_is_not_followed_for_ever(
    config: DeepseekV2Config, call: acc.Call, said: str
) -> None:
    began = time.perf_counter()
    with pytest.raises(OverflowError, match=said) as error:
        acc.activation_peak(config, call)
    assert time.perf_counter() - began < 60
    assert "\n" not in str(error.value)


def test_what_is_not_counted_is_null_and_the_rest_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, reason in (
        (["--dtype", "int8"], "no layer runs in int8"),
        (["--batch", str(10**15)], "the call is too large"),
    ):
        assert main(["account", "--json", *arguments]) == 0
        sizes = json.loads(capsys.readouterr().out)["bytes"]
        assert [name for name, size in sizes.items() if size is None] == ["activations_peak"]
        assert main(["account", *arguments]) == 0
        (row,) = (line for line in capsys.readouterr().out.splitlines() if "alive together" in line)
        assert row.endswith(f"not counted: {reason}")


def test_without_torch_all_else_is_counted() -> None:
    program = """
import sys
sys.modules.update(torch=None, jaxtyping=None, numpy=None)
from dsv2_ref import DeepseekV2Config, accounting as acc
from dsv2_ref.__main__ import main
card, call = DeepseekV2Config.card(), acc.Call(seq=3, kv=3)
found = acc.report(card, call, training=True)
assert found["bytes"].pop("activations_peak") is None
assert None not in found["bytes"].values()
try:
    acc.activation_peak(card, call)
except ModuleNotFoundError as error:
    assert error.name == "torch", error
try:
    acc.report(card, call, checkpointing=True)
except ValueError as error:
    print(error)
sys.exit(main(["account", "--training", "--checkpointing"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("checkpointing is True; wanted None")
    assert "activations alive together, training, full not counted: needs torch" in " ".join(done.stdout.split())


# Faults, and what must stay as it was


@contextmanager
def attention_that_keeps(elements: int) -> Iterator[None]:
    """Every attention makes a tensor that nobody needs, and never lets it go."""
    kept = []

    def keep(module: nn.Module, args: Any) -> None:
        if isinstance(module, DeepseekV2Attention):
            kept.append(torch.zeros(elements, dtype=torch.float32))

    hook = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("training", [False, True])
def test_a_forgotten_tensor_is_counted_in_every_layer(training: bool) -> None:
    config, call, size = replace(TINY, num_hidden_layers=9, moe_layer_freq=2), acc.Call(seq=12, kv=12), 10**9
    layer, model = (acc.activation_peak(config, call, i, training) for i in (2, None))
    with attention_that_keeps(size):
        assert acc.activation_peak(config, call, 2, training) == pytest.approx(layer + 4 * size, abs=layer)
        assert acc.activation_peak(config, call, None, training) == pytest.approx(model + 9 * 4 * size, abs=model)


def test_counting_changes_nothing_and_is_changed_by_nothing() -> None:
    """The state of torch around it: random numbers, the default dtype and device, gradients."""
    call, config = acc.Call(batch=2, seq=12, kv=12), replace(TINY, attention_dropout=0.1)
    counted = partial(acc.activation_peak, config, call, 1, True)
    before, size = torch.get_rng_state(), counted()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.inference_mode(), torch.device("meta"):
        assert counted() == size
        assert torch.is_inference_mode_enabled()
    torch.set_default_dtype(torch.float64)
    try:
        assert counted() == size
        assert torch.get_default_dtype() == torch.float64
        with pytest.raises(OverflowError):
            acc.activation_peak(CARD, acc.Call(batch=10**15))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.zeros(1).device.type == "cpu"
    assert torch.is_grad_enabled()


def test_live_bytes_sees_what_is_alive() -> None:
    """The witness itself."""
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
