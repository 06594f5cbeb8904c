"""Products of so few rows that their matrix may be read once for each, as in decoding: without tensor cores, and without
sorting a token's experts.

A matrix is read at the speed of memory where each warp reads rows of it from end to end, and multiplies and adds as it
goes. Of the experts of a token two launches are left: the first also computes SwiGLU, the second adds up the choices.
Codes of few bits are exact in float32, and a scale multiplies the sum over the inputs that share it.

Source: the definitions, `RoutedExperts.forward` and `dsv2_ref.quantized.quantized_product`.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv2_ref.fast.triton.language import jit, power_of_two, tl
from dsv2_ref.fast.triton.quantized import KINDS, from_float8

MOST_TOKENS = {"": 2, "int8": 4, "fp8": 4, "int4": 4}
"""Tokens up to which experts are computed so, by what their weights are. With more, the products that share what they read
were faster on an H100."""

MOST_ROWS = {"int8": 2, "fp8": 2, "int4": 3}
"""Rows up to which one matrix is multiplied so, likewise."""

MOST_SHARED = 4096  # inputs with one scale: a program holds at least so many of a row


class Matrices(NamedTuple):
    """A matrix, or a stack of them, as it is or as codes with scales of which ``shared`` neighbours in a row have one."""

    codes: Tensor
    scales: Tensor | None = None
    shared: int = 0

    @property
    def kind(self) -> str:
        """``int8``, ``int4``, ``fp8``; empty without scales."""
        return "" if self.scales is None else KINDS[self.codes.dtype]

    @property
    def fits(self) -> bool:
        """Whether the kernels here can read it, which wants rows without gaps and scales for powers of two of neighbours."""
        power = 2 <= self.shared <= MOST_SHARED and self.shared & (self.shared - 1) == 0
        return self.codes.stride(-1) == 1 and (power or self.kind not in ("int4", "fp8"))


@jit
def times_rows(
    x, codes, scales, expert, column, outputs, inputs,
    codes_group, codes_output, scales_group, scales_output,  # strides, in elements
    KIND: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ x · w over the inputs, for COLUMNS rows of an expert's matrix, in float32."""
    real = (column < outputs)[:, None]
    row = codes + expert * codes_group + column[:, None].to(tl.int64) * codes_output
    scale = scales + expert * scales_group
    SUMS: tl.constexpr = INPUTS // SHARED if SHARED else INPUTS
    acc = tl.zeros((COLUMNS, SUMS), tl.float32)
    for first in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        i = first + tl.arange(0, INPUTS)
        left = tl.load(x + i, mask=i < inputs, other=0.0).to(tl.float32)
        if KIND == "int4":  # a byte holds two neighbours
            b = first // 2 + tl.arange(0, INPUTS // 2)
            byte = tl.load(row + b[None, :], mask=real & (2 * b < inputs)[None, :], other=0)
            even, odd = tl.split(tl.reshape(left, (INPUTS // 2, 2)))
            part = ((byte & 15).to(tl.float32) - 8) * even[None, :] + ((byte >> 4).to(tl.float32) - 8) * odd[None, :]
        else:
            code = tl.load(row + i[None, :], mask=real & (i < inputs)[None, :], other=0)
            part = (from_float8(code) if KIND == "fp8" else code.to(tl.float32)) * left[None, :]
        if SHARED:
            share = first // SHARED + tl.arange(0, SUMS)
            block = column // SHARED if KIND == "fp8" else column  # whose blocks are square
            at = scale + block[:, None] * scales_output + share[None, :]
            factor = tl.load(at, mask=real & (share * SHARED < inputs)[None, :], other=0.0).to(tl.float32)
            part = tl.sum(tl.reshape(part, (COLUMNS, SUMS, SHARED // (2 if KIND == "int4" else 1))), 2) * factor
        acc += part
    total = tl.sum(acc, 1)
    if KIND == "int8":  # one scale for all inputs
        total *= tl.load(scale + column * scales_output, mask=column < outputs, other=0.0).to(tl.float32)
    return total


@jit
def rows_kernel(
    x, codes, scales, out, outputs, inputs, row_stride, codes_output, scales_output,
    KIND: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: COLUMNS outputs of one row, by one matrix."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = times_rows(
        x + row * row_stride, codes, scales, 0, column, outputs, inputs, 0, codes_output, 0, scales_output,
        KIND, SHARED, COLUMNS, INPUTS, STAGES,
    )  # fmt: skip
    tl.store(out + row * outputs + column, total.to(out.dtype.element_ty), mask=column < outputs)


@jit
def gate_up_kernel(
    x, codes, scales, choices, out, wide, hidden, experts, x_token,
    codes_group, codes_output, scales_group, scales_output,
    TOP_K: tl.constexpr, KIND: tl.constexpr, SHARED: tl.constexpr,
    COLUMNS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: silu(gate) · up of COLUMNS features of one choice, rounded as torch rounds it."""
    choice = tl.program_id(1).to(tl.int64)
    expert = tl.load(choices + choice).to(tl.int64)
    expert = tl.where((expert >= 0) & (expert < experts), expert, 0)  # of no expert: see below
    token = x + choice // TOP_K * x_token
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kind = out.dtype.element_ty
    gate = times_rows(
        token, codes, scales, expert, column, wide, hidden, codes_group, codes_output, scales_group, scales_output,
        KIND, SHARED, COLUMNS, INPUTS, STAGES,
    ).to(kind).to(tl.float32)  # fmt: skip
    up = times_rows(
        token, codes, scales, expert, wide + column, 2 * wide, hidden,
        codes_group, codes_output, scales_group, scales_output, KIND, SHARED, COLUMNS, INPUTS, STAGES,
    ).to(kind).to(tl.float32)  # fmt: skip
    silu = (gate / (1 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out + choice * wide + column, (silu * up).to(kind), mask=column < wide)


@jit
def down_kernel(
    rows, codes, scales, choices, weights, out, hidden, wide, experts,
    codes_group, codes_output, scales_group, scales_output,
    TOP_K: tl.constexpr, KIND: tl.constexpr, SHARED: tl.constexpr,
    COLUMNS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: COLUMNS features of one token, the weighted sum of its choices in their order, in float32. A choice of no
    expert adds nothing."""
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.range(TOP_K):
        at = token * TOP_K + choice
        expert = tl.load(choices + at).to(tl.int64)
        real = (expert >= 0) & (expert < experts)
        part = times_rows(
            rows + at * wide, codes, scales, tl.where(real, expert, 0), column, hidden, wide,
            codes_group, codes_output, scales_group, scales_output, KIND, SHARED, COLUMNS, INPUTS, STAGES,
        )  # fmt: skip
        part = part.to(out.dtype.element_ty).to(tl.float32) * tl.load(weights + at)
        total += tl.where(real, part, 0.0)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)


class Tile(NamedTuple):
    """COLUMNS and INPUTS of a program, and its warps and stages."""

    columns: int
    inputs: int
    warps: int
    stages: int


TILES = {"": Tile(4, 512, 4, 3), "int8": Tile(4, 512, 4, 3), "fp8": Tile(8, 512, 4, 3), "int4": Tile(4, 2048, 4, 3)}
"""The fastest of 30 to 44 on an H100, by what the weights are."""


def arguments(
    matrices: Matrices, inputs: int, tile: Tile
) -> tuple[tuple[Tensor, Tensor], tuple[int, ...], dict[str, Any]]:
    """Of a launch: codes and scales, their strides without those along a row, and constants."""
    codes, kind = matrices.codes, matrices.kind
    scales = codes if matrices.scales is None else matrices.scales.contiguous()
    shared = matrices.shared if kind in ("int4", "fp8") else 0
    constants = {
        "KIND": kind, "SHARED": shared, "COLUMNS": tile.columns, "STAGES": tile.stages, "num_warps": tile.warps,
        "INPUTS": max(shared, min(tile.inputs, power_of_two(inputs))),
    }  # fmt: skip
    held = codes.view(torch.uint8) if kind == "fp8" else codes  # Triton does not know it on every GPU
    return (held, scales), (*codes.stride()[:-1], *scales.stride()[: codes.ndim - 1]), constants


def product_launch(rows: Float[Tensor, "rows inputs"], matrix: Matrices) -> Float[Tensor, "rows outputs"]:
    """``rows @ matrix.T`` of one matrix."""
    rows, outputs = rows.contiguous(), matrix.codes.shape[0]
    out = torch.empty(len(rows), outputs, dtype=rows.dtype, device=rows.device)
    if out.numel():
        tile = TILES[matrix.kind]
        held, strides, constants = arguments(matrix, rows.shape[1], tile)
        with torch.cuda.device_of(rows):
            rows_kernel[(-(-outputs // tile.columns), len(rows))](
                rows, *held, out, outputs, rows.shape[1], rows.stride(0), *strides, **constants
            )
    return out


def experts_launch(
    hidden_states: Float[Tensor, "tokens hidden"],
    gate_up: Matrices,
    down: Matrices,
    topk_idx: Int[Tensor, "tokens top_k"],
    topk_weight: Float[Tensor, "tokens top_k"],
) -> Float[Tensor, "tokens hidden"]:
    """The experts of every token: gates above ups in the first stack of matrices, the rest in the second."""
    (tokens, top_k), (experts, hidden), wide = topk_idx.shape, down.codes.shape[:2], gate_up.codes.shape[1] // 2
    x, choices, weights = hidden_states.contiguous(), topk_idx.contiguous(), topk_weight.float().contiguous()
    rows, out = (
        torch.empty(*shape, dtype=x.dtype, device=x.device) for shape in ((tokens * top_k, wide), (tokens, hidden))
    )
    if out.numel():
        tile = TILES[gate_up.kind]
        with torch.cuda.device_of(x):
            held, strides, constants = arguments(gate_up, hidden, tile)
            gate_up_kernel[(-(-wide // tile.columns), tokens * top_k)](
                x, *held, choices, rows, wide, hidden, experts, x.stride(0), *strides, TOP_K=top_k, **constants
            )
            held, strides, constants = arguments(down, wide, tile)
            down_kernel[(-(-hidden // tile.columns), tokens)](
                rows, *held, choices, weights, out, hidden, wide, experts, *strides, TOP_K=top_k, **constants
            )
    return out
