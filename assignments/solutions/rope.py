"""Rotary positions: solution."""

import math

import torch


def mscale(factor, scale):
    return 0.1 * scale * math.log(factor) + 1.0


def softmax_temperature(scaling):
    if scaling is None:
        return 1.0
    return mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def yarn(kept, theta, scaling):
    dim = 2 * len(kept)

    def pair_that_turns(times):
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    pairs = torch.arange(len(kept), dtype=kept.dtype)
    divided = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return kept * (1 - divided) + kept / scaling.factor * divided


def rotary_tables(position_ids, dim, theta, scaling=None, dtype=torch.float32):
    exponents = torch.arange(0, dim, 2, dtype=dtype) / dim
    frequencies = theta**-exponents
    size = 1.0
    if scaling is not None:
        frequencies = yarn(frequencies, theta, scaling)
        size = mscale(scaling.factor, scaling.mscale)
        size = size / mscale(scaling.factor, scaling.mscale_all_dim)
    angles = position_ids[..., None].to(dtype) * frequencies
    return angles.cos() * size, angles.sin() * size


def rotate(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return pairs.flatten(-2)


def apply_rotary(q_pe, k_pe, cos, sin):
    return rotate(q_pe, cos[:, None], sin[:, None]), rotate(k_pe, cos, sin)
