"""Published configurations with a few things changed, as files in the wild have them, or as nobody should."""

import copy
import json
import random
from dataclasses import fields
from typing import Any

from dsv2_ref import published
from dsv2_ref.config import DeepseekV2Config
from tests.published_configs import configs

FIELDS = [field.name for field in fields(DeepseekV2Config)]
KINDS = [*published.known()["kinds"], *published.known()["nested"], *published.known()["others"]]
NESTING = ("language_config", "text_config")
SIZES = (1, 2, 3, 4, 6, 8, 16, 20, 27, 64, 128, 160, 192, 256, 512, 1536, 2048, 5120, 7168)
STRETCHES = ("rope_parameters", "rope_scaling")

Object = dict[str, Any]


def _values_by_key() -> dict[str, list[Any]]:
    """What each key has in any of the files."""
    found: dict[str, list[Any]] = {}
    for config in configs().values():
        for part in (config, *(config[key] for key in NESTING if isinstance(config.get(key), dict))):
            for key, value in part.items():
                found.setdefault(key, []).append(value)
    return found


VALUES = _values_by_key()


def _odd_value(draw: random.Random, key: str, value: Any) -> Any:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else draw.choice(SIZES)
    odd = [
        None,
        0,
        -1,
        1,
        10**15,
        10**15 + 1,
        10**30,
        -(10**30),
        True,
        False,
        "",
        "many",
        "it's",
        'a "name"',
        "é\n\u2028𝄞",
    ]
    odd += [str(number), float(number), number + 0.5, -0.0, 1e-30, 1e-5, 1e16, 1.5e300, [], [number], {}, {"a": 1}]
    odd += [[True, None, {"a": [1.0]}], draw.choice(SIZES), draw.choice(SIZES), draw.choice(VALUES.get(key, SIZES))]
    return draw.choice(odd)


def _stretch(draw: random.Random) -> Any:
    """A stretch of rotary positions, good or bad."""
    kind = draw.choice(["yarn", "yarn", "linear", "dynamic", "default", "longrope", None, 3])
    found: Object = {draw.choice(["type", "rope_type"]): kind}
    choices: dict[str, list[Any]] = {
        "factor": [40, 40.0, 1, 0.5, True, "4"], "original_max_position_embeddings": [4096, 4096.0, 0],
        "beta_fast": [32, 1, 1.0, 0.5], "beta_slow": [1, 1.0, 0, 2, 1234567, 0.00001], "mscale": [1.0, 0.707, 1, -1, None],
        "mscale_all_dim": [0.707, 0, None, True], "rope_theta": [10000, 1e4, 5e4, 1, None, True], "truncate": [True, False, 1],
        "attention_factor": [None, 1.0], "partial_rotary_factor": [1, 1.0, True, 0.5], "zebra": [1],
        "type": ["yarn", "linear"], "rope_type": ["yarn", "default"],
    }  # fmt: skip
    likely = {"factor", "original_max_position_embeddings", "mscale", "mscale_all_dim", "rope_theta"}
    for key, values in choices.items():
        if draw.random() < (0.6 if key in likely else 0.12):
            found[key] = draw.choice(values if draw.random() < 0.3 else values[:1])
    odd = [{}, None, [], "yarn", 0, False, {"rope_theta": 5e4}, {"main": {"type": "default"}}]
    return draw.choice(odd) if draw.random() < 0.15 else found


def _layer_types(draw: random.Random, decoder: Object) -> None:
    number = decoder.get("num_hidden_layers")
    number = number if isinstance(number, int) and 0 < number < 100 else 3
    dense = decoder.get("first_k_dense_replace") if "n_routed_experts" in decoder else number
    dense = dense if isinstance(dense, int) else 0
    mixed = ["dense" if layer < dense else "sparse" for layer in range(number)]
    key, layers = draw.choice([("layer_types", ["full_attention"] * number), ("mlp_layer_types", mixed)])
    if draw.random() < 0.5:
        layers[draw.randrange(number)] = draw.choice(["sliding_attention", "sparse", "dense", None, 1])
    decoder[key] = draw.choice([layers, layers, layers, layers[:-1], [], "dense", None, 0])


