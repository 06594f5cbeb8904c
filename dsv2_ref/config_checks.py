"""The door of configurations, beside `dsv2_ref.checks`: from what no layer can be built. Importing this module does not
import torch either."""

import math
from dataclasses import fields
from typing import TYPE_CHECKING

from dsv2_ref import checks
from dsv2_ref.checks import is_number, require, require_each, require_ints

if TYPE_CHECKING:
    from dsv2_ref.config import DeepseekV2Config, RopeScaling

SCORES = ("softmax", "sigmoid")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


def _require_numbers(
    holder: object, names: tuple[str, ...], least: float, below: float = math.inf, above: bool = False
) -> None:
    wanted = f"a finite number, {'above' if above else 'at least'} {least:g}"
    wanted += f", below {below:g}" if below < math.inf else ""
    least = math.nextafter(least, math.inf) if above else least
    require_each(holder, names, lambda x: is_number(x) and least <= x < below, wanted)


def rope_scaling(scaling: "RopeScaling") -> None:
    """Reject a stretch of rotary positions that cannot be computed."""
    kind, slow = scaling.type, scaling.beta_slow
    require(kind in ("linear", "dynamic", "yarn"), "rope_scaling.type", kind, "linear, dynamic or yarn")
    _require_numbers(scaling, ("factor",), 1)
    require_ints(scaling, ("original_max_position_embeddings",), 1)
    _require_numbers(scaling, ("beta_slow", "mscale", "mscale_all_dim"), 0)
    _require_numbers(scaling, ("beta_fast",), slow)
    require(0 < slow <= scaling.beta_fast, "beta_slow", slow, "above 0, and at most beta_fast")
    for field in fields(scaling)[2:] if kind != "yarn" else ():
        value = getattr(scaling, field.name)
        require(value == field.default, field.name, value, f"nothing: {kind} scaling has no such setting")


def configuration(config: "DeepseekV2Config") -> None:
    """Reject a configuration from which no layer can be built."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    require_ints(config, (*sizes, "max_position_embeddings", "moe_layer_freq"), 1)
    require_ints(config, ("first_k_dense_replace",), 0)
    optional = ("num_key_value_heads", "n_shared_experts", "n_routed_experts", "q_lora_rank")
    require_ints(config, optional, 1, optional=True)
    alphas = ("aux_loss_alpha", "device_aux_loss_alpha", "communication_aux_loss_alpha")
    _require_numbers(config, ("routed_scaling_factor", "initializer_range", *alphas), 0)
    _require_numbers(config, ("attention_dropout",), 0, below=1)
    _require_numbers(config, ("rms_norm_eps",), checks.SMALLEST_EPS)
    _require_numbers(config, ("rope_theta",), 1, above=True)
    flags = ("norm_topk_prob", "seq_aux", "tie_word_embeddings", "attention_bias", "use_mla")
    require_each(config, flags, lambda flag: isinstance(flag, bool), "True or False")
    require_each(config, ("hidden_act",), lambda act: act == "silu", "silu, as in every published model")
    require_each(
        config,
        ("_attn_implementation",),
        lambda name: name in checks.IMPLEMENTATIONS,
        ", ".join(checks.IMPLEMENTATIONS),
    )
    require_each(config, ("mla_form",), lambda form: form in checks.MLA_FORMS, ", ".join(checks.MLA_FORMS))
    if config.use_mla:
        _latent_heads(config)
    else:
        _plain_heads(config)
    if config.n_routed_experts is not None:
        _experts(config, config.n_routed_experts)


def _latent_heads(config: "DeepseekV2Config") -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    require(kv_heads in (None, heads), "num_key_value_heads", kv_heads, f"{heads} or None: MLA has no KV heads")
    require_ints(config, ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim"), 1)
    require(config.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", config.qk_rope_head_dim, "an even number")


def _plain_heads(config: "DeepseekV2Config") -> None:
    heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    wanted = f"a multiple of twice num_attention_heads={heads}, for heads that rotate in pairs"
    require(hidden % (2 * heads) == 0, "hidden_size", hidden, wanted)
    require(kv_heads is None or heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of {heads}")


def _experts(config: "DeepseekV2Config", experts: int) -> None:
    grouped = config.topk_method != "greedy"
    require_ints(config, ("moe_intermediate_size", "num_experts_per_tok"), 1)
    require_each(config, ("scoring_func",), lambda name: name in SCORES, " or ".join(SCORES))
    require_each(config, ("topk_method",), lambda name: name in TOPK_METHODS, ", ".join(TOPK_METHODS))
    wanted = "0 with greedy, which has no groups that could be devices"
    alphas = ("device_aux_loss_alpha", "communication_aux_loss_alpha")
    require_each(config, alphas, lambda alpha: grouped or alpha == 0, wanted)
    allowed, wanted = experts, f"at most n_routed_experts={experts}"
    if grouped:
        require_ints(config, ("n_group", "topk_group"), 1)
        groups, kept = config.n_group, config.topk_group
        require(experts % groups == 0, "n_group", groups, f"a divisor of n_routed_experts={experts}")
        require(kept <= groups, "topk_group", kept, f"at most n_group={groups}")
        judged = config.topk_method == "noaux_tc" and kept < groups
        require(
            not judged or 2 * groups <= experts, "n_group", groups, "two experts in a group, whose two best judge it"
        )
        allowed = kept * experts // groups
        wanted = f"at most {allowed}, the experts in topk_group={kept} of n_group={groups} groups"
    require(config.num_experts_per_tok <= allowed, "num_experts_per_tok", config.num_experts_per_tok, wanted)
