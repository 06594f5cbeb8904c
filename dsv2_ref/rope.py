"""Rotary positions: which angle a position turns each pair of features by, and which features form a pair."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv2_ref import kernels
from dsv2_ref.config import RopeScaling
from dsv2_ref.kernels import ops


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's magnitude correction m(x) = 0.1 x ln s + 1 for a stretch ``factor`` s of at least 1.

    Source: ``yarn_get_mscale`` of the published code; DeepSeek-V2, section 3.1.4.
    """
    return 0.1 * mscale * math.log(factor) + 1.0


def softmax_temperature(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies the attention scores by: m(mscale_all_dim)**2, and 1 without YaRN.

    Source: the published attention's ``softmax_scale``. With mscale_all_dim = 0.707 it is the paper's t, given there
    as sqrt(t) = 0.0707 ln s + 1 (DeepSeek-V2, section 3.1.4).
    """
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def inverse_frequencies(
    dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    *,
    max_position_embeddings: int = 2048,
    kv_length: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "pairs"]:
    """Radians a step of one position turns each of the ``dim / 2`` pairs by.

    Without scaling, pair i turns by ``theta ** (-2i / dim)``. Linear scaling divides all by the factor s. Dynamic NTK
    raises theta once ``kv_length`` exceeds ``max_position_embeddings``: it depends on the context of this call alone,
    so that keys cached under a shorter context keep the angles they were given, as in the published code. YaRN
    keeps pairs that turn more than beta_fast times over the original length, divides by s those that turn less than
    beta_slow times, and blends between.

    Source: Su et al. (2021), equation 15; Peng et al. (2023), section 3; ``DeepseekV2*RotaryEmbedding`` of the
    published code.
    """
    exponents = torch.arange(0, dim, 2, device=device, dtype=dtype) / dim
    if scaling is None:
        return 1.0 / theta**exponents
    if scaling.type == "linear":
        return 1.0 / theta**exponents / scaling.factor
    if scaling.type == "dynamic":
        if kv_length > max_position_embeddings and dim > 2:
            stretch = scaling.factor * kv_length / max_position_embeddings - (scaling.factor - 1)
            theta = theta * stretch ** (dim / (dim - 2))
        return 1.0 / theta**exponents

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    kept_below = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    divided_from = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    width = divided_from - kept_below or 0.001
    pairs = torch.arange(dim // 2, device=device, dtype=dtype)
    divided = ((pairs - kept_below) / width).clamp(0, 1)
    kept = 1.0 / theta**exponents
    return kept / scaling.factor * divided + kept * (1 - divided)


def rotary_tables(
    position_ids: Int[Tensor, "batch seq"],
    dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    *,
    max_position_embeddings: int = 2048,
    kv_length: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "batch seq pairs"], Float[Tensor, "batch seq pairs"]]:
    """Cosine and sine of every position's angles, in at least float32 whatever the model's ``dtype``.

    Any position can be asked for: there is no table to outgrow. YaRN scales both by m(mscale) / m(mscale_all_dim).
    """
    dtype = torch.promote_types(dtype, torch.float32)
    turns = inverse_frequencies(
        dim,
        theta,
        scaling,
        max_position_embeddings=max_position_embeddings,
        kv_length=kv_length,
        device=position_ids.device,
        dtype=dtype,
    )
    angles = position_ids[..., None].to(dtype) * turns
    magnitude = 1.0
    if scaling is not None and scaling.type == "yarn":
        magnitude = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate_interleaved(
    x: Float[Tensor, "*batch dim"], cos: Float[Tensor, "*table pairs"], sin: Float[Tensor, "*table pairs"]
) -> Float[Tensor, "*batch dim"]:
    """Turn the pairs (0, 1), (2, 3), …: the layout of MLA's checkpoints. Computed in the tables' dtype, then cast back.

    ``cos`` and ``sin`` broadcast against the pairs of ``x``. The published code permutes the features to (0, 2, …, 1,
    3, …) and turns halves instead, which gives the same scores and a cache permuted alike.
    """
    if x.ndim <= 4 and cos.dtype == torch.float32 and kernels.serve(x) and kernels.serve(cos, sin):
        return ops.rotate(x, cos, sin)
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rotate_half_split(
    x: Float[Tensor, "*batch dim"], cos: Float[Tensor, "*table pairs"], sin: Float[Tensor, "*table pairs"]
) -> Float[Tensor, "*batch dim"]:
    """Turn the pairs (i, i + dim / 2): the layout of the checkpoints with plain multi-head attention."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)
