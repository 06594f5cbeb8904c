"""The kernels in Triton's interpreter, beside their definitions; `test_kernels` runs these with TRITON_INTERPRET=1.

Inputs lie between bands of NaN, so that a read past an edge shows in the result. So do outputs between bands of a mark, which
a write past an edge would change. Tolerances: float32 sums of up to 1,300 terms in another order, 1e-5; float16 rounds at
2**-11 and a few roundings differ, 4e-3.
"""

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsv2_ref import DeepseekV2DecoderLayer, kernels
from dsv2_ref.kernels import add_rmsnorm as norm
from dsv2_ref.kernels import grouped_experts as grouped
from dsv2_ref.kernels import mla_decode as mla
from dsv2_ref.kernels import ops, rotate
from tests.peers import SMALL, randomised, tokens

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
    """What is made empty inside holds NaN, so that what nobody writes is seen, and lies between bands, which nobody may write."""

    MARK = 7.0

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like) and out.is_floating_point() and out.device.type == "cpu":
            out = between(torch.full(out.shape, float("nan"), dtype=out.dtype), self.MARK)
            self.made.append(out)
        return out

    def check(self) -> None:
        for made in self.made:
            memory = made.as_strided((made.numel() + 2 * BAND,), (1,), 0)
            for band in (memory[:BAND], memory[-BAND:]):
                assert (band == self.MARK).all(), "written past an edge"


@pytest.fixture(autouse=True)
def outputs() -> Iterator[OutputsBetweenBands]:
    with OutputsBetweenBands() as outputs:
        yield outputs
    outputs.check()


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
    expected = norm.add_rmsnorm_definition(update, residual, weight, 1e-6)
    actual = norm.add_rmsnorm_launch(update, residual, weight, 1e-6)
    assert torch.equal(actual[0], expected[0])
    assert_near(actual, expected)
    alone = norm.add_rmsnorm_launch(update, None, weight, 1e-6)
    assert alone[0] is None
    assert_near(alone[1:], norm.add_rmsnorm_definition(update, None, weight, 1e-6)[1:])
    total, _, inverse = expected
    assert_near(
        norm.add_rmsnorm_backward_launch(grad, between(total), weight, between(inverse)),
        norm.add_rmsnorm_backward_definition(grad, total, weight, inverse),
    )


def test_small_rows_feel_epsilon() -> None:
    """A mean square of the size of epsilon, and a row of zeros."""
    x, weight = 1e-3 * guarded(3, 40, dtype=torch.float32), guarded(40, dtype=torch.float32, seed=1)
    x[2] = 0
    expected = norm.add_rmsnorm_definition(x, None, weight, 1e-6)[1:]
    assert_near(norm.add_rmsnorm_launch(x, None, weight, 1e-6)[1:], expected)


def test_the_norm_rounds_where_its_definition_does() -> None:
    """Before the weight and after it: bit for bit, but for the few places where the sums' order decides a rounding."""
    x, weight = guarded(8, 1280, dtype=torch.float16), guarded(1280, dtype=torch.float16, seed=1)
    _, expected, _ = norm.add_rmsnorm_definition(x, None, weight, 1e-6)
    _, actual, _ = norm.add_rmsnorm_launch(x, None, weight, 1e-6)
    assert (actual != expected).double().mean() < 0.01
    once = (weight.float() * x.float() * x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()).half()
    assert (once != expected).double().mean() > 0.1  # what a kernel that rounds once would give


def test_rows_may_lie_apart_and_be_many_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "BACKWARD_PROGRAMS", 2)
    x, weight = guarded(5, 24, dtype=torch.float32)[:, :20], guarded(20, dtype=torch.float32)
    _, normed, inverse = norm.add_rmsnorm_definition(x, None, weight, 1e-6)
    assert_near(norm.add_rmsnorm_launch(x, None, weight, 1e-6)[1:], (normed, inverse))
    assert_near(
        norm.add_rmsnorm_backward_launch(x, x, weight, inverse),
        norm.add_rmsnorm_backward_definition(x, x, weight, inverse),
    )


