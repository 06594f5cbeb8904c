"""The fused kernels on a GPU, at real sizes, against float64 on the CPU.

Tolerances are relative to the largest value expected: 2e-5 for float32 sums of some thousand terms; float16 and bfloat16
round at 2**-11 and 2**-8, a few times over.
"""

import pytest
import torch
from torch import Tensor

from dsv2_ref import DeepseekV2RMSNorm
from tests.cuda.place import (
    DEVICE,
    KERNELS,
    KINDS,
    Record,
    add_rms_norm,
    add_rms_norm_definition,
    by_codes,
    device_needed,
    every_dtype,
    experts_definition,
    fused_only,
    grouped_product,
    grouped_product_definition,
    half_only,
    mla_decode,
    mla_decode_definition,
    mla_decode_records,
    ops,
    quantised,
    rotate,
    rotate_interleaved,
    routed_experts,
)

pytestmark = [device_needed, fused_only, pytest.mark.usefixtures("as_shipped")]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.device.type == DEVICE
    wrong = (actual.cpu().double() - expected.double()).abs().max()
    assert wrong <= TOLERANCE[actual.dtype] * expected.abs().max(), float(wrong)


@every_dtype
@pytest.mark.parametrize("rows", [1, 700])
@pytest.mark.parametrize("features", [1, 512, 1536, 5120, 8192])
def test_add_rms_norm_and_its_gradients(rows: int, features: int, dtype: torch.dtype) -> None:
    given = [normal(rows, features, dtype=dtype, seed=s) for s in (1, 2)] + [normal(features, dtype=dtype, seed=3)]
    exact = [t.double().requires_grad_() for t in given]
    total, normed = add_rms_norm_definition(*exact, 1e-6)
    upstream = [normal(rows, features, dtype=dtype, seed=s) for s in (4, 5)]
    torch.autograd.backward((total, normed), [g.double() for g in upstream])

    there = [t.to(DEVICE).requires_grad_() for t in given]
    results = add_rms_norm(*there, 1e-6)
    torch.autograd.backward(results, [g.to(DEVICE) for g in upstream])
    for actual, expected in zip(results, (total, normed), strict=True):
        assert_near(actual.detach(), expected.detach())
    for mine, theirs in zip(there, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_near(mine.grad, theirs.grad)


@every_dtype
def test_norm_of_a_module_is_the_one_without_kernels(dtype: torch.dtype) -> None:
    norm, x = DeepseekV2RMSNorm(5120).to(DEVICE, dtype), normal(9, 5120, dtype=dtype).to(DEVICE)
    with ops.without(KERNELS):
        expected = norm(x)
    assert_near(norm(x).detach(), expected.detach().cpu())


@every_dtype
@pytest.mark.parametrize(("heads", "seq"), [(128, 1), (16, 333)])
def test_rotation(heads: int, seq: int, dtype: torch.dtype) -> None:
    x = normal(2, seq, heads, 192, dtype=dtype)
    cos, sin = (normal(2, 1, seq, 32, dtype=torch.float32, seed=s) for s in (1, 2))
    there = x.to(DEVICE).transpose(1, 2)[..., 128:].requires_grad_()
    actual = rotate(there, cos.to(DEVICE), sin.to(DEVICE))
    assert_near(actual.detach(), rotate_interleaved(x.transpose(1, 2)[..., 128:].double(), cos.double(), sin.double()))
    actual.backward(actual.detach())
    back = rotate_interleaved(actual.detach().cpu().double(), cos.double(), -sin.double())
    assert there.grad is not None
    assert_near(there.grad, back)


@every_dtype
@pytest.mark.parametrize("seq", [1, 4])
@pytest.mark.parametrize(("batch", "heads", "kv_seq"), [(1, 128, 8191), (3, 16, 70), (1, 16, 40000)])
def test_mla_decode(batch: int, heads: int, kv_seq: int, seq: int, dtype: torch.dtype) -> None:
    query = normal(batch, heads, seq, 576, dtype=dtype)
    cache = normal(batch, kv_seq + 50, 576, dtype=dtype, seed=1)
    padding = torch.arange(kv_seq).expand(batch, -1) >= 7
    for mask in (None, padding):
        expected = mla_decode_definition(query.double(), cache[:, :kv_seq].double(), 512, 192**-0.5, mask)
        mask = None if mask is None else mask.to(DEVICE)
        with torch.no_grad():
            actual = mla_decode(query.to(DEVICE), cache.to(DEVICE)[:, :kv_seq], 512, 192**-0.5, mask)
        assert_near(actual, expected)


@half_only
@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize("seq", [1, 4])
@pytest.mark.parametrize(("batch", "heads", "kv_seq"), [(1, 128, 8191), (3, 16, 70), (1, 16, 40000)])
def test_mla_decode_of_records(batch: int, heads: int, kv_seq: int, seq: int, format: str, dtype: torch.dtype) -> None:
    """Of a cache in fewer bits: 656 bytes per token."""
    query, record = normal(batch, heads, seq, 576, dtype=dtype), Record(format, 512, 64, dtype)
    cache = record.encode(normal(batch, kv_seq + 50, 576, dtype=dtype, seed=1))
    assert cache.shape[-1] == 656
    tokens = record.decode(cache[:, :kv_seq]).double()
    padding = torch.arange(kv_seq).expand(batch, -1) >= 7
    for mask in (None, padding):
        expected = mla_decode_definition(query.double(), tokens, 512, 192**-0.5, mask)
        mask = None if mask is None else mask.to(DEVICE)
        with torch.no_grad():
            there = query.to(DEVICE), cache.to(DEVICE)[:, :kv_seq]
            actual = mla_decode_records(*there, format, 512, 192**-0.5, mask)
        assert_near(actual, expected)


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 17, 700])
def test_quantised_product(rows: int, kind: str, dtype: torch.dtype) -> None:
    weight, x = quantised(kind, 1000, 1536, dtype=dtype), normal(rows, 1536, dtype=dtype)
    expected = x.double() @ weight.dense().double().T
    assert_near(by_codes(x.to(DEVICE), weight.to(DEVICE)), expected)


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_written_out(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit as on the CPU: a code is exact, and its product with a scale is rounded once."""
    weight = quantised(kind, 3, 1000, 1536, dtype=dtype)
    assert torch.equal(weight.to(DEVICE).dense().cpu(), quantised(kind, 3, 1000, 1536, dtype=dtype).dense())


@every_dtype
@pytest.mark.parametrize("kind", ["", *KINDS])
@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 90])
def test_routed_experts(tokens: int, kind: str, dtype: torch.dtype) -> None:
    """Few tokens choice by choice, more of them sorted by their experts."""
    shapes = ((16, 2 * 448, 512), (16, 512, 448))
    weights = [quantised(kind or "int8", *shape, dtype=dtype) for shape in shapes]
    x, chosen = normal(tokens, 512, dtype=dtype), torch.rand(tokens, 16).topk(6).indices
    share = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(2))
    for weight in weights:
        weight.scales.mul_(0.05)
    written = [weight.dense() for weight in weights]
    expected = experts_definition(x.double(), *(stack.double() for stack in written), chosen, share)
    stacks = [weight.to(DEVICE) for weight in (weights if kind else written)]
    assert_near(routed_experts(x.to(DEVICE), stacks, chosen.to(DEVICE), share.to(DEVICE)), expected)


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [6, 3000])
def test_grouped_product_of_codes(rows: int, kind: str, dtype: torch.dtype) -> None:
    groups = torch.randint(0, 64, (rows,), generator=torch.Generator().manual_seed(0))
    ends = torch.bincount(groups, minlength=64).cumsum(0).to(torch.int32)
    weight, x = quantised(kind, 64, 384, 512, dtype=dtype), normal(rows, 512, dtype=dtype)
    expected = grouped_product_definition(x.double(), weight.dense().double(), ends)
    assert_near(by_codes(x.to(DEVICE), weight.to(DEVICE), ends.to(DEVICE)), expected)


@every_dtype
@pytest.mark.parametrize("rows", [6, 3000])
def test_grouped_product_and_its_gradients(rows: int, dtype: torch.dtype) -> None:
    groups = torch.randint(0, 64, (rows,), generator=torch.Generator().manual_seed(0))
    ends = torch.bincount(groups, minlength=64).cumsum(0).to(torch.int32)
    x, weights = normal(rows, 512, dtype=dtype), normal(64, 384, 512, dtype=dtype, seed=1)
    exact = [t.double().requires_grad_() for t in (x, weights)]
    there = [t.to(DEVICE).requires_grad_() for t in (x, weights)]
    expected, actual = grouped_product_definition(*exact, ends), grouped_product(*there, ends.to(DEVICE))
    assert_near(actual.detach(), expected.detach())
    upstream = normal(rows, 384, dtype=dtype, seed=2)
    expected.backward(upstream.double())
    actual.backward(upstream.to(DEVICE))
    for mine, theirs in zip(there, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_near(mine.grad, theirs.grad)
