"""Published configurations: right to the parameter, or refused by the name of the key that says why."""

import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite as glm
from transformers.models.youtu import modeling_youtu as youtu

from dsv2_ref import DeepseekV2Config, DeepseekV2ForCausalLM, MoEGate, RopeScaling
from dsv2_ref.accounting import Call, report
from dsv2_ref.published import known
from dsv2_ref.rope import inverse_frequencies
from tests.peers import native_weights
from tests.published_configs import BIASES, OTHERS, TOTALS, configs

FIELDS = {field.name for field in fields(DeepseekV2Config)}
BARE = {"model_type": "deepseek_v2"}
MOE = BARE | {"n_routed_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 3, "first_k_dense_replace": 1}


def read(published: Any) -> DeepseekV2Config:
    """Read without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return DeepseekV2Config.from_published(published)


def assert_rejected(published: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DeepseekV2Config.from_published(published)
    assert "\n" not in str(caught.value)


# Every published file


def test_every_file_has_a_place() -> None:
    assert configs().keys() == TOTALS.keys() | OTHERS.keys()


@pytest.mark.parametrize("name", TOTALS)
def test_models_of_the_family_have_the_published_number_of_parameters(name: str) -> None:
    config = read(configs()[name])
    assert report(config, Call())["parameters"]["total"] == TOTALS[name]
    assert config.use_mla == (name not in ("ocr", "vl2_tiny", "deepseek_moe_16b"))


SMALLER = ["v2_lite", "ocr", "deepseek_moe_16b", "native_youtu", "moonlight", "glm_4_7_flash"]


@pytest.mark.parametrize("name", SMALLER)
def test_the_model_itself_has_as_many(name: str) -> None:
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(read(configs()[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) == TOTALS[name]
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("gate.e_score_correction_bias")]
    assert sum(map(torch.Tensor.numel, biases)) == {"moonlight": 1_664, "glm_4_7_flash": 46 * 64}.get(name, 0)


@pytest.mark.parametrize("name", BIASES)
def test_the_gates_biases_are_counted_beside_the_parameters(name: str) -> None:
    config = read(configs()[name])
    with torch.device("meta"):
        gate = MoEGate(config)
    assert gate.e_score_correction_bias is not None
    layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    assert layers * gate.e_score_correction_bias.numel() == BIASES[name]


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_rejected_by_their_model_type(name: str) -> None:
    assert_rejected(
        configs()[name], rf"^model_type is '{OTHERS[name]}'; wanted one of deepseek_v2, .*: {OTHERS[name]} has"
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("v3", v3.DeepseekV3ForCausalLM), ("glm_4_7_flash", glm.Glm4MoeLiteForCausalLM)]
)
def test_transformers_counts_the_same(name: str, kind: Any) -> None:
    with torch.device("meta"):
        theirs = kind(AutoConfig.for_model(**configs()[name] | {"quantization_config": None}))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == TOTALS[name]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("moonlight", v3.DeepseekV3ForCausalLM),
        ("glm_4_7_flash", glm.Glm4MoeLiteForCausalLM),
        ("native_youtu", youtu.YoutuForCausalLM),
    ],
)
def test_a_small_model_of_each_kind_computes_what_transformers_computes(name: str, kind: Any) -> None:
    """With the same weights; sizes reduced in the file, so that reading is tested with it."""
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16}
    small |= {"qk_rope_head_dim": 8, "v_head_dim": 24, "head_dim": 8, "qk_head_dim": 24}
    if "n_routed_experts" in configs()[name]:
        small |= {"n_routed_experts": 8, "moe_intermediate_size": 32}
    if configs()[name].get("q_lora_rank") is not None:
        small |= {"q_lora_rank": 24}
    published = configs()[name] | small
    torch.manual_seed(0)
    ours = DeepseekV2ForCausalLM(read(published)).eval()
    theirs = kind(AutoConfig.for_model(**published | {"experts_implementation": "eager"})).eval()
    theirs.load_state_dict(native_weights(ours.state_dict()), strict=True)
    ids = torch.randint(128, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, rtol=1e-5, atol=1e-5)


# Which model it is


@pytest.mark.parametrize("kind", known()["kinds"])
def test_a_file_that_leaves_all_out_is_the_kinds_default(kind: str) -> None:
    config = read({"model_type": kind})
    assert {name: getattr(config, name) for name in known()["kinds"][kind]["defaults"]} == dict(
        known()["kinds"][kind]["defaults"]
    )


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe_lite", "youtu"])
def test_defaults_are_those_of_transformers(kind: str) -> None:
    theirs, ours = AutoConfig.for_model(kind), read({"model_type": kind})
    for name in FIELDS - {"initializer_range", "num_key_value_heads", "rope_theta", "rope_scaling"}:
        if name in type(theirs).__annotations__:
            assert getattr(ours, name) == getattr(theirs, name), name


def test_a_name_of_an_architecture_tells_the_kind_too() -> None:
    assert read({"architectures": ["DeepseekV3ForCausalLM"]}) == read({"model_type": "deepseek_v3"})
    assert_rejected(
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 64},
        "^architectures is 'LlamaForCausalLM'; wanted an arch",
    )
    both = ["DeepseekV2ForCausalLM", "LlamaForCausalLM"]
    for names in (["DeepseekV32ForCausalLM"], both, both[::-1]):
        assert_rejected(BARE | {"architectures": names}, f"^architectures is '{' '.join(names)}'; wanted an arch")
        assert_rejected({"architectures": names}, f"^architectures is '{' '.join(names)}'; wanted an arch")
    assert_rejected(BARE | {"architectures": "DeepseekV2"}, "^architectures is 'DeepseekV2'; wanted a list of names")
    assert_rejected(BARE | {"architectures": ["DeepseekV2ForCausalLMé"]}, "^architectures is 'DeepseekV2ForCausalLMé'")
    assert_rejected({"model_type": ["deepseek_v2"]}, "^model_type is a list of 1; wanted a name")


def test_without_a_name_the_keys_must_leave_no_doubt() -> None:
    whole = {key: value for key, value in configs()["v2_lite"].items() if key not in ("model_type", "architectures")}
    assert read(whole) == read(configs()["v2_lite"])
    for key in ("kv_lora_rank", "hidden_size", "num_attention_heads", "scoring_func", "topk_method"):
        assert_rejected(
            {name: value for name, value in whole.items() if name != key}, "^model_type is None; wanted one of"
        )
    plain = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "use_mla": False}
    assert not read(plain).use_mla
    for nothing in ({}, {"hidden_size": 64, "num_hidden_layers": 2}, {"use_mla": True}, {"use_mla": False}):
        assert_rejected(nothing, "^model_type is None; wanted one of .*the keys leave open which model this is")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"metadata": {"total_size": 1}, "weight_map": {}}, "the index of a checkpoint"),
        ({"added_tokens_decoder": {}, "tokenizer_class": "LlamaTokenizerFast"}, "a tokenizer's"),
        ({"version": "1.0", "truncation": None, "added_tokens": [], "model": {"type": "BPE"}}, "a tokenizer's"),
        ({"bos_token": "<s>", "eos_token": {"content": "</s>"}}, "a tokenizer's"),
        ({"_from_model_config": True, "bos_token_id": 0, "temperature": 0.3}, "of generation"),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, "of generation"),
        ({"eos_token_id": 1, "max_new_tokens": 100}, "of generation"),
        ({"peft_type": "LORA", "r": 8}, "an adapter's"),
        ({"dim": 2048, "inter_dim": 10944, "n_layers": 27}, "of DeepSeek's inference code"),
    ],
)
def test_what_is_no_models_configuration_is_called_what_it_is(given: dict[str, Any], what: str) -> None:
    assert_rejected(given, f"^the configuration is {what}.*; wanted a model's config.json")


def test_a_model_with_vision_keeps_its_decoder_inside() -> None:
    lite = {key: value for key, value in configs()["v2_lite"].items() if key != "model_type"}
    expected = read(configs()["v2_lite"])
    vision = {"vision_config": {"hidden_size": 1152}, "projector_config": {"n_embed": 2048}}
    assert read({"model_type": "deepseek_vl_v2", **vision, "language_config": lite}) == expected
    assert read({"language_config": configs()["v2_lite"], **vision}) == expected
    outside = {"model_type": "deepseek_vl_v2", **vision, **lite, "architectures": ["DeepseekVLV2ForCausalLM"]}
    for empty in ({}, {"language_config": {}}, {"language_config": None}):  # values stand outside
        assert read(outside | empty) == expected
    moonlight = configs()["moonlight"]
    for inner in (moonlight, {key: value for key, value in moonlight.items() if key != "model_type"}):
        assert read({"model_type": "kimi_vl", "text_config": inner}) == read(moonlight)
    assert_rejected(
        {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_linear"}}, "model_type is 'kimi_linear'"
    )
    assert_rejected(
        {"model_type": "deepseek_vl_v2", "language_config": [2]}, "language_config is a?.*; wanted a JSON object"
    )
    twice = {"language_config": lite, "text_config": lite}
    assert_rejected(twice, "^language_config and text_config are given; wanted one")
    for between in ({}, {"model_type": "kimi_vl"}):
        assert_rejected(
            {"text_config": between | {"text_config": BARE}},
            "^text_config is an object of [12]; wanted .* which holds no other$",
        )


def test_what_stands_outside_and_inside_must_agree() -> None:
    inner, outer = BARE | {"hidden_size": 2048}, {"model_type": "deepseek_vl_v2"}
    assert read({**outer, "hidden_size": 2048, "language_config": inner}).hidden_size == 2048
    assert_rejected({**outer, "hidden_size": 1, "language_config": inner}, "hidden_size is 1; wanted .* nested .* 2048")
    assert read({**outer, "tie_word_embeddings": True, "language_config": inner}).tie_word_embeddings
    around = {
        "vocab_size": 7, "rope_parameters": {"rope_theta": 5e4}, "head_dim": 3, "num_experts": 8, "layer_types": ["x"]
    }  # fmt: skip
    for key, value in around.items():
        with pytest.warns(UserWarning, match=f"not known, and so not read from the configuration: {key}$"):
            assert DeepseekV2Config.from_published({**outer, key: value, "language_config": inner}) == read(inner)
    yarn = configs()["v3"]["rope_scaling"]
    assert_rejected(
        {**outer, "rope_scaling": yarn, "language_config": inner | {"rope_scaling": yarn | {"factor": 8}}},
        "^rope_scaling.factor is 40; wanted what the nested configuration says, 8$",
    )


@pytest.mark.parametrize("key", ["language_config", "text_config", "llm_config"])
def test_a_decoder_holds_no_other(key: str) -> None:
    assert read(BARE | {key: {}}) == read(BARE)
    assert_rejected(BARE | {key: {"hidden_size": 64}}, f"^{key} is an object of 1; wanted no such key")


# Every key


def test_a_key_that_is_not_known_is_named() -> None:
    with pytest.warns(UserWarning, match="not known, and so not read from the configuration: hidden_sizes, zebra$"):
        config = DeepseekV2Config.from_published(BARE | {"hidden_sizes": 3, "zebra": [1], "use_cache": True})
    assert config == read(BARE)
    with pytest.warns(UserWarning, match=": 3, zebra$"):
        assert DeepseekV2Config.from_published(BARE | {3: 4, "zebra": 1}) == read(BARE)


class Printed:
    def __repr__(self) -> str:
        return "a\nb"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({str(n): n for n in range(500)}, "an object of 500"),
        ([{"a": 1}] * 500, "a list of 500"),
        ("x" * 5000, f"'{'x' * 99}…"),
        (10**4000, f"1{'0' * 99}…"),
        (Printed(), "a b"),
    ],
)
def test_a_rejected_value_takes_few_letters(value: Any, shown: str) -> None:
    for key in ("hidden_size", "rope_scaling", "model_type", "sliding_window"):
        if (key, shown) != ("rope_scaling", "an object of 500"):
            assert_rejected(BARE | {key: value}, rf"^{key} is {shown}; wanted ")
    assert_rejected(
        {"model_type": "kimi_vl", "text_config": [value] * 500}, "^text_config is a list of 500; wanted a JSON"
    )
    if not isinstance(value, dict | str):  # a path, or a configuration
        assert_rejected(value, f"^the configuration is {shown}; wanted a JSON object$")


@pytest.mark.parametrize("key", known()["only"])
def test_keys_that_would_make_another_layer_are_rejected_by_name(key: str) -> None:
    for allowed in known()["only"][key]:
        assert read(BARE | {key: allowed}) == read(BARE)
        if allowed is None:  # an empty object says nothing
            assert read(BARE | {key: {}}) == read(BARE)
    for other in (7, 0.5, ["x"], not known()["only"][key][0]):
        if other not in known()["only"][key]:
            assert_rejected(BARE | {key: other}, f"^{key} is .*; wanted .*: the layer would be another$")


def test_the_first_such_key_of_the_file_is_named() -> None:
    wrong = ["index_topk", "sliding_window", "scale_depth", "o_groups", "mlp_bias"]
    for first in wrong:
        keys = [first, *(key for key in wrong if key != first)]
        assert_rejected(BARE | dict.fromkeys(keys, 7), f"^{first} is 7")


def test_keys_around_a_decoder_are_named_in_the_order_of_the_file() -> None:
    outer = {"model_type": "kimi_vl", "text_config": {"model_type": "deepseek_v3"}}
    for keys in (["vocab_size", "hidden_size", "rope_theta"], ["rope_theta", "hidden_size", "vocab_size"]):
        with pytest.warns(UserWarning, match=f": {', '.join(keys)}$"):
            config = DeepseekV2Config.from_published(outer | dict.fromkeys(keys, 7))
        assert config == DeepseekV2Config.from_published(outer)


def test_true_is_not_one() -> None:
    assert_rejected(BARE | {"partial_rotary_factor": True}, "^partial_rotary_factor is True; wanted 1 or no such key")
    for other in (False, None):  # null, too, makes transformers pair the halves
        assert_rejected(
            BARE | {"rope_interleave": other}, f"^rope_interleave is {other}; wanted True: the layer would be"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "^scoring_func is 'softmax'; wanted 'sigmoid'"),
        ({"topk_method": "greedy"}, "^topk_method is 'greedy'; wanted 'noaux_tc'"),
    ],
)
def test_v3_has_one_gate(changes: dict[str, Any], message: str) -> None:
    assert_rejected(configs()["v3"] | changes, message)


def test_the_first_moe_has_plain_attention() -> None:
    moe = configs()["deepseek_moe_16b"]
    assert not read(moe).use_mla
    assert_rejected(moe | {"kv_lora_rank": 512}, "^kv_lora_rank is 512; wanted no such key")
    assert_rejected(moe | {"use_mla": True}, "^use_mla is True; wanted False")
    assert not read(moe | {"qk_nope_head_dim": None, "qk_rope_head_dim": None, "head_dim": 128}).use_mla


def test_youtu_has_no_experts_under_any_name() -> None:
    for key in ("n_routed_experts", "num_experts", "num_local_experts"):
        assert_rejected(configs()["native_youtu"] | {key: 8}, f"^{key} is 8; wanted no such key")


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("head_dim", [64, 192], 128),
        ("qk_head_dim", [192], 64),
        ("layer_types", [["full_attention"] * 3], ["full_attention", "sliding_attention", "full_attention"]),
        ("mlp_layer_types", [["dense", "sparse", "sparse"]], ["sparse"] * 3),
        ("mlp_layer_types", [], ["dense", "sparse"]),
        ("mlp_layer_types", [], "dense"),
        ("num_experts", [8], 9),
        ("num_local_experts", [8], 64),
    ],
)
def test_what_is_said_twice_must_agree(key: str, right: list[Any], wrong: Any) -> None:
    for value in right:
        assert read(MOE | {key: value}) == read(MOE)
    assert_rejected(MOE | {key: wrong}, f"^{key}")


def test_another_name_is_read_where_it_stands_alone() -> None:
    named = {"num_local_experts" if key == "n_routed_experts" else key: value for key, value in MOE.items()}
    assert read(named) == read(MOE)


# Positions


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_theta_is_read_wherever_it_stands_and_the_inner_wins(key: str) -> None:
    assert read(BARE | {"rope_theta": 5e4}).rope_theta == 5e4
    assert read(BARE | {key: {"rope_type": "default", "rope_theta": 5e4}}).rope_theta == 5e4
    assert read(BARE | {"rope_theta": 1e6, key: {"type": "default", "rope_theta": 5e4}}).rope_theta == 5e4
    assert read(BARE | {"rope_theta": 5e4, key: {"type": "linear", "factor": 2}}).rope_theta == 5e4
    assert read(BARE | {key: {"rope_theta": 5e4}}) == read(BARE | {"rope_theta": 5e4})
    theirs = AutoConfig.for_model("deepseek_v2", rope_theta=1e6, **{key: {"rope_type": "default", "rope_theta": 5e4}})
    assert theirs.rope_parameters["rope_theta"] == 5e4


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_an_empty_object_says_nothing(key: str) -> None:
    assert read(BARE | {key: {}}) == read(BARE)
    yarn = configs()["v3"]["rope_scaling"]
    other = {"rope_parameters": "rope_scaling", "rope_scaling": "rope_parameters"}[key]
    assert read(BARE | {key: {}, other: yarn}) == read(BARE | {"rope_scaling": yarn})


def test_both_keys_may_say_the_same() -> None:
    yarn = configs()["v3"]["rope_scaling"]
    both = {"rope_scaling": yarn, "rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 10000}}
    assert read(BARE | both) == read(BARE | {"rope_scaling": yarn})
    for other in ({"factor": 8}, {"mscale": 0.5}):
        assert_rejected(
            BARE | both | {"rope_scaling": yarn | other},
            rf"^rope_scaling.{next(iter(other))} is .*; wanted what rope_parameters says, \d",
        )


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_errors_name_the_key_that_the_file_has(key: str) -> None:
    yarn = {"type": "yarn", "factor": 2}
    for name in ("type", "rope_type"):
        assert_rejected(
            BARE | {key: {name: "longrope", "factor": 2}}, f"^{key}.{name} is 'longrope'; wanted linear, dynamic or"
        )
    assert_rejected(BARE | {key: yarn | {"rope_type": "linear"}}, f"^{key}.rope_type is 'linear'; wanted 'yarn'")
    assert_rejected(BARE | {key: {"rope_type": "yarn"}}, f"^{key}.factor is None; wanted a factor")
    assert_rejected(BARE | {key: "yarn"}, f"^{key} is 'yarn'; wanted a JSON object")
    assert_rejected(BARE | {key: yarn | {"truncate": False}}, f"^{key}.truncate is False; wanted True")
    assert_rejected(BARE | {key: {"main": {"type": "default"}}}, f"^{key}.type is None; wanted linear")
    assert_rejected(BARE | {key: yarn | {"short_factor": [1] * 48}}, f"^{key}.short_factor is a list of 48; wanted no")
    assert_rejected(BARE | {key: {"type": "default", "factor": 2}}, f"^{key}.factor is 2; wanted no such key beside")
    assert_rejected(
        BARE | {key: {"type": "default", "partial_rotary_factor": 0.5}}, f"^{key}.partial_rotary_factor is 0.5"
    )


def test_equal_betas_of_yarn_compute_what_transformers_computes() -> None:
    kimi = configs()["kimi_k2"]
    config = read(kimi)
    assert config.rope_scaling == RopeScaling(
        type="yarn", factor=32, beta_fast=1, beta_slow=1, mscale=1, mscale_all_dim=1
    )
    theirs = v3.DeepseekV3RotaryEmbedding(
        AutoConfig.for_model(**kimi | {"model_type": "deepseek_v3", "quantization_config": None})
    )
    ours = inverse_frequencies(64, config.rope_theta, config.rope_scaling)
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)
