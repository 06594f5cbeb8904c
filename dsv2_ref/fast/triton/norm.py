"""Residual addition and RMSNorm in one pass over memory, forward and backward.

Fused, each of the N · D elements is read twice (update, residual) and written twice (sum, normalised): 4·N·D elements
move instead of 5·N·D for an addition and a fused norm, and 14·N·D in separate operations of PyTorch, half of them in
float32.

Source: Zhang and Sennrich (2019), equation 4, with the rounding of ``DeepseekV2RMSNorm`` of the published code.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dsv2_ref.fast.triton.language import jit, power_of_two, tl

BACKWARD_PROGRAMS = 256  # each sums the weight's gradient over its share of the rows


# fmt: off
@jit
def add_rmsnorm_kernel(
    update, residual, weight, total, normed, inverse_rms,  # pointers to first elements
    update_stride, residual_stride,  # elements from one row to the next
    features, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program a row, which stays in registers to the end."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < features

    h = tl.load(update + row * update_stride + feature, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        r = tl.load(residual + row * residual_stride + feature, mask=inside, other=0.0)
        h = (r.to(tl.float32) + h.to(tl.float32)).to(h.dtype)  # as PyTorch rounds a sum
        tl.store(total + row * features + feature, h, mask=inside)

    x = h.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x) / features + eps)
    unit = (x * inverse).to(h.dtype)  # before the weight, as published

    w = tl.load(weight + feature, mask=inside, other=0.0)
    y = (w.to(tl.float32) * unit.to(tl.float32)).to(h.dtype)
    tl.store(normed + row * features + feature, y, mask=inside)
    tl.store(inverse_rms + row, inverse)


@jit
def add_rmsnorm_backward_kernel(
    grad, total, weight, inverse_rms, by_input, by_weight,
    grad_stride, total_stride, rows, features, BLOCK: tl.constexpr,
):
    """Each program takes every ``programs``-th row, and keeps its share of the weight's gradient in registers."""
    program = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < features
    w = tl.load(weight + feature, mask=inside, other=0.0)
    share = tl.zeros((BLOCK,), tl.float32)

    for row in range(program, rows, tl.num_programs(0)):
        dy = tl.load(grad + row * grad_stride + feature, mask=inside, other=0.0)
        x = tl.load(total + row * total_stride + feature, mask=inside, other=0.0)
        inverse = tl.load(inverse_rms + row)
        unit = x.to(tl.float32) * inverse
        g = (dy.to(tl.float32) * w.to(tl.float32)).to(x.dtype).to(tl.float32)
        dx = inverse * (g - unit * (tl.sum(g * unit) / features))
        tl.store(by_input + row * features + feature, dx.to(x.dtype), mask=inside)
        share += dy.to(tl.float32) * unit.to(x.dtype).to(tl.float32)
    tl.store(by_weight + program * features + feature, share, mask=inside)
# fmt: on


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(features: int) -> dict[str, int]:
    """A row of a program, and its warps: about sixteen elements per thread."""
    block = power_of_two(features)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def rms_norm_launch(
    x: Float[Tensor, "*batch hidden"], weight: Float[Tensor, "hidden"], eps: float
) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch"]]:
    """`DeepseekV2RMSNorm.forward` in the kernel, and 1 / rms of each row."""
    return add_rms_norm_launch(x, None, weight, eps)[1:]


def add_rms_norm_launch(
    update: Float[Tensor, "*batch hidden"],
    residual: Float[Tensor, "*batch hidden"] | None,
    weight: Float[Tensor, "hidden"],
    eps: float,
) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"], Float[Tensor, "*batch"]]:
    """``total = residual + update``, its norm, and 1 / rms of each row, in the kernel."""
    shape, features = update.shape, update.shape[-1]
    x = _rows(update)
    r = x if residual is None else _rows(residual)
    normed = torch.empty(shape, dtype=x.dtype, device=x.device)
    total = normed if residual is None else torch.empty_like(normed)
    inverse_rms = torch.empty(shape[:-1], dtype=torch.float32, device=x.device)
    if normed.numel():
        with torch.cuda.device_of(x):
            add_rmsnorm_kernel[(len(x),)](
                x, r, weight.contiguous(), total, normed, inverse_rms, x.stride(0), r.stride(0), features, eps,
                HAS_RESIDUAL=residual is not None, **_block(features),
            )  # fmt: skip
    return total, normed, inverse_rms


def rms_norm_backward_launch(
    grad: Float[Tensor, "*batch hidden"],
    total: Float[Tensor, "*batch hidden"],
    weight: Float[Tensor, "hidden"],
    inverse_rms: Float[Tensor, "*batch"],
) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "hidden"]]:
    """Gradients of the norm by its input and by its weight, in the kernel.

    With x̂ = x / rms and g = w · grad: (g - x̂ · mean(g · x̂)) / rms, and Σ grad · x̂ over the rows; the same sums in the
    same order on every run.
    """
    dy, x, features = _rows(grad), _rows(total), total.shape[-1]
    programs = min(max(len(x), 1), BACKWARD_PROGRAMS)
    by_input = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    by_weight = torch.empty(programs, features, dtype=torch.float32, device=total.device)
    if not len(x):
        return by_input, torch.zeros_like(weight)
    with torch.cuda.device_of(x):
        add_rmsnorm_backward_kernel[(programs,)](
            dy, x, weight.contiguous(), inverse_rms.contiguous(), by_input, by_weight,
            dy.stride(0), x.stride(0), len(x), features, **_block(features),
        )  # fmt: skip
    return by_input, by_weight.sum(0).to(weight.dtype)
