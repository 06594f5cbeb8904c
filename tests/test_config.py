"""The configuration: presets as published, what is read from a config.json, and what is refused."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, RopeScaling
from dsv2_ref.checks import describe
from tests.published_configs import TOTALS, configs

# What the config.json of each model says of its layers.
PUBLISHED: Mapping[str, dict[str, Any]] = {
    "deepseek_v2": configs()["v2"],
    "deepseek_v2_lite": configs()["v2_lite"],
    "deepseek_ocr": configs()["ocr"],
    "deepseek_v3": configs()["v3"],
    "moonlight": configs()["moonlight"],
}
V2, V3, OCR = PUBLISHED["deepseek_v2"], PUBLISHED["deepseek_v3"], PUBLISHED["deepseek_ocr"]
YARN = V2["rope_scaling"]


def preset(name: str) -> DeepseekV2Config:
    return getattr(DeepseekV2Config, name)()


# Presets


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_configurations(name: str) -> None:
    expected = PUBLISHED[name].get("language_config", PUBLISHED[name])
    config = preset(name)
    fields = {f.name for f in dataclasses.fields(config)}
    said = {key: value for key, value in expected.items() if key in fields}
    actual = {key: getattr(config, key) for key in said} | {"num_key_value_heads": config.num_attention_heads}
    if config.rope_scaling is not None:
        actual["rope_scaling"] = dataclasses.asdict(config.rope_scaling)
    assert actual == said


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_equal_what_is_read_from_the_published_file(name: str) -> None:
    heads_said = replace(preset(name), num_key_value_heads=preset(name).num_attention_heads)
    assert DeepseekV2Config.from_published(PUBLISHED[name]) == heads_said


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_add_up_to_the_parameters_of_the_model(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        sizes = {
            moe: sum(p.numel() for p in DeepseekV2DecoderLayer(config, layer_idx).parameters())
            for moe, layer_idx in ((False, 0), (True, config.first_k_dense_replace))
        }
    layers = sum(sizes[config.is_moe_layer(layer_idx)] for layer_idx in range(config.num_hidden_layers))
    embedding_and_head = 2 * config.vocab_size * config.hidden_size
    final_norm = config.hidden_size
    assert (
        layers + embedding_and_head + final_norm
        == TOTALS[{"deepseek_ocr": "ocr"}.get(name, name.removeprefix("deepseek_"))]
    )


def test_defaults_are_the_worked_example() -> None:
    config = DeepseekV2Config()
    assert config == DeepseekV2Config.card()
    assert (config.hidden_size, config.intermediate_size, config.moe_intermediate_size) == (1280, 3584, 1408)
    assert (config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank) == (128, 1536, 512)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (128, 64, 128)
    assert (config.n_routed_experts, config.n_shared_experts, config.num_experts_per_tok) == (160, 2, 2)
    assert [config.is_moe_layer(i) for i in range(40)] == [False] + 39 * [True]
    assert config._attn_implementation == "sdpa"


def test_the_tiny_preset_has_every_part_of_the_worked_example() -> None:
    tiny, card = DeepseekV2Config.tiny(), DeepseekV2Config.card()
    for field in dataclasses.fields(card):
        small, large = getattr(tiny, field.name), getattr(card, field.name)
        assert type(small) is type(large)
        if isinstance(large, int) and not isinstance(large, bool):
            assert 0 < small <= large


# Reading


@pytest.mark.parametrize("as_text", [False, True], ids=["Path", "str"])
def test_reading_a_file(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V2))
    config = DeepseekV2Config.from_published(str(path) if as_text else path)
    assert config == DeepseekV2Config.from_published(V2)


def test_reading_changes_nothing_in_what_is_read() -> None:
    before = json.dumps(OCR)
    DeepseekV2Config.from_published(OCR)
    assert json.dumps(OCR) == before


def test_keys_left_out_take_the_published_defaults() -> None:
    """``configuration_deepseek.py`` of DeepSeek-V2: not the defaults of this package, which are the worked example's."""
    config = DeepseekV2Config.from_published({"model_type": "deepseek_v2"})
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (102400, 4096, 11008)
    assert (config.num_hidden_layers, config.num_attention_heads) == (30, 32)
    assert (config.moe_intermediate_size, config.n_routed_experts, config.n_shared_experts) == (1407, None, None)
    assert (config.q_lora_rank, config.kv_lora_rank) == (1536, 512)
    assert (config.first_k_dense_replace, config.max_position_embeddings) == (0, 2048)
    assert not any(config.is_moe_layer(i) for i in range(30))


