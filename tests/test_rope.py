"""Rotary positions against complex numbers and the papers' formulas."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv2_ref import RopeScaling
from dsv2_ref.rope import (
    inverse_frequencies,
    rotary_tables,
    rotate_half_split,
    rotate_interleaved,
    softmax_temperature,
    yarn_mscale,
)
from tests.peers import assert_close, tokens

V2_YARN = RopeScaling(type="yarn", factor=40, mscale=0.707, mscale_all_dim=0.707)
DIM, THETA = 8, 10000.0
ROTATIONS = pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_half_split])


def tables(positions: Tensor, scaling: RopeScaling | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    options = {"dtype": torch.float64} | options
    return rotary_tables(positions[None], options.pop("dim", DIM), THETA, scaling, **options)


# Frequencies


@given(st.integers(1, 32), st.sampled_from([500.0, 10000.0, 1e6]))
def test_each_pair_turns_slower_than_the_one_before(pairs: int, theta: float) -> None:
    """Su et al. (2021): θ^(-2i/d) radians a position."""
    turns = inverse_frequencies(2 * pairs, theta, dtype=torch.float64)
    expected = [theta ** (-2 * i / (2 * pairs)) for i in range(pairs)]
    assert_close(turns, torch.tensor(expected, dtype=torch.float64), "radians a step")


def test_linear_scaling_divides_positions() -> None:
    linear = RopeScaling(type="linear", factor=4.0)
    stretched = tables(torch.arange(0, 40, 4), linear)
    for actual, expected in zip(stretched, tables(torch.arange(10)), strict=True):
        assert_close(actual, expected, "table")


@pytest.mark.parametrize("kv_length", [16, 17, 64])
def test_dynamic_scaling_raises_the_base_beyond_the_trained_length(kv_length: int) -> None:
    """(s · K / L - (s - 1))^(d / (d - 2)) times θ: the slowest pair is stretched by exactly s · K / L - (s - 1)."""
    dynamic = RopeScaling(type="dynamic", factor=2.0)
    options = {"max_position_embeddings": 16, "dtype": torch.float64}
    plain = inverse_frequencies(DIM, THETA, **options)
    turns = inverse_frequencies(DIM, THETA, dynamic, kv_length=kv_length, **options)
    stretch = max(1.0, 2.0 * kv_length / 16 - 1.0)
    assert_close(plain[-1] / turns[-1], torch.tensor(stretch, dtype=torch.float64), "slowest pair")
    assert turns[0] == plain[0] == 1
    assert torch.equal(turns, plain) == (kv_length <= 16)


def test_dynamic_scaling_of_a_single_pair_has_no_base_to_raise() -> None:
    dynamic = RopeScaling(type="dynamic", factor=2.0)
    assert inverse_frequencies(2, THETA, dynamic, max_position_embeddings=16, kv_length=64).tolist() == [1.0]


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    """At V2's size: pairs that turn more than 32 times in 4096 tokens are kept, those under one turn divided by 40."""
    plain = inverse_frequencies(64, THETA, dtype=torch.float64)
    ratio = (plain / inverse_frequencies(64, THETA, V2_YARN, dtype=torch.float64)).tolist()
    turns_in_4096 = (4096 * plain / (2 * math.pi)).tolist()
    # The blend starts at the pair before 32 turns and ends at the one after a single turn.
    for pair in range(32):
        if turns_in_4096[pair] > 32:
            assert ratio[pair] == pytest.approx(1, abs=1e-12)
        if turns_in_4096[pair] < 1:
            assert ratio[pair] == pytest.approx(40, abs=1e-9)
    between = [r for r, t in zip(ratio, turns_in_4096, strict=True) if 1 < t < 32]
    assert len(between) > 5
    assert between == sorted(between)
    assert 1 < between[1] < between[-1] < 40


def test_yarn_of_factor_one_changes_nothing() -> None:
    one = RopeScaling(type="yarn", factor=1.0, mscale=0.707, mscale_all_dim=0.3)
    for actual, expected in zip(tables(torch.arange(9), one), tables(torch.arange(9)), strict=True):
        assert_close(actual, expected, "table")
    assert softmax_temperature(one) == 1.0


@pytest.mark.parametrize(("mscale", "mscale_all_dim"), [(1.0, 0.0), (0.707, 0.707), (1.0, 0.5)])
def test_yarn_scales_the_tables_by_the_ratio_of_the_two_magnitudes(mscale: float, mscale_all_dim: float) -> None:
    yarn = RopeScaling(type="yarn", factor=40, mscale=mscale, mscale_all_dim=mscale_all_dim)
    cos, sin = tables(torch.arange(5), yarn)
    magnitude = (0.1 * mscale * math.log(40) + 1) / (0.1 * mscale_all_dim * math.log(40) + 1)
    lengths = (cos.square() + sin.square()).sqrt()
    assert_close(lengths, torch.full_like(lengths, magnitude), "length of (cos, sin)")


