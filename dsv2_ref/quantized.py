"""A weight held as codes and scales, and the product with it.

Letters: E routed experts, G groups of a row. A *code* is what is stored of a weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from dsv2_ref import ops
from dsv2_ref.codes import (
    from_codes,
    largest_code,
    pack_nibbles,
    to_codes,
    unpack_nibbles,
)

FP8_BLOCK = 128


class QuantizedWeight(nn.Module):
    """A matrix, or a stack of matrices, as codes and scales.

    Buffers, which `state_dict` has under these names: ``codes``, (…, outputs, inputs)
    int8 or float8_e4m3fn, for ``int4`` (…, outputs, inputs / 2) uint8 (`pack_nibbles`);
    and ``scales``, (…, outputs, groups) in the dtype of the module (float32 for
    float16, in which they could vanish), for ``fp8`` (…, row blocks, column blocks) in
    float32.

    ``to`` and its like change the dtype of what the codes stand for, and never a code.

    Args:
        kind: ``int8``, ``int4`` or ``fp8``.
        shape: (…, outputs, inputs).
        group: neighbours in a row that share a scale (``int4`` alone).
        dtype: of the matrix that it stands for. device: where it is.
    """

    def __init__(
        self,
        kind: str,
        shape: tuple[int, ...],
        group: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        *stack, outputs, inputs = shape
        self.kind, self.shape = kind, (*stack, outputs, inputs)
        self.group = {"int8": inputs, "int4": group, "fp8": FP8_BLOCK}[kind]
        grid = [outputs, inputs // self.group]
        if kind == "fp8":
            grid = [-(-size // FP8_BLOCK) for size in (outputs, inputs)]
        if kind == "int4":
            inputs = inputs // 2
        place: dict[str, Any] = {"dtype": code_dtype(kind), "device": device}
        codes = torch.empty(*stack, outputs, inputs, **place)
        place["dtype"] = scale_dtype(kind, dtype)
        scales = torch.empty(*stack, *grid, **place)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        like = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("like", like, persistent=False)

    codes: Tensor
    scales: Tensor
    scales_and_zeros: Tensor
    like: Tensor  #: empty; its dtype is that of the matrix
    block_rows = 0  #: of codes that `pack_weights` laid out for the CPU's kernel
    kept: tuple[Tensor, Tensor] | None = None  #: by `pack_weights`, of ``kv_b_proj``

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `to` moves codes and scales as they are; a dtype is that of what they mean.
        # What a kernel reads beside them, too: float16 could not hold small scales.
        bits = self.codes, self.scales, self._buffers.get("scales_and_zeros")
        before = self.like.dtype, self.codes.device

        def move(x: Tensor) -> Tensor:
            own = any(x is held for held in bits)
            return fn(x.view(torch.uint8)).view(x.dtype) if own else fn(x)

        super()._apply(move, recurse)
        self.scales = self.scales.to(scale_dtype(self.kind, self.like.dtype))
        if self.block_rows and self.codes.device.type != "cpu":  # no kernel there
            self.codes, self.block_rows = in_rows(self.codes, self.block_rows), 0
            del self.scales_and_zeros
        if (self.like.dtype, self.codes.device) != before:
            self.kept = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        codes = self.codes.view(torch.uint8)  # pickle cannot read float8
        return self.__dict__ | {"_buffers": self._buffers | {"codes": codes}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.codes = self.codes.view(code_dtype(self.kind))

    @torch.no_grad()
    def fill(self, weight: Float[Tensor, "..."], place: Any = ...) -> None:
        """Quantise a weight into this one, or into a ``place`` of it: an expert, or an
        expert and some of its rows."""
        codes, scales = self.codes[place], self.scales[self._in_grid(place)]
        if self.kind == "fp8":
            padding = [0, -weight.shape[1] % FP8_BLOCK, 0, -weight.shape[0] % FP8_BLOCK]
            blocks = in_blocks(F.pad(weight, padding))
            found, scale = to_codes(blocks, "fp8", FP8_BLOCK**2)
            found = from_blocks(found)[: weight.shape[0], : weight.shape[1]]
            scale = scale[..., 0]
        else:
            found, scale = to_codes(weight, self.kind, self.group, scales.dtype)
        codes.copy_(pack_nibbles(found) if self.kind == "int4" else found)
        scales.copy_(scale)

    @torch.no_grad()
    def take(
        self,
        codes: Shaped[Tensor, "..."],
        scales: Float[Tensor, "..."],
        place: Any = ...,
    ) -> None:
        """Hold these codes and scales, as they are."""
        self.codes[place].copy_(codes)
        self.scales[self._in_grid(place)].copy_(scales)

    @torch.no_grad()
    def random_(self, std: float) -> None:
        """Draw codes at random, evenly over their range (of four bits only the odd
        ones), and give them the scale with which their standard deviation is ``std``."""
        largest = int(largest_code(self.kind))
        variance = largest * (largest + 1) / 3  # of whole numbers, all equally often
        if self.kind == "fp8":
            for codes in self.codes.view(-1, *self.codes.shape[-2:]):
                uniform = torch.rand(codes.shape, device=codes.device) * 2 - 1
                codes.copy_(uniform * largest)
        else:
            least = torch.iinfo(torch.int64).min
            for codes in self.codes.view(-1, self.codes.shape[-2:].numel()):
                words = codes.new_empty(-(-len(codes) // 8), dtype=torch.int64)
                words.random_(least, None)  # 8 codes at once
                codes.copy_(words.view(codes.dtype)[: len(codes)])
            if self.kind == "int4":  # both halves odd, from 1 to 15: codes from -7 to 7
                self.codes.bitwise_or_(0x11)
                variance = 21
            else:
                self.codes.clamp_(min=-largest)
        self.scales.fill_(std / variance**0.5)

    def _in_grid(self, place: Any) -> Any:
        """The scales of a place: rows of blocks, where a block shares one."""
        if self.kind != "fp8" or not isinstance(place, tuple):
            return place
        expert, rows = place
        return expert, slice(rows.start // FP8_BLOCK, -(-rows.stop // FP8_BLOCK))

    def dense(self, place: Any = ...) -> Float[Tensor, "... outputs inputs"]:
        """The matrices that codes and scales stand for, or some of them: a ``place`` as
        for `fill`, of which nothing else is read than rows of the same block."""
        expert, rows = place if isinstance(place, tuple) else (place, slice(None))
        start, stop, _ = rows.indices(self.shape[-2])
        block = FP8_BLOCK if self.kind == "fp8" else self.block_rows or 1
        first, last = start // block, -(-stop // block)  # blocks
        codes = self.codes[expert][..., first * block : last * block, :]
        scales = self.scales[expert]
        if self.kind == "fp8":
            scales = scales[..., first:last, :]
        else:
            scales = scales[..., first * block : last * block, :]
            codes = in_rows(codes, self.block_rows) if self.block_rows else codes
        matrix = dense_weight(codes, scales, self.group, self.like.dtype)
        before = start - first * block
        return matrix[..., before : before + stop - start, :]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.block_rows:
            destination[prefix + "codes"] = in_rows(self.codes, self.block_rows)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        self.require_plain(prefix[:-1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.like = self.like.new_empty(0, device=self.codes.device)  # maybe assigned
        self.kept = None  # of the codes before

    def require_plain(self, name: str) -> None:
        """Raise RuntimeError if `pack_weights` has laid the codes out otherwise."""
        if self.block_rows:
            wanted = "wanted a layer to load into: load first, then pack"
            raise RuntimeError(f"{name} holds packed weights; {wanted}")

    def __getitem__(self, expert: int) -> Float[Tensor, "outputs inputs"]:
        return self.dense(expert)

    def __len__(self) -> int:
        return self.shape[0]

    def extra_repr(self) -> str:
        """What it is, in a printed module."""
        shared = f"{self.group} of a row" if self.kind != "fp8" else "128 x 128"
        return f"{self.kind}, {self.shape}, a scale per {shared}"


def code_dtype(kind: str) -> torch.dtype:
    """The dtype of the codes."""
    codes = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
    return codes[kind]


def scale_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the scales of weights of this dtype."""
    wide = kind == "fp8" or dtype == torch.float16
    return torch.float32 if wide else dtype