def test_keys_that_no_layer_reads_are_ignored() -> None:
    assert DeepseekV2Config.from_published(V2 | {"auto_map": {}, "pretraining_tp": 1}) == (
        DeepseekV2Config.from_published(V2)
    )


@pytest.mark.parametrize(
    ("parameters", "theta", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, 5e5, None),
        ({"rope_type": "default"}, 10000, None),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, 5e5, RopeScaling(type="linear", factor=2.0)),
        ({**YARN, "rope_type": "yarn", "rope_theta": 5e5}, 5e5, RopeScaling(**YARN)),
    ],
)
def test_the_newer_rope_parameters(parameters: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    """transformers 5 writes them in place of ``rope_theta`` and ``rope_scaling``."""
    published = {key: value for key, value in V2.items() if key not in ("rope_theta", "rope_scaling")}
    config = DeepseekV2Config.from_published(published | {"rope_parameters": parameters})
    assert config.rope_theta == theta
    assert config.rope_scaling == scaling


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "the configuration is a list of 1; wanted a JSON object"),
        ("null", "the configuration is None; wanted a JSON object"),
        ("7", "the configuration is 7; wanted a JSON object"),
        ('{"language_config": [2]}', "language_config is a list of 1; wanted a JSON object"),
        ('{"model_type": "deepseek_v2", "rope_parameters": "yarn"}', "rope_parameters is 'yarn'; wanted a JSON object"),
        (
            '{"model_type": "deepseek_v2", "rope_scaling": {"type": [], "factor": 2}}',
            "rope_scaling.type is a list of 0; wanted linear",
        ),
        ('{"model_type": "deepseek_v2", "hidden_size": 0}', "hidden_size is 0; wanted"),
        ('{"model_type": "deepseek_v2", "hidden_size": NaN}', "is not JSON: NaN is no number"),
        ("{", "is not JSON: "),
        ("[" * 200_000, "is not JSON that can be read: nested too deeply"),
        ('{"model_type": "deepseek_v2", "hidden_size": 64, "hidden_\\u0073ize": 64}', "says 'hidden_size' twice"),
        (
            '{"model_type": "kimi_vl", "text_config": {"a": 1, "a": 1}, "text_config": {}}',
            "says 'a, text_config' twice",
        ),
        ("\xe9", "is not text in UTF-8: "),
    ],
)
def test_files_that_hold_no_model_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"config.json:? {said}"):
        DeepseekV2Config.from_published(path)


@pytest.mark.parametrize("scaling", [None, {"type": "default"}, {"rope_type": "default"}])
def test_no_scaling(scaling: dict[str, Any] | None) -> None:
    assert DeepseekV2Config.from_published(V2 | {"rope_scaling": scaling}).rope_scaling is None


@pytest.mark.parametrize(
    "config",
    [
        *map(preset, ("card", "tiny", *PUBLISHED)),
        DeepseekV2Config(rope_scaling={"type": "linear", "factor": 2.0}),
        DeepseekV2Config(rope_scaling={"type": "dynamic", "factor": 2.0}, _attn_implementation="eager"),
        DeepseekV2Config(n_routed_experts=None, q_lora_rank=None, mla_form="absorbed"),
    ],
)
def test_round_trip_through_json(config: DeepseekV2Config) -> None:
    assert DeepseekV2Config.from_published(json.loads(json.dumps(config.to_dict()))) == config


# A value


def test_a_configuration_is_a_value() -> None:
    config = DeepseekV2Config.tiny()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]
    assert hash(config) == hash(DeepseekV2Config.tiny())
    assert replace(config, hidden_size=128) != config
    with pytest.raises(TypeError, match="positional"):
        DeepseekV2Config(102400)  # type: ignore[misc]
    with pytest.raises(TypeError, match="hidden_sizes"):
        DeepseekV2Config(hidden_sizes=1)  # type: ignore[call-arg]


