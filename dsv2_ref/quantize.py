"""Weights in fewer bits: whole numbers, or eight-bit floating-point numbers, times a
scale that a group of weights shares (`dsv2_ref.quantized` holds them)."""

from collections.abc import Collection, Iterator
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dsv2_ref import checks
from dsv2_ref.mha import MultiHeadAttention
from dsv2_ref.mla import DeepseekV2Attention, is_plain_linear, offers_matrices
from dsv2_ref.moe import DeepseekV2MLP, DeepseekV2MoE, RoutedExperts
from dsv2_ref.quantized import FP8_BLOCK
from dsv2_ref.quantized_modules import (
    QuantizedExperts,
    QuantizedLinear,
    QuantizedUpProjection,
)

KINDS = ("int8", "int4", "fp8")
"""What a weight can become. ``int8`` is a whole number from -127 to 127, with a scale
per row; ``int4`` one from -7 to 7, with a scale per group; ``fp8`` a float8 (e4m3),
with a scale per 128 x 128 block, as in DeepSeek-V3's checkpoints."""

PARTS = ("attention", "experts", "mlp")
"""Where weights are quantised, in projections of attention, routed experts, and dense
and shared networks. Gates, norms, embeddings and the head keep their bits."""

Module = TypeVar("Module", bound=nn.Module)


def quantize(
    module: Module,
    weights: str = "int4",
    group: int = 64,
    parts: Collection[str] = PARTS,
) -> Module:
    """Quantise the weights of a layer, or of any module that holds some, in place.

    Each matrix is rounded by itself, to the nearest (no calibration). What is computed
    is ``forward`` of the same layer with rounded weights, in every form, with every
    cache; on CPUs `pack_weights` afterwards makes bfloat16 fast. Its `state_dict`
    has codes and scales; `load_state_dict` takes these, or weights under their
    published names, and quantises them, as ``from_pretrained(weights=...)`` does.

    Args:
        module: it is returned. On the meta device it becomes an empty quantised one.
        weights: one of `KINDS`.
        group: neighbours in a row that share a scale, for ``int4``: even, and a divisor
            of every width. 64 divides V2-Lite's dense width of 10,944, 128 does not.
        parts: which of `PARTS`.

    Raises:
        ValueError: for what is no module, another kind, group or part, a weight that is
            not finite, and a module without anything to quantise, with something
            quantised or packed already, or with an adapter or a hook on a weight: it
            would be left out in silence. Nothing has changed then.
    """
    checks.is_module(module)
    checks.quantization(weights, group, parts, PARTS, KINDS)
    places = list(weights_of(module, parts))
    checks.require(bool(places), "module", module, "one that holds a layer's weights")
    for _, name, child in places:
        checks.require(is_plain(child), name, child, checks.PLAIN_WEIGHTS)
        matrices = [weight for weight in child.parameters() if weight.ndim > 1]
        checks.quantizable(name, matrices, weights, group)
        if weights == "fp8" and isinstance(child, RoutedExperts):
            # Gates lie above ups, and no block may hold both.
            checks.expert_blocks(child.expert_hidden, FP8_BLOCK)
    for parent, name, child in places:
        if isinstance(child, RoutedExperts):
            quantised: Any = QuantizedExperts(child, weights, group)
            pairs = zip(quantised.children(), child.parameters(), strict=True)
            for weight, stack in pairs:
                for expert, matrix in enumerate(stack.detach()):
                    if not matrix.is_meta:
                        weight.fill(matrix, expert)
        elif isinstance(parent, DeepseekV2Attention) and absorbs(name, child):
            quantised = QuantizedUpProjection(parent, weights, group)
            quantised.fill(child.weight)
        else:
            quantised = QuantizedLinear(child, weights, group)
            quantised.fill(child.weight)
        setattr(parent, name, quantised.train(child.training))
    return module


def absorbs(name: str, child: nn.Module) -> bool:
    """Whether a map of latent attention is one that the absorbed form can read."""
    return name == "kv_b_proj" and offers_matrices(child)


def weights_of(
    module: nn.Module, parts: Collection[str]
) -> Iterator[tuple[nn.Module, str, Any]]:
    """Parent, name and child of every linear map and every stack of experts in these
    parts of a module, whatever it has become."""
    for parent in module.modules():
        attention = isinstance(parent, DeepseekV2Attention | MultiHeadAttention)
        part = "attention" if attention else "mlp"
        linears = attention or isinstance(parent, DeepseekV2MLP)
        for name, child in parent.named_children():
            stack = isinstance(parent, DeepseekV2MoE) and name == "experts"
            linear = linears and name.endswith(("_proj", "_mqa"))
            if (stack and "experts" in parts) or (linear and part in parts):
                yield parent, name, child


def is_plain(module: nn.Module) -> bool:
    """Whether a module does no more than its weights say."""
    if isinstance(module, RoutedExperts):
        own = type(module) is not RoutedExperts or "forward" in module.__dict__
        wrapped = any(is_traceable_wrapper_subclass(w) for w in module.parameters())
        return not own and not wrapped and not has_hooks(module)
    if not is_plain_linear(module) or "weight" not in module._parameters:
        return False
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    return bias is None or bias.shape == weight.shape[:1]


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its ``forward``."""
    forward = module._forward_pre_hooks or module._forward_hooks
    return bool(forward or module._backward_pre_hooks or module._backward_hooks)


def parts_of(module: nn.Module) -> list[str]:
    """Which of `PARTS` are quantised."""
    found = set()
    for parent in module.modules():
        for child in parent.children():
            if isinstance(child, QuantizedExperts):
                found.add("experts")
            elif isinstance(child, QuantizedLinear):
                attention = isinstance(parent, DeepseekV2Attention | MultiHeadAttention)
                found.add("attention" if attention else "mlp")
    return [part for part in PARTS if part in found]
