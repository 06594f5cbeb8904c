"""transformers' own `deepseek_v2` and `deepseek_v3` with the weights of our modules, and what counts as equal between the two."""

import itertools
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as native
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config as NativeConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native_v3
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as NativeV3Config

from dsv2_ref import DeepseekV2Config
from dsv2_ref.moe import RoutedExperts

Module = TypeVar("Module", bound=nn.Module)

# No two sizes are alike, so that an axis mixed up with another cannot go unseen.
SMALL = DeepseekV2Config(
    vocab_size=64, hidden_size=48, intermediate_size=40, moe_intermediate_size=20, num_hidden_layers=2,
    num_attention_heads=4, q_lora_rank=28, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10,
    n_routed_experts=12, n_shared_experts=3, num_experts_per_tok=2, max_position_embeddings=4096 * 40,
)  # fmt: skip

# Of the 4 rotating pairs YaRN keeps two, blends the third and divides the last by the factor.
YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}

V3_GATE = replace(
    SMALL, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, n_group=4, topk_group=2,
    num_experts_per_tok=4, routed_scaling_factor=2.5,
)  # fmt: skip

# The configurations in which transformers does what the published code does.
COMMON: Mapping[str, DeepseekV2Config] = {
    "plain": SMALL,
    "no_q_lora": replace(SMALL, q_lora_rank=None),
    "yarn": replace(SMALL, rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "yarn_unequal_mscales": replace(SMALL, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "linear": replace(SMALL, rope_scaling={"type": "linear", "factor": 4.0}),
    "bias": replace(SMALL, attention_bias=True),
    # More experts than groups a token: the best k of all would always lie in the best k groups.
    "group_limited": replace(
        SMALL,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        routed_scaling_factor=2.5,
    ),
    "everything": replace(
        SMALL,
        attention_bias=True,
        rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        topk_method="group_limited_greedy",
        n_group=3,
        topk_group=1,
        num_experts_per_tok=3,
        routed_scaling_factor=16.0,
        rms_norm_eps=1e-2,
    ),
    "v3": V3_GATE,
    "v3_one_group": replace(V3_GATE, n_group=1, topk_group=1, q_lora_rank=None, rms_norm_eps=1e-5),
    "v3_not_normalised": replace(V3_GATE, norm_topk_prob=False),
    "v3_yarn": replace(V3_GATE, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, attention_bias=True),
}


@dataclass(frozen=True)
class Native:
    """transformers' classes for a generation of the model."""

    config: Any
    norm: Any
    mlp: Any
    gate: Any
    moe: Any
    attention: Any
    layer: Any
    model: Any
    causal_lm: Any
    rotary: Any


V2 = Native(
    NativeConfig,
    native.DeepseekV2RMSNorm,
    native.DeepseekV2MLP,
    native.DeepseekV2TopkRouter,
    native.DeepseekV2Moe,
    native.DeepseekV2Attention,
    native.DeepseekV2DecoderLayer,
    native.DeepseekV2Model,
    native.DeepseekV2ForCausalLM,
    native.DeepseekV2RotaryEmbedding,
)
V3 = Native(
    NativeV3Config,
    native_v3.DeepseekV3RMSNorm,
    native_v3.DeepseekV3MLP,
    native_v3.DeepseekV3TopkRouter,
    native_v3.DeepseekV3MoE,
    native_v3.DeepseekV3Attention,
    native_v3.DeepseekV3DecoderLayer,
    native_v3.DeepseekV3Model,
    native_v3.DeepseekV3ForCausalLM,
    native_v3.DeepseekV3RotaryEmbedding,
)


def native_of(config: DeepseekV2Config) -> Native:
    """The generation that has this configuration's gate."""
    return V3 if config.topk_method == "noaux_tc" else V2


NATIVE_FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_shared_experts",
    "n_routed_experts",
    "routed_scaling_factor",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "v_head_dim",
    "qk_nope_head_dim",
    "topk_method",
    "n_group",
    "topk_group",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
]


@dataclass(frozen=True)
class Calls:
    """A batch of sequences handed to a module in pieces, each with what came before in the cache.

    ``padding`` tokens of each sequence, on the left, are not real. Real tokens are ``stride`` positions apart: far
    enough, where it is not 1, for the slowest rotary pairs to turn.
    """

    lengths: tuple[int, ...]
    padding: tuple[int, ...] = (0, 0)
    stride: int = 1

    @property
    def real(self) -> Tensor:
        return torch.arange(sum(self.lengths)) >= torch.tensor(self.padding)[:, None]

    @property
    def position_ids(self) -> Tensor:
        return (self.real.cumsum(1) - 1).clamp(min=0) * self.stride

    @property
    def pieces(self) -> list[slice]:
        ends = itertools.accumulate(self.lengths, initial=0)
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


CALLS: Mapping[str, Calls] = {
    "prefill": Calls((11,)),
    "prefill_then_decode": Calls((6, 3, 1, 1)),
    "left_padding": Calls((7, 2, 1, 1), padding=(3, 0, 5), stride=97),
}


@dataclass
class Ran:
    """What all calls gave together: outputs, and attention weights of the last call where the module returns them."""

    output: Tensor
    latent: Tensor
    rotated_key: Tensor
    weights: Tensor | None = None


def run_ours(module: nn.Module, hidden_states: Tensor, calls: Calls, with_weights: bool = False) -> Ran:
    """Masks and positions are left out where they say nothing, so that the defaults are tested too."""
    outputs, present, weights = [], None, []
    padded = any(calls.padding)
    for piece in calls.pieces:
        output, *weights, present = module(
            hidden_states[:, piece],
            attention_mask=calls.real[:, : piece.stop] if padded else None,
            position_ids=calls.position_ids[:, piece] if padded or calls.stride > 1 else None,
            past_key_value=present,
            output_attentions=with_weights,
            use_cache=True,
        )
        outputs.append(output)
    assert present is not None
    cached = present.split(getattr(module, "self_attn", module).kv_lora_rank)
    return Ran(torch.cat(outputs, 1), *cached, weights=weights[0] if weights else None)


class Float64Inside(TorchFunctionMode):
    """Read every float32 in transformers' code as float64, which lifts the casts that it makes whatever the input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def inside(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Where transformers' code computes throughout in ``dtype`` or, for a narrower one, as it is written."""
    return Float64Inside() if dtype == torch.float64 else nullcontext()


def run_theirs(module: nn.Module, hidden_states: Tensor, calls: Calls) -> Ran:
    config: Any = module.config if hasattr(module, "config") else module.self_attn.config
    generation = V3 if isinstance(config, NativeV3Config) else V2
    outputs, weights, cache = [], None, DynamicCache(config=config)
    lowest = torch.finfo(hidden_states.dtype).min
    with inside(hidden_states.dtype):
        rotary = generation.rotary(config)
        for piece in calls.pieces:
            places = torch.arange(piece.stop)
            keep = (places <= places[piece, None]) & calls.real[:, None, : piece.stop]
            result = module(
                hidden_states[:, piece],
                attention_mask=hidden_states.new_zeros(keep.shape).masked_fill(~keep, lowest)[:, None],
                position_embeddings=rotary(hidden_states, calls.position_ids[:, piece]),
                past_key_values=cache,
            )
            output, weights = result if isinstance(result, tuple) else (result, None)
            outputs.append(output)
    cached = cache.layers[getattr(module, "self_attn", module).layer_idx]
    rotated = cached.values[:, 0]
    if generation is V3:  # which rotates neighbours, as V2 does, and puts the first of each pair before the second
        rotated = rotated.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return Ran(torch.cat(outputs, 1), cached.keys[:, 0], rotated, weights)


def native_config(config: DeepseekV2Config) -> Any:
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = asdict(config.rope_scaling)
        rope = {"rope_type": scaling.pop("type"), "factor": scaling.pop("factor")}
        rope |= scaling if rope["rope_type"] == "yarn" else {}
    kind = native_of(config).config
    return kind(
        **{name: getattr(config, name) for name in NATIVE_FIELDS},
        **({"norm_topk_prob": config.norm_topk_prob} if kind is NativeV3Config else {}),
        num_key_value_heads=config.num_attention_heads,
        rope_parameters={**rope, "rope_theta": config.rope_theta},
        attn_implementation=config._attn_implementation,
        experts_implementation="eager",
    )


def native_weights(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names and weights turned into transformers' own, which stack the experts."""
    weights: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, weight in published.items():
        if expert := re.fullmatch(r"(.*)\b(\d+)\.(gate|up|down)_proj\.weight", name):
            stacks.setdefault(expert[1], {}).setdefault(int(expert[2]), {})[expert[3]] = weight
        else:
            weights[name] = weight
    for prefix, experts in stacks.items():
        ordered = [experts[index] for index in range(len(experts))]
        weights[f"{prefix}gate_up_proj"] = torch.stack([torch.cat((e["gate"], e["up"])) for e in ordered])
        weights[f"{prefix}down_proj"] = torch.stack([e["down"] for e in ordered])
    return weights


def with_weights_of(ours: nn.Module, theirs: Module) -> Module:
    """``theirs`` in the dtype of ``ours``, loaded through the published names of our `state_dict`."""
    theirs.to(next(ours.parameters()).dtype).load_state_dict(native_weights(ours.state_dict()), strict=True)
    return theirs.eval()


def randomised(module: Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> Module:
    """The module in eval with weights by which every part counts: the published 0.02 leaves attention all but uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter.copy_(noise / 4 + (1 if name.endswith("weight") else 0))
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("e_score_correction_bias"):  # about as far apart as the scores of a token
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64) / 4)
    return module.to(dtype).eval()


def experts_with(gate_up_proj: Tensor, down_proj: Tensor) -> RoutedExperts:
    """Routed experts that hold copies of these weights, (E, 2I, D) and (E, D, I)."""
    number, hidden, width = down_proj.shape
    config = replace(
        SMALL, hidden_size=hidden, moe_intermediate_size=width, n_routed_experts=number, num_experts_per_tok=1
    )
    experts = RoutedExperts(config)
    experts.gate_up_proj = nn.Parameter(gate_up_proj.detach().clone())
    experts.down_proj = nn.Parameter(down_proj.detach().clone())
    return experts


def tokens(batch: int, seq: int, dtype: torch.dtype, seed: int = 1, width: int = SMALL.hidden_size) -> Tensor:
    """Random numbers, the same in every dtype but for their rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq, width, generator=generator, dtype=torch.float64).to(dtype)


ROUNDINGS = 40
"""How far two results may be apart, in roundings of the largest entry (`assert_close`).

Both sides compute the same sums of at most 200 terms, a dozen of them one after the other, in another order. Their
roundings add up like a random walk, to ten at most where this was measured; four times that leaves room for other
processors. The smallest fault planted in `test_faults` moves the output by 0.8 %, which is 60,000 roundings in float32.
"""


def assert_close(actual: Tensor, expected: Tensor, what: str, roundings: float = ROUNDINGS) -> None:
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} against {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    actual, expected = actual.detach(), expected.detach()
    unit = torch.finfo(expected.dtype).eps * float(expected.abs().max())
    apart = float((actual - expected).abs().max())
    assert apart <= roundings * unit, f"{what}: {apart / unit if unit else apart:.3g} roundings apart"


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, roundings: float = ROUNDINGS) -> None:
    """Parameters have the same names on both sides, as both stack the experts; every one must have been reached."""
    expected = dict(theirs.named_parameters())
    actual = dict(ours.named_parameters())
    assert actual.keys() == expected.keys()
    for name, parameter in expected.items():
        assert actual[name].grad is not None, f"no gradient for {name}"
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, f"{name} has no effect"
        assert_close(actual[name].grad, parameter.grad, f"gradient of {name}", roundings)
