"""What takes the place of a linear map or of a stack of experts once its weights are
quantised: modules over a `QuantizedWeight`.

Letters: C latent, D model, E routed experts, H heads, I expert, N unrotated part of a
head, V value head.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv2_ref import ops
from dsv2_ref.mla import DeepseekV2Attention
from dsv2_ref.moe import RoutedExperts
from dsv2_ref.quantized import QuantizedWeight, quantized_product


class Loading(nn.Module):
    """Base of what `load_state_dict` also gives weights under their published names:
    they are quantised while they are loaded."""

    def places(self) -> Iterator[tuple[str, QuantizedWeight, Any]]:
        """Every published name, and where its weight belongs."""
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *reports: Any
    ) -> None:
        missing, _, errors = reports
        wanted = [(prefix + name, held, at) for name, held, at in self.places()]
        given = [place for place in wanted if place[0] in state_dict]
        if given:
            missing += [name for name, *_ in wanted if name not in state_dict]
        for name, held, at in given:
            held.require_plain(name)
            weight = state_dict.pop(name).to(held.like.dtype)
            shape = torch.empty(held.shape, device="meta")[at].shape
            if weight.shape != shape:
                sizes = f"the checkpoint has {tuple(weight.shape)}"
                errors.append(f"size mismatch for {name}: {sizes}, not {tuple(shape)}.")
            elif not weight.is_meta and not weight.isfinite().all():
                errors.append(f"{name} is infinite or NaN in {weight.dtype} somewhere.")
            else:
                if held.codes.is_meta and metadata.get("assign_to_params_buffers"):
                    held.to_empty(device=weight.device)
                held.fill(weight.to(held.like), at)
            path = next(path for path, part in self.named_modules() if part is held)
            path = prefix + path + "." * bool(path)
            state_dict |= {path + "codes": held.codes, path + "scales": held.scales}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *reports)


class QuantizedLinear(Loading, QuantizedWeight):
    """A linear map over quantised weights. Its input gets gradients, they do not."""

    def __init__(self, linear: nn.Linear, kind: str, group: int) -> None:
        weight = linear.weight
        shape = tuple(weight.shape)
        super().__init__(kind, shape, group, weight.dtype, weight.device)
        self.out_features, self.in_features = shape
        self.bias = linear.bias

    def forward(
        self, hidden_states: Float[Tensor, "*batch inputs"]
    ) -> Float[Tensor, "*batch outputs"]:
        """``hidden_states @ weight.T + bias``."""
        out = quantized_product(hidden_states, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def places(self) -> Iterator[tuple[str, QuantizedWeight, Any]]:
        """The published name, and where its weight belongs."""
        yield "weight", self, ...


class QuantizedUpProjection(QuantizedLinear):
    """``kv_b_proj`` of latent attention, whose absorbed form reads it as W_UK and W_UV
    of every head."""

    def __init__(self, attention: DeepseekV2Attention, kind: str, group: int) -> None:
        super().__init__(attention.kv_b_proj, kind, group)
        self.heads, self.nope = attention.num_heads, attention.qk_nope_head_dim

    def matrices(self) -> tuple[Tensor, Tensor]:
        """W_UK (H, N, C) and W_UV (H, V, C)."""
        if self.kept is not None:
            return self.kept
        by_head = self.dense().view(self.heads, -1, self.in_features)
        return by_head[:, : self.nope], by_head[:, self.nope :]


class QuantizedExperts(Loading):
    """The routed experts over quantised weights; `forward` is that of `RoutedExperts`.

    Submodules: ``gate_up_proj`` (E, 2I, D), gates above ups, and ``down_proj`` (E, D,
    I), each a `QuantizedWeight`.
    """

    def __init__(self, experts: RoutedExperts, kind: str, group: int) -> None:
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(experts, name)
            shape = tuple(stack.shape)
            quantised = QuantizedWeight(kind, shape, group, stack.dtype, stack.device)
            self.add_module(name, quantised)
        self.expert_hidden = experts.expert_hidden

    gate_up_proj: QuantizedWeight
    down_proj: QuantizedWeight

    forward = ops.defines()(RoutedExperts.forward.__wrapped__)

    def places(self) -> Iterator[tuple[str, QuantizedWeight, Any]]:
        """Three for every expert."""
        wide = self.expert_hidden
        for expert in range(len(self.down_proj)):
            gate, up = (expert, slice(0, wide)), (expert, slice(wide, 2 * wide))
            yield f"{expert}.gate_proj.weight", self.gate_up_proj, gate
            yield f"{expert}.up_proj.weight", self.gate_up_proj, up
            yield f"{expert}.down_proj.weight", self.down_proj, expert


def quantized_places(module: nn.Module) -> dict[str, tuple[QuantizedWeight, Any]]:
    """Where each weight belongs that is stored as codes, by its published name."""
    found: dict[str, tuple[QuantizedWeight, Any]] = {}
    for path, child in module.named_modules():
        prefix = path + "." if path else ""
        if isinstance(child, Loading):
            found |= {prefix + name: (held, at) for name, held, at in child.places()}
    return found
