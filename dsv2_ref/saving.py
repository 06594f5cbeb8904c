"""How a model becomes a checkpoint: ``config.json`` and its weights in shards."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dsv2_ref import published, tensors, training_checks
from dsv2_ref.checks import is_int, require
from dsv2_ref.loading import OWN_METHOD, is_tied
from dsv2_ref.quantize import parts_of, weights_of
from dsv2_ref.quantized import QuantizedWeight
from dsv2_ref.quantized_modules import Loading

SHARD = r"model-\d{5}-of-\d{5}\.safetensors"


def save(model: Any, folder: Path, max_shard_size: int) -> None:
    """See `dsv2_ref.pretrained.PretrainedModel.save_pretrained`."""
    for part in model.modules():
        training_checks.all_experts(part)
    require(is_int(max_shard_size, 1), "max_shard_size", max_shard_size, "a number of bytes")
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("a checkpoint is written by safetensors; wanted pip install safetensors") from error
    weights = model.state_dict()
    if is_tied(model):
        del weights["lm_head.weight"]
    dtype = model.model.embed_tokens.weight.dtype
    told = published.encode(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")} | _codes_in(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    shards = list(_in_shards(weights, max_shard_size))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [tensors.SINGLE]
    for name, shard in zip(names, shards, strict=True):
        stored = {key: weight.detach().cpu().contiguous() for key, weight in shard.items()}
        save_file(stored, folder / name, {"format": "pt"})
    for path in list(folder.iterdir()):  # what an earlier checkpoint in this folder had
        earlier = path.name in (tensors.INDEX, tensors.SINGLE) or re.fullmatch(SHARD, path.name)
        if earlier and path.name not in names:
            path.unlink()
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(weight.nbytes for weight in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / tensors.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _codes_in(model: nn.Module) -> dict[str, Any]:
    """What ``config.json`` says of a quantised model, so that it is read back."""
    held = [weight for weight in model.modules() if isinstance(weight, QuantizedWeight)]
    if not held:
        return {}
    kinds = {weight.kind: None for weight in held}
    groups = {weight.group for weight in held if weight.kind == "int4"} or {64}
    parts = parts_of(model)
    wanted = "codes of one kind, to be saved as one checkpoint"
    require(len(kinds) == 1, "the weights", ", ".join(kinds), wanted)
    require(
        len(groups) == 1,
        "group",
        " and ".join(map(str, sorted(groups))),
        "one for all weights, to be saved as one checkpoint",
    )
    for _, name, child in weights_of(model, parts):
        wanted = "codes, as others of its part: quantise the whole model, or whole parts, to save it"
        require(isinstance(child, Loading), name, child, wanted)
    how = {"weights": next(iter(kinds)), "group": next(iter(groups)), "parts": parts}
    return {"quantization_config": {"quant_method": OWN_METHOD} | how}


def _in_shards(weights: Mapping[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if shard and sum(held.nbytes for held in shard.values()) + weight.nbytes > most:
            yield shard
            shard = {}
        shard[name] = weight
    yield shard
