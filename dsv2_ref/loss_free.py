"""DeepSeek-V3's balance without a loss: a bias that chooses experts, moved against the
load of each."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from dsv2_ref import checks, training_checks
from dsv2_ref.recompute import is_recomputing


def updated_bias(
    bias: Float[Tensor, "experts"], load: Shaped[Tensor, "experts"], speed: float
) -> Float[Tensor, "experts"]:
    """Expert biases after a training step: up by ``speed`` for each expert that got
    fewer than an even share of ``load``, the choices of all tokens; down for more.

    Source: Wang et al. (2024), algorithm 1; DeepSeek-V3, section 2.1.2.
    """
    training_checks.loads(bias, load, speed)
    load = load.to(bias.dtype)
    return bias + speed * (load.mean() - load).sign()


class LossFreeBalancing:
    """Balance a model by its gates' ``e_score_correction_bias``, without a loss.

    It counts what the gates choose in training, also where layers are checkpointed;
    `step`, called after each step of the optimizer, moves every bias by `updated_bias`
    and starts counting anew. After `parallelize_experts` it sums over all ranks; in
    other data parallel training, sum ``loads`` over the processes first.

    Args:
        model: any module with `MoEGate` inside, of ``topk_method`` ``noaux_tc``. A bias
            in 16 bits becomes float32, as published: 16 bits would lose small steps.
        speed: γ; DeepSeek-V3 took 0.001, and 0 for its last 500 billion tokens
            (section 4.2).

    Raises:
        ValueError: for a model without such a gate, and a speed that is negative or not
            finite.

    Source: Wang et al. (2024), algorithm 1; DeepSeek-V3, section 2.1.2.
    """

    def __init__(self, model: nn.Module, speed: float = 0.001) -> None:
        checks.is_module(model, "model")
        named = {
            name: gate
            for name, gate in model.named_modules()
            if getattr(gate, "e_score_correction_bias", None) is not None
        }
        checks.require(bool(named), "model", model, "gates with topk_method noaux_tc")
        checks.require_not_negative("speed", speed)
        self.speed, self.gates = speed, named
        self.loads = {
            name: torch.zeros_like(gate.e_score_correction_bias, dtype=torch.long)
            for name, gate in named.items()
        }
        for name, gate in named.items():
            bias = gate.e_score_correction_bias
            wide = torch.promote_types(bias.dtype, torch.float32)
            gate.e_score_correction_bias = bias.to(wide)
            gate.register_forward_hook(self._counter(self.loads[name]))

    @staticmethod
    def _counter(load: Tensor) -> Callable[[nn.Module, Any, Any], None]:
        def count(gate: nn.Module, _: Any, routed: tuple[Tensor, ...]) -> None:
            if gate.training and not is_recomputing():
                chosen = routed[0].flatten()
                load.scatter_add_(0, chosen, torch.ones_like(chosen))

        return count

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases of all gates, and count anew."""
        for name, gate in self.gates.items():
            bias, ranks = gate.e_score_correction_bias, getattr(gate, "ranks", None)
            load = self.loads[name] if ranks is None else ranks.sum(self.loads[name])
            bias.copy_(updated_bias(bias, load, self.speed))
            self.loads[name].zero_()
