"""Rotary positions: by which angle a position rotates a pair, and what a pair is."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv2_ref import ops
from dsv2_ref.config import DeepseekV2Config, RopeScaling

Tables = tuple[Float[Tensor, "#batch seq pairs"], Float[Tensor, "#batch seq pairs"]]
"""Cosines and sines of the positions of some tokens."""


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's correction of magnitudes, m(x) = 0.1 x ln s + 1, for a ``factor`` s ≥ 1.

    Source: ``yarn_get_mscale`` of the published code; DeepSeek-V2, section 3.1.4.
    """
    return 0.1 * mscale * math.log(factor) + 1.0


def softmax_temperature(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies the scores by: m(mscale_all_dim)**2, and 1 without YaRN.

    Source: the published ``softmax_scale``. With mscale_all_dim = 0.707 it is the
    paper's t, given there as sqrt(t) = 0.0707 ln s + 1 (DeepSeek-V2, section 3.1.4).
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
    """The radians by which one position rotates each of the ``dim / 2`` pairs.

    Without scaling, this is ``theta ** (-2i / dim)`` for pair i. Linear scaling divides
    all angles by the factor s. Dynamic NTK raises theta once ``kv_length`` exceeds
    ``max_position_embeddings``; it depends on the context of this call alone, so keys
    cached under a shorter context keep theirs, as published. YaRN: `yarn_frequencies`.

    Source: Su et al. (2021), equation 15; Peng et al. (2023), section 3;
    ``DeepseekV2*RotaryEmbedding`` of the published code.
    """
    exponents = torch.arange(0, dim, 2, device=device, dtype=dtype) / dim  # 2i / dim
    longer = kv_length / max_position_embeddings
    if scaling is not None and scaling.type == "dynamic" and longer > 1 and dim > 2:
        stretch = scaling.factor * longer - (scaling.factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    frequencies = 1.0 / theta**exponents
    if scaling is None or scaling.type == "dynamic":
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    return yarn_frequencies(frequencies, theta, scaling)


def yarn_frequencies(
    kept: Float[Tensor, "pairs"], theta: float, scaling: RopeScaling
) -> Float[Tensor, "pairs"]:
    """YaRN: pairs that turn more than beta_fast times over the original length keep
    their angles, those below beta_slow divide them by s, between both are blended."""
    dim = 2 * len(kept)

    def pair_that_turns(times: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    kept_below = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    divided_from = math.ceil(pair_that_turns(scaling.beta_slow))
    divided_from = min(divided_from, dim - 1)  # as published; pairs end at dim / 2 - 1
    width = divided_from - kept_below or 0.001
    pairs = torch.arange(dim // 2, device=kept.device, dtype=kept.dtype)
    divided = ((pairs - kept_below) / width).clamp(0, 1)  # 0 keeps, 1 divides
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
) -> Tables:
    """Cosine and sine of every position's angles, in at least float32.

    Any position can be asked for: there is no table to outgrow. YaRN scales both by
    m(mscale) / m(mscale_all_dim), where m is `yarn_mscale`.
    """
    dtype = torch.promote_types(dtype, torch.float32)  # bfloat16 confuses 4001 and 4002
    limits: dict[str, Any] = {
        "max_position_embeddings": max_position_embeddings,
        "kv_length": kv_length,
    }
    frequencies = inverse_frequencies(
        dim, theta, scaling, dtype=dtype, device=position_ids.device, **limits
    )
    angles = position_ids[..., None].to(dtype) * frequencies  # (B, S, dim / 2)
    magnitude = 1.0
    if scaling is not None and scaling.type == "yarn":
        magnitude = yarn_mscale(scaling.factor, scaling.mscale)
        magnitude /= yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return angles.cos() * magnitude, angles.sin() * magnitude


def position_tables(
    config: DeepseekV2Config,
    hidden_states: Float[Tensor, "batch seq hidden"],
    position_ids: Int[Tensor, "#batch seq"] | None = None,
    past_key_value: Any = None,
) -> Tables:
    """`rotary_tables` of the tokens of a call, the same for all layers of a model.

    Their positions are ``position_ids``, or where that is None the next after those
    that the cache has ``seen``.
    """
    seen = 0 if past_key_value is None else past_key_value.seen
    stop = seen + hidden_states.shape[1]
    if position_ids is None:
        position_ids = torch.arange(seen, stop, device=hidden_states.device)[None]
    whole = config.hidden_size // config.num_attention_heads
    return rotary_tables(
        position_ids,
        config.qk_rope_head_dim if config.use_mla else whole,
        float(config.rope_theta),
        config.rope_scaling,
        max_position_embeddings=config.max_position_embeddings,
        kv_length=stop,  # matters to dynamic scaling only
        dtype=hidden_states.dtype,
    )


Vectors = Float[Tensor, "*batch dim"]
Table = Float[Tensor, "*table pairs"]
"""Cosines or sines, which broadcast against the pairs of what they rotate."""


def rotate_interleaved(x: Vectors, cos: Table, sin: Table) -> Vectors:
    """Rotate the pairs (0, 1), (2, 3), …: the layout of MLA's checkpoints.

    Computed in the tables' dtype. The published code permutes the features to (0, 2, …,
    1, 3, …) and rotates (i, i + dim / 2): the same scores, and a cache permuted alike.
    """
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)  # (..., dim / 2) each
    rotated = even * cos - odd * sin, even * sin + odd * cos
    return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)


def rotate_half_split(x: Vectors, cos: Table, sin: Table) -> Vectors:
    """Rotate the pairs (i, i + dim / 2): the layout of plain multi-head attention."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # (..., dim / 2) each
    rotated = first * cos - second * sin, first * sin + second * cos
    return torch.cat(rotated, dim=-1).to(x.dtype)


@ops.defines()
def apply_rotary(
    q_pe: Float[Tensor, "batch heads seq rope"],
    k_pe: Float[Tensor, "batch seq rope"],
    cos: Float[Tensor, "#batch seq pairs"],
    sin: Float[Tensor, "#batch seq pairs"],
) -> tuple[Float[Tensor, "batch heads seq rope"], Float[Tensor, "batch seq rope"]]:
    """Rotate MLA's queries, and the key that all heads share (equations 14 and 15)."""
    rotated = rotate_interleaved(q_pe, cos[:, None], sin[:, None])
    return rotated, rotate_interleaved(k_pe, cos, sin)
