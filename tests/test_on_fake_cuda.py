"""Every forward stays on the GPU and never makes the host wait for it; seen on fake CUDA tensors, so without a GPU.

Backward runs on the meta device, as the autograd engine has no stream for CUDA tensors that are fake.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, ops
from dsv2_ref.attention import attend
from dsv2_ref.fast import products
from dsv2_ref.masks import Visibility
from dsv2_ref.quantize import KINDS, quantize
from tests.examples import thorough
from tests.fake_cuda import DeviceFaultError, Watch, fake_cuda
from tests.peers import COMMON, SMALL

pytestmark = pytest.mark.usefixtures("as_shipped")

MLA = {
    f"mla_{form}_{kernel}": replace(SMALL, mla_form=form, _attn_implementation=kernel)
    for form in ("expanded", "absorbed", "auto")
    for kernel in ("eager", "sdpa")
}
MHA = {
    f"{name}_{kernel}": replace(SMALL, use_mla=False, num_key_value_heads=heads, _attn_implementation=kernel)
    for name, heads in (("mha", 4), ("gqa", 2))
    for kernel in ("eager", "sdpa")
}
OTHERS = {
    "group_limited": COMMON["group_limited"],
    "yarn": COMMON["yarn"],
    "dynamic_ntk": replace(SMALL, rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=4),
    "bias": COMMON["bias"],
    "no_q_lora": COMMON["no_q_lora"],
    "v3": COMMON["v3"],
    "normalised_weights": replace(SMALL, norm_topk_prob=True),
    "no_shared_experts": replace(SMALL, n_shared_experts=None),
    "dropout": replace(SMALL, attention_dropout=0.1),
    "pooled_balance": replace(SMALL, seq_aux=False),
}
CONFIGS = MLA | MHA | OTHERS
either = pytest.mark.parametrize("train", [True, *thorough(False)], ids=["train", "eval"])
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

BATCH, SEQ = 2, 7


def floating_mask(seq: int, kv_seq: int, dtype: torch.dtype) -> Tensor:
    return torch.cat((-torch.ones(BATCH, 1, seq, 1), torch.zeros(BATCH, 1, seq, kv_seq - 1)), dim=-1).to(dtype)


MASKS: dict[str, Callable[[int, int, torch.dtype], Tensor | None]] = {
    "causal": lambda seq, kv_seq, dtype: None,
    "padding": lambda seq, kv_seq, dtype: torch.ones(BATCH, kv_seq, dtype=torch.bool),
    "integer padding": lambda seq, kv_seq, dtype: torch.ones(BATCH, kv_seq, dtype=torch.int64),
    "bool": lambda seq, kv_seq, dtype: torch.ones(1, 1, seq, kv_seq, dtype=torch.bool),
    "floating": floating_mask,
}


def layer_of(config: DeepseekV2Config, layer_idx: int, dtype: torch.dtype, train: bool) -> DeepseekV2DecoderLayer:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a fake module cannot be moved to another dtype once it is there
    try:
        return DeepseekV2DecoderLayer(config, layer_idx).train(train)
    finally:
        torch.set_default_dtype(before)


def calls(layer: DeepseekV2DecoderLayer, dtype: torch.dtype, watch: Watch, mask_names: Iterable[str] = MASKS) -> None:
    """A prompt, a chunk and a decoding step with the masks, and positions given or not, watched."""
    for name in mask_names:
        cache: Any = None
        for seq in (SEQ, 3, 1):
            kv_seq = seq + (0 if cache is None else len(cache))
            x, mask = torch.empty(BATCH, seq, layer.hidden_size, dtype=dtype), MASKS[name](seq, kv_seq, dtype)
            positions = torch.empty(1, seq, dtype=torch.int64) if name == "padding" else None
            with watch:
                out, cache = layer(x, mask, positions, past_key_value=cache, use_cache=True)
            assert (out.device.type, out.shape, out.dtype) == (watch.device, x.shape, dtype)
            assert cache.tokens.device.type == watch.device


@pytest.fixture
def gpu() -> Iterator[Watch]:
    with fake_cuda() as watch:
        yield watch


# Forward


@either
@pytest.mark.parametrize("config", (MLA | MHA).values(), ids=MLA | MHA)
def test_forward_of_attention_with_every_mask(config: DeepseekV2Config, train: bool, gpu: Watch) -> None:
    layer = layer_of(config, 1, torch.float32, train)
    with torch.set_grad_enabled(train):
        calls(layer, torch.float32, gpu)
    assert gpu.seen > 500


@either
@every_config
def test_forward_in_bfloat16_dense_and_with_experts(config: DeepseekV2Config, train: bool, gpu: Watch) -> None:
    config = replace(config, first_k_dense_replace=1)
    for layer_idx in (0, 1):
        with torch.set_grad_enabled(train):
            calls(layer_of(config, layer_idx, torch.bfloat16, train), torch.bfloat16, gpu, ["causal", "padding"])
    assert gpu.seen > 500


def test_weights_of_attention_are_returned_without_a_copy(gpu: Watch) -> None:
    layer = layer_of(replace(SMALL, _attn_implementation="eager"), 1, torch.float32, False)
    x = torch.empty(BATCH, SEQ, SMALL.hidden_size)
    with gpu:
        _, weights, _ = layer(x, output_attentions=True, use_cache=True)
    assert weights.device.type == "cuda"


def test_a_cache_is_grown_and_its_sequences_chosen_on_the_device(gpu: Watch) -> None:
    layer, x = layer_of(SMALL, 1, torch.float32, False), torch.empty(BATCH, 1, SMALL.hidden_size)
    chosen = torch.empty(3, dtype=torch.int64)
    with torch.no_grad(), gpu:
        cache = layer.self_attn.empty_cache(BATCH, capacity=2)
        for _ in range(5):
            cache = layer(x, past_key_value=cache, use_cache=True)[1]
        assert cache.select(chosen).tokens.device.type == "cuda"


class Largest(TorchDispatchMode):
    """Notes how many bytes the largest tensor has that is made inside; views and what is written in place are not made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given]
        self.nbytes = max([self.nbytes, *(x.nbytes for x in made)])
        return out


