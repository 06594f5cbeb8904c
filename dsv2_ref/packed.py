"""Weights laid out for the CPU's matrix kernels: a layer for inference that reads them twice as fast.

oneDNN multiplies half-precision numbers from blocks, into which it rearranges a plain matrix at every product. With
thousands of tokens that hardly shows; with one it takes as long as the product. `pack_weights` rearranges once.
"""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2_ref.attention import DeepseekV2Attention
from dsv2_ref.checks import require
from dsv2_ref.experts import RoutedExperts, dispatch_by_group


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)


def _product(rows: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    wants_gradients = torch.is_grad_enabled() and rows.requires_grad
    require(not wants_gradients, "hidden_states", rows, "no gradients: packed weights give none, use torch.no_grad()")
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


class _Packed(nn.Module):
    """Base of the packed modules: they give their weights back, but take no others."""

    def _dense(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: weight for name, weight in self._dense().items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        raise RuntimeError(f"{prefix[:-1]} holds packed weights; wanted a layer to load into: load first, then pack")


class PackedLinear(_Packed):
    """A linear map over a packed weight, for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = _pack(linear.weight)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, hidden_states: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """``hidden_states @ weight.T + bias``."""
        return _product(hidden_states, self.weight, self.bias)

    def _dense(self) -> dict[str, Tensor]:
        return {"weight": self.weight.to_dense()} | ({} if self.bias is None else {"bias": self.bias})


class PackedUpProjection(PackedLinear):
    """``kv_b_proj`` of latent attention: packed for the expanded form, and as W_UK and W_UV for the absorbed one."""

    def __init__(self, attention: DeepseekV2Attention) -> None:
        super().__init__(attention.kv_b_proj)
        w_uk, w_uv = attention.up_matrices()
        self.matrices = w_uk.detach().contiguous(), w_uv.detach().mT.contiguous().mT


class PackedExperts(_Packed):
    """The routed experts over packed weights, for inference; only those of chosen experts are read."""

    def __init__(self, experts: RoutedExperts) -> None:
        super().__init__()
        self.gate_up_proj = [_pack(weight) for weight in experts.gate_up_proj]
        self.down_proj = [_pack(weight) for weight in experts.down_proj]

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        topk_idx: Int[Tensor, "tokens top_k"],
        topk_weight: Float[Tensor, "tokens top_k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """Σ weight · expert(token) over each token's choices."""

        def run(rows: Tensor, group_ends: Tensor) -> Tensor:
            ends, out = group_ends.tolist(), []
            for gate_up, down, start, end in zip(self.gate_up_proj, self.down_proj, [0, *ends], ends, strict=False):
                if end > start:
                    gate, up = _product(rows[start:end], gate_up).chunk(2, dim=-1)
                    out.append(_product(F.silu(gate) * up, down))
            return torch.cat(out)

        return dispatch_by_group(hidden_states, topk_idx, topk_weight, len(self.down_proj), run)

    def _dense(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            gate, up = gate_up.to_dense().chunk(2)
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": down.to_dense()}
            named |= {f"{expert}.{name}.weight": weight for name, weight in parts.items()}
        return named


Module = TypeVar("Module", bound=nn.Module)


def pack_weights(module: Module) -> Module:
    """Pack the linear maps and experts of a layer, or of any module that holds some, in place; for inference only.

    Everything else stays as it is: forms, kernels and caches of attention, and the names and values of `state_dict`.
    Weights take the room they took, ``kv_b_proj`` twice that. There is no way back but to build a layer and load the
    state dict.

    Args:
        module: in bfloat16, on the CPU.

    Returns:
        The module given.

    Raises:
        ValueError: for weights of another dtype or device, before anything is packed.
        RuntimeError: where the processor has no bfloat16 instructions that oneDNN can use.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise RuntimeError("pack_weights needs a processor with bfloat16 instructions that oneDNN can use (AVX-512)")
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear | RoutedExperts)
    ]
    for _, name, child in places:
        for weight in child.parameters():
            fits = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
            require(fits, f"the weight of {name}", weight, "bfloat16 on cpu")
    for parent, name, child in places:
        setattr(parent, name, _packed(parent, name, child))
    return module


def _packed(parent: nn.Module, name: str, child: nn.Module) -> nn.Module:
    if isinstance(child, RoutedExperts):
        return PackedExperts(child)
    if isinstance(parent, DeepseekV2Attention) and name == "kv_b_proj":
        return PackedUpProjection(parent)
    assert isinstance(child, nn.Linear)
    return PackedLinear(child)
