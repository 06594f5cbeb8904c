"""Products of one row in C++: against float64, for every layout, and without the instructions that some processors lack."""

import functools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2_ref.cache import LatentCache
from dsv2_ref.codes import from_codes, pack_nibbles, to_codes
from dsv2_ref.fast import compiled, decode, native
from dsv2_ref.fast.decode import attend_to_cache
from dsv2_ref.fast.layer import as_parts
from dsv2_ref.fast.quantized import lay_out
from dsv2_ref.records import CACHE_FORMATS, QuantizedLatentCache, Record

SETS = {
    "as found": (),
    "no pairs of bfloat16": ("-mno-avx512bf16",),
    "avx2": ("-march=x86-64-v3",),
    "sse": ("-march=x86-64-v2",),
}
OPERATORS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "rows.cpp": (native, ("row_products", "row_products_of_int4")),
    "attend.cpp": (decode, ("attend_to_keys",)),
    "layer.cpp": (compiled, ("products_of_row", "attended", "fed_forward")),
}


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As this processor has them, and only those of lesser ones, as operators of another name. Gives which numbers are
    multiplied."""
    pairs = torch.cpu._is_avx512_bf16_supported()
    if request.param == "as found":
        return "bfloat16" if pairs else "float32"
    if not pairs:
        pytest.skip("a processor that may lack some of them")
    namespace = "dsv2_ref_" + request.param.replace(" ", "_")
    monkeypatch.setattr(native, "NAMESPACE", namespace)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, *SETS[request.param]))
    for file, (module, names) in OPERATORS.items():
        with_flags(file, namespace)
        for name in names:
            monkeypatch.setattr(module, name, getattr(getattr(torch.ops, namespace), name).default)
    return "float32"


@functools.cache
def with_flags(file: str, namespace: str) -> None:
    for name in OPERATORS[file][1]:
        operator = getattr(torch.ops.dsv2_ref, name).default
        torch.library.define(f"{namespace}::{name}", str(operator._schema).partition(name)[2])
    native.build.__wrapped__(file)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_exact(actual: Tensor, rows: Tensor, matrices: Tensor) -> None:
    """Sums in float32: off by roundings of their terms, whose sizes add up. Codes of eight bits are differences of two numbers
    up to 256, where the processor multiplies bfloat16: each sum may lose what such a number loses."""
    terms = matrices.double() * rows.double()[:, None]
    bound = terms.abs().sum(dim=-1) * terms.shape[-1] ** 0.5 * 2**-23
    if matrices.dtype == torch.int8:
        bound += 256 * rows.double().abs().sum(dim=-1, keepdim=True) * 2**-23
    assert actual.dtype == torch.float32
    assert ((actual - terms.sum(dim=-1)).abs() <= bound + 1e-30).all()


CHOSEN = torch.tensor([3, 0, 4, 3])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "float32"])
@pytest.mark.parametrize("inputs", [1, 31, 32, 96, 128, 193, 1000])
@pytest.mark.parametrize("chosen", [None, CHOSEN])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_products(kind: str, inputs: int, chosen: Tensor | None, alike: bool, turned: bool) -> None:
    weight = normal(5, 7, inputs, seed=1)
    if kind == "int8":
        weight = (weight * 60).clamp(-128, 127).to(torch.int8)
    if kind == "float32":
        weight = weight.float() * 1.001
    if turned:
        weight = weight.mT.contiguous().mT
    matrices = weight if chosen is None else weight[chosen]
    rows = normal(1 if alike else len(matrices), inputs)
    assert_exact(native.row_products(rows, weight, chosen), rows.expand(len(matrices), -1), matrices)


def test_matrices_that_lie_input_by_input_may_be_wide() -> None:
    weight, rows = normal(2, 24, 1100, seed=1).mT, normal(2, 24)
    assert_exact(native.row_products(rows, weight), rows, weight)


def test_matrices_may_be_parts_of_larger_ones() -> None:
    weight, rows = normal(4, 24, 64, seed=1), normal(4, 64)
    lower = weight[:, 16:]
    assert native.takes(lower)
    assert_exact(native.row_products(rows, lower), rows, lower)
    assert not native.takes(weight.mT)
    assert not native.takes(weight[..., ::2])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("chosen", [None, CHOSEN])
@pytest.mark.parametrize("alike", [True, False])
def test_four_bits(block: int, group: int, chosen: Tensor | None, alike: bool) -> None:
    codes, scales = to_codes(normal(5, 128, 192, seed=1), "int4", group, torch.bfloat16)
    exact = (codes.unflatten(-1, (-1, group)).double() * scales.double()[..., None]).flatten(-2)
    matrices = exact if chosen is None else exact[chosen]
    rows = normal(1 if alike else len(matrices), 192)
    laid_out = torch.stack([lay_out(x, block) for x in pack_nibbles(codes)])
    beside = torch.stack((scales.mT, torch.full_like(scales.mT, torch.nan)), dim=-1).contiguous()
    found = native.row_products_of_int4(rows, laid_out, chosen, beside, group, block)
    assert_exact(found, rows.expand(len(matrices), -1), matrices)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    weight, rows, before = normal(3, 50, 300, seed=1), normal(1, 300), torch.get_num_threads()
    expected = native.row_products(rows, weight)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(native.row_products(rows, weight), expected)
    finally:
        torch.set_num_threads(before)


def test_what_is_infinite_or_nan_stays_in_its_row() -> None:
    weight, rows = normal(1, 3, 40, seed=1), normal(1, 40)
    weight[0, 1, 35] = torch.inf
    weight[0, 2, 3] = torch.nan
    found = native.row_products(rows, weight)[0]
    assert found[0].isfinite()
    assert found[1].isinf()
    assert found[2].isnan()


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_of_no_matrix_is_rejected(index: int) -> None:
    with pytest.raises(RuntimeError, match=rf"^chosen is \[0, {index}\]; wanted indices from 0 to 4$"):
        native.row_products(normal(1, 8), normal(5, 2, 8), torch.tensor([0, index]))


def test_the_defaults_of_torch_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = normal(5, 7, 40, seed=1), normal(1, 40)
    cache = cache_of("int8", 32, 8, 20).append(normal(1, 20, 40))
    query = normal(1, 2, 1, 40)

    def found() -> list[Tensor]:
        return [native.row_products(rows, weight, CHOSEN), attend_to_cache(query, cache, 32, 0.3)]

    expected = found()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        others = found()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(others, expected, strict=True))


def test_indices_may_be_of_any_integer() -> None:
    weight, rows = normal(5, 7, 40, seed=1), normal(1, 40)
    expected = native.row_products(rows, weight, CHOSEN)
    assert torch.equal(native.row_products(rows, weight, CHOSEN.int()), expected)


@pytest.mark.parametrize(
    ("rows", "weight", "line"),
    [
        pytest.param(normal(1, 41), normal(2, 3, 40), "rows do not fit; wanted .* of 40 features", id="longer rows"),
        pytest.param(normal(3, 40), normal(2, 3, 40), "rows do not fit; wanted one, or one for each", id="more rows"),
        pytest.param(normal(1, 40).float(), normal(2, 3, 40), "in torch.bfloat16", id="float32"),
        pytest.param(normal(1, 40), normal(2, 3, 80)[..., ::2], "weight does not fit", id="every second column"),
        pytest.param(normal(1, 40), normal(2, 3, 40).half(), "weight does not fit", id="weights in float16"),
        pytest.param(normal(1, 40), normal(3, 40), "weight does not fit", id="no stack"),
    ],
)
def test_what_does_not_fit_is_rejected(rows: Tensor, weight: Tensor, line: str) -> None:
    with pytest.raises(RuntimeError, match=line):
        native.row_products(rows, weight)


def test_keys_that_do_not_fit_are_rejected() -> None:
    cache, query = cache_of("fp8", 32, 8, 20).append(normal(1, 20, 40)), normal(1, 4, 40)
    bytes_ = cache.stored
    for wrong in (
        (query, bytes_[..., 1:]),
        (query.float(), bytes_),
        (normal(2, 4, 40), bytes_),
        (query[..., 1:], bytes_),
    ):
        with pytest.raises(RuntimeError, match=r"^(query or keys|keys) do not fit; wanted"):
            decode.attend_to_keys(*wrong, 32, 0.3, 0, 32)
    with pytest.raises(RuntimeError, match=r"^format is 7; wanted a number from 0 to 3$"):
        decode.attend_to_keys(query, bytes_, 32, 0.3, 7, 32)
    with pytest.raises(RuntimeError, match=r"^tile is 4; wanted 32 or a divisor of it that is a multiple of"):
        decode.attend_to_keys(query, bytes_, 32, 0.3, 0, 4)
    with pytest.raises(RuntimeError, match=r"^keys do not fit; wanted 40 features in torch.bfloat16"):
        decode.attend_to_keys(query, bytes_, 32, 0.3, 3, 32)


def test_other_devices_are_rejected() -> None:
    fake = torch.empty(1, 40, dtype=torch.bfloat16, device="meta")
    with pytest.raises(NotImplementedError, match=r"rows.cpp is for plain tensors on the CPU, and not for meta"):
        native.row_products.__wrapped__(fake, fake[None])


def test_scales_that_do_not_fit_are_rejected() -> None:
    codes, scales = torch.zeros(1, 64, 32, dtype=torch.uint8), torch.ones(1, 1, 64, 2).bfloat16()
    with pytest.raises(RuntimeError, match="wanted them, and scales, as pack_weights lays them out"):
        native.row_products_of_int4(normal(1, 64), codes, None, scales, 32, 64)
    scales = torch.ones(1, 2, 64, 2).bfloat16()
    with pytest.raises(RuntimeError, match="wanted them, and scales, as pack_weights lays them out"):
        native.row_products_of_int4(normal(1, 64), codes, None, scales, 32, 8)


def test_the_first_words_of_a_compiler_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", ("-no-such-flag",))
    monkeypatch.setattr(native, "build", native.build.__wrapped__)
    line = native.why_not_built.__wrapped__("rows.cpp")
    assert re.fullmatch(r"rows.cpp cannot be built: .*error: .*no-such-flag.*", line)


def test_they_are_operators_of_torch() -> None:
    weight, rows = normal(5, 7, 40, seed=1), normal(1, 40)
    utils: Any = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(native.row_products, (rows, weight, CHOSEN), test_utils=utils)
    codes, beside = torch.zeros(5, 64, 32, dtype=torch.uint8), torch.ones(5, 2, 64, 2).bfloat16()
    torch.library.opcheck(native.row_products_of_int4, (normal(1, 64), codes, CHOSEN, beside, 32, 64), test_utils=utils)


FORMATS = [None, *CACHE_FORMATS]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("heads", "latent", "rope"), [(16, 512, 64), (128, 512, 64), (3, 32, 8), (17, 24, 2), (1, 130, 2)]
)
@pytest.mark.parametrize("keys", [1, 7, 31, 32, 65, 700])
def test_attention_to_a_cache(
    instructions: str, kind: str | None, heads: int, latent: int, rope: int, keys: int
) -> None:
    tokens, query = normal(1, keys, latent + rope, seed=1), normal(1, heads, 1, latent + rope)
    tokens[0, ::5] *= 1e-3
    tokens[0, 3:, :latent] *= torch.logspace(-6, 0, latent).bfloat16()  # down to the smallest codes
    tokens[0, 1::9, :latent] = 0
    cache = cache_of(kind, latent, rope, keys)
    cache = cache.append(tokens[:, : keys // 2]).append(tokens[:, keys // 2 :])
    found = attend_to_cache(query, cache, latent, 0.3)
    exact = cache.tokens.double()[0]  # what records stand for, rounded to bfloat16
    if cache.record is not None and instructions == "float32":
        codes, scales, k_pe = cache.record.split(cache.stored)
        exact = torch.cat((from_codes(codes, scales), k_pe), dim=-1).double()[0]
    weights = (query[0, :, 0].double() @ exact.mT * 0.3).softmax(dim=-1)
    expected = weights @ exact[:, :latent]
    # The result is rounded to bfloat16, and sums are in float32, or of weights that were rounded to bfloat16.
    off = 2**-15 + (2**-8 if instructions == "bfloat16" else 0)
    bound = expected.abs() * 2**-8 + weights @ exact[:, :latent].abs() * off
    assert found.dtype == torch.bfloat16
    assert ((found[0, :, 0] - expected).abs() <= bound).all()


def cache_of(kind: str | None, latent: int, rope: int, room: int) -> LatentCache:
    if kind is None:
        return LatentCache.empty(0, 1, (latent + rope,), capacity=room + 3, dtype=torch.bfloat16, device="cpu")
    record = Record(kind, latent, rope, torch.bfloat16)
    held = LatentCache.empty(0, 1, (sum(record.parts),), capacity=room + 3, dtype=torch.uint8, device="cpu")
    return QuantizedLatentCache(0, held.stored, held._storage, record=record)


@pytest.mark.parametrize("kind", FORMATS)
def test_sharp_attention_reads_one_key(kind: str | None) -> None:
    cache = cache_of(kind, 32, 8, 600).append(normal(1, 600, 40, seed=1))
    key = cache.tokens[0, 431]
    found = attend_to_cache(1000 * key[None, None, None], cache, 32, 1.0)
    torch.testing.assert_close(found.flatten(), key[:32], rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", FORMATS)
def test_scores_of_minus_infinity_hide_their_keys(kind: str | None) -> None:
    tokens, query = normal(1, 80, 40, seed=1), normal(1, 2, 1, 40).abs()
    tokens[0, :39, 32:] = -torch.inf
    found = attend_to_cache(query, cache_of(kind, 32, 8, 80).append(tokens), 32, 0.3)
    alone = attend_to_cache(query, cache_of(kind, 32, 8, 80).append(tokens[:, 39:]), 32, 0.3)
    torch.testing.assert_close(found, alone, rtol=2**-6, atol=2**-8)  # weights are rounded to bfloat16 elsewhere


@pytest.mark.parametrize("kind", FORMATS)
def test_a_key_that_is_nan_shows(kind: str | None) -> None:
    tokens = normal(1, 20, 40, seed=1)
    tokens[0, 4, 3] = torch.nan
    cache = cache_of(kind, 32, 8, 20).append(tokens)
    assert attend_to_cache(normal(1, 2, 1, 40), cache, 32, 0.3)[..., 3].isnan().all()


def test_gradients_are_refused() -> None:
    rows = normal(1, 8).requires_grad_()
    with pytest.raises(NotImplementedError, match="gives no gradients"):
        native.row_products(rows, normal(1, 2, 8)).sum().backward()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("wide", [1, 13, 32, 100])
@pytest.mark.parametrize("parts", ["experts", "mlp", "both"])
def test_experts_and_an_mlp_added_up(wide: int, parts: str) -> None:
    x, before, factor = normal(1, 1, 40), normal(1, 1, 40, seed=1), 3.0
    experts = normal(5, 2 * wide, 40, seed=2), normal(5, 40, wide, seed=3)
    mlp = normal(wide, 40, seed=4), normal(wide, 40, seed=5), normal(40, wide, seed=6)
    gate, maps, routed = normal(5, 40, seed=7).float(), [], (None, None, [])
    scores = (gate.double() @ x.flatten().double()).softmax(-1)
    best = scores.topk(3)
    if parts != "mlp":
        maps, routed = [*experts], (gate, None, [3, 1, 1, 0, 0])
    if parts != "experts":
        maps += mlp

    def expected(dtype: torch.dtype) -> Tensor:
        row, out = x.flatten().to(dtype), torch.zeros(40, dtype=dtype)
        if parts != "mlp":
            for expert, weight in zip(best.indices, best.values, strict=True):
                first, up = (experts[0][expert].to(dtype) @ row).chunk(2)
                out = out + factor * weight * (experts[1][expert].to(dtype) @ (F.silu(first) * up))
        if parts != "experts":
            first, up, down = (matrix.to(dtype) for matrix in mlp)
            out = out + down @ (F.silu(first @ row) * (up @ row))
        return before.flatten().to(dtype) + out

    found = compiled.fed_forward(x, before, *routed, factor, *as_parts(*maps))
    exact, rounded = expected(torch.float64), expected(torch.bfloat16)
    # As near to the exact result as the same in bfloat16 comes, within one of its steps.
    error = (rounded - exact).abs().max() + exact.abs().max() * 2**-7
    assert found.shape == x.shape
    assert (found.flatten() - exact).abs().max() <= error


def test_what_does_not_fit_a_layer_is_rejected() -> None:
    x, weight, codes = normal(1, 1, 40), normal(24, 40, seed=1), torch.zeros(24, 40, dtype=torch.int8)
    bias = normal(40, seed=2)
    calls: list[tuple[tuple[Any, ...], str]] = [
        ((x.float(), [weight], [-1, 0, 0]), "the token has another dtype or size; wanted 40 features"),
        ((x, [weight.float()], [-1, 0, 0]), "a weight has another dtype than before"),
        ((x, [weight[:, :39].contiguous()], [-1, 0, 0]), "rows do not fit; wanted .* of 39 features"),
        ((x, [weight.mT], [-1, 0, 0]), "a weight is no matrix, or does not lie row by row"),
        ((x, [weight, bias], [-1, 0, 1]), "a bias has another dtype or size; wanted 24 features"),
        ((x, [codes, bias], [0, 0, 0]), "scales have another dtype or size; wanted 24 in torch.bfloat16"),
    ]
    for call, line in calls:
        with pytest.raises(RuntimeError, match=f"^{line}"):
            compiled.products_of_row(*call)


def test_what_does_not_fit_a_gate_is_rejected() -> None:
    x, gate, bias = normal(1, 1, 40), normal(6, 40, seed=2).float(), torch.zeros(6)
    stacks = as_parts(normal(6, 26, 40, seed=1), normal(6, 40, 13, seed=1))
    odd = as_parts(normal(6, 25, 40, seed=1), normal(6, 40, 13, seed=1))
    fits = gate, bias, [2, 3, 2, 1, 0]
    compiled.fed_forward(x, None, *fits, 1.0, *stacks)
    for given, line in (
        ((gate.bfloat16(), *fits[1:], 1.0, *stacks), "the gate has another dtype"),
        ((gate, bias[:5], fits[2], 1.0, *stacks), "the gate's bias has another dtype or size; wanted 6"),
        ((gate[:, :39].contiguous(), *fits[1:], 1.0, *stacks), "the gate does not fit a token of 40 features"),
        (
            (normal(8, 40).float(), None, [2, 1, 1, 0, 0], 1.0, *stacks),
            "the gate chooses among 8 experts; wanted at most 6",
        ),
        ((gate, bias, [2, 6, 2, 1, 0], 1.0, *stacks), "the gate's groups do not fit"),
        ((gate, None, [7, 3, 2, 1, 0], 1.0, *stacks), "top_k is 7; wanted at most 6"),
        ((*fits, 1.0, *odd), "gate_up_proj has 25 rows; wanted an even number"),
    ):
        with pytest.raises(RuntimeError, match=f"^{line}"):
            compiled.fed_forward(x, None, *given)


def test_only_gcc_is_given_flags_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", lambda _, extra_flags: given.append(extra_flags))
    for is_gcc in (True, False):
        monkeypatch.setattr("torch._inductor.cpp_builder.is_gcc", lambda is_gcc=is_gcc: is_gcc)
        native.build.__wrapped__("rows.cpp")
    assert "-ftree-loop-vectorize" in given[0]
    assert "-ftree-loop-vectorize" not in given[1], "clang stops at flags that it does not know"
