"""The kernels in Triton's interpreter, beside the core's functions; `test_kernels` runs these with TRITON_INTERPRET=1.

Inputs lie between bands of NaN, so that a read past an edge shows in the result. So do outputs between bands of a mark, which
a write past an edge would change. Tolerances: float32 sums of up to 1,300 terms in another order, 1e-5; float16 rounds at
2**-11 and a few roundings differ, 4e-3.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

from dsv2_ref import DeepseekV2DecoderLayer, DeepseekV2RMSNorm, ops
from dsv2_ref.attention import attend
from dsv2_ref.fast import products
from dsv2_ref.fast.triton import decode, experts, few_rows, moe, norm, operators, plan, quantized, rotate
from dsv2_ref.fast.triton.language import tl
from dsv2_ref.fast.triton.language import triton as triton_itself
from dsv2_ref.masks import Visibility
from dsv2_ref.moe import DeepseekV2MoE
from dsv2_ref.quantize import KINDS, quantize
from dsv2_ref.quantized import QuantizedWeight, dense_weight, quantized_product
from dsv2_ref.records import Record
from dsv2_ref.rope import rotate_interleaved
from tests.peers import SMALL, experts_with, randomised, tokens

DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
both = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])


BAND = 2**14
"""Numbers of a band: more than one program reads or writes of any tensor here."""


def between(values: Tensor, mark: float = float("nan")) -> Tensor:
    """The same numbers, with bands of ``mark`` before and behind them in memory."""
    memory = torch.full((values.numel() + 2 * BAND,), mark, dtype=values.dtype)
    memory[BAND : BAND + values.numel()] = values.flatten()
    return memory[BAND : BAND + values.numel()].view(values.shape)


def guarded(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers between bands of NaN."""
    return between(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


class OutputsBetweenBands(TorchFunctionMode):
    """What is made empty inside holds NaN, or -1 for whole numbers, so that what nobody writes is seen, and lies between
    bands, which nobody may write."""

    MARK = 7.0

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = func in (torch.empty, torch.empty_like) and out.device.type == "cpu"
        if made and (out.is_floating_point() or out.dtype == torch.int32):
            unwritten = float("nan") if out.is_floating_point() else -1
            out = between(torch.full(out.shape, unwritten, dtype=out.dtype), self.MARK)
            self.made.append(out)
        return out

    def check(self) -> None:
        for made in self.made:
            memory = made.as_strided((made.numel() + 2 * BAND,), (1,), 0)
            for band in (memory[:BAND], memory[-BAND:]):
                assert (band == self.MARK).all(), "written past an edge"


@pytest.fixture(autouse=True)
def outputs(request: pytest.FixtureRequest) -> Iterator[None]:
    if "without_bands" in request.keywords:
        yield
        return
    with OutputsBetweenBands() as outputs:
        yield
    outputs.check()


def normalise(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The core's norm, and 1 / rms."""
    module = DeepseekV2RMSNorm(len(weight), eps)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    with ops.plain():
        return module(x), x.float().square().mean(-1).add(eps).rsqrt()


def gradients(grad: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Those of the core's norm, by autograd."""
    module, leaf = DeepseekV2RMSNorm(len(weight)), x.clone().requires_grad_()
    module.weight = torch.nn.Parameter(weight.clone())
    with ops.plain():
        module(leaf).backward(grad)
    assert leaf.grad is not None
    assert module.weight.grad is not None
    return [leaf.grad, module.weight.grad]


def attended(query: Tensor, keys: Tensor, latent: int, scale: float, padding: Tensor | None = None) -> Tensor:
    """The core's attention."""
    visible = Visibility(query.shape[2], keys.shape[1], keys.device, padding)
    with ops.plain():
        return attend(query, keys[:, None], keys[:, None, :, :latent], visible, scale)[0]


def assert_near(actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        bound = TOLERANCE[a.dtype] * max(1.0, float(e.abs().max())) if e.numel() else 0
        assert torch.allclose(a.double(), e.double(), rtol=0, atol=bound), float((a - e).abs().max())


@both
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("features", [1, 7, 64, 1280])
def test_add_rmsnorm(rows: int, features: int, dtype: torch.dtype) -> None:
    update, residual = (guarded(rows, features, dtype=dtype, seed=s) for s in (1, 2))
    weight, grad = guarded(features, dtype=dtype, seed=3), guarded(rows, features, dtype=dtype, seed=4)
    total = residual + update
    expected = total, *normalise(total, weight)
    actual = norm.add_rms_norm_launch(update, residual, weight, 1e-6)
    assert torch.equal(actual[0], total)
    assert_near(actual, expected)
    assert_near(norm.rms_norm_launch(update, weight, 1e-6), normalise(update, weight))
    found = norm.rms_norm_backward_launch(grad, between(total), weight, between(expected[2]))
    assert_near(found, gradients(grad, total, weight))


def test_small_rows_feel_epsilon() -> None:
    """A mean square of the size of epsilon, and a row of zeros."""
    x, weight = 1e-3 * guarded(3, 40, dtype=torch.float32), guarded(40, dtype=torch.float32, seed=1)
    x[2] = 0
    assert_near(norm.rms_norm_launch(x, weight, 1e-6), normalise(x, weight))


def test_the_norm_rounds_where_its_definition_does() -> None:
    """Before the weight and after it: bit for bit, but for the few places where the sums' order decides a rounding."""
    x, weight = guarded(8, 1280, dtype=torch.float16), guarded(1280, dtype=torch.float16, seed=1)
    expected, _ = normalise(x, weight)
    actual, _ = norm.rms_norm_launch(x, weight, 1e-6)
    assert (actual != expected).double().mean() < 0.01
    once = (weight.float() * x.float() * x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()).half()
    assert (once != expected).double().mean() > 0.1  # what a kernel that rounds once would give


def test_rows_may_lie_apart_and_be_many_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "BACKWARD_PROGRAMS", 2)
    x, weight = guarded(5, 24, dtype=torch.float32)[:, :20], guarded(20, dtype=torch.float32)
    expected = normalise(x, weight)
    assert_near(norm.rms_norm_launch(x, weight, 1e-6), expected)
    assert_near(norm.rms_norm_backward_launch(x, x, weight, expected[1]), gradients(x, x, weight))


@both
@pytest.mark.parametrize(("batch", "heads", "seq", "dim"), [(1, 1, 1, 2), (2, 3, 5, 64), (1, 2, 17, 6)])
def test_rotation(batch: int, heads: int, seq: int, dim: int, dtype: torch.dtype) -> None:
    """The queries' part of a wider tensor, with the axes as attention has them."""
    x = guarded(batch, seq, heads, dim + 8, dtype=dtype).transpose(1, 2)[..., 8:]
    cos, sin = (guarded(batch, 1, seq, dim // 2, dtype=torch.float32, seed=s) for s in (1, 2))
    expected = rotate_interleaved(x, cos, sin)
    assert torch.equal(rotate.rotate_launch(x, cos, sin), expected)
    assert torch.equal(rotate.rotate_launch(x, cos, sin, backward=True), rotate_interleaved(x, cos, -sin))
    assert torch.equal(rotate.rotate_launch(x[:, 0], cos[:, 0], sin[:, 0]), expected[:, 0])


LATENT, ROPE = 40, 16


def queries_and_keys(heads: int, seq: int, kv_seq: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of two sequences, the keys a view of a roomier cache, whose free places hold NaN here."""
    query = guarded(2, seq, heads, LATENT + ROPE, dtype=dtype).transpose(1, 2)
    cache = torch.full((2, kv_seq + 11, LATENT + ROPE), float("nan"), dtype=dtype)
    cache[:, :kv_seq] = guarded(2, kv_seq, LATENT + ROPE, dtype=dtype, seed=1)
    return query, cache[:, :kv_seq]


def half_of_it_padding(kv_seq: int) -> Tensor:
    """A hole in the first sequence; the second sees nothing."""
    padding = torch.arange(kv_seq) >= torch.tensor([[0], [kv_seq]])
    padding[0, kv_seq // 2] = kv_seq == 1
    return padding


@both
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(("heads", "seq", "kv_seq"), [(1, 1, 1), (3, 1, 37), (16, 1, 96), (5, 4, 70)])
def test_mla_decode(heads: int, seq: int, kv_seq: int, splits: int | None, dtype: torch.dtype) -> None:
    query, keys = queries_and_keys(heads, seq, kv_seq, dtype)
    expected = attended(query, keys, LATENT, 0.2)
    assert_near([decode.mla_decode_launch(query, keys, LATENT, 0.2, splits=splits)], [expected])
    padding = half_of_it_padding(kv_seq)
    actual = decode.mla_decode_launch(query, keys, LATENT, 0.2, padding, splits=splits)
    assert not actual[1].any()
    assert_near([actual], [attended(query, keys, LATENT, 0.2, padding)])


@pytest.mark.parametrize("seq", range(1, 9))
@pytest.mark.parametrize("gpu", [plan.H100, plan.Gpu(128, 100 * 1024, 8), plan.Gpu(1, 100 * 1024, 8)], ids=str)
def test_any_few_queries_on_any_gpu(gpu: plan.Gpu, seq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 and of 16 keys, as many shares as each GPU gets, and the queries of a head in two blocks."""
    monkeypatch.setattr(plan, "gpu_of", lambda device: gpu)
    query, keys = queries_and_keys(3, seq, 77, torch.float16 if seq < 8 else torch.float32)
    padding = half_of_it_padding(77)
    actual = decode.mla_decode_launch(query, keys, LATENT, 0.2, padding)
    assert_near([actual], [attended(query, keys, LATENT, 0.2, padding)])


WIDE = [(49, 1, 37), (13, 4, 150), (25, 3, 129)]
"""Heads, queries and keys for blocks of 64 rows: of one that is not full, of two, and tiles of keys that are not full."""


@pytest.mark.parametrize("splits", [1, 2, 3, None])
@pytest.mark.parametrize(("heads", "seq", "kv_seq"), WIDE)
def test_wide_blocks(heads: int, seq: int, kv_seq: int, splits: int | None) -> None:
    assert plan.decode_tile(heads * seq, 64 + 16, 2, plan.H100)[:2] == (64, 64)
    query, keys = queries_and_keys(heads, seq, kv_seq, torch.float16)
    actual = decode.mla_decode_launch(query, keys, LATENT, 0.2, splits=splits)
    assert_near([actual], [attended(query, keys, LATENT, 0.2)])
    padding = half_of_it_padding(kv_seq)
    actual = decode.mla_decode_launch(query, keys, LATENT, 0.2, padding, splits=splits)
    assert not actual[1].any()
    assert_near([actual], [attended(query, keys, LATENT, 0.2, padding)])


def test_shares_may_be_many() -> None:
    """More than a launch by itself would make."""
    query, keys = guarded(1, 2, 1, 56, dtype=torch.float32), guarded(1, 3000, 56, dtype=torch.float32, seed=1)
    assert_near([decode.mla_decode_launch(query, keys, 40, 0.2, splits=180)], [attended(query, keys, 40, 0.2)])


def test_features_of_several_programs_that_add_shares() -> None:
    """A latent of 200: two programs of 128 features a row, the second not full."""
    query, keys = guarded(1, 2, 1, 216, dtype=torch.float32), guarded(1, 90, 216, dtype=torch.float32, seed=1)
    assert_near([decode.mla_decode_launch(query, keys, 200, 0.1, splits=3)], [attended(query, keys, 200, 0.1)])


def test_a_single_share_is_written_by_one_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "mla_combine_kernel", None)
    query, keys = queries_and_keys(3, 1, 37, torch.float16)
    assert_near([decode.mla_decode_launch(query, keys, LATENT, 0.2, splits=1)], [attended(query, keys, LATENT, 0.2)])
    with pytest.raises(TypeError):
        decode.mla_decode_launch(query, keys, LATENT, 0.2, splits=2)


@both
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [[1], [0, 3, 0, 18], [70, 0, 1]])
def test_grouped_product(sizes: list[int], transposed: bool, dtype: torch.dtype) -> None:
    ends = between(torch.tensor(sizes).cumsum(0).to(torch.int32), 10**6)
    rows = guarded(sum(sizes), 37, dtype=dtype)
    weights = guarded(len(sizes), *((37, 67) if transposed else (67, 37)), dtype=dtype, seed=1)
    weights = weights.mT if transposed else weights
    expected = products.grouped_product(rows, weights, ends)
    assert_near([experts.grouped_product_launch(rows, weights, ends)], [expected])


def test_more_groups_than_torch_takes() -> None:
    ends = torch.tensor([*[0] * 1100, 2, 3], dtype=torch.int32)
    rows, weights = guarded(3, 5, dtype=torch.float16), guarded(1102, 7, 5, dtype=torch.float16, seed=1)
    expected = products.grouped_product(rows, weights, ends)
    assert_near([experts.grouped_product_launch(rows, weights, ends)], [expected])


@both
@pytest.mark.parametrize(("token_count", "top_k", "groups"), [(1, 1, 1), (5, 2, 4), (3, 3, 40), (50, 2, 3), (90, 3, 2)])
def test_grouped_product_of_tokens_that_chose(token_count: int, top_k: int, groups: int, dtype: torch.dtype) -> None:
    """Their rows need not be gathered before, and are fewer than those that are multiplied; tiles of 16, 64 and 128."""
    order, ends, _ = products.sort_by_expert(choices(token_count, top_k, groups), groups)
    rows = guarded(token_count, 37, dtype=dtype)
    weights = guarded(groups, 67, 37, dtype=dtype, seed=1)
    expected = products.grouped_product(rows[order // top_k], weights, ends)
    for given in (order, between(order.int(), 10**6)):
        assert_near([experts.grouped_product_launch(rows, weights, ends, given, top_k)], [expected])


def choices(token_count: int, top_k: int, experts: int, seed: int = 0) -> Tensor:
    """Different experts for each token, if there are as many, the first more often than others; between bands of zeros."""
    generator = torch.Generator().manual_seed(seed)
    liking = torch.rand(token_count, experts, generator=generator) + (torch.arange(experts) < 2) * 0.4
    chosen = liking.topk(min(top_k, experts), dim=-1).indices
    return between(chosen.repeat(1, top_k)[:, :top_k], 0)


# The experts of a few tokens


ROUTED = [(1, 1, 1), (1, 6, 160), (5, 2, 12), (64, 1, 3), (43, 3, 4), (70, 2, 1), (9, 6, 64), (0, 2, 5)]
"""Tokens, choices of each, and experts: fewer choices than experts, more than a program has, ties, and none."""


@pytest.mark.parametrize(("token_count", "top_k", "groups"), ROUTED)
def test_choices_are_sorted_as_by_torch(token_count: int, top_k: int, groups: int) -> None:
    """Those of one expert stay in their order, though not all experts are chosen."""
    chosen = choices(token_count, top_k, groups)
    order, ends, places = moe.sort_launch(chosen, groups)
    expected = products.sort_by_expert(chosen, groups)
    for found, right in zip((order, ends, places), expected, strict=True):
        assert found.dtype == torch.int32
        assert torch.equal(found, right.int())
    if groups == 160:
        assert (ends.diff() == 0).any()


@both
@pytest.mark.parametrize(("rows", "wide"), [(1, 2), (3, 20), (2, 1100), (0, 4), (3, 1), (2, 7), (2, 1025)])
def test_swiglu(rows: int, wide: int, dtype: torch.dtype) -> None:
    together = 3 * guarded(rows, 2 * wide + 5, dtype=dtype)[:, : 2 * wide]
    together = guarded(rows, 2 * wide + 5, dtype=dtype)[:, : 2 * wide].copy_(together)
    gate, up = together.chunk(2, dim=-1)
    assert_near([moe.swiglu_launch(together)], [F.silu(gate) * up])


def test_swiglu_rounds_where_its_definition_does() -> None:
    """After silu and after the product: bit for bit, but where exponential functions differ."""
    together = guarded(8, 2048, dtype=torch.float16)
    gate, up = together.chunk(2, dim=-1)
    assert (moe.swiglu_launch(together) != F.silu(gate) * up).double().mean() < 0.01
    once = (F.silu(gate.float()) * up.float()).half()
    assert (once != F.silu(gate) * up).double().mean() > 0.1


@both
@pytest.mark.parametrize("apart", [0, 3])
@pytest.mark.parametrize(("token_count", "top_k", "hidden"), [(1, 1, 1), (5, 2, 48), (3, 6, 1100), (0, 2, 4)])
def test_outputs_of_experts_are_added(
    token_count: int, top_k: int, hidden: int, apart: int, dtype: torch.dtype
) -> None:
    """Weights may lie apart, and be of the dtype of the tokens."""
    places = torch.randperm(token_count * top_k, generator=torch.Generator().manual_seed(0))
    places = between(places.view(token_count, top_k).int(), 10**6)
    sorted_out = guarded(token_count * top_k, hidden, dtype=dtype)
    for weights_in in (torch.float32, dtype):
        weights = guarded(token_count, top_k + apart, dtype=weights_in, seed=1)[:, :top_k]
        expected = products.combine(sorted_out.float(), places, weights.float()).to(dtype)
        assert_near([moe.combine_launch(sorted_out, places, weights)], [expected])


def test_sums_over_choices_are_in_float32() -> None:
    """In float16 2048 + 1 is 2048."""
    sorted_out, places = torch.tensor([[2048.0], [1.0], [1.0]]).half(), torch.arange(3)[None].int()
    assert moe.combine_launch(sorted_out, places, torch.ones(1, 3)).item() == 2050


def routed(groups: int, hidden: int, wide: int, dtype: torch.dtype) -> Any:
    return experts_with(
        between(0.5 * normal(groups, 2 * wide, hidden, seed=1).to(dtype)),
        between(0.5 * normal(groups, hidden, wide, seed=2).to(dtype)),
    ).requires_grad_(False)


EXPERTS = [
    (1, 1, 1, 5, 3),
    (1, 6, 40, 48, 20),
    (7, 2, 12, 48, 20),
    (50, 3, 4, 16, 7),
    (2, 2, 3, 1100, 2),
    (0, 2, 4, 8, 6),
]
"""Tokens, choices of each, experts, and the widths of tokens and experts."""


def let(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let experts be computed choice by choice, or sorted by the kernel, or by torch."""
    monkeypatch.setattr(few_rows, "MOST_TOKENS", dict.fromkeys(few_rows.MOST_TOKENS, 10**6 if way == "unsorted" else 0))
    monkeypatch.setattr(moe, "MOST_SORTED", 0 if way == "sorted by torch" else moe.MOST_SORTED)


@both
@pytest.mark.parametrize(
    ("sizes", "way"),
    [(sizes, way) for way in ("sorted", "sorted by torch") for sizes in EXPERTS]
    + [
        (sizes, "unsorted") for sizes in EXPERTS if sizes[0] < 8 and sizes[3] < 1000
    ],  # a program each for four features
)
def test_routed_experts(sizes: tuple[int, ...], way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition."""
    let(way, monkeypatch)
    token_count, top_k, groups, hidden, wide = sizes
    module, x = routed(groups, hidden, wide, dtype), guarded(token_count, hidden, dtype=dtype, seed=3)
    chosen, weights = choices(token_count, top_k, groups), guarded(token_count, top_k, dtype=torch.float32, seed=4)
    with ops.plain():
        expected = module(x, chosen, weights)
    assert_near(
        [operators.routed_experts(x, module.gate_up_proj, module.down_proj, chosen, weights)],
        [expected],
    )
    with ops.watch() as made:
        assert_near([module(x, chosen, weights)], [expected])
    assert [choice.way for choice in made] == ["triton experts"]


def quantised_experts(kind: str, dtype: torch.dtype) -> Any:
    """Four of them, of 48 features and 128 in between, in groups of 16."""
    config = replace(SMALL, n_routed_experts=4, moe_intermediate_size=128)
    stack = quantize(randomised(DeepseekV2MoE(config), dtype), kind, group=16).experts
    for weight in (stack.gate_up_proj, stack.down_proj):
        weight.scales = between(weight.scales)
    return stack


@both
@pytest.mark.parametrize(("token_count", "way"), [(2, "unsorted"), (1, "sorted"), (80, "sorted")])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_by_codes(
    kind: str, token_count: int, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    let(way, monkeypatch)
    module, x = quantised_experts(kind, dtype), guarded(token_count, 48, dtype=dtype, seed=3)
    chosen, weights = choices(token_count, 2, 4), guarded(token_count, 2, dtype=torch.float32, seed=4)
    with ops.plain():
        expected = module(x, chosen, weights)
    assert_near(
        [operators.quantized_experts(x, module.gate_up_proj, module.down_proj, chosen, weights)],
        [expected],
    )
    with torch.no_grad(), ops.watch() as made:
        assert_near([module(x, chosen, weights)], [expected])
    assert [choice.way for choice in made] == ["triton grouped codes"]


def test_a_choice_of_no_expert_adds_nothing() -> None:
    """As in the definition; the matrices lie between bands of NaN."""
    module, x = routed(4, 16, 7, torch.float32), guarded(2, 16, dtype=torch.float32, seed=3)
    chosen, weights = torch.tensor([[1, 4, -1], [-5, 3, 2**40]]), guarded(2, 3, dtype=torch.float32, seed=4)
    with ops.plain():
        expected = module(x, chosen, weights)
    assert_near([module(x, chosen, weights)], [expected])


def test_what_does_not_fit_is_left_to_the_definition() -> None:
    """Which refuses it, or takes it; none reads past the end."""
    plain, by_codes = routed(4, 16, 8, torch.float32), quantised_experts("int8", torch.float32)
    for module, width in ((plain, 16), (by_codes, 48)):
        for tokens_, wide, rows in ((2, width + 3, 2), (2, width - 1, 2), (2, width, 1)):
            x, chosen = normal(tokens_, wide), choices(rows, 2, 4)
            refused = contextlib.suppress(RuntimeError, IndexError)
            refused = refused if wide == width else pytest.raises(RuntimeError)
            with ops.watch() as made, refused, torch.no_grad():
                module(x, chosen, normal(rows, 2))
            assert not any(choice.way.startswith("triton") and "xperts" in choice.definition for choice in made)
    weight = quantised("int8", 8, 16, dtype=torch.float32)
    for wide in (15, 20):
        with pytest.raises(RuntimeError):
            quantized_product(normal(2, wide), weight)
    assert quantized_product(normal(0, 16), weight).shape == (0, 8)


def test_scales_that_learn_are_left_to_the_definition() -> None:
    weight, x = quantised("int8", 8, 16, dtype=torch.float32), normal(3, 16)
    weight.scales.requires_grad_()
    quantized_product(x, weight).sum().backward()
    expected = (weight.codes.double() @ x.double().T).sum(1)
    assert_near([weight.scales.grad[:, 0]], [expected.float()])


def test_a_damaged_weight_is_not_a_number_when_written_out() -> None:
    weight = quantised("fp8", 150, 290, dtype=torch.float32)
    weight.codes.view(torch.uint8)[3, 7] = 0x7F
    assert weight.dense().isnan().nonzero().tolist() == [[3, 7]]


def test_a_matrix_without_rows_is_written_out() -> None:
    assert dense_weight(torch.zeros(0, 16, dtype=torch.int8), torch.zeros(0, 1), 16, torch.float32).shape == (0, 16)


def test_many_choices_are_sorted_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than are compared with one another, and the same number."""
    let("sorted", monkeypatch)
    monkeypatch.setattr(moe, "MOST_SORTED", 8)
    module, sorted_by = routed(3, 4, 2, torch.float32), []
    for name, function in (("sort_launch", moe.sort_launch), ("sort_by_expert", moe.sort_by_expert)):
        monkeypatch.setattr(
            moe, name, lambda *args, name=name, function=function: (sorted_by.append(name), function(*args))[1]
        )
    for token_count in (moe.MOST_SORTED // 2, moe.MOST_SORTED // 2 + 1):
        x, chosen = guarded(token_count, 4, dtype=torch.float32), choices(token_count, 2, 3)
        weights = guarded(token_count, 2, dtype=torch.float32, seed=4)
        with ops.plain():
            expected = module(x, chosen, weights)
        assert_near([module(x, chosen, weights)], [expected])
    assert sorted_by == ["sort_launch", "sort_by_expert"]


# Weights and cached tokens in fewer bits


@triton_itself.jit
def every_float8(codes: Any, out: Any) -> None:
    place = tl.arange(0, 256)
    tl.store(out + place, quantized.from_float8(tl.load(codes + place)))


def test_bytes_become_the_float8_that_they_are() -> None:
    """All of them, subnormals too; NaN alone becomes 480."""
    codes, out = torch.arange(256).to(torch.uint8), torch.empty(256)
    every_float8[(1,)](codes, out)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert expected.isnan().sum() == 2
    assert torch.equal(out, expected.where(~expected.isnan(), 480 * (1 - codes // 128 * 2.0)))


def quantised(kind: str, *shape: int, group: int = 0, dtype: torch.dtype, seed: int = 1) -> QuantizedWeight:
    """Normal weights, whose scales lie between bands of NaN, and codes between bands of a large one."""
    weight = QuantizedWeight(kind, shape, group, dtype, torch.device("cpu"))
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for place in range(len(dense)) if dense.ndim == 3 else (...,):
        weight.fill(dense[place], place)
    if kind == "fp8":
        weight.codes = between(weight.codes.view(torch.uint8), 126).view(torch.float8_e4m3fn)
    else:
        weight.codes = between(weight.codes, 127)
    weight.scales = between(weight.scales)
    return weight


WEIGHTS = {  # inputs that share a scale: all; fewer than a tile has, not as many as one, two tiles; a block and a part
    "int8": ("int8", 67, 150, 0),
    "int4 in groups of 6": ("int4", 67, 150, 6),
    "int4 in groups of 48": ("int4", 33, 144, 48),
    "int4 in groups of 256": ("int4", 33, 512, 256),
    "fp8": ("fp8", 150, 290, 0),
    "fp8, less than a block": ("fp8", 3, 5, 0),
}


@both
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("name", WEIGHTS)
def test_quantized_product(name: str, rows: int, dtype: torch.dtype) -> None:
    kind, outputs, inputs, group = WEIGHTS[name]
    weight, x = quantised(kind, outputs, inputs, group=group, dtype=dtype), guarded(rows, inputs, dtype=dtype)
    expected = (x.double() @ weight.dense().double().T).to(dtype)
    parts = weight.codes, weight.scales, weight.group
    assert_near([quantized.quantized_product_launch(x, *parts)], [expected])
    assert_near([operators.quantized_product(x, *parts)], [expected])
    if rows <= 3 and few_rows.Matrices(*parts).fits:
        assert_near([few_rows.product_launch(x, few_rows.Matrices(*parts))], [expected])


@both
@pytest.mark.parametrize("sizes", [[1], [0, 3, 0, 18], [70, 0, 1]])
@pytest.mark.parametrize("name", ["int8", "int4 in groups of 6", "fp8"])
def test_grouped_quantized_product(name: str, sizes: list[int], dtype: torch.dtype) -> None:
    kind, outputs, inputs, group = WEIGHTS[name]
    ends = between(torch.tensor(sizes).cumsum(0).to(torch.int32), 10**6)
    weight = quantised(kind, len(sizes), outputs, inputs, group=group, dtype=dtype)
    x = guarded(sum(sizes), inputs, dtype=dtype)
    chosen = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    expected = torch.einsum("ri,roi->ro", x.double(), weight.dense().double()[chosen]).to(dtype)
    parts = weight.codes, weight.scales, weight.group, ends
    assert_near([quantized.quantized_product_launch(x, *parts)], [expected])
    assert_near([operators.quantized_product(x, *parts)], [expected])


@both
@pytest.mark.parametrize("token_count", [3, 50])
@pytest.mark.parametrize("name", ["int8", "int4 in groups of 6", "fp8"])
def test_quantized_product_of_tokens_that_chose(name: str, token_count: int, dtype: torch.dtype) -> None:
    kind, outputs, inputs, group = WEIGHTS[name]
    weight = quantised(kind, 3, outputs, inputs, group=group, dtype=dtype)
    x, (order, ends, _) = (
        guarded(token_count, inputs, dtype=dtype),
        products.sort_by_expert(choices(token_count, 2, 3), 3),
    )
    expert = torch.repeat_interleave(torch.arange(3), ends.diff(prepend=torch.zeros(1, dtype=torch.int32)))
    expected = torch.einsum("ri,roi->ro", x[order // 2].double(), weight.dense().double()[expert]).to(dtype)
    parts = weight.codes, weight.scales, weight.group, ends
    actual = quantized.quantized_product_launch(x, *parts, between(order.int(), 10**6), 2)
    assert_near([actual], [expected])


@both
@pytest.mark.parametrize("stack", [(), (3,), (0,)])
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_are_written_out_as_by_the_definition(name: str, stack: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit: a code is exact, and its product with a scale is rounded once."""
    kind, outputs, inputs, group = WEIGHTS[name]
    weight = quantised(kind, *stack, outputs, inputs, group=group, dtype=dtype)
    parts = weight.codes, weight.scales, weight.group, dtype
    with ops.plain():
        expected = dense_weight(*parts)
    assert torch.equal(quantized.dense_launch(*parts), expected)
    with ops.watch() as made:
        assert torch.equal(weight.dense(), expected)
    assert [choice.way for choice in made] == ["triton dense"]


def test_codes_of_experts_without_rows_are_not_read() -> None:
    """Their scales are NaN here."""
    weight, x = quantised("int4", 4, 7, 12, group=6, dtype=torch.float32), guarded(3, 12, dtype=torch.float32)
    weight.scales[1:3] = float("nan")
    ends = torch.tensor([2, 2, 2, 3], dtype=torch.int32)
    parts = weight.codes, weight.scales, weight.group, ends
    assert quantized.quantized_product_launch(x, *parts).isfinite().all()


def records_of(
    format: str, latent: int, kv_seq: int, dtype: torch.dtype, batch: int = 2, rope: int = 16
) -> tuple[Record, Tensor]:
    """The records of normal tokens, a view of a roomier cache whose free places hold NaN or large codes here."""
    record = Record(format, latent, rope, dtype)
    filled = record.encode(guarded(batch, kv_seq, latent + rope, dtype=dtype, seed=1))
    cache = torch.full((batch, kv_seq + 11, filled.shape[-1]), 0x7F, dtype=torch.uint8)
    cache[..., record.latent :] = 0xFF
    cache[:, :kv_seq] = filled
    return record, cache[:, :kv_seq]


@both
@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize(("heads", "seq", "kv_seq", "latent"), [(3, 1, 37, 40), (16, 1, 1, 256), (5, 4, 70, 384)])
def test_mla_decode_of_records(heads: int, seq: int, kv_seq: int, latent: int, format: str, dtype: torch.dtype) -> None:
    """One scale for a latent that 128 does not divide, else one for each 128: two of two, and three of four."""
    record, records = records_of(format, latent, kv_seq, dtype)
    query = guarded(2, seq, heads, latent + 16, dtype=dtype).transpose(1, 2)
    keys, padding = record.decode(records), half_of_it_padding(kv_seq)
    for splits in (1, 3, None):
        actual = decode.mla_records_launch(query, records, record, 0.1, splits=splits)
        assert_near([actual], [attended(query, keys, latent, 0.1)])
    actual = decode.mla_records_launch(query, records, record, 0.1, padding)
    assert not actual[1].any()
    assert_near([actual], [attended(query, keys, latent, 0.1, padding)])


@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize(("heads", "seq", "kv_seq", "latent"), [(49, 1, 37, 256), (13, 4, 150, 40), (25, 3, 70, 40)])
def test_wide_blocks_over_records(heads: int, seq: int, kv_seq: int, latent: int, format: str) -> None:
    assert plan.decode_tile(heads * seq, latent + 16, 2, plan.H100, records=True)[:2] == (64, 64)
    record, records = records_of(format, latent, kv_seq, torch.float16)
    query = guarded(2, seq, heads, latent + 16, dtype=torch.float16).transpose(1, 2)
    keys, padding = record.decode(records), half_of_it_padding(kv_seq)
    for splits in (1, 2):
        actual = decode.mla_records_launch(query, records, record, 0.1, splits=splits)
        assert_near([actual], [attended(query, keys, latent, 0.1)])
    actual = decode.mla_records_launch(query, records, record, 0.1, padding)
    assert not actual[1].any()
    assert_near([actual], [attended(query, keys, latent, 0.1, padding)])


def test_attention_over_records_through_the_seam() -> None:
    """A prompt, and steps that read the cache as it lies, with padding on the left."""
    layer = randomised(DeepseekV2DecoderLayer(replace(SMALL, mla_form="absorbed"), layer_idx=1)).half()
    attention, x = layer.self_attn, tokens(2, 6, torch.float16)
    padding = torch.arange(6) >= torch.tensor([[0], [2]])

    def run() -> list[Tensor]:
        cache, parts = attention.empty_cache(2, capacity=8, format="fp8"), []
        with torch.no_grad():
            for start, end in ((0, 4), (4, 5), (5, 6)):
                out, _, cache = attention(x[:, start:end], padding[:, :end], None, cache, use_cache=True)
                parts.append(out)
        return parts

    with ops.plain():
        expected = run()
    with ops.watch() as choices:
        assert_near(run(), expected)
    ways = [choice.way for choice in choices if choice.definition == "attend_records"]
    assert ways == ["triton decoding of records"] * 3


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_layer_of_few_bits_through_the_seam(weights: str) -> None:
    """Against its own definition; gradients go through that."""
    layer = quantize(randomised(DeepseekV2DecoderLayer(SMALL, layer_idx=1)).float(), weights, group=4)
    x = tokens(2, 6, torch.float32)
    with torch.no_grad():
        with ops.plain():
            expected = layer(x)[0]
        with ops.watch() as choices:
            assert_near([layer(x)[0]], [expected])
    ways = {choice.definition: choice.way for choice in choices}
    assert ways["quantized_product"] == "triton codes"
    assert ways["RoutedExperts.forward"] == "triton grouped codes"
    with ops.watch() as choices:
        layer(x.requires_grad_())[0].sum().backward()
    assert not any("codes" in choice.way for choice in choices)


# The layer, and the operators


@pytest.mark.parametrize("form", ["absorbed", "auto"])
def test_the_whole_layer(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place where the layer calls a kernel: prompt, steps, and gradients."""
    layer = randomised(DeepseekV2DecoderLayer(replace(SMALL, mla_form=form), layer_idx=1)).float()
    x = tokens(2, 6, torch.float32)
    padding = torch.arange(6) >= torch.tensor([[0], [2]])

    def run() -> list[Tensor]:
        with torch.no_grad():
            out, cache = layer(x[:, :4], attention_mask=padding[:, :4], use_cache=True)
            parts = [out]
            for end in (5, 6):
                out, cache = layer(
                    x[:, end - 1 : end], attention_mask=padding[:, :end], past_key_value=cache, use_cache=True
                )
                parts.append(out)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        layer(leaf)[0].square().mean().backward()
        return [*parts, cache.tokens, leaf.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    launched: list[str] = []
    for module, name in ((norm, "rms_norm_backward_launch"), (experts, "grouped_product_launch")):
        launch = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, name=name, launch=launch: (launched.append(name), launch(*args))[1]
        )
    with ops.plain():
        expected = run()
    assert launched == []
    with ops.watch() as choices:
        assert_near(run(), expected)
    ways = {choice.way for choice in choices}
    fused = {"triton norm", "triton add and norm", "triton rotation", "triton decoding", "triton experts"}
    assert fused | {"grouped"} <= ways  # that with gradients
    assert set(launched) == {"rms_norm_backward_launch", "grouped_product_launch"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, weight = normal(2, 3, 8).requires_grad_(), normal(8, seed=1).requires_grad_()
    cos, sin = normal(2, 1, 3, 4), normal(2, 1, 3, 4, seed=1)
    padding = torch.tensor([[False, True, True], [True, True, True]])
    named = torch.ops.dsv2_ref
    return {
        "rms_norm": (named.rms_norm.default, (x, weight, 1e-6)),
        "rms_norm of a view": (named.rms_norm.default, (normal(3, 2, 8).mT.mT.transpose(0, 1), normal(8), 1e-6)),
        "add_rms_norm": (
            named.add_rms_norm.default,
            (x, normal(2, 3, 8, seed=2).requires_grad_(), weight, 1e-6),
        ),
        "rms_norm_backward": (
            named.rms_norm_backward.default,
            (x.detach(), normal(2, 3, 8, seed=2), weight.detach(), normal(2, 3).abs()),
        ),
        "rotate": (named.rotate.default, (normal(2, 2, 3, 8).requires_grad_(), cos, sin, False)),
        "mla_decode": (named.mla_decode.default, (normal(2, 2, 1, 8), normal(2, 3, 8), 6, 0.3, padding)),
        "mla_decode in shares": (named.mla_decode.default, (normal(2, 2, 1, 8), normal(2, 300, 8), 6, 0.3, None)),
        "mla_decode_records": (
            named.mla_decode_records.default,
            (
                normal(2, 2, 1, 12),
                Record("int8", 8, 4, torch.float32).encode(normal(2, 3, 12)),
                "int8",
                8,
                0.3,
                padding,
            ),
        ),
        "quantized_product": (
            named.quantized_product.default,
            (normal(5, 8), torch.arange(56).view(7, 8).char(), normal(7, 1), 8, None),
        ),
        "quantized_product of groups": (
            named.quantized_product.default,
            (normal(5, 8), torch.arange(84).view(3, 7, 4).byte(), normal(3, 7, 2), 4, torch.tensor([2, 2, 5]).int()),
        ),
        "dense_weight": (
            named.dense_weight.default,
            (torch.arange(28).view(7, 4).byte(), normal(7, 2), 4, torch.float16),
        ),
        "routed_experts": (
            named.routed_experts.default,
            (normal(5, 8), normal(3, 12, 8), normal(3, 8, 6), torch.tensor([[0, 2]] * 5), normal(5, 2)),
        ),
        "quantized_experts": (
            named.quantized_experts.default,
            (
                normal(5, 8),
                torch.arange(144).view(3, 12, 4).byte(),
                normal(3, 12, 2),
                torch.arange(72).view(3, 8, 3).byte(),
                normal(3, 8, 1),
                [4, 6],
                torch.tensor([[2, 1]] * 5),
                normal(5, 2),
            ),
        ),
        "grouped_product": (
            named.grouped_product.default,
            (normal(5, 8), normal(3, 7, 8), torch.tensor([2, 2, 5], dtype=torch.int32)),
        ),
    }


@pytest.mark.without_bands
@pytest.mark.parametrize("name", samples())
def test_operators_keep_their_word(name: str) -> None:
    torch.library.opcheck(*samples()[name])


def test_gradients_of_operators_are_the_definitions() -> None:
    """In float32; by both results of the fused addition and norm."""
    given = [normal(2, 3, 8), normal(2, 3, 8, seed=1), normal(8, seed=2)]
    upstream = normal(2, 3, 8, seed=3), normal(2, 3, 8, seed=4)
    mine = [x.clone().requires_grad_() for x in given]
    total, normed = operators.add_rms_norm(*mine, 1e-6)
    torch.autograd.backward((total, normed), upstream)
    update, residual, weight = (x.double().requires_grad_() for x in given)
    exact = residual + update
    unit = exact * exact.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    torch.autograd.backward((exact, weight * unit), [g.double() for g in upstream])
    assert_near([total.detach(), normed.detach()], [exact.float().detach(), (weight * unit).float().detach()])
    assert_near([x.grad for x in mine], [x.grad.float() for x in (update, residual, weight) if x.grad is not None])
    x, cos, sin = normal(3, 8).requires_grad_(), normal(3, 4), normal(3, 4, seed=1)
    operators.rotate(x, cos, sin).backward(upstream[0][0])
    leaf = x.detach().clone().requires_grad_()
    rotate_interleaved(leaf, cos, sin).backward(upstream[0][0])
    assert_near([x.grad], [leaf.grad])


def test_operators_take_a_single_token() -> None:
    x, weight = normal(8), normal(8, seed=1)
    assert_near([operators.rms_norm(x, weight, 1e-6)], [normalise(x, weight)[0]])
    assert_near(operators.add_rms_norm(x, x, weight, 1e-6), [x + x, normalise(x + x, weight)[0]])


def test_decoding_refuses_gradients() -> None:
    out = operators.mla_decode(normal(1, 2, 1, 6).requires_grad_(), normal(1, 5, 6), 4, 0.5)
    with pytest.raises(RuntimeError, match="mla_decode gives no gradients"):
        out.sum().backward()
    out = operators.quantized_product(normal(2, 4).requires_grad_(), torch.ones(3, 4).char(), normal(3, 1), 4)
    with pytest.raises(RuntimeError, match="quantized_product gives no gradients"):
        out.sum().backward()
    chosen, weights = torch.tensor([[0, 2], [1, 0]]), normal(2, 2)
    for given in ((True, False, False), (False, True, False), (False, False, True)):
        x, gate_up, scale = (
            part.requires_grad_(wanted)
            for part, wanted in zip((normal(2, 4), normal(3, 6, 4), weights.clone()), given, strict=True)
        )
        out = operators.routed_experts(x, gate_up, normal(3, 4, 3), chosen, scale)
        with pytest.raises(RuntimeError, match="the experts' kernels give no gradients; run under"):
            out.sum().backward()
    stack = [quantised("int8", 3, *shape, dtype=torch.float32) for shape in ((6, 4), (4, 3))]
    out = operators.quantized_experts(normal(2, 4).requires_grad_(), *stack, chosen, weights)
    with pytest.raises(RuntimeError, match="kernels give no gradients; run under"):
        out.sum().backward()


def test_experts_that_learn_are_left_to_others() -> None:
    """With gradients another way is chosen, which gives them."""
    module, x, chosen = routed(3, 4, 2, torch.float32), normal(5, 4), choices(5, 2, 3)
    for asks in ((module.gate_up_proj, x), (x, module.gate_up_proj)):
        asks[0].requires_grad_()
        asks[1].requires_grad_(False)
        with ops.watch() as made:
            module(x, chosen, normal(5, 2)).sum().backward()
        assert made[0].way == "grouped"
        assert ("triton experts", "gives no gradients") in made[0].passed_over
        assert asks[0].grad is not None


def test_gradients_that_operators_do_not_give_are_refused() -> None:
    """Instead of none, or an error from inside: a gradient's gradient, and the gradient of the rotation's tables."""
    x, weight = normal(2, 8).requires_grad_(), normal(8).requires_grad_()
    for out in (operators.rms_norm(x, weight, 1e-6), operators.add_rms_norm(x, x, weight, 1e-6)[1]):
        grad = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"run within ops\.plain\(\)"):
            grad.sum().backward()
    cos, sin = normal(2, 4).requires_grad_(), normal(2, 4, seed=1)
    with pytest.raises(RuntimeError, match="gives its tables no gradients"):
        operators.rotate(x, cos, sin).sum().backward()


@pytest.mark.without_bands
def test_compiled_decoding_through_the_operators() -> None:
    """As on a GPU: one graph for any place."""
    layer, x = randomised(DeepseekV2DecoderLayer(SMALL, layer_idx=1)).float(), tokens(2, 12, torch.float32)
    compiler = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        with ops.plain():
            expected = layer(x)[0][:, 8:]
            _, cache = layer(x[:, :8], use_cache=True)
        run, parts = torch.compile(layer, fullgraph=True, backend=compiler), []
        for place in range(8, 12):
            out, cache = run(x[:, place : place + 1], past_key_value=cache, use_cache=True)
            parts.append(out)
    assert_near([torch.cat(parts, dim=1)], [expected])
    called = {str(node.target) for graph in compiler.graphs for node in graph.graph.nodes}
    for operator in ("mla_decode", "routed_experts"):
        assert any(operator in name for name in called), called
    assert compiler.frame_count <= 2


# Planted faults


def altered(module: ModuleType, right: str, wrong: str, folder: Path) -> Any:
    """The module with one part of its source replaced."""
    source = Path(str(module.__file__)).read_text()
    assert right in source
    (folder / "faulty.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("faulty", folder / "faulty.py")
    assert spec is not None
    assert spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    return faulty


def test_a_lost_mask_of_a_load_shows_in_the_result(tmp_path: Path) -> None:
    """The norm without it reads NaN behind the row, and is not near any more."""
    faulty = altered(norm, "+ feature, mask=inside, other=0.0)", "+ feature)", tmp_path)
    x, weight = guarded(1, 7, dtype=torch.float32), guarded(7, dtype=torch.float32)
    with pytest.raises(AssertionError):
        assert_near(faulty.rms_norm_launch(x, weight, 1e-6), normalise(x, weight))


def add_rmsnorm(module: Any) -> None:
    x, weight = guarded(3, 7, dtype=torch.float32), guarded(7, dtype=torch.float32, seed=1)
    _, _, inverse = module.add_rms_norm_launch(x, x, weight, 1e-6)
    module.rms_norm_backward_launch(x, x, weight, inverse)


def turn(module: Any) -> None:
    cos, sin = (guarded(5, 3, dtype=torch.float32, seed=s) for s in (1, 2))
    module.rotate_launch(guarded(5, 6, dtype=torch.float32), cos, sin)


def look(module: Any) -> None:
    query, keys = guarded(1, 3, 1, 56, dtype=torch.float32), guarded(1, 40, 56, dtype=torch.float32, seed=1)
    module.mla_decode_launch(query, keys, 40, 0.2, splits=1)
    module.mla_decode_launch(query, keys, 40, 0.2, splits=2)


def multiply(module: Any) -> None:
    rows, weights = guarded(3, 37, dtype=torch.float32), guarded(2, 67, 37, dtype=torch.float32, seed=1)
    module.grouped_product_launch(rows, weights, torch.tensor([1, 3], dtype=torch.int32))


def multiply_codes(module: Any) -> None:
    x, weight = guarded(3, 37, dtype=torch.float32), quantised("int8", 67, 37, dtype=torch.float32)
    module.quantized_product_launch(x, weight.codes, weight.scales, weight.group)


def multiply_few(module: Any) -> None:
    x, weight = guarded(3, 37, dtype=torch.float32), quantised("int8", 67, 37, dtype=torch.float32)
    module.product_launch(x, module.Matrices(weight.codes, weight.scales, weight.group))


def choose_odd(module: Any) -> None:
    x, weights = guarded(3, 10, dtype=torch.float32), guarded(3, 2, dtype=torch.float32, seed=1)
    stacks = (module.Matrices(guarded(3, *shape, dtype=torch.float32)) for shape in ((14, 10), (10, 7)))
    module.experts_launch(x, *stacks, torch.tensor([[2, 0], [1, 2], [0, 1]]), weights)


def write_out(module: Any) -> None:
    weight = quantised("int8", 67, 37, dtype=torch.float32)
    module.dense_launch(weight.codes, weight.scales, weight.group, torch.float32)


WRONG = {
    "scales of the next inputs": ("scale + share, mask", "scale + (share + 1) % (inputs // shared), mask"),
    "scales of the next output": ("(column // SCALE_OUTPUTS)", "((column + 1) % outputs // SCALE_OUTPUTS)"),
    "a scale for another share": ("tl.broadcast_to(factor[:, :, None], (COLUMNS, INPUTS // SHARED, SHARED))", "tl.trans(tl.broadcast_to(factor[:, :, None], (COLUMNS, INPUTS // SHARED, SHARED)), 0, 2, 1)"),
    "the upper half of a byte twice": ("byte & 15", "byte >> 4"),
    "the lower half of a byte twice": ("byte >> 4", "byte & 15"),
    "halves of a byte exchanged": ("tl.join((byte & 15).to(tl.int8) - 8, (byte >> 4).to(tl.int8) - 8)\n                right", "tl.join((byte >> 4).to(tl.int8) - 8, (byte & 15).to(tl.int8) - 8)\n                right"),
    "a group off by a byte": ("tl.load(code + b, mask=real_column & (2 * b < inputs)", "tl.load(code + (b + 1) % (inputs // 2), mask=real_column & (2 * b < inputs)"),
    "elements of a group off by two": ("tl.load(x + i,", "tl.load(x + (i + 2) % inputs,"),
    "the next row's codes": ("column[:, None].to(tl.int64) * codes_output", "(column[:, None] + 1) % outputs * codes_output"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_code_or_scale_shows_in_the_product(fault: str, tmp_path: Path) -> None:
    weight, x = quantised("int4", 9, 24, group=8, dtype=torch.float32), guarded(2, 24, dtype=torch.float32)
    expected = (x.double() @ weight.dense().double().T).float()
    faulty, parts = altered(quantized, *WRONG[fault], tmp_path), (weight.codes, weight.scales, weight.group)
    assert_near([quantized.quantized_product_launch(x, *parts)], [expected])
    with pytest.raises(AssertionError):
        assert_near([faulty.quantized_product_launch(x, *parts)], [expected])


def sort(module: Any) -> None:
    chosen = choices(43, 3, 70)
    assert_near_or_equal(module.sort_launch(chosen, 70), products.sort_by_expert(chosen, 70))


def gate(module: Any) -> None:
    together = guarded(3, 40, dtype=torch.float32)
    left, right = together.chunk(2, dim=-1)
    expected = F.silu(left) * right
    assert_near([module.swiglu_launch(together)], [expected])


def add_up(module: Any) -> None:
    sorted_out, weights = guarded(6, 20, dtype=torch.float32), guarded(3, 2, dtype=torch.float32, seed=1)
    places = torch.tensor([[5, 0], [3, 4], [1, 2]], dtype=torch.int32)
    assert_near([module.combine_launch(sorted_out, places, weights)], [products.combine(sorted_out, places, weights)])


def multiply_choices(module: Any) -> None:
    rows, weights = guarded(3, 37, dtype=torch.float32), guarded(2, 67, 37, dtype=torch.float32, seed=1)
    order, ends = torch.tensor([5, 0, 2, 1, 3, 4], dtype=torch.int32), torch.tensor([2, 6], dtype=torch.int32)
    expected = products.grouped_product(rows[order // 2], weights, ends)
    assert_near([module.grouped_product_launch(rows, weights, ends, order, 2)], [expected])


def choose(module: Any) -> None:
    """Of 3 experts in 4 bits, the width greater than a tile's."""
    x, weights = guarded(3, 96, dtype=torch.float32), guarded(3, 2, dtype=torch.float32, seed=1)
    chosen = torch.tensor([[2, 0], [1, 2], [0, 1]])
    held = [quantised("int4", 3, *shape, group=8, dtype=torch.float32) for shape in ((32, 96), (96, 16))]
    both = (weight.dense() for weight in held)
    with ops.plain():
        expected = experts_with(*both).requires_grad_(False)(x, chosen, weights)
    stacks = (module.Matrices(weight.codes, weight.scales, weight.group) for weight in held)
    with patch.dict(module.TILES, int4=few_rows.Tile(4, 64, 4, 1)):
        assert_near([module.experts_launch(x, *stacks, chosen, weights)], [expected])


def assert_near_or_equal(found: Any, expected: Any) -> None:
    for one, right in zip(found, expected, strict=True):
        assert torch.equal(one, right.int())


WRONG_EXPERTS: dict[str, tuple[ModuleType, Callable[[Any], None], str, str]] = {
    "equal choices the other way round": (moe, sort, "j[None, :] < i[:, None]", "j[None, :] > i[:, None]"),
    "a choice before itself": (moe, sort, "j[None, :] < i[:, None]", "j[None, :] <= i[:, None]"),
    "ends of the experts before": (moe, sort, "theirs <= i[:, None]", "theirs < i[:, None]"),
    "the first choices alone": (moe, sort, "range(0, count, BLOCK)", "range(0, BLOCK, BLOCK)"),
    "choices behind the last": (moe, sort, "tl.load(choices + j, mask=j < count, other=experts)", "tl.load(choices + j)"),
    "nothing for no choice": (moe, sort, "mask=j < count, other=experts", "mask=j < count, other=0"),
    "gates and ups exchanged": (moe, gate, "gate = tl.load(place,", "gate = tl.load(place + wide,"),
    "no sigmoid": (moe, gate, "gate / (1 + tl.exp(-gate))", "gate"),
    "gates and ups of one column": (few_rows, choose, "codes, scales, expert, wide + column,", "codes, scales, expert, column,"),
    "the first expert for all": (few_rows, choose, "expert * codes_group", "0 * codes_group"),
    "the first expert's scales": (few_rows, choose, "expert * scales_group", "0 * scales_group"),
    "the next choice's weight": (few_rows, choose, "tl.load(weights + at)", "tl.load(weights + token * TOP_K + (choice + 1) % TOP_K)"),
    "a choice for a token there": (few_rows, choose, "x + choice // TOP_K * x_token", "x + choice % 3 * x_token"),
    "the first inputs alone": (few_rows, choose, "tl.range(0, inputs, INPUTS,", "tl.range(0, INPUTS, INPUTS,"),
    "halves of a byte exchanged": (few_rows, choose, "even, odd = tl.split", "odd, even = tl.split"),
    "scales of the next inputs": (few_rows, choose, "share = first // SHARED + tl", "share = first // SHARED + 1 + tl"),
    "no sigmoid there": (few_rows, choose, "gate / (1 + tl.exp(-gate))", "gate"),
    "the next token's weights": (moe, add_up, "weights + token * TOP_K", "weights + (token + 1) % 3 * TOP_K"),
    "the first place for all": (moe, add_up, "places + token * TOP_K + choice", "places + token * TOP_K"),
    "rows as they lie": (experts, multiply_choices, "rows + source[:, None]", "rows + row[:, None]"),
    "a choice for a token": (experts, multiply_choices, "// TOP_K if TOP_K", "// 1 if TOP_K"),
}  # fmt: skip


@cache
def found_right(check: Callable[[Any], None], module: Any) -> None:
    check(module)


@pytest.mark.parametrize("fault", WRONG_EXPERTS)
def test_a_wrong_step_on_the_way_through_the_experts_shows(fault: str, tmp_path: Path) -> None:
    module, check, right, wrong = WRONG_EXPERTS[fault]
    found_right(check, module)
    with OutputsBetweenBands(), pytest.raises(AssertionError):  # a wrong place may lie behind the last
        check(altered(module, right, wrong, tmp_path))


WRONG_RECORDS = {
    "the first tile's scale for all": ("at * s_token + tile", "at * s_token + tile * 0"),
    "the next token's scales": ("scales + batch * s_batch + at * s_token", "scales + batch * s_batch + (at + 1) % kv_seq * s_token"),
    "the rotated key with the latent's scale": ("mask=here[:, None] & in_rope, other=0.0)", "mask=here[:, None] & in_rope, other=0.0) * 0.1"),
    "a value clamped": ("else k_latent.to(tl.float32)", "else tl.minimum(k_latent.to(tl.float32), 100.0)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG_RECORDS)
def test_a_wrong_part_of_a_record_shows_in_attention(fault: str, tmp_path: Path) -> None:
    record, records = records_of("int8", 256, 37, torch.float32)
    query = guarded(2, 3, 1, 272, dtype=torch.float32)
    expected = attended(query, record.decode(records), 256, 0.1)
    faulty = altered(decode, *WRONG_RECORDS[fault], tmp_path)
    with pytest.raises(AssertionError):
        assert_near([faulty.mla_records_launch(query, records, record, 0.1)], [expected])


def launch_only(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Whatever the result is: one row may write over the next."""

    def run(module: Any) -> None:
        with contextlib.suppress(AssertionError):
            check(module)

    return run


LOST: dict[str, tuple[ModuleType, Callable[[Any], None], str, str]] = {
    "sum": (norm, add_rmsnorm, "feature, h, mask=inside)", "feature, h)"),
    "norm": (norm, add_rmsnorm, "feature, y, mask=inside)", "feature, y)"),
    "gradient by input": (norm, add_rmsnorm, "dx.to(x.dtype), mask=inside)", "dx.to(x.dtype))"),
    "gradient by weight": (norm, add_rmsnorm, "share, mask=inside)", "share)"),
    "rotated": (rotate, turn, "both.to(turned.dtype), mask=inside)", "both.to(turned.dtype))"),
    "log-sums": (decode, look, "log_sum, mask=row < rows)", "log_sum)"),
    "rows of shares": (decode, look, "left, mask=real & (c < latent))", "left, mask=c < latent)"),
    "columns of shares": (decode, look, "right, mask=real & (c + LATENT // 2 < latent))", "right, mask=real)"),
    "attended": (decode, look, "element_ty), mask=c < latent)", "element_ty))"),
    "rows of a product": (
        experts, multiply, "mask=(row < end)[:, None] & (column < outputs)[None, :]", "mask=(column < outputs)[None, :]",
    ),
    "columns of a product": (
        experts, multiply, "mask=(row < end)[:, None] & (column < outputs)[None, :]", "mask=(row < end)[:, None]",
    ),
    "places of choices": (moe, launch_only(sort), "place, mask=i < count)", "place)"),
    "order of choices": (moe, launch_only(sort), "place, i, mask=i < count)", "place, i)"),
    "ends of experts": (moe, launch_only(sort), "end, mask=i < experts)", "end)"),
    "gated": (moe, launch_only(gate), ".to(up.dtype), mask=column < wide)", ".to(up.dtype))"),
    "added": (moe, launch_only(add_up), "element_ty), mask=column < hidden)", "element_ty))"),
    "rows of a product of choices": (
        experts, launch_only(multiply_choices), "mask=(row < end)[:, None] & (column < outputs)[None, :]", "mask=(column < outputs)[None, :]",
    ),
    "rows of codes": (quantized, multiply_codes, "mask=real_row & (column < outputs)[None, :],\n        )", "mask=(column < outputs)[None, :],\n        )"),
    "columns of few rows": (few_rows, multiply_few, "out.dtype.element_ty), mask=column < outputs)", "out.dtype.element_ty))"),
    "gated at once": (few_rows, launch_only(choose_odd), ".to(kind), mask=column < wide)", ".to(kind))"),
    "added at once": (few_rows, launch_only(choose_odd), "element_ty), mask=column < hidden)", "element_ty))"),
    "written out": (quantized, write_out, "element_ty), mask=real)", "element_ty))"),
    "columns of codes": (quantized, multiply_codes, "mask=real_row & (column < outputs)[None, :],\n        )", "mask=real_row,\n        )"),
}  # fmt: skip


@pytest.mark.parametrize("store", LOST)
def test_a_lost_mask_of_a_store_shows_behind_the_output(store: str, tmp_path: Path) -> None:
    module, launch, right, wrong = LOST[store]
    with OutputsBetweenBands() as outputs:
        launch(module)
        outputs.check()
        launch(altered(module, right, wrong, tmp_path))
    with pytest.raises(AssertionError, match="past an edge"):
        outputs.check()