def test_variants_are_checked_too() -> None:
    with pytest.raises(ValueError, match="hidden_size is 0"):
        replace(DeepseekV2Config.tiny(), hidden_size=0)


# Refusals

NOT_FINITE = [float("nan"), float("inf"), -float("inf")]
NOT_SIZES = [0, -1, 1.5, "8", None, True, *NOT_FINITE]
POSITIVE = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "moe_layer_freq",
    "max_position_embeddings", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "moe_intermediate_size", "num_experts_per_tok",
]  # fmt: skip
POSITIVE_OR_NONE = ["num_key_value_heads", "n_shared_experts", "n_routed_experts", "q_lora_rank"]
REAL = [
    "routed_scaling_factor",
    "aux_loss_alpha",
    "initializer_range",
    "attention_dropout",
    "rms_norm_eps",
    "rope_theta",
]
FLAGS = ["norm_topk_prob", "seq_aux", "tie_word_embeddings", "attention_bias", "use_mla"]


def check_refusal(wanted: str, **fields: Any) -> None:
    """The first of ``fields`` is to blame."""
    name, given = next(iter(fields.items()))
    with pytest.raises(ValueError, match="; wanted ") as caught:
        DeepseekV2Config(**fields)
    said, _, want = str(caught.value).partition("; wanted ")
    assert said == f"{name} is {describe(given)}"
    assert wanted in want


@pytest.mark.parametrize("value", NOT_SIZES, ids=repr)
@pytest.mark.parametrize("name", POSITIVE)
def test_sizes(name: str, value: Any) -> None:
    check_refusal("an integer of at least 1", **{name: value})


@pytest.mark.parametrize("value", [value for value in NOT_SIZES if value is not None], ids=repr)
@pytest.mark.parametrize("name", POSITIVE_OR_NONE)
def test_sizes_of_parts_that_can_be_left_out(name: str, value: Any) -> None:
    check_refusal("an integer of at least 1 or None", **{name: value})


@pytest.mark.parametrize("value", [-1, 0.5, None, True, *NOT_FINITE], ids=repr)
def test_first_k_dense_replace(value: Any) -> None:
    check_refusal("an integer of at least 0", first_k_dense_replace=value)


@pytest.mark.parametrize("value", [-1.0, "1", None, True, *NOT_FINITE], ids=repr)
@pytest.mark.parametrize("name", REAL)
def test_numbers(name: str, value: Any) -> None:
    check_refusal("a finite number", **{name: value})


@pytest.mark.parametrize(("name", "value"), [("attention_dropout", 1.0), ("rms_norm_eps", 0.0), ("rope_theta", 1.0)])
def test_bounds_of_numbers(name: str, value: float) -> None:
    check_refusal("a finite number", **{name: value})


def test_a_bound_that_is_no_value_is_named_as_one() -> None:
    check_refusal("a finite number, above 1", rope_theta=1)
    check_refusal("a finite number, at least 0, below 1", attention_dropout=1)


