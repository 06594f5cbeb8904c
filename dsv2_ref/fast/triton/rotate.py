"""Rotary positions on interleaved pairs in one pass: every element is read once and written once.

In PyTorch the four products, the two sums, the stacking and two changes of dtype each pass over memory. The gradient is
the rotation back, by the same kernel with the sign of the sine flipped.

Source: Su et al. (2021), equation 15; the layout of MLA's checkpoints (`dsv2_ref.rope.rotate_interleaved`).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dsv2_ref.fast.triton.language import jit, power_of_two, tl

BLOCK_ROWS = 16  # that one program rotates, each a token of a head


@jit
def rotate_kernel(
    x, cos, sin, out, heads, seq, rows, pairs,
    x_batch, x_head, x_token,  # strides, in elements
    cos_batch, cos_head, cos_token,
    sin_batch, sin_head, sin_token,
    sign, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program a block of rows, counted through batch, head and token."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = row % seq
    head = row // seq % heads
    batch = row // (seq * heads)
    feature = tl.arange(0, 2 * PAIRS)
    pair = tl.arange(0, PAIRS)
    inside = (row < rows)[:, None] & (feature < 2 * pairs)[None, :]
    in_table = (row < rows)[:, None] & (pair < pairs)[None, :]

    place = batch * x_batch + head * x_head + token * x_token
    turned = tl.load(x + place[:, None] + feature[None, :], mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(turned.to(tl.float32), (BLOCK, PAIRS, 2)))
    place = batch * cos_batch + head * cos_head + token * cos_token
    c = tl.load(cos + place[:, None] + pair[None, :], mask=in_table, other=0.0)
    place = batch * sin_batch + head * sin_head + token * sin_token
    s = tl.load(sin + place[:, None] + pair[None, :], mask=in_table, other=0.0) * sign
    both = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK, 2 * PAIRS))
    tl.store(out + row[:, None] * (2 * pairs) + feature[None, :], both.to(turned.dtype), mask=inside)


def _four(x: Tensor) -> Tensor:
    """With leading axes of one, up to (batch, heads, seq, features), and features side by side."""
    x = x[(None,) * (4 - x.ndim)]
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate_launch(
    x: Float[Tensor, "*batch dim"],
    cos: Float[Tensor, "*table pairs"],
    sin: Float[Tensor, "*table pairs"],
    backward: bool = False,
) -> Float[Tensor, "*batch dim"]:
    """`rotate_interleaved` in the kernel for up to four axes of any strides; ``backward`` rotates the other way."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    table = (*x.shape[:-1], x.shape[-1] // 2)
    four, c, s = _four(x), _four(cos.expand(table)), _four(sin.expand(table))
    _, heads, seq, dim = four.shape
    if rows := four[..., 0].numel():
        with torch.cuda.device_of(x):
            rotate_kernel[(-(-rows // BLOCK_ROWS),)](
                four, c, s, out, heads, seq, rows, dim // 2,
                *four.stride()[:3], *c.stride()[:3], *s.stride()[:3],
                -1.0 if backward else 1.0, BLOCK=BLOCK_ROWS, PAIRS=power_of_two(dim // 2), num_warps=4,
                enable_fp_fusion=False,  # products are rounded before they are added, as PyTorch rounds them
            )  # fmt: skip
    return out