def largest_in_a_step(padded: bool) -> float:
    """Bytes of the largest tensor that a step of MLA over 4,096 tokens makes, over those of its cache."""
    layer = layer_of(replace(SMALL, mla_form="auto"), 0, torch.float32, False)
    cache = layer.self_attn.empty_cache(BATCH, capacity=4100).append(
        torch.empty(BATCH, 4096, *layer.self_attn.cache_features)
    )
    mask = torch.ones(BATCH, 4097, dtype=torch.bool) if padded else None
    with torch.no_grad(), Largest() as largest:
        layer(torch.empty(BATCH, 1, layer.hidden_size), mask, past_key_value=cache, use_cache=True)
    return largest.nbytes / cache.nbytes


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_does_not_copy_its_cache(fused: bool, padded: bool, gpu: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the planted fault, in which it does."""
    with ops.without() if fused else ops.without("triton"):
        assert largest_in_a_step(padded) < 0.5  # the scores of four heads

        def copying(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
            return attend(query, key.clone(), *rest, **options)

        monkeypatch.setattr("dsv2_ref.mla.attend", copying)
        assert largest_in_a_step(padded) >= 1


def quantised_layer(weights: str) -> DeepseekV2DecoderLayer:
    """On CUDA, of empty codes: rounding weights asks whether they are finite, for which the host waits."""
    config = replace(SMALL, mla_form="auto", hidden_size=128, moe_intermediate_size=128)
    with torch.device("meta"):
        layer = quantize(layer_of(config, 1, torch.bfloat16, False), weights, group=4)
    for module in layer.modules():  # which torch cannot move where tensors are fake
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                empty = None if x is None else torch.empty_like(x, device="cuda")
                held[name] = nn.Parameter(empty) if isinstance(x, nn.Parameter) else empty
    return layer


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton, which is published for Linux alone, is not here")
@pytest.mark.parametrize("weights", KINDS)
def test_a_layer_of_few_bits_never_waits(weights: str, gpu: Watch) -> None:
    """A prompt and steps, with a cache in fewer bits as well, whose records are not made into tokens; and the planted
    fault: without kernels the host asks which tokens chose each expert."""
    layer = quantised_layer(weights)
    with torch.no_grad():
        cache = layer.self_attn.empty_cache(BATCH, capacity=40, format="fp8")
        for seq in (SEQ, 20, 1, 1):
            x = torch.empty(BATCH, seq, layer.hidden_size, dtype=torch.bfloat16)
            with gpu, ops.watch() as choices:
                out, cache = layer(x, past_key_value=cache, use_cache=True)
            assert (out.device.type, out.shape, out.dtype) == ("cuda", x.shape, x.dtype)
        ways = {choice.definition: choice.way for choice in choices}
        assert ways["quantized_product"] == "triton codes"
        assert ways["RoutedExperts.forward"] == "triton grouped codes"
        assert ways["attend_records"] == "triton decoding of records"
        with pytest.raises(DeviceFaultError, match="group_ends"), ops.without("triton"), gpu:
            layer(x, past_key_value=cache, use_cache=True)


def test_blocks_of_queries(gpu: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt, which is attended to a block of queries at a time."""
    monkeypatch.setattr("dsv2_ref.fast.sdpa.SCORES_AT_ONCE", 8)
    for form in ("expanded", "absorbed"):
        before = gpu.seen
        calls(layer_of(replace(SMALL, mla_form=form), 0, torch.float32, False), torch.float32, gpu)
        assert gpu.seen > before  # the watch, which raises at a fault, was on


def test_inside_the_operator_of_grouped_products(gpu: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A custom operator only tells its shape to fake tensors: this is what it runs in bfloat16 on a Hopper GPU, with more
    rows of a group than its kernel serves there.

    What torch does with other dtypes, it knows no shapes for: that is left to the tests on a GPU.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    rows, weights = (torch.empty(size, dtype=torch.bfloat16) for size in ((400, 16), (4, 32, 16)))
    ends = torch.empty(4, dtype=torch.int32)
    with gpu:
        out = products._grouped_product.__wrapped__(rows, weights, ends)
        assert out.shape == (400, 32)
        assert products._grouped_outer.__wrapped__(out, rows, ends).shape == (4, 32, 16)


# Backward


@every_config
@pytest.mark.parametrize("layer_idx", [0, 1], ids=["dense", "experts"])
def test_forward_and_backward_on_meta(config: DeepseekV2Config, layer_idx: int) -> None:
    with torch.device("meta"):
        layer = layer_of(replace(config, first_k_dense_replace=1), layer_idx, torch.float32, True)
        x = torch.empty(BATCH, SEQ, SMALL.hidden_size, requires_grad=True)
        with Watch("meta") as watch:
            layer(x)[0].sum().backward()
    assert watch.seen > 100
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in [x, *layer.parameters()])


# Planted faults: each must be found, with its place


FAULTS = {
    "item": (lambda q: q * q.sum().item(), "_local_scalar_dense: the host reads a number"),
    "condition": (lambda q: q if q.sum() > 0 else -q, "_local_scalar_dense: the host reads a number"),
    "list": (lambda q: q * len(q.flatten()[:2].tolist()), "_local_scalar_dense: the host reads a number"),
    "cpu tensor": (lambda q: q * torch.ones(10 + 2, device="cpu"), "ones: a tensor is made on cpu: (12,)"),
    "cpu index": (lambda q: q[torch.arange(BATCH, device="cpu")], "arange: a tensor is made on cpu"),
    "cpu number": (lambda q: q * torch.tensor(2.0, device="cpu"), "cpu"),
    "to the cpu and back": (lambda q: q.cpu().cuda(), "_to_copy: a copy leaves the device for cpu"),
    "mask index": (lambda q: q + q[q > 0].sum(), "index.Tensor: the host must learn how many the mask selects"),
    "nonzero": (lambda q: q + q.nonzero().sum(), "nonzero: the host must learn how many are not zero"),
    "masked_select": (lambda q: q + q.masked_select(q > 0).sum(), "masked_select: the host must learn"),
    "bincount": (lambda q: q + q.flatten().long().bincount().sum(), "bincount: the host must learn"),
}


@pytest.mark.parametrize(("fault", "said"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_named_by_file_and_line(fault: Any, said: str, gpu: Watch) -> None:
    """After the queries are made, ``fault`` happens to them."""
    layer, x = layer_of(SMALL, 0, torch.float32, False), torch.empty(BATCH, SEQ, SMALL.hidden_size)
    layer.self_attn.q_b_proj.register_forward_hook(lambda module, args, query: fault(query))
    with pytest.raises(DeviceFaultError) as caught, gpu:
        layer(x)
    place, told = str(caught.value).split("\n")
    line = fault.__code__.co_firstlineno
    assert place.startswith(f"tests/test_on_fake_cuda.py:{line}: ")
    assert said in told


def test_a_fault_in_the_package_is_named_there(gpu: Watch) -> None:
    """The definition of the experts finds each expert's tokens with `torch.where`: the host waits for every one."""
    layer, x = layer_of(SMALL, 1, torch.float32, False), torch.empty(BATCH, SEQ, SMALL.hidden_size)
    with (
        pytest.raises(DeviceFaultError, match=r"dsv2_ref/moe\.py:\d+: token, choice = torch\.where") as caught,
        ops.without("grouped"),
        gpu,
    ):
        layer(x)
    assert "nonzero" in str(caught.value)


def test_a_mask_made_on_the_cpu_is_found(gpu: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in published code that makes its causal mask with a bare ``torch.ones``."""
    block = Visibility.block

    def on_cpu(self: Visibility, start: int, stop: int) -> Any:
        return block(replace(self, device=torch.device("cpu")), start, stop)

    monkeypatch.setattr(Visibility, "block", on_cpu)
    layer = layer_of(replace(SMALL, _attn_implementation="eager"), 0, torch.float32, False)
    x = torch.empty(BATCH, SEQ, SMALL.hidden_size)
    with pytest.raises(DeviceFaultError, match=r"dsv2_ref/masks\.py:\d+: .*arange"), gpu:
        layer(x)