@pytest.mark.parametrize("value", [None, 1, 0, "true", float("nan")], ids=repr)
@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str, value: Any) -> None:
    check_refusal("True or False", **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("hidden_act", "gelu", "silu"),
        ("scoring_func", "tanh", "softmax or sigmoid"),
        ("topk_method", "best", "greedy, group_limited_greedy, noaux_tc"),
        ("_attn_implementation", "flash", "eager, sdpa, flash_attention_2"),
        ("mla_form", "folded", "auto, expanded, absorbed"),
        ("rope_scaling", "yarn", "a dict or None"),
    ],
)
@pytest.mark.parametrize("nothing", [False, True], ids=["unknown", "wrong type"])
def test_names(name: str, value: str, wanted: str, nothing: bool) -> None:
    check_refusal(wanted, **{name: 7 if nothing else value})


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"qk_rope_head_dim": 7}, "an even number"),
        ({"num_key_value_heads": 64}, "128 or None: MLA has no KV heads"),
        ({"vocab_size": 10**15 + 1}, "at most 10^15"),
        ({"n_routed_experts": 10**400}, "or None, and at most 10^15"),
        ({"rope_theta": 10**400}, "a finite number"),
        ({"aux_loss_alpha": 10**400}, "a finite number"),
        (
            {"hidden_size": 1290, "use_mla": False, "num_attention_heads": 10},
            "a multiple of twice num_attention_heads=10",
        ),
        ({"num_key_value_heads": 3, "use_mla": False, "num_attention_heads": 10}, "a divisor of 10"),
        ({"num_experts_per_tok": 161}, "at most n_routed_experts=160"),
        ({"n_group": 3, "topk_method": "group_limited_greedy"}, "a divisor of n_routed_experts=160"),
        ({"n_group": None, "topk_method": "group_limited_greedy"}, "an integer of at least 1"),
        ({"topk_group": 0, "topk_method": "group_limited_greedy"}, "an integer of at least 1"),
        ({"topk_group": 9, "topk_method": "group_limited_greedy", "n_group": 8}, "at most n_group=8"),
        (
            {"num_experts_per_tok": 41, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 2},
            "at most 40, the experts in topk_group=2 of n_group=8 groups",
        ),
        (
            {"n_group": 160, "topk_group": 8, "topk_method": "noaux_tc"},
            "two experts in a group, whose two best judge it",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], wanted: str) -> None:
    check_refusal(wanted, **fields)


def test_fields_of_parts_that_are_not_there_are_not_checked() -> None:
    DeepseekV2Config(n_routed_experts=None, num_experts_per_tok=None, topk_method="noaux_tc", scoring_func="sigmoid")
    DeepseekV2Config(use_mla=False, kv_lora_rank=None, qk_rope_head_dim=0, qk_nope_head_dim=0, v_head_dim=0)
    DeepseekV2Config(topk_method="greedy", n_group=None, topk_group=None)


def test_a_bias_in_the_mlp_is_refused_rather_than_dropped() -> None:
    with pytest.raises(ValueError, match="mlp_bias is True; wanted False or no such key"):
        DeepseekV2Config.from_published(V2 | {"mlp_bias": True})
    assert DeepseekV2Config.from_published(V2 | {"mlp_bias": False}) == DeepseekV2Config.from_published(V2)


@pytest.mark.parametrize(
    ("changes", "name", "wanted"),
    [
        ({"type": "longrope"}, "rope_scaling.type", "linear, dynamic or yarn"),
        ({"type": None}, "rope_scaling.type", "linear, dynamic or yarn"),
        ({"rope_type": "linear"}, "rope_scaling.rope_type", "'yarn', as its type says"),
        ({"factor": None}, "rope_scaling.factor", "a factor"),
        ({"factor": 0.5}, "factor", "at least 1"),
        ({"factor": float("inf")}, "factor", "a finite number"),
        ({"factor": "40"}, "factor", "a finite number"),
        ({"factor": 10**400}, "factor", "a finite number"),
        ({"type": []}, "rope_scaling.type", "linear, dynamic or yarn"),
        ({"beta_fast": 0.5}, "beta_fast", "at least 1"),
        ({"beta_slow": 0}, "beta_slow", "above 0, and at most beta_fast"),
        ({"mscale": -1.0}, "mscale", "at least 0"),
        ({"mscale_all_dim": float("nan")}, "mscale_all_dim", "a finite number"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings", "an integer of at least 1"),
        ({"attention_factor": 1.0}, "rope_scaling.attention_factor", "no such key"),
        ({"short_factor": 1.0}, "rope_scaling.short_factor", "no such key beside type yarn"),
        ({"type": "linear"}, "mscale", "nothing: linear scaling has no such setting"),
        ({"type": "default"}, r"rope_scaling.\w+", "no such key beside type default"),
    ],
)
def test_rope_scaling(changes: dict[str, Any], name: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*; wanted .*{wanted}"):
        DeepseekV2Config(rope_scaling=YARN | changes)


def test_the_misspelt_default_is_read_as_what_was_meant() -> None:
    with pytest.warns(UserWarning, match="'gready' is a misspelling"):
        config = DeepseekV2Config(topk_method="gready")
    assert config == DeepseekV2Config(topk_method="greedy")