@both
@pytest.mark.parametrize(("batch", "heads", "seq", "dim"), [(1, 1, 1, 2), (2, 3, 5, 64), (1, 2, 17, 6)])
def test_rotation(batch: int, heads: int, seq: int, dim: int, dtype: torch.dtype) -> None:
    """The queries' part of a wider tensor, with the axes as attention has them."""
    x = guarded(batch, seq, heads, dim + 8, dtype=dtype).transpose(1, 2)[..., 8:]
    cos, sin = (guarded(batch, 1, seq, dim // 2, dtype=torch.float32, seed=s) for s in (1, 2))
    expected = rotate.rotate_definition(x, cos, sin)
    assert torch.equal(rotate.rotate_launch(x, cos, sin), expected)
    assert torch.equal(rotate.rotate_launch(x, cos, sin, backward=True), rotate.rotate_definition(x, cos, -sin))
    assert torch.equal(rotate.rotate_launch(x[:, 0], cos[:, 0], sin[:, 0]), expected[:, 0])


@both
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(("heads", "seq", "kv_seq"), [(1, 1, 1), (3, 1, 37), (16, 1, 96), (5, 4, 70)])
def test_mla_decode(heads: int, seq: int, kv_seq: int, splits: int | None, dtype: torch.dtype) -> None:
    """Over a view of a roomier cache, whose free places hold NaN here."""
    latent, rope = 40, 16
    query = guarded(2, seq, heads, latent + rope, dtype=dtype).transpose(1, 2)
    cache = torch.full((2, kv_seq + 11, latent + rope), float("nan"), dtype=dtype)
    cache[:, :kv_seq] = guarded(2, kv_seq, latent + rope, dtype=dtype, seed=1)
    keys = cache[:, :kv_seq]
    expected = mla.mla_decode_definition(query, keys, latent, 0.2)
    assert_near([mla.mla_decode_launch(query, keys, latent, 0.2, splits=splits)], [expected])
    padding = torch.arange(kv_seq) >= torch.tensor([[0], [kv_seq]])  # the second sequence sees nothing
    padding[0, kv_seq // 2] = kv_seq == 1
    expected = mla.mla_decode_definition(query, keys, latent, 0.2, padding)
    actual = mla.mla_decode_launch(query, keys, latent, 0.2, padding, splits=splits)
    assert not actual[1].any()
    assert_near([actual], [expected])


def test_shares_may_be_many() -> None:
    """More than a launch by itself would make."""
    query, keys = guarded(1, 2, 1, 56, dtype=torch.float32), guarded(1, 3000, 56, dtype=torch.float32, seed=1)
    expected = mla.mla_decode_definition(query, keys, 40, 0.2)
    assert_near([mla.mla_decode_launch(query, keys, 40, 0.2, splits=100)], [expected])


@both
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [[1], [0, 3, 0, 18], [70, 0, 1]])
def test_grouped_product(sizes: list[int], transposed: bool, dtype: torch.dtype) -> None:
    ends = between(torch.tensor(sizes).cumsum(0).to(torch.int32), 10**6)
    rows = guarded(sum(sizes), 37, dtype=dtype)
    weights = guarded(len(sizes), *((37, 67) if transposed else (67, 37)), dtype=dtype, seed=1)
    weights = weights.mT if transposed else weights
    expected = grouped.grouped_product_definition(rows, weights, ends)
    assert_near([grouped.grouped_product_launch(rows, weights, ends)], [expected])


@pytest.mark.parametrize("form", ["absorbed", "auto"])
def test_the_whole_layer(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place where the layer calls a kernel, as if its CPU tensors were on a GPU: prompt, steps, and gradients."""
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

    called: list[str] = []

    def launches(*_: Tensor) -> bool:
        called.append(inspect.stack()[1].function)
        return True

    expected = run()
    monkeypatch.setattr(kernels, "serve", lambda *tensors: tensors[0].dtype == torch.float32)
    monkeypatch.setattr(ops, "serve", launches)
    monkeypatch.setattr("dsv2_ref.grouped._triton_should", launches)
    assert_near(run(), expected)
    assert {"_rms_norm", "_add_rms_norm", "_rms_norm_backward", "_rotate", "_mla_decode", "_grouped_product"} <= set(
        called
    )


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
        assert_near(
            faulty.add_rmsnorm_launch(x, None, weight, 1e-6)[1:], norm.add_rmsnorm_definition(x, None, weight, 1e-6)[1:]
        )


def add_rmsnorm(module: Any) -> None:
    x, weight = guarded(3, 7, dtype=torch.float32), guarded(7, dtype=torch.float32, seed=1)
    _, _, inverse = module.add_rmsnorm_launch(x, x, weight, 1e-6)
    module.add_rmsnorm_backward_launch(x, x, weight, inverse)


def turn(module: Any) -> None:
    cos, sin = (guarded(5, 3, dtype=torch.float32, seed=s) for s in (1, 2))
    module.rotate_launch(guarded(5, 6, dtype=torch.float32), cos, sin)


def decode(module: Any) -> None:
    query, keys = guarded(1, 3, 1, 56, dtype=torch.float32), guarded(1, 40, 56, dtype=torch.float32, seed=1)
    module.mla_decode_launch(query, keys, 40, 0.2)


def multiply(module: Any) -> None:
    rows, weights = guarded(3, 37, dtype=torch.float32), guarded(2, 67, 37, dtype=torch.float32, seed=1)
    module.grouped_product_launch(rows, weights, torch.tensor([1, 3], dtype=torch.int32))


LOST: dict[str, tuple[ModuleType, Callable[[Any], None], str, str]] = {
    "sum": (norm, add_rmsnorm, "feature, h, mask=inside)", "feature, h)"),
    "norm": (norm, add_rmsnorm, "feature, y, mask=inside)", "feature, y)"),
    "gradient by input": (norm, add_rmsnorm, "dx.to(x.dtype), mask=inside)", "dx.to(x.dtype))"),
    "gradient by weight": (norm, add_rmsnorm, "share, mask=inside)", "share)"),
    "rotated": (rotate, turn, "both.to(turned.dtype), mask=inside)", "both.to(turned.dtype))"),
    "log-sums": (mla, decode, 'float("-inf")), mask=row < rows)', 'float("-inf")))'),
    "rows of shares": (mla, decode, "mask=real & (c < latent)[None, :])\n\n\n@jit", "mask=(c < latent)[None, :])\n\n\n@jit"),
    "columns of shares": (mla, decode, "mask=real & (c < latent)[None, :])\n\n\n@jit", "mask=real)\n\n\n@jit"),
    "attended": (mla, decode, "element_ty), mask=c < latent)", "element_ty))"),
    "rows of a product": (
        grouped, multiply, "mask=(row < end)[:, None] & (column < outputs)[None, :]", "mask=(column < outputs)[None, :]",
    ),
    "columns of a product": (
        grouped, multiply, "mask=(row < end)[:, None] & (column < outputs)[None, :]", "mask=(row < end)[:, None]",
    ),
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
