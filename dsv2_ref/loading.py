"""How a checkpoint becomes a module: all headers are read and compared with the module before any weight is, so that
nothing is half loaded. Then tensors are read one at a time into their place.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsv2_ref import checks, files, published, strict_json, tensors
from dsv2_ref.checks import reject, require, require_object, require_values
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.quantize import KINDS, PARTS, quantize, weights_of
from dsv2_ref.quantized import FP8_BLOCK
from dsv2_ref.quantized_modules import quantized_places
from dsv2_ref.tensors import WEIGHTS, Entry, dequantize, read_headers, read_tensor

LONG = 1 << 28  # bytes from which on a progress bar is shown
NOT_LOADED = r"rotary_emb\.inv_freq$"  # tables that older checkpoints store, and everybody computes
SCALE = "_scale_inv"
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what a layer computes in
PARTS_OF_A_MODEL = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
ROOTS = ("", "language.", "language_model.")  # models with vision keep their decoder under one of these names


@dataclass(frozen=True)
class How:
    """What ``from_pretrained`` is told beside the source."""

    dtype: torch.dtype | None
    device: torch.device | str | None
    attn_implementation: str
    mla_form: str
    revision: str | None
    token: str | None
    weights: str | None
    group: int
    experts_of: tuple[int, int] | None


OWN_METHOD = "dsv2_ref"
"""``quant_method`` of the checkpoints of quantised models that `dsv2_ref.saving.save` writes."""


def _own_codes(told: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of `dsv2_ref.quantize.quantize` for a checkpoint that holds codes of ours."""
    name, how = "quantization_config", told.get("quantization_config")
    if not isinstance(how, Mapping) or how.get("quant_method") != OWN_METHOD:
        return None
    own = {key: value for key, value in how.items() if key != "quant_method"}
    known = own.keys() == {"weights", "group", "parts"}
    require(known, name, ", ".join(map(str, own)), "weights, group and parts beside quant_method")
    try:
        checks.quantization(own["weights"], own["group"], own["parts"], PARTS, KINDS)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error
    return own


