"""Products with weights of few bits, which are never written as anything else: a program reads codes and scales, makes
its tile of the matrix in registers, and adds up in float32.

A code of eight bits with one scale for a row is multiplied as it is, exactly, and the scale multiplies the sum; otherwise
code times scale is rounded as the definition rounds it. The grouped form finds the rows of a group as
`dsv2_ref.fast.triton.experts` does, and reads the codes of groups with rows alone.

Source: the definition, `dsv2_ref.quantized.quantized_product`; blocks of DeepSeek-V3 (2024), section 3.3.2.
"""

from typing import NamedTuple

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
    KIND: tl.constexpr, GROUPED: tl.constexpr, SCALE_OUTPUTS: tl.constexpr, SHARED: tl.constexpr, TOP_K: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows of one group by COLUMNS outputs, INPUTS at a time. SHARED is ``shared`` where a tile has whole
    shares of inputs, else 0. With TOP_K > 0 row i is that of token ``order[i] // TOP_K``."""
    if GROUPED:
        mine, first_row, end = rows_of_tile(tl.program_id(1), group_ends, groups, GROUPS, ROWS)
    else:
        mine, first_row, end = 0, tl.program_id(1) * ROWS, row_count
    if first_row < end:
        row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        source = tl.load(order + row, mask=row < end, other=0).to(tl.int64) // TOP_K if TOP_K else row
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        real_row, real_column = (row < end)[:, None], (column < outputs)[:, None]
        group = tl.cast(mine, tl.int64)
        code = codes + group * codes_group + column[:, None].to(tl.int64) * codes_output
        scale = scales + group * scales_group + (column // SCALE_OUTPUTS)[:, None] * scales_output
        x = rows + source[:, None] * row_stride
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in tl.range(0, inputs, INPUTS, num_stages=STAGES):
            i = start + tl.arange(0, INPUTS)[None, :]
            left = tl.load(x + i, mask=real_row & (i < inputs), other=0.0)
            if KIND == "int4":  # a byte holds two neighbours
                b = start // 2 + tl.arange(0, INPUTS // 2)[None, :]
                byte = tl.load(code + b, mask=real_column & (2 * b < inputs), other=0)
                both = tl.join((byte & 15).to(tl.int8) - 8, (byte >> 4).to(tl.int8) - 8)
                right = tl.reshape(both, (COLUMNS, INPUTS)).to(tl.float32)
            else:
                byte = tl.load(code + i, mask=real_column & (i < inputs), other=0)
                right = from_float8(byte) if KIND == "fp8" else byte
            if KIND == "int8":  # one scale for all inputs: see below
                right = right.to(left.dtype)
            elif SHARED:
                share = start // SHARED + tl.arange(0, INPUTS // SHARED)[None, :]
                factor = tl.load(scale + share, mask=real_column & (share * SHARED < inputs), other=0.0).to(tl.float32)
                factor = tl.broadcast_to(factor[:, :, None], (COLUMNS, INPUTS // SHARED, SHARED))
                right = (right * tl.reshape(factor, (COLUMNS, INPUTS))).to(left.dtype)
            else:
                factor = tl.load(scale + i // shared, mask=real_column & (i < inputs), other=0.0)
                right = (right * factor.to(tl.float32)).to(left.dtype)
            acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
        if KIND == "int8":
            acc *= tl.trans(tl.load(scale, mask=real_column, other=0.0).to(tl.float32))
        tl.store(
            out + row[:, None] * outputs + column[None, :],
            acc.to(out.dtype.element_ty),
            mask=real_row & (column < outputs)[None, :],
        )


KINDS = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}
"""What a weight's codes are, by their dtype."""


class Tile(NamedTuple):
    """ROWS, COLUMNS and INPUTS of a program, and its warps and stages."""

    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int


FEW = {"int8": Tile(16, 32, 256, 4, 4), "int4": Tile(16, 32, 512, 4, 1), "fp8": Tile(16, 32, 256, 4, 3)}
MANY = {"int8": Tile(64, 128, 64, 4, 3), "int4": Tile(64, 64, 128, 4, 3), "fp8": Tile(64, 64, 128, 4, 3)}
"""For few rows to a group, as in decoding, and for many. Narrow tiles make programs enough to read with the whole GPU, each
many bytes of a row at a time. The fastest of 54 on an H100, for int8 and int4."""


def tile_of(kind: str, rows: int, groups: int, itemsize: int, shared: int) -> tuple[Tile, int]:
    """The tile for so many rows, and ``shared`` if it has whole shares of inputs, else 0. In float32, or where each number
    asks for its scale, it is so small that nothing is spilled."""
    few = rows <= 32 * groups
    tile = (FEW if few else MANY)[kind]
    if itemsize == 4:
        tile = tile._replace(inputs=64, stages=3) if few else Tile(64, 64, 32, 8, 3)
    whole = shared & (shared - 1) == 0 and tile.inputs % shared == 0
    if kind == "int4" and itemsize == 2 and not whole:
        tile = tile._replace(inputs=128, stages=min(tile.stages, 2))
    return tile, shared if whole else 0


def most_tiles(rows: int, groups: int, tall: int) -> int:
    """Tiles of ``tall`` rows that the groups could need at most."""
    return min(rows, -(-rows // tall) + groups)


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
    `dsv2_ref.fast.triton.experts.grouped_product_launch`."""
    kind, outputs, inputs = KINDS[codes.dtype], codes.shape[-2], rows.shape[-1]
    codes = codes.view(torch.uint8) if kind == "fp8" else codes  # Triton does not know it on every GPU
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    codes, scales = codes.contiguous(), scales.contiguous()
    grouped = group_ends is not None
    groups = len(group_ends) if group_ends is not None else 1
    count = len(rows) if order is None else len(order)
    out = torch.empty(count, outputs, dtype=rows.dtype, device=rows.device)
    if out.numel():
        tile, whole = tile_of(kind, count, groups, rows.element_size(), shared)
        with torch.cuda.device_of(rows):
            quantized_product_kernel[(-(-outputs // tile.columns), most_tiles(count, groups, tile.rows))](
                rows, codes, scales, group_ends if grouped else rows, rows if order is None else order, out,
                count, groups, outputs, inputs,
                shared, rows.stride(0), codes.stride(0), codes.stride(-2), scales.stride(0), scales.stride(-2),
                KIND=kind, GROUPED=grouped, SCALE_OUTPUTS=FP8_BLOCK if kind == "fp8" else 1,
                SHARED=whole, TOP_K=top_k,
                GROUPS=power_of_two(groups), ROWS=tile.rows, COLUMNS=tile.columns, INPUTS=tile.inputs,
                STAGES=tile.stages, num_warps=tile.warps,
            )  # fmt: skip
    return out


@jit
def dense_kernel(
    codes, scales, out, outputs, inputs, shared, codes_group, codes_output, scales_group, scales_output,
    KIND: tl.constexpr, SCALE_OUTPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program: ROWS by COLUMNS numbers of one matrix, each a code times its scale."""
    group = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    real = (row < outputs) & (column < inputs)
    code = codes + group * codes_group + row * codes_output
    if KIND == "int4":  # a byte holds two neighbours
        b = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
        byte = tl.load(code + b, mask=(row < outputs) & (2 * b < inputs), other=0)
        both = tl.join((byte & 15).to(tl.int8) - 8, (byte >> 4).to(tl.int8) - 8)
        value = tl.reshape(both, (ROWS, COLUMNS)).to(tl.float32)
    else:
        byte = tl.load(code + column, mask=real, other=0)
        value = from_float8(byte) if KIND == "fp8" else byte.to(tl.float32)
        if KIND == "fp8":  # a damaged weight stays one
            value = tl.where((byte & 127) == 127, float("nan"), value)
    scale = scales + group * scales_group + row // SCALE_OUTPUTS * scales_output + column // shared
    value *= tl.load(scale, mask=real, other=0.0).to(tl.float32)
    tl.store(out + (group * outputs + row) * inputs + column, value.to(out.dtype.element_ty), mask=real)


DENSE_TILE = {"ROWS": 4, "COLUMNS": 512}


def dense_launch(
    codes: Shaped[Tensor, "*stack outputs stored"],
    scales: Float[Tensor, "*stack row_blocks column_blocks"],
    shared: int,
    dtype: torch.dtype,
) -> Float[Tensor, "*stack outputs inputs"]:
    """`dsv2_ref.quantized.dense_weight` in one kernel."""
    kind, (*stack, outputs, stored) = KINDS[codes.dtype], codes.shape
    inputs = 2 * stored if kind == "int4" else stored
    out = torch.empty(*stack, outputs, inputs, dtype=dtype, device=codes.device)
    if out.numel():
        flat = codes.reshape(-1, outputs, stored).contiguous()
        scales = scales.reshape(-1, *scales.shape[-2:]).contiguous()
        tiles = -(-outputs // DENSE_TILE["ROWS"]), -(-inputs // DENSE_TILE["COLUMNS"]), len(flat)
        with torch.cuda.device_of(out):
            dense_kernel[tiles](
                flat.view(torch.uint8) if kind == "fp8" else flat, scales, out, outputs, inputs, shared,
                flat.stride(0), flat.stride(1), scales.stride(0), scales.stride(1),
                KIND=kind, SCALE_OUTPUTS=FP8_BLOCK if kind == "fp8" else 1, **DENSE_TILE, num_warps=4,
            )  # fmt: skip
    return out
