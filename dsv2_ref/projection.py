"""Linear maps as the published models initialise them, and the inputs they accept."""

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dsv2_ref.checks import require, require_tensor


def projection(inputs: int, outputs: int, std: float, bias: bool = False) -> nn.Linear:
    """A linear map with weights drawn from a normal distribution of deviation ``std``, and a bias of zeros."""
    linear = skip_init(nn.Linear, inputs, outputs, bias=bias, device=torch.get_default_device())
    nn.init.normal_(linear.weight, std=std)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def require_features(hidden_states: Tensor, width: int, weight: Tensor) -> None:
    """Refuse an input without tokens, of another width, or that ``weight`` cannot meet in dtype or device.

    Autocast decides the dtypes where it is on.
    """
    require_tensor(hidden_states, "hidden_states")
    require(
        hidden_states.shape[-1:] == (width,)
        and hidden_states.numel() > 0
        and (hidden_states.dtype == weight.dtype or torch.is_autocast_enabled(hidden_states.device.type))
        and hidden_states.device == weight.device,
        "hidden_states",
        hidden_states,
        "at least one token of {} features, {} on {}, as the weights",
        width,
        weight.dtype,
        weight.device,
    )
