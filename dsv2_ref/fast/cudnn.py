"""Prompts through cuDNN on GPUs where it takes values narrower than keys, as V2's are (128 and 192 features).

torch's other fast kernels want values as wide as keys: zeros are appended to them and cut off from the output. On an H100
with 2,048 queries of V2 this way took 0.33 ms in place of 0.47.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from dsv2_ref import ops
from dsv2_ref.attention import attend
from dsv2_ref.fast.sdpa import FEW_QUERIES, attend_sdpa
from dsv2_ref.masks import Visibility


@cache
def _takes(device: torch.device | str, dtype: torch.dtype, width: int, value_width: int, grouped: bool) -> bool:
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False  # torch would choose another kernel first
    with unset_fake_temporarily():
        query, key = (
            torch.empty(1, heads, 64, width, device=device, dtype=dtype) for heads in (2, 1 if grouped else 2)
        )
        value = key.new_empty(*key.shape[:3], value_width).requires_grad_()
        return bool(can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, True, grouped)))


@ops.once_when_compiling
def takes(device: torch.device | str, dtype: torch.dtype, width: int, value_width: int, grouped: bool) -> bool:
    """Whether cuDNN multiplies by values of this width here, and may be chosen now."""
    if not torch.cuda.is_available() or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    return not torch.are_deterministic_algorithms_enabled() and _takes(device, dtype, width, value_width, grouped)


def _not_by_cudnn(
    query: Tensor, key: Tensor, value: Tensor, visible: Visibility, scale: float, dropout: float = 0.0, **_: Any
) -> str:
    (heads, seq, width), value_width = query.shape[1:], value.shape[-1]
    if width == value_width:
        return "values are as wide as keys"
    if seq <= FEW_QUERIES:
        return f"for more than {FEW_QUERIES} queries"
    if visible.attention_mask is not None or seq != visible.kv_seq or dropout:
        return "for whole prompts without a mask and dropout"
    if any(x.dtype != query.dtype or x.device != query.device for x in (key, value)):
        return "not all of one dtype on one GPU"
    device = "cuda" if query.is_meta else query.device  # as `watch` pretends
    if not takes(device, query.dtype, width, value_width, key.shape[1] != heads):
        return f"no GPU here whose cuDNN takes values of {value_width} features for keys of {width}"
    return ""


@ops.faster(
    attend,
    "cudnn",
    where={"implementation": "sdpa"},
    device="cuda",
    dtypes=(torch.float16, torch.bfloat16),
    why_not=_not_by_cudnn,
)
def attend_cudnn(
    query: Float[Tensor, "batch heads seq width"],
    key: Float[Tensor, "batch kv_heads kv_seq width"],
    value: Float[Tensor, "batch kv_heads kv_seq value_width"],
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "batch heads seq value_width"], None]:
    """`attend` of a whole prompt without zeros after the values, for which torch then chooses cuDNN."""
    return attend_sdpa(query, key, value, visible, scale, dropout, widen=False)
