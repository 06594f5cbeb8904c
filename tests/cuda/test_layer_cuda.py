"""Every path of the layer on a GPU, against the same weights in float64 on the CPU.

Results are compared token by token, by the norm of the difference over the norm of the right result. A chain of some thirty
roundings at 2**-24, 2**-11 or 2**-8 that add up at random stays below the tolerances; so do float32 sums of a few hundred
terms below the first.

In half precision a token whose last chosen and first rejected expert are nearly tied may be routed to another expert than
in float64: one token in ten may be off altogether.
"""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from dsv2_ref import DeepseekV2Attention, DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM
from dsv2_ref import accounting as acc
from tests.cuda.place import (
    DEVICE,
    FUSED,
    GPU_FOUND,
    HALF,
    KERNELS,
    KINDS,
    NOT_FUSED,
    OLD,
    ON_GPU,
    LatentCache,
    device_needed,
    every_dtype,
    fused_only,
    gpu_only,
    ops,
    quantize,
)

pytestmark = [
    device_needed,
    pytest.mark.usefixtures("as_shipped"),
    # The first product of a backward pass, which runs in a thread of its own, finds no context and makes one.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}

MIDDLE = DeepseekV2Config(
    vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, q_lora_rank=96, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64,
    n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=4096,
)  # fmt: skip
V2_WIDTHS = replace(MIDDLE, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
"""A small layer whose heads are as wide as V2's: on a GPU the widths decide which of torch's attention kernels runs."""

HALF_ONLY = "flash_attention_2"
CONFIGS = {
    f"{name} {kernel}": replace(config, _attn_implementation=kernel)
    for kernel in ("eager", "sdpa", HALF_ONLY)
    for name, config in {
        "expanded": replace(MIDDLE, mla_form="expanded"),
        "absorbed": replace(MIDDLE, mla_form="absorbed"),
        "auto": MIDDLE,
        "v2_widths": V2_WIDTHS,
        "mha": replace(MIDDLE, use_mla=False),
        "mha_128": replace(MIDDLE, use_mla=False, num_attention_heads=2, num_key_value_heads=2),
        "gqa": replace(MIDDLE, use_mla=False, num_key_value_heads=2),
        "groups": replace(MIDDLE, topk_method="group_limited_greedy", n_group=4, topk_group=2),
        "v3": replace(
            MIDDLE, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, n_group=4, topk_group=2
        ),
    }.items()
}
every_config = pytest.mark.parametrize("name", CONFIGS)
without_waiting = pytest.mark.parametrize(
    "layer_idx", [pytest.param(0, id="dense"), pytest.param(1, id="experts", marks=fused_only)]
)
"""With experts by the fused kernels alone: without them the host reads how many tokens each expert has."""
SEQ, CHUNK = 37, 5


@pytest.fixture(params=[True, False], ids=["kernels", "plain"])
def with_kernels(request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param and GPU_FOUND and not FUSED:
        pytest.skip(NOT_FUSED)
    with nullcontext() if request.param else ops.without(KERNELS):
        yield request.param


def flash_attn_is_installed() -> bool:
    """Not by a folder of that name alone, as flash-attn 4 makes; one that is installed and broken is an error, not skipped."""
    if importlib.util.find_spec("flash_attn") is None:
        return False
    return importlib.util.find_spec("flash_attn.flash_attn_interface") is not None


def skip_what_is_not_here(config: DeepseekV2Config, dtype: torch.dtype) -> None:
    if config._attn_implementation == HALF_ONLY:
        if not ON_GPU or not flash_attn_is_installed():
            pytest.skip("flash-attn is not installed")
        if OLD:
            pytest.skip("flash-attn 2 needs compute capability 8.0")
        if dtype == torch.float32:
            pytest.skip("flash-attn takes half precision only")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def pair(name: str, layer_idx: int, dtype: torch.dtype) -> tuple[DeepseekV2DecoderLayer, DeepseekV2DecoderLayer]:
    """A layer on the device, and one with the same weights in float64 on the CPU, computed the plainest way."""
    torch.manual_seed(0)
    here = DeepseekV2DecoderLayer(CONFIGS[name], layer_idx)
    for place, p in enumerate(here.parameters()):
        noise = normal(*p.shape, seed=place)
        p.data = 1 + 0.2 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5
    here = here.to(dtype).eval()
    plainest = replace(CONFIGS[name], _attn_implementation="eager", mla_form="expanded")
    exact = DeepseekV2DecoderLayer(plainest, layer_idx).double().eval()
    exact.load_state_dict({weight: value.double() for weight, value in here.state_dict().items()})
    return here.to(DEVICE), exact


def pieces(layer: DeepseekV2DecoderLayer, x: Tensor, padding: Tensor | None) -> Tensor:
    """A prompt, a chunk after it, and single tokens, through the cache."""
    outputs, cached, start = [], None, 0
    for stop in (SEQ, SEQ + CHUNK, *range(SEQ + CHUNK + 1, x.shape[1] + 1)):
        mask = None if padding is None else padding[:, :stop]
        out, cached = layer(x[:, start:stop], attention_mask=mask, past_key_value=cached, use_cache=True)
        outputs.append(out)
        start = stop
    return torch.cat(outputs, dim=1)


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype, off_at_most: float = 0.0) -> None:
    assert (actual.device.type, actual.dtype) == (DEVICE, dtype)
    wrong = (actual.detach().cpu().double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-6)
    off = (wrong > TOLERANCE[dtype]).double().mean()
    assert off <= off_at_most, (float(off), float(wrong.max()))


@every_dtype
@every_config
@pytest.mark.parametrize("layer_idx", [0, 1], ids=["dense", "experts"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_outputs(name: str, layer_idx: int, dtype: torch.dtype, padded: bool, with_kernels: bool) -> None:
    skip_what_is_not_here(CONFIGS[name], dtype)
    layer, exact = pair(name, layer_idx, dtype)
    x = normal(2, SEQ + CHUNK + 3, MIDDLE.hidden_size, seed=1).to(dtype)
    padding = torch.arange(x.shape[1]) >= torch.tensor([[0], [9]]) if padded else None
    with torch.no_grad():
        actual = pieces(layer, x.to(DEVICE), None if padding is None else padding.to(DEVICE))
        expected = pieces(exact, x.double(), padding)
    real = slice(None) if padding is None else padding
    half_and_routed = layer_idx == 1 and dtype != torch.float32
    assert_near(actual.cpu().to(DEVICE)[real], expected[real], dtype, off_at_most=0.1 * half_and_routed)


@every_dtype
@every_config
def test_gradients(name: str, dtype: torch.dtype, with_kernels: bool) -> None:
    """Of the input and of every weight; with experts in float32 only, where no token is routed differently."""
    config = CONFIGS[name]
    skip_what_is_not_here(config, dtype)
    for layer_idx in (0, 1) if dtype == torch.float32 else (0,):
        layer, exact = (copy.deepcopy(module) for module in pair(name, layer_idx, dtype))
        upstream = normal(2, SEQ, MIDDLE.hidden_size, seed=2).to(dtype)
        x = normal(2, SEQ, MIDDLE.hidden_size, seed=1).to(dtype)
        there, here = (x.detach().to(*where, copy=True).requires_grad_() for where in ((DEVICE,), (torch.float64,)))
        layer(there)[0].backward(upstream.to(DEVICE))
        exact(here)[0].backward(upstream.double())
        assert there.grad is not None
        assert here.grad is not None
        assert_near(there.grad, here.grad, dtype)
        for (weight, mine), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
            assert mine.grad is not None, weight
            assert theirs.grad is not None, weight
            wrong = (mine.grad.cpu().double() - theirs.grad).norm() / theirs.grad.norm()
            assert wrong <= TOLERANCE[dtype], (weight, float(wrong))


@every_dtype
@pytest.mark.parametrize("name", ["expanded sdpa", "absorbed sdpa", "absorbed eager", "mha sdpa"])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_mask_per_query(name: str, kind: str, dtype: torch.dtype, with_kernels: bool) -> None:
    """A sliding window, as the four axes of a mask."""
    layer, exact = pair(name, 0, dtype)
    x, place = normal(2, SEQ, MIDDLE.hidden_size, seed=1).to(dtype), torch.arange(SEQ)
    behind = place[:, None] - place
    keep = ((behind >= 0) & (behind < 9))[None, None]
    added = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    with torch.no_grad():
        actual = layer(x.to(DEVICE), attention_mask=(keep if kind == "bool" else added.to(dtype)).to(DEVICE))[0]
        expected = exact(x.double(), attention_mask=keep)[0]
    assert_near(actual, expected, dtype)


@every_dtype
def test_a_step_after_a_long_context(dtype: torch.dtype, with_kernels: bool) -> None:
    """V2's attention over 131,072 tokens, in float64 on the same device: its cache alone takes 0.6 GB there.

    The query's position is a small one: at position 131,071 a float32 angle is off by more than the tolerance, kernel or not.
    """
    config = DeepseekV2Config.deepseek_v2() if ON_GPU else MIDDLE
    tokens = 131_072 if ON_GPU else 3000
    torch.manual_seed(0)
    attention = DeepseekV2Attention(replace(config, mla_form="absorbed"), 0).to(DEVICE, dtype).eval()
    exact = copy.deepcopy(attention).double()
    past = normal(1, tokens - 1, *attention.cache_features).to(DEVICE, dtype)
    x, place = normal(1, 1, config.hidden_size, seed=1).to(DEVICE, dtype), torch.full((1, 1), 5, device=DEVICE)
    with torch.no_grad():
        cached = LatentCache.of(attention, 1, capacity=tokens).append(past)
        actual = attention(x, position_ids=place, past_key_value=cached, use_cache=True)[0]
        cached = LatentCache.of(exact, 1, capacity=tokens).append(past.double())
        expected = exact(x.double(), position_ids=place, past_key_value=cached, use_cache=True)[0]
    assert_near(actual, expected.cpu(), dtype)


@every_dtype
@fused_only
@pytest.mark.parametrize("weights", KINDS)
def test_a_layer_of_few_bits_by_its_kernels(weights: str, dtype: torch.dtype) -> None:
    """Against its definitions on the same device, which round every weight to ``dtype`` once more."""
    layer = quantize(copy.deepcopy(pair("auto sdpa", 1, dtype)[0]), weights, group=32)
    x = normal(2, SEQ + CHUNK + 3, MIDDLE.hidden_size, seed=1).to(DEVICE, dtype)
    with torch.no_grad():
        actual = pieces(layer, x, None)
        with ops.without(KERNELS):
            expected = pieces(layer, x, None)
    assert_near(actual, expected.cpu().double(), dtype, off_at_most=0.0 if dtype == torch.float32 else 0.1)


def test_a_model_generates_the_same_tokens() -> None:
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(MIDDLE).double().eval()
    prompt = torch.arange(2 * 11).view(2, 11) * 23 % MIDDLE.vocab_size
    with torch.no_grad():
        expected = model.generate(prompt, 20)
        actual = model.to(DEVICE).generate(prompt.to(DEVICE), 20)
    assert actual.device.type == DEVICE
    assert torch.equal(actual.cpu(), expected)


def test_the_cache_is_as_large_as_counted() -> None:
    for name in ("auto sdpa", "mha sdpa", "gqa sdpa"):
        layer, _ = pair(name, 0, HALF)
        x = normal(3, 19, MIDDLE.hidden_size).to(DEVICE, HALF)
        with torch.no_grad():
            cached = layer(x, use_cache=True)[1]
        assert cached.nbytes == acc.cache_bytes(CONFIGS[name], 3 * 19, layers=1)


@gpu_only
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_memory_is_what_is_counted(kernel: str, training: bool) -> None:
    """Without fused kernels. Every tensor takes a multiple of 512 bytes; 5 % are for that and for products' workspaces.

    The backward pass also makes the gradients of the weights, one after the other: between none and all of them exist
    at the peak. And on CUDA torch's gradient of the softmax, where the definition's attention has its peak, holds the
    product of its two inputs, as large as the scores in float32, while it runs.
    """
    config = replace(DeepseekV2Config.deepseek_v2_lite(), _attn_implementation=kernel, mla_form="expanded")
    layer = DeepseekV2DecoderLayer(config, 1).to(DEVICE, HALF).train(training)
    x = normal(1, 2048, config.hidden_size).to(DEVICE, HALF).requires_grad_(training)

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        out = layer(x)[0]
        if training:
            out.backward(out.detach())

    with ops.without(KERNELS), torch.set_grad_enabled(training):
        run()  # the libraries make their workspaces
        layer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        taken = torch.cuda.max_memory_allocated() - before
    call = acc.Call(batch=1, seq=2048, kv=2048, form="expanded")
    counted = acc.activation_peak(config, call, 1, training)
    gradients = sum(p.nbytes for p in layer.parameters()) if training else 0
    inside = config.num_attention_heads * 2048**2 * 4 if training and kernel == "eager" else 0
    assert taken <= 1.05 * counted + gradients + inside
    assert (
        taken >= 0.95 * counted or kernel == "sdpa"
    )  # a GPU's own fused attention may need less than torch's on a CPU


@gpu_only
@every_config
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@without_waiting
def test_the_host_never_waits(name: str, layer_idx: int) -> None:
    skip_what_is_not_here(CONFIGS[name], HALF)
    layer, _ = pair(name, layer_idx, HALF)
    x = normal(2, SEQ + CHUNK + 2, MIDDLE.hidden_size).to(DEVICE, HALF)
    with torch.no_grad():
        expected = pieces(layer, x, None)  # compiles
        try:
            torch.cuda.set_sync_debug_mode("error")  # a wait raises
            actual = pieces(layer, x, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_near(actual, expected.cpu().double(), HALF)


@gpu_only
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:TensorFloat32 tensor cores")
def test_a_step_compiled_whole() -> None:
    """In float32, where compiled code rounds otherwise but chooses the same experts."""
    layer, _ = pair("auto sdpa", 1, torch.float32)
    x = normal(1, 8, MIDDLE.hidden_size).to(DEVICE)
    with torch.no_grad():
        _, cached = layer(x[:, :7], use_cache=True)
        expected = layer(x[:, 7:], past_key_value=cached, use_cache=True)[0]
        compiled = torch.compile(layer, fullgraph=True)
        actual = compiled(x[:, 7:], past_key_value=cached, use_cache=True)[0]
    assert_near(actual, expected.cpu().double(), torch.float32)


@gpu_only
@without_waiting
def test_a_step_recorded_as_a_graph_and_replayed(layer_idx: int) -> None:
    """What engines do: one launch for the whole step, with new values in the same places."""
    layer, _ = pair("auto sdpa", layer_idx, HALF)
    x = normal(1, 8, MIDDLE.hidden_size).to(DEVICE, HALF)
    with torch.no_grad():
        _, cached = layer(x[:, :7], use_cache=True)
        for _ in range(3):
            layer(x[:, 7:], past_key_value=cached)
        torch.cuda.synchronize()
        graph, token = torch.cuda.CUDAGraph(), torch.zeros_like(x[:, 7:])
        with torch.cuda.graph(graph):
            out = layer(token, past_key_value=cached)[0]
        token.copy_(x[:, 7:])
        graph.replay()
        expected = layer(x[:, 7:], past_key_value=cached)[0]
    assert_near(out, expected.cpu().double(), HALF)
