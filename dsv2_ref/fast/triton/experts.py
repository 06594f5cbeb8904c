"""Products of consecutive groups of rows, each with a matrix of its own, in one launch that never asks for the sizes.

A program finds its group and rows from ``group_ends`` on the device. As many programs start as the groups could need at
most, ⌈rows / ROWS⌉ + groups or one for each row, times the column blocks; those left over end at once. Only matrices of groups with rows are
read. A loop in PyTorch needs the sizes on the host first, which makes the host wait for the device.

Source: the mapping from programs to groups of MegaBlocks (Gale et al., 2022), with tiles instead of padding.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv2_ref import ops
from dsv2_ref.fast.products import torch_can_group
from dsv2_ref.fast.triton.available import DEVICE, HALF_AND_SINGLE, alike
from dsv2_ref.fast.triton.language import jit, power_of_two, tl

FEW_ROWS = 96
"""Rows of a group, on average, up to which the kernel is chosen on sm_90. On an H100 it was faster than torch's with up to
77 rows, by 3 to 20 %, and slower with 192, by 8 %."""

MOST_TILES = 2**16 - 1  # of a launch's second axis (CUDA C++ Programming Guide, technical specifications)


@jit
def rows_of_tile(tile, group_ends, groups, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """A tile's group, its first row and the end of the group's rows; no rows for a tile that is left over."""
    group = tl.arange(0, GROUPS)
    ends = tl.load(group_ends + group, mask=group < groups, other=0)
    starts = tl.load(group_ends + group - 1, mask=(group > 0) & (group < groups), other=0)
    tiles = (ends - starts + ROWS - 1) // ROWS
    tiles = tl.where(group < groups, tiles, 0)
    tile_ends = tl.cumsum(tiles, 0)
    mine = tl.sum((tile_ends <= tile).to(tl.int32), 0)  # GROUPS, which is no group, if left over
    chosen = group == mine
    start = tl.sum(tl.where(chosen, starts, 0), 0)
    end = tl.sum(tl.where(chosen, ends, 0), 0)
    first_tile = tl.sum(tl.where(chosen, tile_ends - tiles, 0), 0)
    return mine, start + (tile - first_tile) * ROWS, end


@jit
def grouped_product_kernel(
    rows, weights, group_ends, order, out, groups, outputs, inputs,
    row_stride, weight_group, weight_output, weight_input,  # strides, in elements
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows of one group by COLUMNS outputs. With TOP_K > 0 row i is that of token ``order[i] // TOP_K``."""
    mine, first_row, end = rows_of_tile(tl.program_id(1), group_ends, groups, GROUPS, ROWS)
    if first_row < end:
        row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        source = tl.load(order + row, mask=row < end, other=0).to(tl.int64) // TOP_K if TOP_K else row
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        weight = weights + mine.to(tl.int64) * weight_group
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, inputs, INPUTS):
            k = first + tl.arange(0, INPUTS)
            mask = (row < end)[:, None] & (k < inputs)[None, :]
            x = tl.load(rows + source[:, None] * row_stride + k[None, :], mask=mask, other=0.0)
            w = tl.load(
                weight + column[None, :].to(tl.int64) * weight_output + k[:, None].to(tl.int64) * weight_input,
                mask=(column < outputs)[None, :] & (k < inputs)[:, None],
                other=0.0,
            )
            acc = tl.dot(x, w, acc, input_precision="ieee")
        tl.store(
            out + row[:, None] * outputs + column[None, :],
            acc.to(out.dtype.element_ty),
            mask=(row < end)[:, None] & (column < outputs)[None, :],
        )


def tile_sizes(rows: int, groups: int, itemsize: int) -> tuple[int, int, int]:
    """ROWS, COLUMNS and INPUTS of a tile: few rows where a group has few, so that decoding wastes little."""
    tall = 16 if rows <= 8 * groups else 64 if rows <= 64 * groups or itemsize == 4 else 128
    if itemsize == 4:
        return tall, 64, 32
    return (128, 128, 64) if tall == 128 else (tall, 64, 128)


def warps(tall: int) -> int:
    """Of a launch with ``tall`` rows to a tile: more for more sums, so that none is spilled."""
    return 8 if tall == 128 else 4


def most_tiles(rows: int, groups: int, itemsize: int) -> int:
    """Tiles of rows that the groups could need at most."""
    tall, _, _ = tile_sizes(rows, groups, itemsize)
    return min(rows, -(-rows // tall) + groups)


def should_serve(
    rows: Float[Tensor, "rows inputs"], weights: Float[Tensor, "groups outputs inputs"], choices: int | None = None
) -> bool:
    """Whether the kernel is to multiply these: on GPUs where torch would loop over the groups and wait for their sizes,
    which are all but bfloat16 on sm_90 and sm_100, and for few rows on sm_90; up to some four million rows, as one
    launch takes no more. With ``choices`` so many of these rows, which are not gathered yet."""
    count = len(rows) if choices is None else choices
    known = rows.dtype in HALF_AND_SINGLE and not alike(rows, weights)
    known = known and rows.shape[-1] == weights.shape[-1]  # else it would read past the end
    if ops.is_off("triton experts") or not known or most_tiles(count, len(weights), rows.element_size()) > MOST_TILES:
        return False
    if DEVICE == "cpu" or rows.dtype != torch.bfloat16:  # interpreted, or looped over
        return True
    generation = torch.cuda.get_device_capability(rows.device)[0]
    if generation == 9 and count <= FEW_ROWS * len(weights):
        return True
    return generation not in (9, 10) or not torch_can_group(rows, weights, groups=len(weights))


def grouped_product_launch(
    rows: Float[Tensor, "rows inputs"],
    weights: Float[Tensor, "groups outputs inputs"],
    group_ends: Int[Tensor, "groups"],
    order: Int[Tensor, "choices"] | None = None,
    top_k: int = 0,
) -> Float[Tensor, "choices outputs"]:
    """`grouped_product` in the kernel: any strides of the weights, and no waiting for the device. With ``order`` the rows
    are those of tokens, of which each has ``top_k`` choices, taken in that order."""
    groups, outputs, inputs = weights.shape
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    count = len(rows) if order is None else len(order)
    out = torch.empty(count, outputs, dtype=rows.dtype, device=rows.device)
    if out.numel():
        sizes = count, groups, rows.element_size()
        tall, wide, deep = tile_sizes(*sizes)
        with torch.cuda.device_of(rows):
            grouped_product_kernel[(-(-outputs // wide), most_tiles(*sizes))](
                rows, weights, group_ends.contiguous(), group_ends if order is None else order, out,
                groups, outputs, inputs, rows.stride(0), *weights.stride(), TOP_K=top_k,
                GROUPS=power_of_two(groups), ROWS=tall, COLUMNS=wide, INPUTS=deep,
                num_warps=warps(tall), num_stages=3,
            )  # fmt: skip
    return out