def _change(draw: random.Random, config: Object) -> None:
    """One change of a file, in place."""
    inside = [config[key] for key in NESTING if isinstance(config.get(key), dict)]
    part = draw.choice([config, *inside, *inside])
    keys = [key for key in part if key not in NESTING]
    key = draw.choice(keys) if keys else "hidden_size"
    only = published.known()["only"]
    match draw.randrange(17):
        case 0 | 1:
            part.pop(key, None)
        case 2 | 3 | 4:
            part[key] = _odd_value(draw, key, part.get(key))
        case 5 | 6:
            key = draw.choice(FIELDS)
            part[key] = _odd_value(draw, key, part.get(key))
        case 7:
            part[key] = draw.choice(VALUES.get(key, SIZES))
        case 8:
            key = draw.choice(
                ["zebra", "hidden_sizes", "__proto__", "constructor", "7", "é", "vision_config", "use_cache"]
            )
            part[key] = _odd_value(draw, key, None)
        case 9 | 10:
            key = draw.choice(list(only))
            part[key] = draw.choice([*only[key], 0, 1.0, True, "x"])
        case 11:
            part["model_type"] = draw.choice([*KINDS, *KINDS, None, "", 3, "constructor", ["deepseek_v2"]])
            if draw.random() < 0.5:
                part.pop("architectures", None)
        case 12:
            kind = draw.choice(["DeepseekV2", "DeepseekV3", "Youtu", "KimiVL", "Llama", "Deepseek", "DeepseekVLV2"])
            kind += draw.choice(["ForCausalLM", "ForConditionalGeneration", "Model", ""])
            part["architectures"] = draw.choice([[kind], [kind], [kind, "LlamaModel"], kind, [], None, "", 0, [3], {}])
            if draw.random() < 0.6:
                part.pop("model_type", None)
        case 13:
            if inside and draw.random() < 0.5:  # a key, or all of them, out of the nested configuration
                moved = dict(inside[0]) if draw.random() < 0.5 else {key: inside[0].get(key)}
                config |= moved
                if draw.random() < 0.7:
                    for name in moved:
                        inside[0].pop(name, None)
            else:
                nested = {name: config.get(name) for name in ([*config] if draw.random() < 0.7 else [key])}
                for name in nested if draw.random() < 0.7 else ():
                    config.pop(name, None)
                config[draw.choice(NESTING)] = draw.choice([nested, nested, nested, {}, None, 3, [nested]])
                if draw.random() < 0.5:
                    config["model_type"] = draw.choice([*published.known()["nested"], "deepseek_v2"])
        case 14:
            for name in STRETCHES if draw.random() < 0.3 else (draw.choice(STRETCHES),):
                part[name] = _stretch(draw)
            if draw.random() < 0.2:
                part[STRETCHES[0]] = copy.deepcopy(part.get(STRETCHES[1]))
        case 15:
            name, value = draw.choice(["num_experts", "num_local_experts"]), part.get("n_routed_experts")
            part[name] = draw.choice([value, value, None, 8, 64.0, True])
            if draw.random() < 0.3:
                part.pop("n_routed_experts", None)
            heads = [part.get("qk_rope_head_dim"), 192, 128, 64.0, "64"]
            if draw.random() < 0.5:
                part[draw.choice(["head_dim", "qk_head_dim"])] = draw.choice(heads)
        case 16:
            _layer_types(draw, part)


def mutations(name: str, number: int) -> list[str]:
    """The text of a published file, and of that many changed ones."""
    draw, original = random.Random(name), configs()[name]
    texts = [json.dumps(original)]
    for _ in range(number):
        config = copy.deepcopy(original)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            _change(draw, config)
        texts.append(json.dumps(config, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 2])))
    return texts
