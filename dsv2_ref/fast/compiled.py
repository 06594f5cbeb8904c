"""One token through a layer in C++ (``layer.cpp``), for CPUs.

A step of decoding multiplies one row by many matrices, which costs what reading them costs, and between two products stand
operations that take longer to start than to run. `dsv2_ref.fast.packed.pack_weights` with ``compiled=True`` marks the modules
whose single tokens go this way: two operators for a layer, in place of some sixty.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dsv2_ref import ops
from dsv2_ref.cache import LatentCache
from dsv2_ref.fast.as_packed import FORWARDS, OURS, PLACES, STEPS, AsPacked, runs_forward
from dsv2_ref.fast.cpu import HALF_ON_CPU
from dsv2_ref.fast.decode import NAME, format_of
from dsv2_ref.fast.layer import attended, fed_forward, products_of_row, use_large_pages
from dsv2_ref.fast.native import is_watched, why_not_built
from dsv2_ref.layer import DeepseekV2DecoderLayer
from dsv2_ref.moe import DeepseekV2MLP, DeepseekV2MoE, MoEGate, RoutedExperts
from dsv2_ref.quantize import is_plain
from dsv2_ref.quantized import QuantizedWeight
from dsv2_ref.records import QuantizedLatentCache, Record
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from dsv2_ref.rope import position_tables


def _without_step(module: nn.Module, hidden_states: Tensor) -> str:
    made = module.__dict__.get("token_in_cpp")
    if not isinstance(made, AsPacked):
        return "not packed with compiled=True"
    if hidden_states.ndim == 0 or not 0 < hidden_states.numel() == hidden_states.shape[-1]:
        return "for one token"
    if module.training or torch.is_autocast_enabled("cpu"):
        return "for inference without torch.autocast"
    if type(hidden_states) is not Tensor or hidden_states.layout is not torch.strided or is_watched():
        return "for plain tensors, whose operations nothing watches"
    if nn.modules.module._has_any_global_hook() or not made.holds(module):
        return "a part of it has a hook, or became another"
    return why_not_built("layer.cpp")


def _feed(mlp: Any, maps: tuple[list[Tensor], list[int]], x: Tensor, residual: Tensor | None) -> Tensor:
    if isinstance(mlp, DeepseekV2MLP):
        return fed_forward(x, residual, None, None, [], 1.0, *maps)
    gate = mlp.gate
    yes_or_no = gate.scoring_func == "sigmoid", bool(gate.norm_topk_prob)
    settings = [gate.top_k, gate.n_group, gate.topk_group, *map(int, yes_or_no)]
    bias = gate.e_score_correction_bias
    bias = None if bias is None else bias.float()
    return fed_forward(x, residual, gate.weight, bias, settings, gate.routed_scaling_factor, *maps)


@ops.faster(DeepseekV2MLP.forward, "cpu compiled", why_not=_without_step, **HALF_ON_CPU)
@ops.faster(DeepseekV2MoE.forward, "cpu compiled", why_not=_without_step, **HALF_ON_CPU)
def _mlp_or_moe(mlp: Any, hidden_states: Tensor) -> Tensor:
    return _feed(mlp, mlp.token_in_cpp.of(mlp).maps(), hidden_states, None).view(*hidden_states.shape[:-1], -1)


class LinearByRow(nn.Linear):
    """A plain linear map outside of layers, such as a model's head, whose product with one row reads its weight as it lies."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(linear.__dict__)
        self.token_in_cpp = AsPacked(self)
        use_large_pages([self.weight])

    forward = ops.defines()(nn.Linear.forward)

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Whether its weight is in bfloat16, and it lies row by row."""
        in_rows = all(x.is_contiguous() for x in linear.parameters())
        return in_rows and linear.weight.dtype == torch.bfloat16


FORWARDS.add(LinearByRow.forward)


def _not_one_row(linear: nn.Linear, input: Tensor) -> str:
    return _without_step(linear, input)


@ops.faster(LinearByRow.forward, "cpu compiled", why_not=_not_one_row, **HALF_ON_CPU)
def _linear(linear: Any, input: Tensor) -> Tensor:
    return products_of_row(input, *linear.token_in_cpp.of(linear).maps()).view(*input.shape[:-1], -1)


# A whole layer


def _not_absorbed(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool | None = False,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
) -> str:
    if reason := _without_step(layer, hidden_states):
        return reason
    if past_key_value is None or attention_mask is not None or output_attentions:
        return "for one token after others, without a mask, that returns no attention weights"
    attention, past = layer.self_attn, past_key_value
    if type(past) not in (LatentCache, QuantizedLatentCache) or type(past.record) not in (type(None), Record):
        return "for caches of the package's own"
    if past.like != ((1, *attention.cache_features), hidden_states.dtype, hidden_states.device):
        return "for a cache of such tokens"
    tables = position_embeddings or ()
    if attention.training or (torch.is_grad_enabled() and any(x.requires_grad for x in (past.stored, *tables))):
        return "for inference"
    if type(attention.softmax_scale) not in (float, int):
        return "for a softmax_scale that is a number"
    if ops.is_off(NAME):
        return "attention in C++ is switched off"
    form = attention.form if attention.form != "auto" else attention.cheaper_form(1, past.length + 1)
    return "" if form == "absorbed" else "for the absorbed form"


@ops.faster(DeepseekV2DecoderLayer.forward, "cpu compiled", why_not=_not_absorbed, **HALF_ON_CPU)
def _layer(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool | None = False,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
) -> tuple[Any, ...]:
    attention, past, tables, found = layer.self_attn, past_key_value, position_embeddings, layer.token_in_cpp.of(layer)
    if tables is None:
        tables = position_tables(attention.config, hidden_states, position_ids, past)
    tables = [x.float().contiguous() for x in tables]
    present = past.extended(1)
    place = present.stored, *format_of(past, attention.kv_lora_rank)
    numbers = [*found.epsilons(), attention.softmax_scale]
    gains, *maps = found.gains_and_maps()
    hidden_states, x = attended(hidden_states, *tables, *place, *attention.up_matrices(), gains, numbers, *maps)
    hidden_states = _feed(layer.mlp, found.maps(), x, hidden_states)
    return (hidden_states, present) if use_cache else (hidden_states,)


def mark_steps(module: nn.Module) -> list[Any]:
    """Mark and return the layers, MLPs and MoE in it of which one token can run in C++: with plain bfloat16 weights, or codes
    over it, int8 or four bits that are laid out, on the CPU, that run no more than was made of them."""

    def fits(name: str, part: nn.Module) -> bool:
        place = name.rpartition(".")[2]
        if name and not isinstance(part, PLACES.get(place, ())):
            return False
        if not type(part).__module__.startswith(OURS) or not runs_forward(part):
            return False
        if isinstance(part, RoutedExperts | nn.Linear) and not (is_plain(part) or type(part) is LinearByRow):
            return False
        weights: list[Tensor] = list(part.parameters(recurse=False))
        if isinstance(part, DeepseekV2RMSNorm) and not weights:
            return False
        if isinstance(part, MoEGate):
            weights = []  # widened in any case
        elif isinstance(part, QuantizedWeight):
            weights += part.like, part.scales  # the dtype that the codes stand for, and that of the kernels' scales
        held = (*part.parameters(recurse=False), *part.buffers(recurse=False))
        kinds = Tensor, nn.Parameter
        plain = all(type(x) in kinds and x.layout is torch.strided and x.is_cpu and x.is_contiguous() for x in held)
        if isinstance(part, QuantizedWeight) and part.kind != "int8" and not part.block_rows:
            return False  # no kernel takes these codes
        return plain and all(x.dtype == torch.bfloat16 for x in weights)

    steps: list[Any] = [part for part in module.modules() if isinstance(part, STEPS)]
    for part in steps:
        part.token_in_cpp = AsPacked(part) if all(fits(*named) for named in part.named_modules()) else None
        if part.token_in_cpp and not _takes_zeros(part):
            part.token_in_cpp = None
    marked = [part for part in steps if part.token_in_cpp]
    for part in marked:
        found = part.token_in_cpp.of(part)
        use_large_pages([*found.gains_and_maps()[1], *found.maps()[0]])
    return marked


@torch.no_grad()
def _takes_zeros(part: Any) -> bool:
    """Whether the operators take what the part holds. Sizes that do not belong together are left to the usual ways."""
    features = part.gate.weight.shape[1] if isinstance(part, DeepseekV2MoE) else part.hidden_size
    token = torch.zeros(1, 1, features, dtype=torch.bfloat16, device="cpu")
    try:
        if isinstance(part, DeepseekV2DecoderLayer):
            _layer(part, token, past_key_value=part.self_attn.empty_cache(1))
        else:
            _mlp_or_moe(part, token)
    except (RuntimeError, TypeError):  # of the operators
        return False
    return True
