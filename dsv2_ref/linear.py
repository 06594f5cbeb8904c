"""Linear maps as the published models initialise them."""

import torch
from torch import nn


def linear(inputs: int, outputs: int, std: float, bias: bool = False) -> nn.Linear:
    """A linear map with weights from a normal distribution of standard deviation
    ``std``, and a bias of zeros."""
    # On meta, torch's own initialisation, which would be overwritten, costs nothing.
    module = nn.Linear(inputs, outputs, bias=bias, device="meta")
    module.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(std=std))
    if bias:
        module.bias = nn.Parameter(torch.zeros(outputs))
    return module