def in_rows(
    codes: UInt8[Tensor, "... outputs half"], block_rows: int
) -> UInt8[Tensor, "... outputs half"]:
    """Codes as `pack_nibbles` packs them, of codes that were laid out in blocks of rows,
    in which halves of a byte belong to two rows and not to two neighbours."""
    blocks = codes.unflatten(-2, (-1, block_rows)).flatten(-2)
    columns = blocks.unflatten(-1, (-1, block_rows // 2)).mT  # (…, rows / 2, inputs)
    even, odd = columns.unflatten(-1, (-1, 2)).unbind(dim=-1)
    halves = even & 15 | odd << 4, even >> 4 | odd & 240  # of the rows of a block
    return torch.stack(halves, dim=-3).flatten(-4, -2)


def in_blocks(
    x: Float[Tensor, "rows columns"],
) -> Float[Tensor, "row_blocks column_blocks elements"]:
    """The blocks of a matrix, each as one row."""
    blocks = x.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
    return blocks.transpose(1, 2).flatten(2)


def from_blocks(
    blocks: Shaped[Tensor, "row_blocks column_blocks elements"],
) -> Shaped[Tensor, "rows columns"]:
    """The matrix that `in_blocks` split."""
    split = blocks.unflatten(2, (FP8_BLOCK, FP8_BLOCK)).transpose(1, 2)
    return split.flatten(2).flatten(0, 1)


@ops.defines()
def dense_weight(
    codes: Shaped[Tensor, "*stack outputs stored"],
    scales: Float[Tensor, "*stack row_blocks column_blocks"],
    group: int,
    dtype: torch.dtype,
) -> Float[Tensor, "*stack outputs inputs"]:
    """The matrices that codes and scales of a `QuantizedWeight` stand for; ``group``
    neighbours in a row share a scale."""
    if codes.dtype == torch.float8_e4m3fn:
        height, width = codes.shape[-2:]
        scales = scales.repeat_interleave(FP8_BLOCK, dim=-2)[..., :height, :]
        scales = scales.repeat_interleave(FP8_BLOCK, dim=-1)[..., :width]
        return (codes.to(scales.dtype) * scales).to(dtype)
    codes = unpack_nibbles(codes) if codes.dtype == torch.uint8 else codes
    return from_codes(codes, scales).to(dtype)


@ops.defines()
def quantized_product(
    rows: Float[Tensor, "*batch inputs"], weight: QuantizedWeight, place: Any = ...
) -> Float[Tensor, "*batch outputs"]:
    """``rows @ weight.T``, for one expert of a stack where ``place`` is its index."""
    return F.linear(rows, weight.dense(place))
