"""Weights laid out for the CPU's matrix kernels: a layer for inference that reads them twice
as fast in bfloat16.

oneDNN multiplies matrices from blocks, into which it rearranges a plain matrix at every
product. With thousands of tokens that hardly shows; with one it takes as long as the product.
`pack_weights` rearranges once.
"""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2_ref.checks import require
from dsv2_ref.fast.cpu import has_bfloat16
from dsv2_ref.fast.products import combine, sort_by_expert
from dsv2_ref.mla import DeepseekV2Attention, is_plain_linear, offers_matrices
from dsv2_ref.moe import RoutedExperts


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)


def _product(rows: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    gradients = torch.is_grad_enabled() and rows.requires_grad
    wanted = "no gradients: packed weights give none, use torch.no_grad()"
    require(not gradients, "hidden_states", rows, wanted)
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


class _Packed(nn.Module):
    """Base of the packed modules: their state dict holds the weights as they were, and they
    are copied and pickled, but they load no others."""

    def dense(self) -> dict[str, Tensor]:
        """The weights by the names that they had."""
        raise NotImplementedError

    def repack(self, dense: dict[str, Tensor]) -> None:
        """Pack the weights that `dense` gave."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: weight for name, weight in self.dense().items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        wanted = "wanted a layer to load into: load first, then pack"
        raise RuntimeError(f"{prefix[:-1]} holds packed weights; {wanted}")

    def __getstate__(self) -> dict[str, Any]:
        packed = ("weight", "matrices", "gate_up_proj", "down_proj")  # cannot be copied
        kept = {name: x for name, x in self.__dict__.items() if name not in packed}
        return kept | {"_dense": self.dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dense = state.pop("_dense")
        super().__setstate__(state)
        self.repack(dense)


class PackedLinear(_Packed):
    """A linear map over a packed weight, for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.repack({"weight": linear.weight})

    def forward(self, hidden_states: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """``hidden_states @ weight.T + bias``."""
        return _product(hidden_states, self.weight, self.bias)

    def dense(self) -> dict[str, Tensor]:
        """The weight, and the bias if there is one."""
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"weight": self.weight.to_dense()} | bias

    def repack(self, dense: dict[str, Tensor]) -> None:
        """Pack the weight."""
        self.weight = _pack(dense["weight"])


class PackedUpProjection(PackedLinear):
    """``kv_b_proj`` of latent attention: packed for the expanded form, and as the matrices
    W_UK and W_UV of every head for the absorbed one."""

    def __init__(self, attention: DeepseekV2Attention) -> None:
        self.heads, self.nope = attention.num_heads, attention.qk_nope_head_dim
        super().__init__(attention.kv_b_proj)

    def repack(self, dense: dict[str, Tensor]) -> None:
        """Pack the weight, and part it by heads; W_UV so that it need not be transposed."""
        super().repack(dense)
        by_head = dense["weight"].detach().view(self.heads, -1, self.in_features)
        w_uk, w_uv = by_head[:, : self.nope], by_head[:, self.nope :]
        self.matrices = w_uk.contiguous(), w_uv.mT.contiguous().mT


class PackedExperts(_Packed):
    """The routed experts over packed weights, for inference; only those of chosen experts are
    read."""

    def __init__(self, experts: RoutedExperts) -> None:
        super().__init__()
        self.number = len(experts.down_proj)
        self.repack({name: weight.detach() for name, weight in experts.published()})

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        topk_idx: Int[Tensor, "tokens top_k"],
        topk_weight: Float[Tensor, "tokens top_k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """Σ weight · expert(token) over each token's choices."""
        order, group_ends, places = sort_by_expert(topk_idx, self.number)
        rows = hidden_states[order // topk_idx.shape[1]]
        ends, out = group_ends.tolist(), []
        groups = zip(self.gate_up_proj, self.down_proj, [0, *ends], ends, strict=False)
        for gate_up, down, start, end in groups:
            if end > start:
                gate, up = _product(rows[start:end], gate_up).chunk(2, dim=-1)
                out.append(_product(F.silu(gate) * up, down))
        return combine(torch.cat(out), places, topk_weight).to(hidden_states.dtype)

    def dense(self) -> dict[str, Tensor]:
        """The weights of all experts by their published names."""
        named: dict[str, Tensor] = {}
        for expert in range(self.number):
            gate, up = self.gate_up_proj[expert].to_dense().chunk(2)
            down = self.down_proj[expert].to_dense()
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
            named |= {f"{expert}.{name}.weight": weight for name, weight in parts.items()}
        return named

    def repack(self, dense: dict[str, Tensor]) -> None:
        """Pack every expert's weights, gates above ups."""
        gate_up, down = [], []
        for expert in range(self.number):
            names = (f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight")
            gate_up.append(_pack(torch.cat([dense[name] for name in names])))
            down.append(_pack(dense[f"{expert}.down_proj.weight"]))
        self.gate_up_proj, self.down_proj = gate_up, down


Module = TypeVar("Module", bound=nn.Module)


def pack_weights(module: Module) -> Module:
    """Pack the linear maps and experts of a layer, or of any module that holds some, in place;
    for inference only.

    Everything else stays as it is: forms, kernels and caches of attention, and the names and
    values of `state_dict`. Weights take as much memory as before, ``kv_b_proj`` twice as much.
    There is no way to unpack but to build a layer and load the state dict. What is more than a
    plain linear map or the package's own experts (an adapter, a wrapper, hooks, a
    parametrization, a quantised map) is left as it is and keeps its effect.

    Args:
        module: in bfloat16, or float32, which gains little, on the CPU.

    Returns:
        The module given.

    Raises:
        ValueError: for weights of another dtype or device, before anything is packed.
        RuntimeError: for bfloat16 where the processor has no instructions for it that oneDNN
            can use.
    """
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if _is_plain(child)
    ]
    for _, name, child in places:
        for weight in child.parameters():
            fits = weight.dtype in (torch.bfloat16, torch.float32)
            fits = fits and weight.device.type == "cpu"
            require(fits, f"the weight of {name}", weight, "bfloat16 or float32 on cpu")
            if weight.dtype == torch.bfloat16 and not has_bfloat16():
                needed = "a processor with bfloat16 instructions that oneDNN can use (AVX-512)"
                raise RuntimeError(f"pack_weights needs {needed}")
    for parent, name, child in places:
        if isinstance(child, RoutedExperts):
            packed: nn.Module = PackedExperts(child)
        elif isinstance(parent, DeepseekV2Attention) and name == "kv_b_proj" and offers_matrices(child):
            packed = PackedUpProjection(parent)
        else:
            assert isinstance(child, nn.Linear)
            packed = PackedLinear(child)
        setattr(parent, name, packed)
    return module


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, RoutedExperts):
        hooks = module._forward_hooks or module._forward_pre_hooks
        return type(module) is RoutedExperts and not hooks and "forward" not in module.__dict__
    return is_plain_linear(module) and "weight" in module._parameters