def _block_of(told: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, if the checkpoint is quantised in float8."""
    if told.get("quantization_config") is None or _own_codes(told) is not None:
        return None
    how = require_object(told["quantization_config"], "quantization_config")
    method, block = how.get("quant_method"), how.get("weight_block_size")
    require(method == "fp8", "quantization_config.quant_method", method, "fp8, or weights that are not quantised")
    require(how.get("fmt", "e4m3") == "e4m3", "quantization_config.fmt", how.get("fmt"), "e4m3")
    if not isinstance(block, list) or [type(n) for n in block] != [int, int] or min(block) < 1:
        reject("quantization_config.weight_block_size", block, "rows and columns that share a scale")
    return block[0], block[1]


def _dtype_of(told: Mapping[str, Any], stored: torch.dtype) -> torch.dtype:
    """What the configuration says the weights are, else what they are; bfloat16 for those in eight bits."""
    named = getattr(torch, str(told.get("dtype") or told.get("torch_dtype")).removeprefix("torch."), None)
    dtype = named if isinstance(named, torch.dtype) else stored
    return dtype if dtype in FLOATING else torch.bfloat16


def _match(
    targets: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    root: str,
    block: tuple[int, int] | None,
    source: object,
) -> list[tuple[str, Entry]]:
    """Each tensor of the module with its place in the checkpoint, in the order of the files.

    Raises:
        ValueError: for a tensor that is missing, of another shape or in another format; it names the first.
    """
    wanted = {root + name: target for name, target in targets.items()}
    missing = [name for name in wanted if name not in entries]
    more = f" and {len(missing) - 1} more" * (len(missing) > 1)
    if missing:
        raise ValueError(
            f"{source}: the checkpoint has no tensor {missing[0]}{more}; wanted every weight of the module"
        )
    for name, target in wanted.items():
        entry, shape = entries[name], tuple(target.shape)
        where = f"{entry.file.name}: tensor {name}"
        if entry.shape != shape:
            raise ValueError(f"{where} is {entry.shape}; wanted {shape}")
        if not target.is_floating_point() or (target.dtype.itemsize == 1 and block is None):
            require(tensors.DTYPES.get(entry.code) == target.dtype, where, entry.code, f"{target.dtype} codes")
        elif entry.code == "F8_E4M3" and block is not None and len(shape) == 2:
            grid = tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
            scales = entries.get(name + SCALE)
            if scales is None or scales.shape != grid or not _is_floating(scales):
                found = "missing" if scales is None else f"{scales.shape} {scales.code}"
                raise ValueError(f"{where}{SCALE} is {found}; wanted {grid} in floating point, a scale for each block")
        else:
            wanted_code = (
                "floating point, or a matrix in F8_E4M3 with the weight_block_size of its scales in config.json"
            )
            require(_is_floating(entry), where, entry.code, wanted_code)
    return sorted(((name, entries[name]) for name in wanted), key=lambda pair: (pair[1].file.name, pair[1].start))


def _is_floating(entry: Entry) -> bool:
    return entry.code in WEIGHTS and entry.code != "F8_E4M3"


def _require_no_others(names: set[str], entries: Mapping[str, Entry], inside: tuple[str, ...], wanted: str) -> None:
    """Reject tensors that lie inside of the module and are none of these, nor the scales of one in eight bits."""
    for name, entry in entries.items():
        weight = entries.get(name.removesuffix(SCALE), entry)
        known = name in names or (weight is not entry and weight.name in names and weight.code == "F8_E4M3")
        if name.startswith(inside) and not known and not re.search(NOT_LOADED, name):
            raise ValueError(f"{entry.file.name}: tensor {name} has no place; wanted only {wanted}")


def _progress(total: int) -> Any:
    """A bar for long loads, where tqdm is installed and the output is a terminal."""
    if total >= LONG:
        try:
            from tqdm import tqdm  # type: ignore[import-untyped]
        except ImportError:
            return nullcontext()
        return tqdm(total=total, unit="B", unit_scale=True, disable=None)
    return nullcontext()


def _fill(
    module: nn.Module, matched: list[tuple[str, Entry]], entries: Mapping[str, Entry], root: str, block: Any
) -> None:
    targets, tied, codes = module.state_dict(), is_tied(module), quantized_places(module)
    tensors.expect(entries[each] for name, _ in matched for each in (name, name + SCALE) if each in entries)
    with torch.no_grad(), _progress(sum(entry.end - entry.start for _, entry in matched)) as bar:
        for name, entry in matched:
            own = name.removeprefix(root)
            if tied and name.endswith("lm_head.weight"):
                continue  # its place has the embedding
            stored: Tensor | None = read_tensor(entry)
            assert stored is not None
            where = f"{entry.file.name}: tensor {name}"
            if block is not None and entry.code == "F8_E4M3":
                scales = read_tensor(entries[name + SCALE])
                if own in codes and codes[own][0].kind == "fp8" and block == (FP8_BLOCK, FP8_BLOCK):
                    finite = scales.isfinite().all() & (stored.view(torch.uint8) & 127 != 127).all()
                    require_values(finite, where, "infinite or NaN somewhere, or its scales", "finite numbers")
                    codes[own][0].take(stored, scales, codes[own][1])
                    stored = None
                else:
                    wide = torch.empty(stored.shape, dtype=torch.float32) if own in codes else targets[own]
                    inside = min(block[0], stored.shape[0]), min(block[1], stored.shape[1])
                    dequantize(stored, scales, inside, wide)
                    stored = wide if own in codes else None
            if stored is not None and own in codes:
                like = codes[own][0].like
                stored = stored.to(like.dtype)  # which may be narrower
                found = f"infinite or NaN in {like.dtype} somewhere"
                require_values(stored.isfinite().all(), where, found, "finite numbers")
                codes[own][0].fill(stored.to(like.device), codes[own][1])
            elif stored is not None:
                targets[own].copy_(stored)
            if bar is not None:
                bar.update(entry.end - entry.start)
        head, embedding = entries.get(root + "lm_head.weight"), targets.get("model.embed_tokens.weight")
        if not tied or head is None or embedding is None or embedding.is_meta:
            return
        if not torch.equal(embedding.cpu(), read_tensor(head).to(embedding.dtype)):
            wanted = "the embedding, to which this model ties its head"
            raise ValueError(f"{head.file.name}: tensor {head.name} has other values; wanted {wanted}")


def is_tied(module: nn.Module) -> bool:
    """Whether the head of this model is its embedding."""
    config = getattr(module, "config", None)
    return bool(config.tie_word_embeddings) if hasattr(module, "lm_head") and config is not None else False


@dataclass(frozen=True)
class Told:
    """What a checkpoint's ``config.json`` says of the decoder."""

    decoder: Mapping[str, Any]
    config: DeepseekV2Config
    block: tuple[int, int] | None  #: rows and columns that share a scale in float8
    own: dict[str, Any] | None  #: how its codes of ours are quantised
    further: range  #: the layers after the last, which predict further tokens


def _configuration(place: files.Place) -> Told:
    """Read ``config.json``; ValueError, naming the file, for what cannot be read or is rejected."""
    file = place.open("config.json")
    text = files.read(file)
    try:
        content = strict_json.loads(text)
        decoder, config = published.decoder_of(content), DeepseekV2Config.from_published(content)
        return Told(decoder, config, _block_of(decoder), _own_codes(decoder), _further_layers(decoder, config))
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def load(build: Callable[[DeepseekV2Config], Any], source: str | Path, part: str, how: How) -> Any:
    """``build(config)`` with the weights that a checkpoint has under the name ``part``, in evaluation mode."""
    checks.weights_dtype(how.dtype)
    checks.weights_device(how.device)
    require(how.weights is None or how.weights in KINDS, "weights", how.weights, ", ".join(KINDS))
    checks.group_size(how.group)
    name, wanted = how.attn_implementation, ", ".join(checks.IMPLEMENTATIONS)
    require(name in checks.IMPLEMENTATIONS, "attn_implementation", name, wanted)
    with closing(files.place_of(source, how.revision, how.token, whole=not part)) as place:
        return _load(build, place, source, part, how)


def _load(build: Callable[[DeepseekV2Config], Any], place: files.Place, source: str | Path, part: str, how: How) -> Any:
    told = _configuration(place)
    block, own = told.block, told.own
    config = replace(told.config, _attn_implementation=how.attn_implementation, mla_form=how.mla_form)
    with torch.device("meta"):
        module = build(config)
    if own is not None:
        require(how.weights is None, "weights", how.weights, f"None: the checkpoint holds {own['weights']} codes")
        if any(weights_of(module, own["parts"])):  # a dense layer has no experts
            module = quantize(module, **own)
    whole = targets = module.state_dict()
    if how.experts_of is not None:
        from dsv2_ref.parallel import share_experts

        pair = isinstance(how.experts_of, tuple | list) and len(how.experts_of) == 2
        require(pair, "experts_of", how.experts_of, "a rank, from 0, and the number of ranks")
        plain = how.weights is None and (own is None or "experts" not in own["parts"])
        require(plain, "experts_of", how.experts_of, "None for quantised experts")
        module = share_experts(module, *how.experts_of)
        targets = module.state_dict()
    entries = read_headers(place, tuple(root + part for root in ROOTS))
    first = next(iter(targets))
    root = next((root for root in ROOTS if root + part + first in entries), "")
    if config.tie_word_embeddings and root + "lm_head.weight" not in entries:
        targets.pop("lm_head.weight", None)
    matched = _match(targets, entries, root + part, block, source)
    inside = tuple(root + each for each in ([part] if part else PARTS_OF_A_MODEL))
    names, wanted = {root + part + name for name in whole}, f"weights of a {type(module).__name__} of this config.json"
    own_entries = {name: entry for name, entry in entries.items() if _layer_of(name) not in told.further}
    _require_no_others(names, own_entries, inside, wanted)
    dtype = _dtype_of(told.decoder, matched[0][1].dtype) if how.dtype is None else how.dtype
    module = module.to(dtype)
    if how.weights is not None:
        module = quantize(module, how.weights, how.group)
    module = allocated(module, dtype, how.device)
    _fill(module, matched, entries, root + part, block)
    return module.eval()


def _further_layers(told: Mapping[str, Any], config: DeepseekV2Config) -> range:
    """The modules that predict further tokens: checkpoints count them as layers after the last."""
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        number = told.get(key) or 0
        require(checks.is_int(number, 0), key, number, "an integer of at least 0")
        if number:
            return range(config.num_hidden_layers, config.num_hidden_layers + number)
    return range(0)


def _layer_of(name: str) -> int:
    """The layer of a tensor; -1 for one of none."""
    found = re.search(r"\bmodel\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def allocated(module: Any, dtype: torch.dtype, device: torch.device | str | None) -> Any:
    """The module with memory, which holds nothing yet. What chooses experts keeps its bits, as published."""
    for gate in module.modules():
        if getattr(gate, "e_score_correction_bias", None) is not None:
            bias = gate.e_score_correction_bias
            gate.e_score_correction_bias = bias.to(torch.promote_types(dtype, torch.float32))
    module = module.to_empty(device="cpu" if device is None else device)
    if is_tied(module):
        module.lm_head.weight = module.model.embed_tokens.weight
    return module
