"""The operators of torch in ``layer.cpp``, which take one token through the parts of a layer. A linear map comes as the tensors
of it and three numbers, see `as_parts`.
"""

from typing import Any

from torch import Tensor

from dsv2_ref.fast.native import in_cpp
from dsv2_ref.quantized import QuantizedWeight


@in_cpp("layer.cpp")
def normalised_products(  # type: ignore[empty-body]
    x: Tensor, norm: Tensor | None, eps: float, parts: list[Tensor], layout: list[int]
) -> Tensor:
    """What linear maps make of a token's RMSNorm (None: of the token), side by side: (1, outputs of all)."""


@in_cpp("layer.cpp")
def absorbed(  # type: ignore[empty-body]
    query: Tensor,
    compressed: Tensor,
    norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    w_uk: Tensor,
    format: int,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """What `DeepseekV2Attention.forward` makes of projections: the absorbed query of every head (1, heads, 1, latent + rope),
    and what is cached of the token (1, 1, latent + rope), or its record (1, 1, bytes)."""


@in_cpp("layer.cpp")
def attended(  # type: ignore[empty-body]
    residual: Tensor, mixed: Tensor, w_uv: Tensor, parts: list[Tensor], layout: list[int], norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The token after attention, from the mixed latents of every head, and its RMSNorm: (1, 1, hidden) each."""


@in_cpp("layer.cpp")
def fed_forward(  # type: ignore[empty-body]
    x: Tensor,
    residual: Tensor | None,
    chosen: Tensor | None,
    weights: Tensor | None,
    parts: list[Tensor],
    layout: list[int],
) -> Tensor:
    """The chosen experts of a token, weighted, plus an MLP, plus what it is added to, where there are such: (1, 1, hidden)."""


def as_parts(*linear: Any) -> tuple[list[Tensor], list[int]]:
    """The tensors of linear maps, or of stacks of them, each with its scales and bias, if it has them; and for each map the
    inputs that share a scale (-1: there are no scales; 0: all), how many of its rows a block has, and whether it has a bias."""
    parts: list[Tensor] = []
    layout: list[int] = []
    for one in linear:
        bias = getattr(one, "bias", None)
        if not isinstance(one, QuantizedWeight):
            parts.append(one if isinstance(one, Tensor) else one.weight)
            layout += -1, 0, bias is not None
        elif one.kind == "int8":
            parts += one.codes, one.scales
            layout += 0, 0, bias is not None
        else:
            parts += one.codes, one.scales_and_zeros
            layout += one.group, one.block_rows, bias is not None
        if bias is not None:
            parts.append(bias)
    return parts, layout
