"""Rounding to few bits: whole numbers, or eight-bit floating-point numbers, times a scale
that neighbours share.

Letters: G groups of a row. A *code* is what is stored of a value.
"""

import torch
from jaxtyping import Float, Int8, Shaped, UInt8
from torch import Tensor


def largest_code(kind: str) -> float:
    """The code of the largest value of a group: 448 for ``fp8``, else 2^(bits-1) - 1,
    so that codes are symmetric about 0."""
    return 448.0 if kind == "fp8" else 2.0 ** (int(kind.removeprefix("int")) - 1) - 1


def to_codes(
    x: Float[Tensor, "*rows inputs"],
    kind: str,
    group: int,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Shaped[Tensor, "*rows inputs"], Float[Tensor, "*rows groups"]]:
    """Round every ``group`` neighbours of a row to multiples of one scale, which makes
    the largest of them the largest code. ``kind`` is ``fp8`` or ``int`` and a number of
    bits from 2 to 8; a group of zeros has the scale 0, one with a NaN is NaN. A scale
    too large for its dtype, infinity included, becomes the largest that fits.

    Returns:
        ``(codes, scales)``: int8 or float8_e4m3fn; and what to multiply them by.
    """
    largest = largest_code(kind)
    wide = torch.promote_types(x.dtype, torch.promote_types(scale_dtype, torch.float32))
    groups = x.to(wide).unflatten(-1, (-1, group))  # (…, G, group)
    limits = torch.finfo(scale_dtype)  # a code times its scale must stay finite
    scales = groups.abs().amax(dim=-1) / largest  # (…, G)
    scales = scales.clamp(max=limits.max * (1 - limits.eps) / largest).to(scale_dtype)
    units = groups / scales.to(wide).where(scales > 0, 1)[..., None]
    units = units.clamp(-largest, largest)  # a float8 might be NaN
    codes = units.to(torch.float8_e4m3fn) if kind == "fp8" else units.round().char()
    return codes.flatten(-2), scales


def from_codes(
    codes: Shaped[Tensor, "*rows inputs"], scales: Float[Tensor, "*rows groups"]
) -> Float[Tensor, "*rows inputs"]:
    """What codes stand for, in the dtype of the scales."""
    groups = codes.to(scales.dtype).unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales[..., None]).flatten(-2)


def pack_nibbles(codes: Int8[Tensor, "*rows inputs"]) -> UInt8[Tensor, "*rows half"]:
    """Two four-bit codes in a byte, each plus 8: the first of them in the low half."""
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(dim=-1)
    return low | high << 4


def unpack_nibbles(packed: UInt8[Tensor, "*rows half"]) -> Int8[Tensor, "*rows inputs"]:
    """The codes that `pack_nibbles` packed, as int8."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return codes.char() - 8
