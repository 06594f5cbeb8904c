"""Products with weights of few bits, which are never written as anything else: a program reads codes and scales, makes
its tile of the matrix in registers, and adds up in float32.

Codes are exact in float16 and bfloat16 and are multiplied as they are; a scale multiplies the sum over the inputs that
share it, so no weight is rounded a second time. The grouped form finds the rows of a group as
`dsv2_ref.fast.triton.experts` does, and reads the codes of groups with rows alone.

Source: the definition, `dsv2_ref.quantized.quantized_product`; blocks of DeepSeek-V3 (2024), section 3.3.2.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dsv2_ref.fast.triton.experts import rows_of_tile
from dsv2_ref.fast.triton.language import jit, power_of_two, tl
from dsv2_ref.quantized import FP8_BLOCK


@jit
def from_float8(code):
    """What bytes stand for as float8_e4m3fn (s eeee mmm), exactly, as float32.

    By bits, as every GPU can: Triton has no conversion from float8_e4m3fn before sm_89 (an A100 is sm_80). Moved to
    float16's places (s eeeee mmm…), the exponent is too small by the difference of both biases, 15 - 7, in subnormals
    as well. NaN (s 1111 111), which `to_codes` never gives, becomes 480.
    """
    code = code.to(tl.uint16)
    half = ((code & 128) << 8) | ((code & 127) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@jit
def quantized_product_kernel(
    rows, codes, scales, group_ends, order, out, row_count, groups, outputs, inputs,
    shared,  # inputs that share a scale
    row_stride, codes_group, codes_output, scales_group, scales_output,  # strides, in elements
    KIND: tl.constexpr, GROUPED: tl.constexpr, SCALE_OUTPUTS: tl.constexpr, TOP_K: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows of one group by COLUMNS outputs; INPUTS at a time, which share a scale. With TOP_K > 0 row i is
    that of token ``order[i] // TOP_K``."""
    if GROUPED:
        mine, first_row, end = rows_of_tile(tl.program_id(1), group_ends, groups, GROUPS, ROWS)
    else:
        mine, first_row, end = 0, tl.program_id(1) * ROWS, row_count
    if first_row < end:
        row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        source = tl.load(order + row, mask=row < end, other=0).to(tl.int64) // TOP_K if TOP_K else row
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        real_row, real_column = (row < end)[:, None], column < outputs
        group = tl.cast(mine, tl.int64)
        code = codes + group * codes_group + column[:, None].to(tl.int64) * codes_output
        scale = scales + group * scales_group + (column // SCALE_OUTPUTS) * scales_output
        x = rows + source[:, None] * row_stride
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        pieces = tl.cdiv(shared, INPUTS)  # of the inputs that share a scale
        for step in range(0, tl.cdiv(inputs, shared) * pieces):
            share = step // pieces
            start, size = share * shared, (step % pieces) * INPUTS
            if KIND == "int4":  # a byte holds two neighbours; elements at even places lie before those at odd ones
                b = size // 2 + tl.arange(0, INPUTS // 2)
                here = (2 * b < shared) & (start + 2 * b < inputs)
                mask = real_column[:, None] & here[None, :]
                byte = tl.load(code + (start // 2 + b)[None, :], mask=mask, other=0)
                at, mask = x + (start // 2 + b)[None, :], real_row & here[None, :]
                left = tl.load(at, mask=mask, other=0.0)
                right = ((byte & 15).to(tl.int8) - 8).to(left.dtype)
                part = tl.dot(left, tl.trans(right), input_precision="ieee")
                left = tl.load(at + inputs // 2, mask=mask, other=0.0)
                right = ((byte >> 4).to(tl.int8) - 8).to(left.dtype)
                part = tl.dot(left, tl.trans(right), part, input_precision="ieee")
            else:
                i = size + tl.arange(0, INPUTS)
                here = (i < shared) & (start + i < inputs)
                left = tl.load(x + (start + i)[None, :], mask=real_row & here[None, :], other=0.0)
                mask = real_column[:, None] & here[None, :]
                byte = tl.load(code + (start + i)[None, :], mask=mask, other=0)
                right = from_float8(byte).to(left.dtype) if KIND == "fp8" else byte.to(left.dtype)
                if KIND == "int8":  # one scale for all inputs
                    acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
                else:
                    part = tl.dot(left, tl.trans(right), input_precision="ieee")
            if KIND != "int8":
                factor = tl.load(scale + share, mask=real_column, other=0.0).to(tl.float32)
                acc += part * factor[None, :]
        if KIND == "int8":
            acc *= tl.load(scale, mask=real_column, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out + row[:, None] * outputs + column[None, :],
            acc.to(out.dtype.element_ty),
            mask=real_row & real_column[None, :],
        )


KINDS = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}
"""What a weight's codes are, by their dtype."""


def tile_sizes(rows: int, groups: int, itemsize: int, shared: int) -> tuple[int, int, int]:
    """ROWS, COLUMNS and INPUTS of a tile. With few rows to a group, as in decoding, narrow tiles make programs enough to
    read with the whole GPU, each many bytes of a row at a time. No tile has inputs of two scales."""
    tall, wide, deep = (64, 64, 128) if rows > 32 * groups else (16, 32, 128)
    if itemsize == 4:
        deep = 32 if tall == 64 else 64
    return tall, wide, max(32, min(deep, power_of_two(shared)))  # of int4 half of them at a time, 16 at least


def options(tall: int, itemsize: int) -> dict[str, int]:
    """Warps and stages of a launch with ``tall`` rows to a tile: more warps for large sums in float32, so that none is
    spilled, and more stages for few rows, whose loads take longer than their products."""
    return {"num_warps": 8 if tall == 64 and itemsize == 4 else 4, "num_stages": 4 if tall == 16 else 3}


def most_tiles(rows: int, groups: int, tall: int) -> int:
    """Tiles of ``tall`` rows that the groups could need at most."""
    return min(rows, -(-rows // tall) + groups)


def even_before_odd(rows: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows inputs"]:
    """Elements at even places, then those at odd ones: a byte of four-bit codes has one of each, so both halves of a tile
    are read as they lie."""
    return rows.unflatten(1, (-1, 2)).mT.flatten(1)


def quantized_product_launch(
    rows: Float[Tensor, "rows inputs"],
    codes: Shaped[Tensor, "*groups outputs stored"],
    scales: Float[Tensor, "*groups row_blocks column_blocks"],
    shared: int,
    group_ends: Int[Tensor, "groups"] | None = None,
    order: Int[Tensor, "choices"] | None = None,
    top_k: int = 0,
) -> Float[Tensor, "choices outputs"]:
    """`dsv2_ref.quantized.quantized_product` in the kernel, for codes and scales of a `QuantizedWeight` of which ``shared`` neighbours in a
    row have one scale; with ``group_ends``, of a stack of them for consecutive groups of rows, as in
    `dsv2_ref.fast.products.grouped_product`. The other options are those of
    `dsv2_ref.fast.triton.experts.grouped_product_launch`. For ``int4`` the rows must be `even_before_odd`."""
    kind, outputs, inputs = KINDS[codes.dtype], codes.shape[-2], rows.shape[-1]
    codes = codes.view(torch.uint8) if kind == "fp8" else codes  # Triton does not know it on every GPU
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    codes, scales = codes.contiguous(), scales.contiguous()
    grouped = group_ends is not None
    groups = len(group_ends) if group_ends is not None else 1
    count = len(rows) if order is None else len(order)
    out = torch.empty(count, outputs, dtype=rows.dtype, device=rows.device)
    if out.numel():
        tall, wide, deep = tile_sizes(count, groups, rows.element_size(), shared)
        with torch.cuda.device_of(rows):
            quantized_product_kernel[(-(-outputs // wide), most_tiles(count, groups, tall))](
                rows, codes, scales, group_ends if grouped else rows, rows if order is None else order, out,
                count, groups, outputs, inputs,
                shared, rows.stride(0), codes.stride(0), codes.stride(-2), scales.stride(0), scales.stride(-2),
                KIND=kind, GROUPED=grouped, SCALE_OUTPUTS=FP8_BLOCK if kind == "fp8" else 1, TOP_K=top_k,
                GROUPS=power_of_two(groups), ROWS=tall, COLUMNS=wide, INPUTS=deep, **options(tall, rows.element_size()),
            )  # fmt: skip
    return out
