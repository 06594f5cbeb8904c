"""Root-mean-square normalisation, with the rounding of the published code."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv2_ref import checks, ops


class DeepseekV2RMSNorm(nn.Module):
    """Divide each token by its root mean square, then scale every feature: ``w * x /
    rms(x)``.

    ``rms(x) = sqrt(mean(x**2) + eps)`` over the last axis. The statistics are computed
    in float32 (float64 for a float64 input) and rounded to the input's dtype *before*
    the weight is applied, as in the published code; ``torch.nn.functional.rms_norm``
    rounds once, after the weight, and so differs in the last bit of bfloat16.

    Args:
        hidden_size: number of features D, positive.
        eps: added to the mean square, in units of the squared input; finite and at
            least 2**-84, so that a token of zeros gives zeros and not NaN, and so does
            its gradient, which holds eps**-1.5.

    Raises:
        ValueError: for a size or an epsilon out of range, and for an input whose last
            axis is not D, whose dtype is not floating point or that lies on another
            device.

    Source: Zhang and Sennrich (2019), equation 4; ``DeepseekV2RMSNorm`` of the
    published code.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        checks.norm_sizes(hidden_size, eps)
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    @ops.defines(checks.norm_input)
    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """Normalise the last axis; the result has the dtype that weight and input
        promote to."""
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return f"{self.weight.numel()}, eps={self.variance_epsilon}"
