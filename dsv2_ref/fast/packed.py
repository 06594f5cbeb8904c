"""Weights laid out for the CPU's matrix kernels: a layer for inference that need not rearrange them.

oneDNN multiplies matrices from blocks, into which it rearranges a plain matrix at every product. With thousands of
tokens that hardly shows; with one it takes longer than reading the matrix does. `pack_weights` rearranges once. How
much of a step that saves depends on the processor: ``python -m bench.bits`` times packed and plain weights.
"""

from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2_ref.checks import is_module, require
from dsv2_ref.fast.as_packed import STEPS
from dsv2_ref.fast.compiled import LinearByRow, mark_steps
from dsv2_ref.fast.native import find_compiler, why_not_built
from dsv2_ref.fast.processor import has_bfloat16
from dsv2_ref.fast.quantized import can_lay_out, chosen_experts, lay_out_codes
from dsv2_ref.mla import DeepseekV2Attention, offers_matrices
from dsv2_ref.moe import MoEGate, RoutedExperts
from dsv2_ref.quantize import is_plain
from dsv2_ref.quantized import QuantizedWeight
from dsv2_ref.quantized_modules import QuantizedUpProjection


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)


def _product(rows: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    # torch's operator has no rule for tangents: it would drop them in silence.
    derived = (torch.is_grad_enabled() and rows.requires_grad) or torch.autograd.forward_ad._current_level >= 0
    require(not derived, "hidden_states", rows, "no derivatives: packed weights give none, use torch.no_grad()")
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


PACKED = ("weight", "absorbed", "gate_up_proj", "down_proj")
"""Attributes that hold packed weights, which cannot be copied."""


class _Packed(nn.Module):
    """Base of the packed modules: their state dict holds the weights as they were, and they are copied and pickled, but
    they load no others, and stay in their dtype on the CPU."""

    def _dense(self) -> dict[str, Tensor]:
        """The weights by the names that they had."""
        raise NotImplementedError

    def _repack(self, dense: dict[str, Tensor]) -> None:
        """Pack the weights that `_dense` gave."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: weight for name, weight in self._dense().items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _refuse_to_load(self, state_dict, prefix)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        own = self.__dict__
        held = own["weight"] if "weight" in own else own["down_proj"][0]
        like = torch.empty(0, dtype=held.dtype)
        moved = fn(like)  # what `to` and its like would make of the weights
        if (moved.dtype, moved.device) != (like.dtype, like.device):
            given = f"packed weights would become {moved.dtype} on {moved.device}"
            raise RuntimeError(f"{given}; wanted {like.dtype} on cpu, as they are: convert first, then pack")
        return super()._apply(fn, recurse)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PACKED and name in self.__dict__:  # not at first: in `_repack`
            raise RuntimeError(f"{name} is packed; wanted no other in its place: change the weights first, then pack")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name not in PACKED} | {"dense": self._dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dense = state.pop("dense")
        super().__setstate__(state)
        self._repack(dense)


def _refuse_to_load(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    """Raise RuntimeError where there are packed weights, before anything beside them is loaded."""
    for name, child in module.named_modules(prefix=prefix[:-1]):
        if isinstance(child, _Packed):
            raise RuntimeError(f"{name} holds packed weights; wanted a layer to load into: load first, then pack")
        if isinstance(child, QuantizedWeight):
            child.require_plain(name)


class PackedLinear(_Packed):
    """A linear map over a packed weight, for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach().contiguous()  # oneDNN heeds no strides
        self._repack({"weight": linear.weight})

    def forward(self, hidden_states: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """``hidden_states @ weight.T + bias``."""
        return _product(hidden_states, self.weight, self.bias)

    def _dense(self) -> dict[str, Tensor]:
        return {"weight": self.weight.to_dense()} | ({} if self.bias is None else {"bias": self.bias})

    def _repack(self, dense: dict[str, Tensor]) -> None:
        self.weight = _pack(dense["weight"])


class PackedUpProjection(PackedLinear):
    """``kv_b_proj`` of latent attention: packed for the expanded form, and as the matrices W_UK and W_UV of every head
    for the absorbed one."""

    def __init__(self, attention: DeepseekV2Attention) -> None:
        self.heads, self.nope = attention.num_heads, attention.qk_nope_head_dim
        super().__init__(attention.kv_b_proj)

    def _repack(self, dense: dict[str, Tensor]) -> None:
        super()._repack(dense)
        by_head = dense["weight"].detach().view(self.heads, -1, self.in_features)
        w_uk, w_uv = by_head[:, : self.nope], by_head[:, self.nope :]
        self.absorbed = w_uk.contiguous(), w_uv.mT.contiguous().mT  # W_UV so that it need not be transposed

    def matrices(self) -> tuple[Tensor, Tensor]:
        """W_UK (H, N, C) and W_UV (H, V, C)."""
        return self.absorbed


class PackedExperts(_Packed):
    """The routed experts over packed weights, for inference; only those of chosen experts are read."""

    def __init__(self, experts: RoutedExperts) -> None:
        super().__init__()
        self.number = len(experts.down_proj)
        self._repack(dict(experts.published()))

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        topk_idx: Int[Tensor, "tokens top_k"],
        topk_weight: Float[Tensor, "tokens top_k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """Σ weight · expert(token) over each token's choices."""
        alone = not torch._C._functorch.is_functorch_wrapped_tensor(topk_idx)  # the choice will be read
        require(
            alone, "hidden_states", hidden_states, "none that a transform of torch.func holds: packed experts take none"
        )

        def product(rows: Tensor, expert: int, down: bool) -> Tensor:
            return _product(rows, (self.down_proj if down else self.gate_up_proj)[expert])

        return chosen_experts(product, self.number, hidden_states, topk_idx, topk_weight)

    def _dense(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for expert in range(self.number):
            gate, up = self.gate_up_proj[expert].to_dense().chunk(2)
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": self.down_proj[expert].to_dense()}
            named |= {f"{expert}.{name}.weight": weight for name, weight in parts.items()}
        return named

    def _repack(self, dense: dict[str, Tensor]) -> None:
        def packed(expert: int, *names: str) -> Tensor:
            return _pack(torch.cat([dense[f"{expert}.{name}.weight"] for name in names]))

        self.gate_up_proj = [packed(expert, "gate_proj", "up_proj") for expert in range(self.number)]
        self.down_proj = [packed(expert, "down_proj") for expert in range(self.number)]


class PackedGate(MoEGate):
    """The gate with its weight in float32, in which it is multiplied: widening it takes longer than the product. It is
    saved as it was."""

    def __init__(self, gate: MoEGate, wide: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(gate.__dict__)
        self.like = torch.empty(0, dtype=gate.weight.dtype)  # as it is saved
        self._parameters = {"weight": wide}

    @staticmethod
    def widened(gate: MoEGate) -> nn.Parameter:
        """The weight in float32."""
        return nn.Parameter(gate.weight.detach().float(), requires_grad=gate.weight.requires_grad)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.like = fn(self.like)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].to(self.like.dtype)


def _is_plain_gate(module: nn.Module | None) -> bool:
    if type(module) is not MoEGate or "forward" in module.__dict__ or module._parameters.keys() != {"weight"}:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


Module = TypeVar("Module", bound=nn.Module)


def pack_weights(module: Module, compiled: bool = False) -> Module:
    """Pack the linear maps and experts of a layer, or of any module that holds some, in place; for inference only.

    Everything else stays as it is: forms, kernels and caches of attention, and the names and values of `state_dict`.
    Weights take as much memory as before, ``kv_b_proj`` and a gate in bfloat16 twice as much. There is no way to unpack
    but to build a layer and load the state dict. What is more than a plain linear map or the package's own experts (an
    adapter, a wrapper, hooks, a parametrization, a map that others quantised) is left as it is and keeps its effect.

    Weights that `dsv2_ref.quantize.quantize` made are packed, too, where torch has a kernel for their codes; then
    ``kv_b_proj`` keeps a copy for the absorbed form: in the module's dtype, or in float32 where it is bfloat16 and the
    processor has no instructions for it.

    Args:
        module: on the CPU, in bfloat16, or float32, which gains little; it is returned.
        compiled: leave the weights of layers in bfloat16, or in codes over it, as they lie, and take each single token through
            them, and through linear maps outside of attention, in C++ (`dsv2_ref.fast.compiled`). The fastest way to decode
            one sequence; it needs a C++ compiler and Python's headers, and some 20 seconds, once on a machine. Calls with more
            tokens, sequences or a mask take the usual ways, over weights that are not rearranged, and so does what has hooks.
            On Linux the weights move to large pages; processes that share them should be forked after that.

    Raises:
        ValueError: for what is no module, weights of another dtype or device, and ``compiled`` where some are packed
            already, before anything is packed.
        RuntimeError: for bfloat16 where the processor has no instructions for it that oneDNN can use, unless ``compiled``;
            and for ``compiled`` without a C++ compiler or Python's headers.
    """
    is_module(module)
    if compiled:
        find_compiler()
        if reason := why_not_built("layer.cpp"):
            raise RuntimeError(f"compiled is True; {reason}")
        for name, part in module.named_modules():
            again = isinstance(part, PackedLinear | PackedExperts)
            require(not again, f"compiled is True, and {name or 'the module'}", part, "weights that are not packed yet")
    children = [(parent, *named) for parent in module.modules() for named in parent.named_children()]
    named = [
        (parent, *named) for parent in module.modules() for named in parent._modules.items()
    ]  # one may be twice there
    gates: list[Any] = [place for place in named if _is_plain_gate(place[2])]
    places = [(parent, name, child) for parent, name, child in children if is_plain(child)]
    quantised = [child for child in module.modules() if isinstance(child, QuantizedWeight)]
    if (quantised or compiled) and not has_bfloat16():  # the others stay as they are
        places = [place for place in places if next(place[2].parameters()).dtype != torch.bfloat16]
    for _, name, child in places:
        for weight in child.parameters():
            fits = weight.dtype in (torch.bfloat16, torch.float32) and weight.device.type == "cpu"
            require(fits, f"the weight of {name}", weight, "bfloat16 or float32 on cpu")
            if weight.dtype == torch.bfloat16 and not has_bfloat16():
                needed = "a processor with bfloat16 instructions that oneDNN can use (AVX-512)"
                raise RuntimeError(f"pack_weights needs {needed}")
    for held in quantised:
        held.codes, held.scales = held.codes.contiguous(), held.scales.contiguous()
        if isinstance(held, QuantizedUpProjection):
            w_uk, w_uv = held.matrices()
            if w_uk.dtype == torch.bfloat16 and not has_bfloat16():  # else torch multiplies one number at a time
                w_uk, w_uv = w_uk.float(), w_uv.float()
            held.kept = w_uk.contiguous(), w_uv.mT.contiguous().mT
        if can_lay_out(held):
            lay_out_codes(held)
    wide = {gate.weight: PackedGate.widened(gate) for _, _, gate in gates}  # one for what several share
    made = {gate: PackedGate(gate, wide[gate.weight]) for _, _, gate in gates}
    for parent, name, gate in gates:
        setattr(parent, name, made[gate])
    whole = {child for part in mark_steps(module) for child in part.modules()} if compiled else set()
    if not compiled:
        steps: list[Any] = [part for part in module.modules() if isinstance(part, STEPS)]
        for step in steps:
            step.token_in_cpp = None
    for parent, name, child in places:
        if child in whole:
            continue
        if isinstance(child, RoutedExperts):
            packed: nn.Module = PackedExperts(child)
        elif isinstance(parent, DeepseekV2Attention) and name == "kv_b_proj" and offers_matrices(child):
            packed = PackedUpProjection(parent)
        else:
            assert isinstance(child, nn.Linear)
            by_row = compiled and not isinstance(parent, DeepseekV2Attention) and LinearByRow.fits(child)
            packed = LinearByRow(child) if by_row else PackedLinear(child)
        setattr(parent, name, packed)
    module.register_load_state_dict_pre_hook(_refuse_to_load)
    return module
