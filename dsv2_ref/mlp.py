"""The gated feed-forward network, SwiGLU."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsv2_ref.checks import require
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.projection import projection, require_features


class DeepseekV2MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``: each hidden feature is let through as far as its gate is open.

    Args:
        config: hyperparameters.
        hidden_size: features in and out; None takes ``config.hidden_size``.
        intermediate_size: features between; None takes ``config.intermediate_size``.

    Raises:
        ValueError: for a size below 1, and for an input of other width, dtype or device than the weights.

    Source: Shazeer (2020), equation 6 (SwiGLU); ``DeepseekV2MLP`` of the published code.
    """

    def __init__(
        self, config: DeepseekV2Config, hidden_size: int | None = None, intermediate_size: int | None = None
    ) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size if hidden_size is None else hidden_size
        self.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
        require(self.hidden_size >= 1, "hidden_size", self.hidden_size, "a positive number of features")
        require(
            self.intermediate_size >= 1, "intermediate_size", self.intermediate_size, "a positive number of features"
        )
        std = config.initializer_range
        self.gate_proj = projection(self.hidden_size, self.intermediate_size, std)
        self.up_proj = projection(self.hidden_size, self.intermediate_size, std)
        self.down_proj = projection(self.intermediate_size, self.hidden_size, std)

    def forward(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Transform every token alike."""
        require_features(hidden_states, self.hidden_size, self.gate_proj.weight)
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
