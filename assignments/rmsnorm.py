"""Assignment 1: RMSNorm. The page rmsnorm.md says what is wanted.

python -m dsv2_ref grade rmsnorm rmsnorm.py
"""

import torch
from torch import nn


class DeepseekV2RMSNorm(nn.Module):
    """Divide each token by its root mean square, then multiply by a weight.

    Parameter: weight (hidden_size).
    """

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states):
        """hidden_states: (..., hidden_size); the result has its shape and dtype."""
        raise NotImplementedError("RMSNorm's forward: start with the mean of the squares")