def test_softmax_temperature_of_v2_is_the_papers() -> None:
    """DeepSeek-V2, section 3.1.4: sqrt(t) = 0.0707 ln s + 1 with s = 40."""
    assert softmax_temperature(V2_YARN) == pytest.approx((0.0707 * math.log(40) + 1) ** 2, rel=1e-15)
    assert softmax_temperature(V2_YARN) == pytest.approx(1.589626, abs=5e-7)
    assert yarn_mscale(40, 0.0) == 1.0


@pytest.mark.parametrize(
    "scaling", [None, RopeScaling(type="linear", factor=4.0), RopeScaling(type="dynamic", factor=4.0)]
)
def test_other_scalings_have_no_temperature(scaling: RopeScaling | None) -> None:
    assert softmax_temperature(scaling) == 1.0


# Tables


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tables_are_float32_whatever_the_model(dtype: torch.dtype) -> None:
    """In bfloat16 position 257 would be position 256."""
    cos, _ = tables(torch.tensor([256, 257]), dtype=dtype)
    assert cos.dtype == torch.float32
    assert cos[0, 0, 0] != cos[0, 1, 0]


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=4))
def test_any_position_can_be_asked_for(positions: list[int]) -> None:
    cos, sin = tables(torch.tensor(positions), max_position_embeddings=4)
    angles = np.outer(positions, THETA ** (-2 * np.arange(DIM // 2) / DIM))
    # An angle of 1e6 radians is known to 1e-10 in float64.
    np.testing.assert_allclose(cos[0], np.cos(angles), rtol=0, atol=1e-9)
    np.testing.assert_allclose(sin[0], np.sin(angles), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8], ids=str)
def test_positions_in_any_signed_dtype(dtype: torch.dtype) -> None:
    for actual, expected in zip(tables(torch.arange(9, dtype=dtype)), tables(torch.arange(9)), strict=True):
        assert torch.equal(actual, expected)


# Rotations


def as_complex(x: Tensor, interleaved: bool) -> Tensor:
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.complex(first.contiguous(), second.contiguous())


@ROTATIONS
def test_rotation_multiplies_pairs_by_a_complex_number(rotate: Any) -> None:
    x, positions = tokens(2, 5, torch.float64, width=DIM), torch.tensor([0, 1, 2, 50, 100])
    interleaved = rotate is rotate_interleaved
    turned = as_complex(rotate(x, *tables(positions)), interleaved)
    angles = positions[:, None] * inverse_frequencies(DIM, THETA, dtype=torch.float64)
    expected = as_complex(x, interleaved) * torch.polar(torch.ones_like(angles), angles)
    assert_close(turned.real, expected.real, "real parts")
    assert_close(turned.imag, expected.imag, "imaginary parts")


def test_the_layouts_are_the_same_up_to_the_order_of_features() -> None:
    x, table = tokens(2, 5, torch.float64, width=DIM), tables(torch.arange(5))
    order = torch.cat((torch.arange(0, DIM, 2), torch.arange(1, DIM, 2)))
    assert torch.equal(rotate_half_split(x[..., order], *table), rotate_interleaved(x, *table)[..., order])
    assert not torch.allclose(rotate_half_split(x, *table), rotate_interleaved(x, *table))


@ROTATIONS
def test_position_zero_changes_nothing_and_no_position_changes_lengths(rotate: Any) -> None:
    x = tokens(2, 5, torch.float64, width=DIM)
    turned = rotate(x, *tables(torch.tensor([0, 1, 10, 100, 1000])))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert_close(turned.norm(dim=-1), x.norm(dim=-1), "lengths")


@ROTATIONS
@given(shift=st.integers(0, 10**4), distance=st.integers(0, 10**4))
def test_scores_depend_on_the_distance_alone(rotate: Any, shift: int, distance: int) -> None:
    query, key = tokens(2, 1, torch.float64, width=DIM).split(1)

    def score(at: int, other: int) -> Tensor:
        return (rotate(query, *tables(torch.tensor([at]))) * rotate(key, *tables(torch.tensor([other])))).sum()

    # Angles of up to 2e4 radians are known to 4e-12 in float64.
    torch.testing.assert_close(score(distance + shift, shift), score(distance, 0), rtol=0, atol=1e-10)


@ROTATIONS
def test_the_dtype_of_the_features_is_kept_and_the_product_is_rounded_once(rotate: Any) -> None:
    x = tokens(2, 5, torch.bfloat16, width=DIM)
    table = tables(torch.arange(5), dtype=torch.bfloat16)
    assert torch.equal(rotate(x, *table), rotate(x.float(), *table).to(torch.bfloat16))
