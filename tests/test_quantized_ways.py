"""Ways over quantised weights on the CPU: each, whichever this processor would choose, against the definition."""

import copy
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import bits
from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, ops, pack_weights
from dsv2_ref.attention import attend
from dsv2_ref.codes import pack_nibbles
from dsv2_ref.fast import quantized
from dsv2_ref.fast.cpu import has_bfloat16
from dsv2_ref.fast.quantized import can_lay_out, kernel_block_rows, lay_out, lay_out_codes
from dsv2_ref.masks import Visibility
from dsv2_ref.quantize import KINDS, quantize
from dsv2_ref.quantized import QuantizedWeight, dense_weight, in_rows, quantized_product
from dsv2_ref.quantized_modules import QuantizedExperts
from dsv2_ref.records import attend_records

BFLOAT16_STEP = 2**-8
"""Half a step of bfloat16, relative: by so much a sum differs that is rounded once."""

CONFIG = replace(
    DeepseekV2Config.tiny(), hidden_size=128, intermediate_size=192, moe_intermediate_size=64, kv_lora_rank=64,
    q_lora_rank=None, n_routed_experts=6, num_experts_per_tok=3,
)  # fmt: skip


def weight(kind: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    torch.manual_seed(0)
    made = QuantizedWeight(kind, shape, 32, dtype, torch.device("cpu"))
    if len(shape) == 2:
        made.fill(torch.randn(shape))
    else:
        for expert in range(shape[0]):
            made.fill(torch.randn(shape[1:]), expert)
    return made


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """The error of each sum is that of its rounding to bfloat16, and the products' own in float32, which is far less."""
    scale = exact.abs().max()
    torch.testing.assert_close(found.double(), exact, rtol=2 * BFLOAT16_STEP, atol=2 * BFLOAT16_STEP * float(scale))


def served(rows: Tensor, held: QuantizedWeight, place: Any = ...) -> tuple[Tensor, str]:
    with torch.no_grad(), ops.watch() as made:
        out = quantized_product(rows, held, place)
    return out, made[0].way


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_product_is_that_of_the_dense_matrix(kind: str, packed: bool, rows: int) -> None:
    held = weight(kind, 128, 64)
    dense = held.dense().double()
    if packed and can_lay_out(held):
        lay_out_codes(held)
    x = torch.randn(2, rows, 64).bfloat16()
    out, way = served(x, held)
    assert_rounded_once(out, x.double() @ dense.T)
    few = rows <= 8
    expected = {"int8": "cpu int8" if few else None, "int4": "cpu int4" if few and held.block_rows else None}
    assert way == (expected.get(kind) or way)
    assert ("cpu int" in way) == (expected.get(kind) is not None)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_nibbles_are_written_out_as_by_the_definition(dtype: torch.dtype) -> None:
    """To the bit, of a stack, of some of its rows, and of every byte there is."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 2, 1)
    scales = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for part in ((codes, scales), (codes[1, 1:], scales[1, 1:]), (codes.mT.contiguous().mT, scales)):
        with ops.watch() as choices:
            found = dense_weight(*part, 64, dtype)
        with ops.plain():
            expected = dense_weight(*part, 64, dtype)
        assert (choices[0].way == "cpu nibbles") == (part[0].stride(-1) == 1)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_strided_rows_and_one_expert_of_a_stack() -> None:
    for kind in ("int8", "int4"):
        held = weight(kind, 3, 64, 96)
        dense = held.dense().double()
        if kind == "int4" and can_lay_out(held):
            lay_out_codes(held)
        x = torch.randn(2, 5, 200).bfloat16()[..., 50:146]
        for expert in range(3):
            out, _ = served(x, held, expert)
            assert_rounded_once(out, x.double() @ dense[expert].T)


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 48), (48, 64), (1, 32), (64, 50)])
def test_widths_that_the_kernel_would_read_past_take_the_dense_matrix(outputs: int, inputs: int) -> None:
    held = QuantizedWeight("int8", (outputs, inputs), 2, torch.bfloat16, torch.device("cpu"))
    held.fill(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    out, way = served(x, held)
    assert way in ("definition", "cpu float32")
    assert_rounded_once(out, x.double() @ held.dense().double().T)


def test_float64_takes_the_dense_matrix() -> None:
    held = weight("int8", 64, 64, dtype=torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64)
    out, way = served(x, held)
    assert way == "definition"
    torch.testing.assert_close(out, x @ held.dense().T, rtol=0, atol=0)


@pytest.mark.parametrize("outputs", [64, 384, 700])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_float32_widens_some_rows_of_the_matrix_at_a_time(
    kind: str, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one matrix and of one expert of a stack, with a last piece that is short, and in bfloat16 too where no
    instruction multiplies it. Sums of 64 products in float32 differ by their order."""
    monkeypatch.setattr(quantized, "has_bfloat16", lambda: False)
    seen, dense = [], QuantizedWeight.dense

    def watched(held: QuantizedWeight, place: Any = ...) -> Tensor:
        seen.append(place)
        return dense(held, place)

    for dtype, error in ((torch.float32, 64 * 2**-24), (torch.bfloat16, 2 * BFLOAT16_STEP)):
        for shape, place in (((outputs, 64), ...), ((2, outputs, 64), 1)):
            held = weight(kind, *shape, dtype=dtype)
            matrix, x = held.dense(place).double(), torch.randn(2, 20, 64).to(dtype)
            with monkeypatch.context() as patch:
                patch.setattr(QuantizedWeight, "dense", watched)
                out, way = served(x, held, place)
            assert way == "cpu float32"
            assert out.dtype == dtype
            assert (out.double() - x.double() @ matrix.T).abs().max() <= error * (
                x.double().abs() @ matrix.T.abs()
            ).max()
            assert [rows for _, rows in seen] == [slice(i, i + 256) for i in range(0, outputs, 256)]
            seen.clear()
            with torch.autocast("cpu", torch.bfloat16):
                assert served(x, held, place)[1] == "definition"


@pytest.mark.parametrize("kind", ["int8", "int4", "int4 laid out", "fp8"])
def test_some_rows_are_those_of_the_whole_matrix(kind: str) -> None:
    """Wherever they begin in a block of rows, and without a look at the scales of other blocks."""
    held = weight(kind.split()[0], 2, 320, 64)
    if kind == "int4 laid out":
        if not can_lay_out(held):
            pytest.skip("torch lays codes out in no order that is known here")
        lay_out_codes(held)
    whole = held.dense()
    for start, stop in ((0, 320), (128, 256), (7, 40), (31, 33), (300, 400), (64, 64)):
        alone = copy.deepcopy(held)
        step = 128 if kind == "fp8" else held.block_rows or 1
        grid = 128 if kind == "fp8" else 1
        alone.scales[:, : start // step * step // grid] = float("nan")
        alone.scales[:, -(-stop // step) * step // grid :] = float("nan")
        assert torch.equal(alone.dense((1, slice(start, stop))), whole[1, start:stop])
        assert torch.equal(alone.dense((..., slice(start, stop))), whole[:, start:stop])


def test_the_layout_is_that_of_torch_and_is_undone() -> None:
    rows = kernel_block_rows()
    if not rows:
        pytest.skip("torch lays codes out in no order that is known here")
    codes = torch.randint(-7, 8, (4 * rows, 64), generator=torch.Generator().manual_seed(0)).char()
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    packed = pack_nibbles(codes)
    assert torch.equal(lay_out(packed, rows), theirs)
    assert torch.equal(in_rows(theirs, rows), packed)


@pytest.mark.parametrize("block_rows", [2, 16, 32, 64])
def test_every_layout_is_undone(block_rows: int) -> None:
    packed = torch.randint(0, 256, (2, 128, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    laid_out = torch.stack([lay_out(one, block_rows) for one in packed])
    assert not torch.equal(laid_out, packed)
    assert torch.equal(in_rows(laid_out, block_rows), packed)


def test_what_cannot_be_laid_out_stays() -> None:
    assert not can_lay_out(weight("int8", 64, 64))
    assert not can_lay_out(weight("int4", 64, 64, dtype=torch.float32))
    assert not can_lay_out(weight("int4", 60, 64))
    held = weight("int4", 64, 64)
    held.group = 16
    assert not can_lay_out(held)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("layer_idx", [0, 1])
def test_a_packed_layer_is_the_quantised_one(layer_idx: int, form: str, kind: str) -> None:
    torch.manual_seed(0)
    layer = DeepseekV2DecoderLayer(replace(CONFIG, mla_form=form), layer_idx).bfloat16().eval()
    quantize(layer, kind, 32)
    packed = pack_weights(copy.deepcopy(layer))
    before = layer.state_dict()
    same = 0 if has_bfloat16() else 2**-6  # kv_b_proj in float32 may round to the neighbour
    for tokens in (torch.randn(2, 9, 128), torch.randn(1, 1, 128), torch.randn(3, 1, 128)):
        x = tokens.bfloat16()
        with ops.plain():
            expected = layer(x)[0]
            torch.testing.assert_close(packed(x)[0], expected, rtol=0, atol=same)
        # Each product may round its sum to the neighbour: two steps of numbers up to 8.
        for one in (layer, packed):
            torch.testing.assert_close(one(x)[0], expected, rtol=0, atol=2**-4)
    for other in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        after = other.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        torch.testing.assert_close(other(x)[0], packed(x)[0], rtol=0, atol=0)
    if any(held.block_rows for held in packed.modules() if isinstance(held, QuantizedWeight)):
        with pytest.raises(RuntimeError, match="_proj holds packed weights; wanted a layer to load into: load first"):
            packed.load_state_dict(before)
        with pytest.raises(RuntimeError, match="holds packed weights"):
            packed.load_state_dict(DeepseekV2DecoderLayer(CONFIG, layer_idx).state_dict())
        assert all(torch.equal(packed.state_dict()[name], before[name]) for name in before)
    else:
        other = quantize(DeepseekV2DecoderLayer(layer.self_attn.config, layer_idx).bfloat16().eval(), kind, 32)
        packed.load_state_dict(other.state_dict())
        with ops.plain():
            torch.testing.assert_close(packed(x)[0], other(x)[0], rtol=0, atol=0)
        packed.load_state_dict(before)
    elsewhere = copy.deepcopy(packed).to("meta")
    assert not any(held.block_rows for held in elsewhere.modules() if isinstance(held, QuantizedWeight))
    wide = copy.deepcopy(packed).double()
    torch.testing.assert_close(wide(x.double())[0], copy.deepcopy(layer).double()(x.double())[0])


@torch.no_grad()
@pytest.mark.parametrize("bfloat16_products", [True, False])
@pytest.mark.parametrize("seq", [1, 8])
def test_the_absorbed_matrices_are_in_a_dtype_that_the_processor_multiplies(
    monkeypatch: pytest.MonkeyPatch, bfloat16_products: bool, seq: int
) -> None:
    monkeypatch.setattr("dsv2_ref.fast.packed.has_bfloat16", lambda: bfloat16_products)
    layer = quantize(DeepseekV2DecoderLayer(replace(CONFIG, mla_form="absorbed"), 1).bfloat16().eval(), "int4", 32)
    exact = copy.deepcopy(layer).double()
    packed = pack_weights(layer)
    kept = packed.self_attn.kv_b_proj.kept
    assert {matrix.dtype for matrix in kept} == {torch.bfloat16 if bfloat16_products else torch.float32}
    x = torch.randn(2, seq, 128).bfloat16()
    out = packed(x)[0]
    assert out.dtype == torch.bfloat16
    # Every product rounds to 8 bits, numbers up to 8.
    torch.testing.assert_close(out.double(), exact(x.double())[0], rtol=0, atol=2**-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_absorbed_form_writes_kv_b_proj_out_once(kind: str) -> None:
    """And not to ask whether it could."""
    config = replace(CONFIG, mla_form="absorbed", moe_intermediate_size=128)
    layer = quantize(DeepseekV2DecoderLayer(config, 1).eval(), kind)
    with ops.plain(), ops.watch() as made:
        layer(torch.randn(1, 1, 128))
    linear = sum(choice.definition == "quantized_product" for choice in made)
    written = [choice for choice in made if choice.definition == "dense_weight"]
    # One for each product with a whole matrix by its definition, two for each expert, and one for kv_b_proj.
    assert len(written) == linear + 2 * CONFIG.n_routed_experts + 1


@pytest.mark.skipif(not kernel_block_rows(), reason="torch lays codes out in no order that is known here")
def test_scales_that_float16_cannot_hold_come_through_it() -> None:
    held = weight("int4", 128, 64)
    held.scales.mul_(2**-20)
    lay_out_codes(held)
    before = held.scales_and_zeros.clone()
    held.half().bfloat16()
    assert torch.equal(held.scales_and_zeros, before)
    assert held.scales_and_zeros.amax() < torch.finfo(torch.float16).smallest_normal


@torch.no_grad()
def test_only_chosen_experts_are_read() -> None:
    """The others hold NaN, which would be seen."""
    torch.manual_seed(0)
    layer = DeepseekV2DecoderLayer(CONFIG, 1).bfloat16().eval()
    for kind in ("int8", "int4"):
        quantised = quantize(copy.deepcopy(layer), kind, 32)
        experts: Any = quantised.mlp
        experts = experts.experts
        assert isinstance(experts, QuantizedExperts)
        for tokens in (1, 2):
            idx, scores = torch.tensor([[4, 1, 2]] * tokens), torch.rand(tokens, 3)
            x = torch.randn(tokens, 128).bfloat16()
            expected = experts(x, idx, scores)
            broken = copy.deepcopy(experts)
            for held in (broken.gate_up_proj, broken.down_proj):
                held.scales[[0, 3, 5]] = float("nan")
            assert torch.equal(broken(x, idx, scores), expected)
            with ops.plain():
                exact = copy.deepcopy(experts).double()
                exact = sum(
                    s * (experts_of(exact, int(e), x[t].double()))
                    for t in range(tokens) for e, s in zip(idx[t], scores[t].double(), strict=True) if t == tokens - 1
                )  # fmt: skip
            # Four roundings to bfloat16 on the way: gates and ups, their product, the result, and their sum.
            torch.testing.assert_close(
                expected[-1].double(), exact, rtol=4 * 2**-8, atol=4 * 2**-8 * float(exact.abs().max())
            )


def experts_of(experts: Any, expert: int, x: Tensor) -> Tensor:
    """One expert by the definition of SwiGLU."""
    gate, up = (experts.gate_up_proj.dense(expert).double() @ x).chunk(2)
    return experts.down_proj.dense(expert).double() @ (torch.nn.functional.silu(gate) * up)


def test_every_code_of_eight_bit_floats_is_that_of_torch_in_float16() -> None:
    """But for NaN, which `to_codes` never gives."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    exact = every.double()
    found = quantized.as_float16(every[None].expand(3, -1)).double() * 256
    assert torch.equal(found[:, exact.isfinite()], exact[exact.isfinite()].expand(3, -1))
    assert exact.isfinite().sum() == 254


@torch.no_grad()
@pytest.mark.parametrize("bfloat16_products", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_seq", [1, 7, 64, 150])
@pytest.mark.parametrize("latent", [64, 256])
@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_one_query_attends_to_records_as_to_what_they_stand_for(
    format: str, latent: int, kv_seq: int, dtype: torch.dtype, bfloat16_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over more than one piece of the cache, with scales that differ from token to token by a thousand times."""
    monkeypatch.setattr(quantized, "RECORDS_AT_ONCE", 64)
    monkeypatch.setattr(quantized, "has_bfloat16", lambda: bfloat16_products)
    torch.manual_seed(0)
    attention = DeepseekV2DecoderLayer(replace(CONFIG, kv_lora_rank=latent), 0).to(dtype).self_attn
    held = torch.randn(2, kv_seq, latent + 8)
    held[..., :latent] *= 10 ** (3 * torch.rand(2, kv_seq, 1) - 3)
    cache: Any = attention.empty_cache(2, kv_seq + 3, format).append(held.to(dtype))
    query = torch.randn(2, 4, 1, latent + 8).to(dtype)
    visible = Visibility(1, kv_seq, query.device)
    with ops.watch() as made:
        out, _ = attend_records(query, cache, visible, 0.1, implementation="products")
    assert made[0].way == "cpu records"
    codes, scales, k_pe = cache.record.split(cache.stored)
    exact_latent = (codes.double().unflatten(-1, (scales.shape[-1], -1)) * scales.double()[..., None]).flatten(2)
    tokens = torch.cat((exact_latent, k_pe.double()), dim=-1)[:, None]
    with ops.plain():
        exact, _ = attend(query.double(), tokens, tokens[..., :latent], visible, 0.1)
        rounded, _ = attend_records(query, cache, visible, 0.1)
    error, by_definition = ((x - exact).norm() / exact.norm() for x in (out, rounded))
    assert out.dtype == dtype
    # Latents, scores, weights and result are rounded by half a step each, as in the definition; in float32 only the last.
    step = torch.finfo(dtype).eps
    assert error < 2 * max(by_definition, step)
    with torch.autocast("cpu", torch.bfloat16), ops.watch() as made:
        attend_records(query, cache, visible, 0.1, implementation="products")
    assert made[0].way == "definition"


@torch.no_grad()
def test_masks_and_more_queries_go_to_the_definition() -> None:
    attention = DeepseekV2DecoderLayer(CONFIG, 0).bfloat16().self_attn
    cache: Any = attention.empty_cache(1, 9, "fp8").append(torch.randn(1, 9, 72).bfloat16())
    for seq, mask in ((2, None), (1, torch.ones(1, 9, dtype=torch.bool))):
        query = torch.randn(1, 4, seq, 72).bfloat16()
        with ops.watch() as made:
            attend_records(query, cache, Visibility(seq, 9, query.device, mask), 0.1, implementation="products")
        assert made[0].way == "definition"


def test_weights_that_others_did_not_quantise_stay_where_bfloat16_cannot_be_packed() -> None:
    layer = quantize(DeepseekV2DecoderLayer(CONFIG, 1).bfloat16().eval(), "int4", 32, parts=["experts"])
    attention = layer.self_attn.o_proj
    pack_weights(layer)
    assert (layer.self_attn.o_proj is attention) == (not has_bfloat16())


@pytest.mark.slow
def test_the_benchmark_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """At toy sizes: every row is there, bytes are those of the modules, and the whole model runs in its own process."""
    monkeypatch.setattr(bits, "PREFILL", 8)
    monkeypatch.setattr(bits, "LONG", 40)
    monkeypatch.setattr(bits, "LAYERS", 1)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # it cannot see through checked signatures
    with torch.no_grad():
        rows = {row["weights"]: row for row in bits.weights_table(replace(CONFIG, num_hidden_layers=3), 1, 1e9)}
        caches = {row["cache"]: row["bytes"] for row in bits.cache_table(CONFIG, 1)}
    assert {
        "bfloat16",
        "bfloat16 compiled",
        "int8",
        "int8 compiled",
        "int4",
        "int4 packed",
        "int4 compiled",
    } <= rows.keys()
    assert rows["int4"]["active_bytes"] < rows["int8"]["active_bytes"] < rows["bfloat16"]["active_bytes"]
    assert all(row["limit"] == row["active_bytes"] / 1e9 for row in rows.values())
    assert caches == {"bfloat16": 144, "fp8": 64 + 4 + 16, "int8": 64 + 4 + 16, "int4": 32 + 4 + 16}
    whole = bits.whole_model("int8", 3, 1, replace(CONFIG, vocab_size=64))
    assert 0 < whole["active_bytes"] < whole["bytes"] < whole["peak"]


@pytest.mark.slow
def test_llama_cpp_is_given_the_same_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from bench import llama

    config = replace(CONFIG, qk_nope_head_dim=32)  # llama.cpp's blocks of a row
    for name, value in {"CONFIG": config, "LAYERS": 2, "PREFILL": 8, "SHORT": 4}.items():
        monkeypatch.setattr(llama, name, value)
    layer = DeepseekV2DecoderLayer(config, 1)
    weights = 2 * sum(weight.numel() for weight in layer.parameters()) + (llama.VOCABULARY + 1) * config.hidden_size
    for kind in llama.FORMATS:
        llama.write_model(tmp_path / kind, kind)
        assert sum(tensor.n_elements for tensor in gguf.GGUFReader(tmp_path / kind).tensors) == weights
        assert min(llama.measure(tmp_path / kind, lambda: time.sleep(0), 4, 1)) > 0
