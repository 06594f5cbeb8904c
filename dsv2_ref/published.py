"""Published ``config.json`` files: which kind of model a file describes, what each of its keys means for a decoder
layer, and which values no layer of this package has.

What is known stands in ``published.json``, which the book's calculator reads too: the kinds of models with the
defaults of their published code, the keys that may have only one value here, and those that change nothing in a layer.
"""

import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2_ref.checks import describe, reject, require, require_object

if TYPE_CHECKING:
    from dsv2_ref.config import DeepseekV2Config

LATENT_KEYS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
SIZE_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads")
ROUTING_KEYS = ("scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor")


@cache
def known() -> Mapping[str, Any]:
    """The table of ``published.json``."""
    table: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    for name, kind in table["kinds"].items():
        if "like" in kind:
            table["kinds"][name] = table["kinds"][kind["like"]] | kind
    return table


def read(source: object, names: Collection[str]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The decoder's keys in a published file, and the fields of a configuration, among ``names``: what it says and,
    where it says nothing, what its kind's published code assumes.

    Raises:
        ValueError: for what is no model's configuration, a kind of model that is not known, and a key whose value would
            change the layer; it names the key.

    Warns:
        UserWarning: for keys that are not known, naming them.
    """
    published = require_object(source, "the configuration")
    outer, kind, decoder = _decoder_of(published)
    only = known()["only"] | known()["kinds"][kind].get("only", {})
    unknown = []
    for where in (decoder, outer):
        _reject_others(where, only)
        beside = known()["beside"] if where is outer else ()
        unknown += [key for key in where if not _is_known(key, names, only, beside)]
    given = {key: value for key, value in decoder.items() if key in names}
    for other, name in known()["same_as"].items():
        if other in decoder:
            given.setdefault(name, decoder[other])
            _require_same(other, decoder[other], given[name], f"{name}'s")
    if "tie_word_embeddings" in outer:
        given.setdefault("tie_word_embeddings", outer["tie_word_embeddings"])
    inside = {**decoder, **given}
    for name in (name for name in outer if _is_read(name, names)):
        if name in inside:
            _require_same(name, outer[name], inside[name], "what the nested configuration says,")
        else:
            unknown.append(name)
    if unknown:
        keys = ", ".join(map(str, dict.fromkeys(unknown)))
        message = f"not known, and so not read from the configuration: {keys}"
        warnings.warn(message, stacklevel=4)
    given |= {"rope_scaling": None} | _rope_of(decoder)
    return decoder, known()["kinds"][kind]["defaults"] | given


def decoder_of(source: object) -> Mapping[str, Any]:
    """All keys that a published file has for its decoder, those around it included."""
    outer, _, decoder = _decoder_of(require_object(source, "the configuration"))
    return {**outer, **decoder}


def encode(config: "DeepseekV2Config") -> dict[str, Any]:
    """A ``config.json`` that this package and, where it has the model, transformers read as this configuration.
    Youtu-LLM is V2's layer without experts, which transformers' DeepseekV2 cannot be."""
    dense = config.n_routed_experts is None
    v3 = config.scoring_func == "sigmoid" and config.topk_method == "noaux_tc" and not dense
    kind = "deepseek_v3" if v3 else "youtu" if dense and config.use_mla else "deepseek_v2"
    architectures = [f"{name}ForCausalLM" for name in known()["kinds"][kind]["architectures"]]
    own = ("_attn_implementation", "mla_form", "device_aux_loss_alpha", "communication_aux_loss_alpha")
    fields = {key: value for key, value in config.to_dict().items() if key not in own}
    if config.num_key_value_heads is None:
        fields["num_key_value_heads"] = config.num_attention_heads
    return {"architectures": architectures, "model_type": kind} | fields


def _decoder_of(published: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, Mapping[str, Any]]:
    """What stands around the decoder's keys, the kind of the decoder, and its keys."""
    kinds, nested = known()["kinds"], known()["nested"]
    told = published.get("model_type")
    require(told is None or isinstance(told, str), "model_type", told, "a name")
    kind: str | None = _kind_by_architecture(published) if told is None else told
    if kind is not None and kind in kinds:
        _require_architectures(published, kind, kinds[kind]["architectures"])
        return {}, kind, published
    key, inner_kind = _nested_key(published), None
    if kind is not None and kind in nested:
        _require_architectures(published, kind, nested[kind]["architectures"])
        key, inner_kind = nested[kind]["key"], nested[kind]["kind"]
    elif kind is not None:
        why = f": {kind} has {known()['others'][kind]}" if kind in known()["others"] else ""
        reject("model_type", kind, f"one of {', '.join([*kinds, *nested])}{why}")
    if key is None:
        return {}, _kind_by_keys(published), published
    inside = published.get(key)
    outer: dict[str, Any] = {name: value for name, value in published.items() if name != key}
    if inside in (None, {}) and inner_kind is not None:  # the values stand outside
        around: dict[str, Any] = {
            name: outer.pop(name) for name in list(outer) if name in {*known()["beside"], "architectures"}
        }
        return around, inner_kind, outer | {"model_type": inner_kind}
    inner: Mapping[str, Any] = require_object(inside, key)
    if inner_kind is not None and inner.get("model_type") is None:
        inner = {**inner, "model_type": inner_kind}
    wanted = "a decoder's configuration, which holds no other"
    require(_nested_key(inner) is None, key, inner, wanted)
    beside, kind, decoder = _decoder_of(inner)
    require(not beside, key, inner, wanted)
    return outer, kind, decoder


def _nested_key(published: Mapping[str, Any]) -> str | None:
    keys = {entry["key"] for entry in known()["nested"].values()}
    present = [key for key in sorted(keys) if published.get(key) not in (None, {})]
    if len(present) > 1:
        raise ValueError(f"{' and '.join(present)} are given; wanted one decoder's configuration")
    return present[0] if present else None


def _architectures(published: Mapping[str, Any]) -> list[str]:
    names: list[str] = published.get("architectures") or []
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
    require(fits, "architectures", names, "a list of names")
    return names


def _are_of(names: list[str], own: list[str]) -> bool:
    """Whether all these classes belong to these architectures, whatever they are for: DeepseekV3ForCausalLM to
    DeepseekV3."""
    return all(re.sub(r"(For[A-Z][A-Za-z0-9]*|Model)\Z", "", name) in own for name in names)


def _require_architectures(published: Mapping[str, Any], kind: str, own: list[str]) -> None:
    names = _architectures(published)
    wanted = f"an architecture of model_type {kind}: {', '.join(f'{name}ForCausalLM' for name in own)}"
    require(_are_of(names, own), "architectures", " ".join(names), wanted)


def _kind_by_architecture(published: Mapping[str, Any]) -> str | None:
    names = _architectures(published)
    for kind, entry in [*known()["kinds"].items(), *known()["nested"].items()] if names else ():
        if _are_of(names, entry["architectures"]):
            return str(kind)
    require(not names, "architectures", " ".join(names), "an architecture of a model that is known")
    return None


def _kind_by_keys(published: Mapping[str, Any]) -> str:
    """The kind of a file that does not name it: the keys must leave no doubt."""
    for key, what in known()["not_a_model"].items():
        if key in published and "hidden_size" not in published:
            raise ValueError(f"the configuration is {what}, as its key {key} says; wanted a model's config.json")
    told = published.keys() >= {*SIZE_KEYS} and ("use_mla" in published or published.keys() >= {*LATENT_KEYS})
    routed = published.get("n_routed_experts") is not None
    if not told or (routed and not published.keys() >= {*ROUTING_KEYS}):
        wanted = f"one of {', '.join([*known()['kinds'], *known()['nested']])}: the keys leave open which model this is"
        reject("model_type", None, wanted)
    return "deepseek_v2"


def _same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _require_same(name: str, value: Any, other: Any, whose: str) -> None:
    """Reject what is said twice, and otherwise; of two objects it names the first key in which they differ."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*value, *other]):
            _require_same(f"{name}.{key}", value.get(key), other.get(key), whose)
    else:
        require(_same(value, other), name, value, f"{whose} {describe(other)}")


def _reject_others(given: Mapping[str, Any], only: Mapping[str, list[Any]], where: str = "") -> None:
    for key, found in given.items():
        says = None if found == {} else found  # an empty object says nothing
        if key in only and not any(_same(says, value) for value in only[key]):
            allowed = " or ".join("no such key" if value is None else repr(value) for value in only[key])
            reject(f"{where}{key}", found, f"{allowed}: the layer would be another")


def _is_read(key: str, names: Collection[str]) -> bool:
    return any(key in keys for keys in (names, known()["same_as"], known()["read"]))


def _is_known(key: str, names: Collection[str], only: Iterable[str], beside: Iterable[str]) -> bool:
    return _is_read(key, names) or any(key in keys for keys in (only, beside, known()["irrelevant"]))


def rope_scaling(scaling: Mapping[str, Any], key: str = "rope_scaling") -> dict[str, Any] | None:
    """The fields of a `RopeScaling` that this object gives, which the file has under ``key``; None for the type
    ``default``, and for an object without one that gives rope_theta alone."""
    table = known()["rope"]
    _reject_others(scaling, table["only"], f"{key}.")
    given = {name: value for name, value in scaling.items() if value is not None and name not in table["only"]}
    given.pop("rope_theta", None)
    kinds: dict[str, Any] = {name: given.pop(name) for name in ("type", "rope_type") if name in given}
    if not kinds and not given and scaling:
        return None
    kind = next(iter(kinds.values()), None)
    for name, value in (kinds or {"type": None}).items():
        require(value in ("linear", "dynamic", "yarn", "default"), f"{key}.{name}", value, "linear, dynamic or yarn")
        require(value == kind, f"{key}.{name}", value, f"{kind!r}, as its type says")
    for name, value in given.items():
        known_name = kind != "default" and name in table["read"]
        require(known_name, f"{key}.{name}", value, f"no such key beside type {kind}")
    if kind == "default":
        return None
    require("factor" in given, f"{key}.factor", None, "a factor")
    return {"type": kind, **given}


def _rope_of(decoder: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, wherever the file has them: the theta inside wins, as in transformers."""
    stretched = {key: decoder[key] for key in ("rope_parameters", "rope_scaling") if decoder.get(key) not in (None, {})}
    found: dict[str, Any] = {}
    for key, parameters in stretched.items():
        read = rope_scaling(require_object(parameters, key), key)
        theta = parameters.get("rope_theta", found.get("rope_theta"))
        before, default = found or {"rope_theta": theta, "rope_scaling": read}, {"type": "default"}
        _require_same(f"{key}.rope_theta", theta, before.get("rope_theta", theta), "what rope_parameters says,")
        _require_same(key, read or default, before["rope_scaling"] or default, "what rope_parameters says,")
        found["rope_scaling"] = read
        if theta is not None:
            found["rope_theta"] = theta
    return found


def require_agreement(decoder: Mapping[str, Any], config: "DeepseekV2Config") -> None:
    """Reject keys that say again, and otherwise, what follows from the fields."""
    if config.use_mla:
        rotating, query = config.qk_rope_head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim
        heads = {"head_dim": [rotating, query], "qk_head_dim": [query]}
    else:  # the widths of latent attention may be anything
        heads = {"head_dim": [config.hidden_size // config.num_attention_heads]}
    for key, allowed in heads.items():
        value = decoder.get(key)
        fits = value is None or any(_same(value, one) for one in allowed)
        require(fits, key, value, " or ".join(map(str, allowed)))
    kinds = {"layer_types": "full_attention in each layer", "mlp_layer_types": "dense and sparse as the fields say"}
    for key, wanted in kinds.items():
        layers = decoder.get(key)
        if layers is None:
            continue
        fits = isinstance(layers, list) and len(layers) == config.num_hidden_layers
        require(fits, key, layers, f"a list of num_hidden_layers={config.num_hidden_layers} kinds of layers")
        for layer, kind in enumerate(layers):
            feed_forward = "sparse" if config.is_moe_layer(layer) else "dense"
            expected = feed_forward if key == "mlp_layer_types" else "full_attention"
            require(kind == expected, f"{key}[{layer}]", kind, f"{expected}: {wanted}")
