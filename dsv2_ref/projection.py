"""Linear maps as the published models initialise them, and the inputs they accept."""

import torch
from torch import Tensor, nn

from dsv2_ref.checks import require, require_tensor


def projection(inputs: int, outputs: int, std: float, bias: bool = False) -> nn.Linear:
    """A linear map with weights drawn from a normal distribution of deviation ``std``, and a bias of zeros."""
    linear = nn.Linear(inputs, outputs, bias=bias, device="meta")  # where its own initialisation costs nothing
    linear.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(std=std))
    if bias:
        linear.bias = nn.Parameter(torch.zeros(outputs))
    return linear


def autocast_is_on(device: torch.device) -> bool:
    """Whether ``torch.autocast`` is on for a device; the meta device has none, and torch cannot be asked about it."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def require_features(hidden_states: Tensor, width: int, weight: Tensor) -> None:
    """Refuse an input without tokens, of another width, or that ``weight`` cannot meet in dtype or device.

    Autocast decides the dtypes where it is on.
    """
    require_tensor(hidden_states, "hidden_states")
    require(
        hidden_states.shape[-1:] == (width,)
        and hidden_states.numel() > 0
        and (hidden_states.dtype == weight.dtype or autocast_is_on(hidden_states.device))
        and hidden_states.device == weight.device,
        "hidden_states",
        hidden_states,
        "at least one token of {} features, {} on {}, as the weights",
        width,
        weight.dtype,
        weight.device,
    )
