"""Ways over quantised weights: experts of which only the chosen ones are read, and torch's kernels for CPUs, which
multiply codes as they are.

torch has kernels for one or a few rows in bfloat16: for int8 codes as they lie, and for int4 codes laid out in blocks of
rows, which `lay_out_codes` does once. For many rows they are slower than a product with the dense matrix.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from dsv2_ref import ops
from dsv2_ref.codes import from_codes, pack_nibbles
from dsv2_ref.fast.cpu import HALF_ON_CPU
from dsv2_ref.fast.processor import has_bfloat16
from dsv2_ref.fast.products import all_experts, combine, in_float32, needs_vmap, scaled_product, sort_by_expert
from dsv2_ref.masks import Visibility
from dsv2_ref.quantized import QuantizedWeight, dense_weight, quantized_product
from dsv2_ref.quantized_modules import QuantizedExperts
from dsv2_ref.records import QuantizedLatentCache, attend_records

FEW_ROWS = 16
"""Up to so many rows torch's kernels over codes are used. They read a code once per row."""

STEP = 32
"""What divides every width that the kernel for int8 is given."""

GROUPS = (32, 64, 128, 256)
"""Groups that the kernel for int4 takes."""


def chosen_experts(
    product: Callable[[Tensor, int, bool], Tensor],
    experts: int,
    hidden_states: Float[Tensor, "tokens hidden"],
    topk_idx: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens hidden"]:
    """The routed experts where ``product(rows, expert, down)`` multiplies rows by one expert's matrix: gates above ups, or
    its down projection. Only experts that a token chose are asked for."""
    if len(hidden_states) == 1 and not topk_idx.is_meta:  # nothing to sort
        chosen = topk_idx[0].tolist()
        gates, ups = torch.cat([product(hidden_states, expert, False) for expert in chosen]).chunk(2, dim=-1)
        rows = (F.silu(gates) * ups).split(1)
        out = [product(row, expert, True) for row, expert in zip(rows, chosen, strict=True)]
        return (topk_weight @ torch.cat(out).to(topk_weight.dtype)).to(hidden_states.dtype)
    order, group_ends, places = sort_by_expert(topk_idx, experts)
    rows = hidden_states[order // topk_idx.shape[1]]
    ends, out = ends_of_groups(group_ends, len(rows)), []
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            gate, up = product(rows[start:end], expert, False).chunk(2, dim=-1)
            out.append(product(F.silu(gate) * up, expert, True))
    return combine(torch.cat(out), places, topk_weight).to(hidden_states.dtype)


def ends_of_groups(group_ends: Int[Tensor, "groups"], rows: int) -> list[int]:
    """Where the rows of each group end; where there is no memory, as if all groups had as many."""
    if group_ends.is_meta:
        return [rows * group // len(group_ends) for group in range(1, len(group_ends) + 1)]
    return group_ends.tolist()


ops.faster(QuantizedExperts.forward, "all experts", transforms=True, compiles=False, why_not=needs_vmap)(all_experts)


@ops.faster(QuantizedExperts.forward, "chosen experts", compiles=False)
def _chosen_experts(experts: QuantizedExperts, hidden_states: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
    def product(rows: Tensor, expert: int, down: bool) -> Tensor:
        return quantized_product(rows, experts.down_proj if down else experts.gate_up_proj, expert)

    return chosen_experts(product, len(experts.down_proj), hidden_states, topk_idx, topk_weight)


# On the CPU

ALSO_FLOAT32 = HALF_ON_CPU | {"dtypes": (torch.float32, torch.bfloat16)}


def _autocast() -> str:
    return "torch.autocast chooses the dtype" if torch.is_autocast_enabled("cpu") else ""


def _not_in_float32(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> str:
    if rows.dtype == torch.bfloat16 and has_bfloat16():
        return "this processor has bfloat16 products"
    return _autocast()


@ops.faster(quantized_product, "cpu float32", why_not=_not_in_float32, **ALSO_FLOAT32)
def _some_rows_at_once(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> Tensor:
    return in_float32(rows, weight.shape[-2], lambda some: weight.dense((place, some)))


def _not_nibbles(codes: Tensor, *_: Any) -> str:
    return "" if codes.dtype == torch.uint8 and codes.stride(-1) == 1 else "for codes of four bits side by side"


@ops.faster(dense_weight, "cpu nibbles", device="cpu", gradients=False, compiles=False, why_not=_not_nibbles)
def dense_from_nibbles(
    codes: UInt8[Tensor, "*stack outputs half"],
    scales: Float[Tensor, "*stack outputs groups"],
    group: int,
    dtype: torch.dtype,
) -> Float[Tensor, "*stack outputs inputs"]:
    """`dsv2_ref.quantized.dense_weight` of four bits. Shifts spread the halves of a byte over the two bytes of an int16,
    six times as fast as interleaving them."""
    pairs = codes.to(torch.int16, memory_format=torch.contiguous_format)
    pairs = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F)  # the lower half first
    return from_codes(pairs.view(torch.int8).sub_(8), scales).to(dtype)


def _not_few(rows: Tensor, weight: QuantizedWeight, kind: str) -> str:
    if weight.kind != kind:
        return f"for {kind}"
    if rows.numel() > FEW_ROWS * rows.shape[-1]:
        return f"slower than the dense matrix beyond {FEW_ROWS} rows"
    return "" if weight.scales.dtype == rows.dtype else "for scales in the dtype of the rows"


def _not_few_int8(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> str:
    outputs, inputs = weight.shape[-2:]
    if inputs % STEP or outputs % STEP:  # torch's kernel reads past the end of others
        return f"for widths that {STEP} divides"
    if not weight.codes.is_contiguous():
        return "for codes that lie row by row"
    return _not_few(rows, weight, "int8")


@ops.faster(quantized_product, "cpu int8", why_not=_not_few_int8, **HALF_ON_CPU)
def _few_by_int8(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> Tensor:
    codes, scales = _at(place, weight.codes, weight.scales)
    return _by_rows(rows, lambda flat: torch.ops.aten._weight_int8pack_mm(flat, codes, scales.flatten()))


def _not_few_int4(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> str:
    return _not_few(rows, weight, "int4") or ("" if weight.block_rows else "not packed: see dsv2_ref.pack_weights")


@ops.faster(quantized_product, "cpu int4", why_not=_not_few_int4, **HALF_ON_CPU)
def _few_by_int4(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> Tensor:
    codes, scales = _at(place, weight.codes, weight.scales_and_zeros)
    product: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
    return _by_rows(rows, lambda flat: product(flat, codes, weight.group, scales))


def _at(place: Any, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return (codes, scales) if place is ... else (codes[place], scales[place])


def _by_rows(rows: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    if rows.ndim == 2:
        return product(rows.contiguous())
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    return product(flat).view(*rows.shape[:-1], -1)


# The latent cache in fewer bits

RECORDS_AT_ONCE = 2048
"""Records that are decoded together, so that they stay in the processor's cache (5 MB for V2-Lite in float32)."""


def not_one_query(
    query: Float[Tensor, "batch heads seq features"], _: Any, visible: Visibility, *__: Any, **___: Any
) -> str:
    """Of a call of `attend_records`: why it is not of one query that sees all."""
    if query.shape[2] != 1:
        return "for one query at a time"
    if visible.attention_mask is not None:
        return "for queries that see every record"
    return _autocast()


@ops.faster(attend_records, "cpu records", where={"implementation": "products"}, why_not=not_one_query, **ALSO_FLOAT32)
def attend_in_pieces(
    query: Float[Tensor, "batch heads 1 features"],
    cache: QuantizedLatentCache,
    visible: Visibility,
    scale: float,
    *_: Any,
    **__: Any,
) -> tuple[Float[Tensor, "batch heads 1 latent"], None]:
    """`attend_records` of one query, some records at a time, with a running softmax.

    Products are in the dtype of the query, or in float32 where no instruction multiplies bfloat16. Codes become numbers in
    float32: torch converts them to bfloat16 one at a time.
    """
    record, wide = cache.record, query.dtype if has_bfloat16() else torch.float32
    (B, H), C, rows = query.shape[:2], record.latent, query[:, :, 0].to(wide)
    largest = query.new_full((B, H, 1), -torch.inf, dtype=torch.float32)
    total, out = torch.zeros_like(largest), query.new_zeros(B, H, C, dtype=torch.float32)
    keys = out.new_empty(B, min(RECORDS_AT_ONCE, cache.length), C + record.rope)
    rounded = keys if wide == keys.dtype else torch.empty_like(keys, dtype=wide)
    for start in range(0, cache.length, RECORDS_AT_ONCE):
        codes, scales, k_pe = record.split(cache.stored[:, start : start + RECORDS_AT_ONCE])
        key = keys[:, : codes.shape[1]]  # (B, n, C + R)
        latent = key[..., :C]
        if record.format == "fp8":
            codes, scales = as_float16(codes), scales * 2**8
        latent.copy_(codes).unflatten(-1, (-1, record.tile)).mul_(scales[..., None])
        key[..., C:] = k_pe
        key = key if rounded is keys else rounded[:, : codes.shape[1]].copy_(key)
        scores = scaled_product(rows, key.mT).float() * scale  # (B, H, n)
        new = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        weights, shrink = (scores - new).exp(), (largest - new).exp()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        out = out * shrink + scaled_product(weights.to(wide), key[..., :C]).float()  # (B, H, C)
        largest = new
    return (out / total)[:, :, None].to(query.dtype), None


def as_float16(codes: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
    """2⁻⁸ times what float8_e4m3fn codes (s eeee mmm) stand for, exactly. Their bits lie in float16 (s eeeee mmm…) as they
    are, seven places further left, and its exponent's bias is 8 larger. torch converts one code at a time, with AVX2 six
    times as slowly."""
    bits = codes.view(torch.int8).to(torch.int16)  # the sign also fills the upper half
    return bits.mul_(2**7).bitwise_and_(~(1 << 14)).view(torch.float16)


# Codes laid out for torch's kernel


@functools.cache
def kernel_block_rows() -> int:
    """Of how many rows torch's kernel for int4 makes a block on this processor: the low halves of the bytes hold the first
    half of them, the high halves the second. 0 where it lays codes out otherwise."""
    codes = (torch.arange(128 * 64).view(128, 64) % 15 - 7).char()
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    packed = pack_nibbles(codes)
    return next((rows for rows in (16, 32, 64, 128) if torch.equal(lay_out(packed, rows), expected)), 0)


def lay_out(codes: UInt8[Tensor, "outputs half"], block_rows: int) -> UInt8[Tensor, "outputs half"]:
    """Codes as `pack_nibbles` packs them, laid out as torch's kernel for int4 wants them: column by column in each block of
    rows (`in_rows` undoes it)."""
    first, second = codes.unflatten(0, (-1, 2, block_rows // 2)).unbind(dim=1)  # (blocks, rows / 2, inputs / 2)
    columns = torch.stack((first & 15 | second << 4, first >> 4 | second & 240), dim=-1).flatten(-2)
    return columns.mT.reshape(codes.shape)


def can_lay_out(weight: QuantizedWeight) -> bool:
    """Whether torch's kernel for int4 takes this weight."""
    on_cpu, rows = weight.codes.device.type == "cpu", kernel_block_rows()
    fits = weight.kind == "int4" and weight.group in GROUPS and weight.scales.dtype == torch.bfloat16
    return fits and on_cpu and not weight.block_rows and rows > 0 and weight.shape[-2] % rows == 0


@torch.no_grad()
def lay_out_codes(weight: QuantizedWeight) -> None:
    """Lay the codes of a weight out for torch's kernel, in place."""
    rows, shape = kernel_block_rows(), weight.codes.shape
    for codes in weight.codes.view(-1, *shape[-2:]):
        codes.copy_(lay_out(codes, rows))
    scales = weight.scales.mT  # (…, groups, outputs)
    zeros = torch.zeros_like(scales)
    weight.register_buffer("scales_and_zeros", torch.stack((scales, zeros), dim=-1).contiguous(), persistent=False)
    weight.block_rows = rows
