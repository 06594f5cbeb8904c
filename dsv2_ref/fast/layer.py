"""The operators of torch in ``layer.cpp``, which take one token through the parts of a layer. A linear map comes as the tensors
of it and three numbers, see `as_parts`.
"""

from typing import Any

from torch import Tensor

from dsv2_ref.fast.native import in_cpp
from dsv2_ref.quantized import QuantizedWeight


@in_cpp("layer.cpp")
def use_large_pages(tensors: list[Tensor]) -> int:  # type: ignore[empty-body]
    """Move what tensors hold to pages of 2 MB, where Linux gives such. Returns how many bytes lie in them then."""


@in_cpp("layer.cpp")
def products_of_row(x: Tensor, parts: list[Tensor], layout: list[int]) -> Tensor:  # type: ignore[empty-body]
    """What a linear map makes of a token: (1, outputs)."""


@in_cpp("layer.cpp", writes=("keys",))
def attended(  # type: ignore[empty-body]
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    format: int,
    tile: int,
    w_uk: Tensor,
    w_uv: Tensor,
    norms: list[Tensor],
    numbers: list[float],
    parts: list[Tensor],
    layout: list[int],
) -> tuple[Tensor, Tensor]:
    """The token after attention in the absorbed form, and its RMSNorm: (1, 1, hidden) each. What is cached of it is written
    to the last of ``keys``.

    Args:
        keys, format, tile: as for `dsv2_ref.fast.decode.attend_to_keys`. norms: weights of the layer's two norms, of that of
            latents, between these, and of that of queries, if they are compressed. numbers: the epsilon of each, and the scale
            of the softmax. parts, layout: of the maps that make the query (if it is compressed, its latent), what is cached,
            then the query of its latent, and the output.
    """


@in_cpp("layer.cpp")
def fed_forward(  # type: ignore[empty-body]
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    settings: list[int],
    factor: float,
    parts: list[Tensor],
    layout: list[int],
) -> Tensor:
    """The experts that a gate chooses for a token, weighted, plus an MLP, plus what it is added to, where there are such:
    (1, 1, hidden).

    Args:
        gate, bias: weight and ``e_score_correction_bias`` of a `MoEGate` in float32. settings: its top_k, n_group and
            topk_group, whether scores are sigmoids, and whether weights are divided by their sum. factor: by which they are
            multiplied. parts, layout: of gate_up_proj and down_proj of the experts; gate_proj, up_proj, down_proj of the MLP.
    """


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
