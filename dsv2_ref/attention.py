"""Softmax attention, as it is defined.

Letters: B sequences, S queries, K keys, H heads, G key heads (each serves H / G heads),
W width of queries and keys, V width of values.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv2_ref import ops
from dsv2_ref.masks import Visibility


@ops.defines(autocast=False)
def attend(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
    *,
    implementation: str = "eager",
) -> tuple[Float[Tensor, "batch heads seq value_width"], Tensor | None]:
    """softmax(scale · query · keyᵀ) · value, and the weights (B, H, S, K).

    Scores and softmax are computed in at least float32, so that scores beyond 65504
    stay finite in float16. Ways other than this definition are chosen by
    ``implementation``, and return None for the weights, which they never hold.

    Source: Vaswani et al. (2017), equation 1; DeepSeek-V2, equation 18.
    """
    B, H, S, W = query.shape
    (G, K), wide = key.shape[1:3], torch.promote_types(query.dtype, torch.float32)
    # Heads that share a key head are rows of one product: (B, G, H / G * S, W).
    scores = query.reshape(B, G, H // G * S, W).to(wide) @ key.to(wide).mT * scale
    scores = scores.view(B, H, S, K)
    mask, sees_any = visible.block(0, S)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1).to(query.dtype)
    if sees_any is not None:
        weights = weights.where(sees_any, 0)  # not NaN where everything is masked
    if dropout:
        weights = F.dropout(weights, dropout)
    out = weights.view(B, G, H // G * S, K) @ value.to(query.dtype)
    return out.view(B, H, S, value.shape[-1]), weights
