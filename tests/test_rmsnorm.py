"""RMSNorm against the equation, its rounding, and what follows from it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import rms_norm

from dsv2_ref import DeepseekV2RMSNorm
from tests import oracle
from tests.peers import assert_close, randomised, tokens

WIDTH = 24


def norm_of(dtype: torch.dtype = torch.float64, width: int = WIDTH, eps: float = 1e-6) -> DeepseekV2RMSNorm:
    return randomised(DeepseekV2RMSNorm(width, eps), dtype)


@given(width=st.integers(1, 40), eps=st.sampled_from([1e-6, 1e-2]), size=st.sampled_from([1e-4, 1.0, 1e4]))
def test_the_equation(width: int, eps: float, size: float) -> None:
    norm, x = norm_of(width=width, eps=eps), tokens(2, 3, torch.float64, width=width) * size
    expected = oracle.rms_norm(x.numpy(), norm.weight.detach().numpy(), eps)
    assert_close(norm(x), torch.from_numpy(expected), "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float32_inside_and_rounding_before_the_weight(dtype: torch.dtype) -> None:
    """To the last bit: the published code rounds the normalised token to its dtype, then multiplies in that dtype."""
    norm, x = norm_of(dtype), tokens(64, 8, dtype, width=WIDTH)
    wide = x.float()
    normalised = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    assert torch.equal(norm(x), norm.weight * normalised)


def test_torch_rounds_once_and_so_differs_in_bfloat16() -> None:
    norm, x = norm_of(torch.bfloat16), tokens(64, 8, torch.bfloat16, width=WIDTH)
    once = rms_norm(x, (WIDTH,), norm.weight, 1e-6)
    apart = (norm(x) - once).abs()
    assert apart.max() > 0
    # Two roundings against one: at most one unit in the last of 8 bits further apart.
    assert (apart <= once.abs() * 2**-7).all()
    wide = x.double()
    assert_close(norm_of(torch.float64)(wide), rms_norm(wide, (WIDTH,), norm_of().weight, 1e-6), "float64")


def test_squares_beyond_float16_do_not_overflow() -> None:
    x = torch.full((1, WIDTH), 300.0, dtype=torch.float16)  # 300² is more than 65504
    assert torch.equal(DeepseekV2RMSNorm(WIDTH).half()(x), torch.ones_like(x))


@pytest.mark.parametrize(
    ("weight", "given_dtype", "result"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtype_of_the_result_is_the_wider(weight: torch.dtype, given_dtype: torch.dtype, result: torch.dtype) -> None:
    assert norm_of(weight)(tokens(1, 2, given_dtype, width=WIDTH)).dtype == result


@given(st.floats(0.01, 100), st.sampled_from([-1.0, 1.0]))
def test_the_length_of_a_token_is_lost_and_its_sign_is_not(length: float, sign: float) -> None:
    norm, x = norm_of(eps=1e-25), tokens(2, 3, torch.float64, width=WIDTH)
    assert_close(norm(x * length * sign), norm(x) * sign, "output")


def test_the_result_has_root_mean_square_one() -> None:
    x = tokens(2, 3, torch.float64, width=WIDTH)
    squares = DeepseekV2RMSNorm(WIDTH, eps=1e-25).double()(x).square().mean(-1)
    assert_close(squares, torch.ones_like(squares), "mean square")


def test_epsilon_bounds_what_a_small_token_is_multiplied_by() -> None:
    """1 / sqrt(eps) at most: 1000 for 1e-6."""
    x = tokens(1, 2, torch.float64, width=WIDTH) * 1e-12
    assert_close(
        DeepseekV2RMSNorm(WIDTH).double()(x), x * 1000, "output", roundings=1e5
    )  # x² / 2eps ≈ 1e-18 is left out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_stay_zeros_whatever_the_epsilon(dtype: torch.dtype) -> None:
    x = torch.zeros(2, WIDTH, dtype=dtype, requires_grad=True)
    out = DeepseekV2RMSNorm(WIDTH, eps=2**-84).to(dtype)(x)
    assert (out == 0).all()
    (out.float() * torch.linspace(-1, 1, WIDTH)).sum().backward()
    assert x.grad is not None
    assert not x.grad.isnan().any()  # 2**42 times what arrives is more than float16 holds


def test_each_token_is_normalised_by_itself() -> None:
    norm, x = norm_of(), tokens(2, 3, torch.float64, width=WIDTH)
    alone = torch.stack([norm(token) for token in x.flatten(0, 1)]).view_as(x)
    assert_close(norm(x), alone, "output")


def test_no_gradient_along_the_token_itself() -> None:
    """A longer token gives the same result, so that the gradient is at right angles to the token."""
    norm, x = norm_of(eps=1e-25), tokens(2, 3, torch.float64, width=WIDTH).requires_grad_()
    cotangent = tokens(2, 3, torch.float64, seed=2, width=WIDTH)
    norm(x).backward(cotangent)
    assert x.grad is not None
    along = (x.grad * x).sum(-1)
    assert_close(along + 1, torch.ones_like(along), "1 + gradient along the token")


def test_gradients_of_the_closed_form() -> None:
    """With r = rms(x) and g = w · grad: (g - x (g · x) / (D r²)) / r, and grad · x / r for the weight."""
    norm, x = norm_of(), tokens(2, 3, torch.float64, width=WIDTH).requires_grad_()
    cotangent = tokens(2, 3, torch.float64, seed=2, width=WIDTH)
    norm(x).backward(cotangent)

    def expected(x: np.ndarray, weight: np.ndarray, grad: np.ndarray) -> tuple[Tensor, Tensor]:
        r = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        g = weight * grad
        of_x = (g - x * (g * x).sum(-1, keepdims=True) / (WIDTH * r**2)) / r
        return torch.from_numpy(of_x), torch.from_numpy((grad * x / r).sum((0, 1)))

    of_x, of_weight = expected(x.detach().numpy(), norm.weight.detach().numpy(), cotangent.numpy())
    assert_close(x.grad, of_x, "gradient of the token")
    assert_close(norm.weight.grad, of_weight, "gradient of the weight")


def test_repr_says_size_and_epsilon() -> None:
    assert repr(DeepseekV2RMSNorm(8, 1e-5)) == "DeepseekV2RMSNorm(8, eps=1e-05)"
