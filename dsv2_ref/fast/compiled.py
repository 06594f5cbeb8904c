"""One token through a feed-forward part of a layer as one compiled graph, for CPUs.

A step of decoding multiplies one row by many matrices, which costs what reading them costs. torch's products read no faster
than a sum that the compiler writes, and between two of them stand operations that take longer to start than to run. In a
graph of its own the compiler also reads the chosen experts where they lie. `dsv2_ref.fast.packed.pack_weights` with
``compiled=True`` gives modules a `Step`; whoever compiles a layer gets the ways for one row as well.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2_ref import ops
from dsv2_ref.fast.cpu import HALF_ON_CPU
from dsv2_ref.mla import is_plain_linear
from dsv2_ref.moe import DeepseekV2MLP, DeepseekV2MoE, MoEGate, RoutedExperts
from dsv2_ref.quantize import is_plain
from dsv2_ref.quantized import QuantizedWeight, quantized_product
from dsv2_ref.quantized_modules import QuantizedExperts, QuantizedLinear

# Ways for one row, which only the compiler makes fast

TRACED: dict[str, Any] = HALF_ON_CPU | {"compiles": True}


def row_product(
    row: Float[Tensor, "*#stack inputs"], weight: Float[Tensor, "*stack outputs inputs"]
) -> Float[Tensor, "*stack outputs"]:
    """``weight @ row``, in float32, of any dtype with whole numbers or floats, codes too: a sum, which the compiler fuses
    with what makes the weight."""
    return (weight.float() * row.float()[..., None, :]).sum(dim=-1)


def _not_one_row(hidden_states: Tensor) -> str:
    if not torch.compiler.is_compiling():
        return "for compiled graphs"
    return "" if hidden_states.numel() == hidden_states.shape[-1] else "for one token"


def takes_rows(weight: nn.Module | None) -> bool:
    """Whether this is a plain linear map without a bias, or int8 codes. (Four bits gain nothing: the compiler writes slower
    code for them than torch's own kernel.)"""
    if isinstance(weight, QuantizedWeight):
        return weight.kind == "int8"
    return weight is not None and is_plain_linear(weight) and weight.bias is None


def _not_plain(mlp: DeepseekV2MLP, hidden_states: Tensor) -> str:
    plain = all(takes_rows(x) for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return _not_one_row(hidden_states) or ("" if plain else "for linear maps without more to them")


@ops.faster(DeepseekV2MLP.forward, "cpu row", why_not=_not_plain, **TRACED)
def _mlp_row(mlp: DeepseekV2MLP, hidden_states: Tensor) -> Tensor:
    def product(linear: Any, x: Tensor) -> Tensor:
        return linear(x) if isinstance(linear, QuantizedWeight) else row_product(x, linear.weight).to(x.dtype)

    return product(mlp.down_proj, F.silu(product(mlp.gate_proj, hidden_states)) * product(mlp.up_proj, hidden_states))


def chosen_product(
    rows: Float[Tensor, "#choices inputs"], weight: Any, chosen: Int[Tensor, "choices"]
) -> Float[Tensor, "choices outputs"]:
    """The product of a row, or of one for each choice, with the matrices of the chosen experts, of a stack or of int8
    codes."""
    if not isinstance(weight, QuantizedWeight):
        return row_product(rows, weight[chosen]).to(rows.dtype)
    return (row_product(rows, weight.codes[chosen]) * weight.scales[chosen][..., 0]).to(rows.dtype)


def _not_one_choice(experts: Any, hidden_states: Tensor, *_: Any) -> str:
    quantised = isinstance(experts, QuantizedExperts)
    fits = not quantised or (takes_rows(experts.gate_up_proj) and takes_rows(experts.down_proj))
    return _not_one_row(hidden_states) or ("" if fits else "for int8")


@ops.faster(QuantizedExperts.forward, "cpu row", why_not=_not_one_choice, **TRACED)
@ops.faster(RoutedExperts.forward, "cpu row", why_not=_not_one_choice, **TRACED)
def _experts_row(experts: Any, hidden_states: Tensor, topk_idx: Tensor, topk_weight: Tensor) -> Tensor:
    chosen = topk_idx[0]
    gate, up = chosen_product(hidden_states, experts.gate_up_proj, chosen).chunk(2, dim=-1)
    out = chosen_product(F.silu(gate) * up, experts.down_proj, chosen)
    return (out * topk_weight[0, :, None]).sum(dim=0, keepdim=True).to(hidden_states.dtype)


def _not_one_product(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> str:
    fits = takes_rows(weight) and place is ...
    return _not_one_row(rows) or ("" if fits else "for int8")


@ops.faster(quantized_product, "cpu row", why_not=_not_one_product, **TRACED)
def _quantized_row(rows: Tensor, weight: QuantizedWeight, place: Any = ...) -> Tensor:
    return (row_product(rows, weight.codes) * weight.scales[:, 0]).to(rows.dtype)


# The compiled step


def _may_change(guards: Any) -> list[bool]:
    """Which of the compiler's guards are asked at every token: for what the modules hold, and for torch's state, but not
    for this package's code."""
    return [not guard.is_global and "__closure__" not in guard.name for guard in guards]


GUARDS: dict[str, Any] = {"guard_filter_fn": _may_change}


class Step:
    """Compiles what modules do to one token, at the first token. Modules that share a `Step` share graphs; a copy compiles
    its own."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, definition: Any, module: nn.Module, hidden_states: Tensor) -> Tensor:
        """``definition(module, hidden_states)``."""
        if definition not in self._compiled:
            plain = definition.__wrapped__
            code = plain.__code__.replace()  # the compiler counts the graphs of a code, and stops at the eighth
            own = types.FunctionType(code, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
            self._compiled[definition] = torch.compile(own, dynamic=False, options=GUARDS)
        return self._compiled[definition](module, hidden_states)

    def __reduce__(self) -> Any:
        return Step, ()


def _without_step(module: nn.Module, hidden_states: Tensor) -> str:
    if not hasattr(module, "step"):
        return "not packed with compiled=True"
    if hidden_states.numel() != hidden_states.shape[-1]:
        return "for one token"
    if module.training or torch.is_autocast_enabled("cpu"):
        return "for inference without torch.autocast"
    if type(hidden_states) is not Tensor:
        return "for plain tensors"
    return "" if runs_as_made(module) else "a part of it has a hook, or became another"


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KNOWN: tuple[Any, ...] = (DeepseekV2MLP, DeepseekV2MoE, MoEGate, RoutedExperts, QuantizedExperts, QuantizedLinear)
FORWARDS = {kind.forward for kind in (*KNOWN, QuantizedWeight, nn.Linear)}


def runs_as_made(module: nn.Module) -> bool:
    """Whether no part runs more than the ``forward`` of a known class, over weights that are no codes but int8. The compiler
    has no guards for hooks."""
    own = module.__dict__
    if "forward" in own or type(module).forward not in FORWARDS or any(own[hooks] for hooks in HOOKS):
        return False
    parts = (part for part in own["_modules"].values() if part is not None)
    return own.get("kind", "int8") == "int8" and all(runs_as_made(part) for part in parts)


@ops.faster(DeepseekV2MLP.forward, "cpu compiled", why_not=_without_step, **HALF_ON_CPU)
def _mlp_step(mlp: Any, hidden_states: Tensor) -> Tensor:
    return mlp.step(DeepseekV2MLP.forward, mlp, hidden_states)


@ops.faster(DeepseekV2MoE.forward, "cpu compiled", why_not=_without_step, **HALF_ON_CPU)
def _moe_step(moe: Any, hidden_states: Tensor) -> Tensor:
    return moe.step(DeepseekV2MoE.forward, moe, hidden_states)


def steps_of(module: nn.Module) -> list[Any]:
    """The MLPs and MoE in it of which the compiler makes one graph for one token: with plain bfloat16 weights or int8 codes,
    on the CPU, that do no more than multiply."""

    def fits(part: nn.Module) -> bool:
        if isinstance(part, RoutedExperts | nn.Linear) and not is_plain(part):
            return False
        weights: list[Tensor] = list(part.parameters(recurse=False))
        if isinstance(part, MoEGate):
            weights = []  # widened in any case
        elif isinstance(part, QuantizedWeight):
            weights.append(part.like)  # of the dtype that the codes stand for
        return all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in weights)

    found = (part for part in module.modules() if isinstance(part, DeepseekV2MLP | DeepseekV2MoE))
    return [part for part in found if runs_as_made(part) and all(fits(x) for x in part.modules())]


def find_compiler() -> None:
    """Raise RuntimeError where torch finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "compiled is True; wanted a C++ compiler that torch can call, such as g++, for it"
        ) from error
