"""Root-mean-square normalisation, with the rounding of the published code."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv2_ref import kernels
from dsv2_ref.checks import require, require_tensor
from dsv2_ref.kernels import ops


class DeepseekV2RMSNorm(nn.Module):
    """Divide each token by its root mean square and scale every feature: ``w * x / rms(x)``.

    ``rms(x) = sqrt(mean(x**2) + eps)`` over the last axis. The statistics are computed in float32 (float64 for a
    float64 input) and rounded to the input's dtype *before* the weight is applied, as in the published modeling code;
    ``torch.nn.functional.rms_norm`` rounds once, after the weight, and so differs in the last bit of bfloat16.

    Args:
        hidden_size: number of features D, positive.
        eps: added to the mean square, in units of the squared input; finite and at least 2**-84, so that a token of
            zeros gives zeros and not NaN, and so does its gradient, which holds eps**-1.5.

    Raises:
        ValueError: for a size or an epsilon out of range, and for an input whose last axis is not D, whose dtype is
            not floating point or that lies on another device.

    Source: Zhang and Sennrich (2019), equation 4; ``DeepseekV2RMSNorm`` of the published code.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        require(hidden_size > 0, "hidden_size", hidden_size, "a positive number of features")
        require(2**-84 <= eps < float("inf"), "eps", eps, "a finite number, at least 2**-84 (5.2e-26)")
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Normalise the last axis; the result has the dtype that weight and input promote to."""
        require_tensor(hidden_states, "hidden_states")
        require(
            hidden_states.is_floating_point()
            and hidden_states.shape[-1:] == self.weight.shape
            and hidden_states.device == self.weight.device,
            "hidden_states",
            hidden_states,
            "floating-point numbers whose last axis is {}, on {}",
            self.weight.numel(),
            self.weight.device,
        )
        if kernels.serve(hidden_states, self.weight):
            return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def after_adding(
        self, update: Float[Tensor, "*batch hidden"], residual: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"]]:
        """``residual + update`` and the norm of it; in one kernel where there is one and no hook waits for the norm."""
        alike = update.shape == residual.shape and update.shape[-1:] == self.weight.shape
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        if alike and kernels.serve(update, residual, self.weight) and not any(hooks):
            return ops.add_rms_norm(update, residual, self.weight, self.variance_epsilon)
        total = residual + update
        return total, self(total)

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return f"{self.weight.numel()}, eps={self.variance_epsilon}"
