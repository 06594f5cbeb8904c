"""Published weights: layers and models from checkpoints in safetensors, of which only the tensors wanted are read.

All headers are read and compared with the module before any weight is, so that nothing is half loaded. Then tensors
are read one at a time into their place.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dsv2_ref import checks, files, published, tensors
from dsv2_ref.checks import require, require_object, require_values
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.quantize import KINDS, PARTS, parts_of, quantize, weights_of
from dsv2_ref.quantized import FP8_BLOCK, Loading, QuantizedWeight, quantized_places
from dsv2_ref.tensors import WEIGHTS, Entry, dequantize, read_headers, read_tensor

LONG = 1 << 28  # bytes from which on a progress bar is shown
NOT_LOADED = r"rotary_emb\.inv_freq$"  # tables that older checkpoints store, and everybody computes
SCALE = "_scale_inv"
ROOTS = ("", "language.", "language_model.")  # models with vision keep their decoder under one of these names


OWN_METHOD = "dsv2_ref"
"""``quant_method`` of the checkpoints of quantised models that `PretrainedModel.save_pretrained` writes."""


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
    method, block = how.get("quant_method"), how.get("weight_block_size", [])
    require(method == "fp8", "quantization_config.quant_method", method, "fp8, or weights that are not quantised")
    require(how.get("fmt", "e4m3") == "e4m3", "quantization_config.fmt", how.get("fmt"), "e4m3")
    two = isinstance(block, list) and [type(n) for n in block] == [int, int] and min(block) > 0
    require(two, "quantization_config.weight_block_size", block, "rows and columns that share a scale")
    return block[0], block[1]


def _dtype_of(told: Mapping[str, Any], matched: list[tuple[str, Entry]]) -> torch.dtype:
    """What the configuration says the weights are, else what they are; bfloat16 for those in eight bits."""
    dtype = getattr(torch, str(told.get("dtype", told.get("torch_dtype"))), matched[0][1].dtype)
    return dtype if dtype in (torch.float64, torch.float32, torch.float16) else torch.bfloat16


def _match(
    targets: Mapping[str, Tensor], entries: Mapping[str, Entry], root: str, block: Any
) -> list[tuple[str, Entry]]:
    """Each tensor of the module with its place in the checkpoint, in the order of the files.

    Raises:
        ValueError: for a tensor that is missing, left over or of another shape; it names the first.
    """
    wanted = {root + name: target for name, target in targets.items()}
    missing = [name for name in wanted if name not in entries]
    more = f" and {len(missing) - 1} more" * (len(missing) > 1)
    if missing:
        raise ValueError(f"the checkpoint has no tensor {missing[0]}{more}; wanted every weight of the module")
    for name, target in wanted.items():
        entry, shape = entries[name], tuple(target.shape)
        if entry.shape != shape:
            raise ValueError(f"{entry.file.name}: tensor {name} is {entry.shape}; wanted {shape}")
        if not target.is_floating_point() or (target.dtype.itemsize == 1 and block is None):
            require(
                tensors.DTYPES.get(entry.code) == target.dtype,
                f"{entry.file.name}: tensor {name}",
                entry.code,
                f"{target.dtype} codes",
            )
            continue
        fits = entry.code in WEIGHTS and (entry.code != "F8_E4M3" or block is not None)
        wanted_code = "floating point, or F8_E4M3 with the weight_block_size of its scales in config.json"
        require(fits, f"{entry.file.name}: tensor {name}", entry.code, wanted_code)
        if block is not None and entry.code == "F8_E4M3":
            scales = entries.get(name + SCALE)
            grid = tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
            if scales is None or scales.shape != grid:
                found = "missing" if scales is None else scales.shape
                raise ValueError(
                    f"{entry.file.name}: tensor {name}{SCALE} is {found}; wanted {grid}, a scale for each block"
                )
    return sorted(((name, entries[name]) for name in wanted), key=lambda pair: (pair[1].file.name, pair[1].start))


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
    targets, tied, codes = module.state_dict(), _is_tied(module), quantized_places(module)
    with torch.no_grad(), _progress(sum(entry.end - entry.start for _, entry in matched)) as bar:
        for name, entry in matched:
            own = name.removeprefix(root)
            if tied and name.endswith("lm_head.weight"):
                continue  # its place has the embedding
            stored: Tensor | None = read_tensor(entry)
            assert stored is not None
            if block is not None and entry.code == "F8_E4M3":
                scales = read_tensor(entries[name + SCALE])
                if own in codes and codes[own][0].kind == "fp8" and block == (FP8_BLOCK, FP8_BLOCK):
                    codes[own][0].take(stored, scales, codes[own][1])
                    stored = None
                else:
                    wide = torch.empty(stored.shape, dtype=torch.float32) if own in codes else targets[own]
                    dequantize(stored, scales, block, wide)
                    stored = wide if own in codes else None
            if stored is not None and own in codes:
                finite = stored.isfinite().all()
                require_values(
                    finite, f"{entry.file.name}: tensor {name}", "infinite or NaN somewhere", "finite numbers"
                )
                codes[own][0].fill(stored.to(codes[own][0].like), codes[own][1])
            elif stored is not None:
                targets[own].copy_(stored)
            if bar is not None:
                bar.update(entry.end - entry.start)
        head, embedding = entries.get(root + "lm_head.weight"), targets.get("model.embed_tokens.weight")
        if tied and head is not None and embedding is not None:
            same = torch.equal(embedding.cpu(), read_tensor(head).to(embedding.dtype))
            wanted = "the embedding, to which this model ties it"
            require(same, f"{head.file.name}: tensor {head.name}", "another matrix", wanted)


def _is_tied(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return bool(config.tie_word_embeddings) if hasattr(module, "lm_head") and config is not None else False


def _configuration(place: files.Place) -> tuple[Mapping[str, Any], DeepseekV2Config]:
    """What a checkpoint's ``config.json`` says of the decoder."""
    file = place.open("config.json")
    try:
        content = published.decode(files.read(file))
        return published.decoder_of(content), DeepseekV2Config.from_published(content)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _load(build: Callable[[DeepseekV2Config], Any], source: str | Path, part: str, how: "_How") -> Any:
    """``build(config)`` with the weights that a checkpoint has under the name ``part``, in evaluation mode."""
    place = files.place_of(source, how.revision, how.token, whole=not part)
    told, config = _configuration(place)
    block = _block_of(told)
    config = replace(config, _attn_implementation=how.attn_implementation, mla_form=how.mla_form)
    with torch.device("meta"):
        module = build(config)
    own = _own_codes(told)
    if own is not None:
        require(how.weights is None, "weights", how.weights, f"None: the checkpoint holds {own.get('weights')} codes")
        if any(weights_of(module, own["parts"])):  # a dense layer has no experts
            module = quantize(module, **own)
    whole = targets = module.state_dict()
    if how.experts_of is not None:
        from dsv2_ref.parallel import share_experts

        pair = isinstance(how.experts_of, tuple | list) and len(how.experts_of) == 2
        require(pair, "experts_of", how.experts_of, "a rank, from 0, and the number of ranks")
        require(how.weights is None and own is None, "experts_of", how.experts_of, "None for quantised experts")
        module = share_experts(module, *how.experts_of)
        targets = module.state_dict()
    entries = read_headers(place, tuple(root + part for root in ROOTS))
    first = next(iter(targets))
    root = next((root for root in ROOTS if root + part + first in entries), "")
    if config.tie_word_embeddings and root + "lm_head.weight" not in entries:
        targets.pop("lm_head.weight", None)
    matched = _match(targets, entries, root + part, block)
    inside = [part] if part else ["model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."]
    beyond = (
        told.get("num_nextn_predict_layers") or told.get("num_mtp_layers") or 0
    )  # modules that predict further tokens
    others = tuple(f"{root}model.layers.{config.num_hidden_layers + i}." for i in range(beyond))
    for name, entry in entries.items():
        known = name.removesuffix(SCALE).removeprefix(root + part) in whole or re.search(NOT_LOADED, name)
        if not known and name.startswith(tuple(root + place for place in inside)) and not name.startswith(others):
            wanted = f"only weights of a {type(module).__name__} of this config.json"
            raise ValueError(f"{entry.file.name}: tensor {name} has no place; wanted {wanted}")
    dtype = _dtype_of(told, matched) if how.dtype is None else how.dtype
    module = module.to(dtype)
    if how.weights is not None:
        module = quantize(module, how.weights, how.group)
    module = _allocated(module, dtype, how.device)
    _fill(module, matched, entries, root + part, block)
    return module.eval()


def _allocated(module: Any, dtype: torch.dtype, device: torch.device | str | None) -> Any:
    """The module with memory, which holds nothing yet. What chooses experts keeps its bits, as published."""
    for gate in module.modules():
        if getattr(gate, "e_score_correction_bias", None) is not None:
            bias = gate.e_score_correction_bias
            gate.e_score_correction_bias = bias.to(torch.promote_types(dtype, torch.float32))
    module = module.to_empty(device="cpu" if device is None else device)
    if _is_tied(module):
        module.lm_head.weight = module.model.embed_tokens.weight
    return module


def _random(
    build: Callable[[], Any],
    std: float,
    weights: str | None,
    group: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Any:
    """A module with random weights that never existed in more bits, in evaluation mode."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    with torch.device("meta"):
        module = build().to(dtype)
    if weights is not None:
        module = quantize(module, weights, group)
    module = _allocated(module, dtype, device)
    with torch.no_grad():
        for name, weight in module.state_dict().items():
            if name.endswith("norm.weight"):
                weight.fill_(1)
            elif name.endswith((".bias", "_bias")):
                weight.zero_()
            elif weight.is_floating_point() and weight.itemsize > 1:
                weight.normal_(std=std)
        for weight in module.modules():
            if isinstance(weight, QuantizedWeight):
                weight.random_(std)
    return module.eval()


@dataclass(frozen=True)
class _How:
    """What `from_pretrained` was told beside the source."""

    dtype: torch.dtype | None
    device: torch.device | str | None
    attn_implementation: str
    mla_form: str
    revision: str | None
    token: str | None
    weights: str | None
    group: int
    experts_of: tuple[int, int] | None


class PretrainedLayer:
    """A layer that can be read from a published checkpoint."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        layer_idx: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        attn_implementation: str = "sdpa",
        mla_form: str = "auto",
        revision: str | None = None,
        token: str | None = None,
        weights: str | None = None,
        group: int = 64,
        experts_of: tuple[int, int] | None = None,
    ) -> Self:
        """One layer of a checkpoint, in evaluation mode. Only its own tensors are read, from afar too.

        Args:
            source: a folder with ``config.json`` and safetensors (``model.safetensors``, or shards with an index), the
                http or https address of such a folder, or a name on the Hugging Face Hub (``owner/model``).
            layer_idx: which layer, from 0.
            dtype: of the weights; None takes what config.json says, bfloat16 for weights in float8. The bias that
                chooses experts stays in float32.
            device: where the weights go; None is the CPU.
            attn_implementation: as ``_attn_implementation`` of `DeepseekV2Config`.
            mla_form: as ``mla_form`` of `DeepseekV2Config`.
            revision: a branch, tag or commit on the Hub.
            token: for what is not public: on the Hub, or sent with the requests to an address.
            weights: quantise each tensor as it is read, as `dsv2_ref.quantize.quantize` does, to ``int8``, ``int4`` or
                ``fp8``; a float8 checkpoint keeps its codes and scales in the last. None does not.
            group: weights of a row that share a scale, for ``int4``.
            experts_of: ``(rank, ranks)``: read only the routed experts of one of so many ranks, for
                `dsv2_ref.parallel.parallelize_experts`; None reads all.

        Raises:
            ValueError: for a configuration that is rejected, files that are cut or damaged, and a tensor that is missing,
                left over, of another shape or in another format; it names the file and the tensor.
            FileNotFoundError: for a source or a file of it that does not exist.
            OSError: for a server that fails.
            ImportError: for a name on the Hub without huggingface_hub.

        Memory: the layer, and its largest tensor once more; where tensors are quantised, the largest of those four times
        in float32.

        Source: the safetensors format; float8 blocks as in DeepSeek-V3's published ``inference/fp8_cast_bf16.py``.
        """

        def build(config: DeepseekV2Config) -> Any:
            return cls(config, layer_idx)  # type: ignore[call-arg]

        how = _How(dtype, device, attn_implementation, mla_form, revision, token, weights, group, experts_of)
        layer: Self = _load(build, source, f"model.layers.{layer_idx}.", how)
        return layer

    @classmethod
    def random(
        cls,
        config: DeepseekV2Config,
        layer_idx: int,
        weights: str | None = None,
        group: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A layer with random weights; see `PretrainedModel.random`."""
        std = config.initializer_range
        layer: Self = _random(lambda: cls(config, layer_idx), std, weights, group, dtype, device)  # type: ignore[call-arg]
        return layer


class PretrainedModel:
    """A model that can be read from a published checkpoint, and written as one."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        attn_implementation: str = "sdpa",
        mla_form: str = "auto",
        revision: str | None = None,
        token: str | None = None,
        weights: str | None = None,
        group: int = 64,
        experts_of: tuple[int, int] | None = None,
    ) -> Self:
        """A whole model, in evaluation mode; arguments and errors as for `PretrainedLayer.from_pretrained`.

        A model from the Hub goes through the Hub's cache. Modules that predict further tokens are not loaded.
        """
        how = _How(dtype, device, attn_implementation, mla_form, revision, token, weights, group, experts_of)
        model: Self = _load(cls, source, "", how)
        return model

    @classmethod
    def random(
        cls,
        config: DeepseekV2Config,
        weights: str | None = None,
        group: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A model with random weights, in evaluation mode, to time one without a checkpoint. Quantised ones are drawn as
        codes, so that memory never holds more: V2-Lite in ``int4`` takes 9 GB.

        Args:
            config: hyperparameters.
            weights: ``int8``, ``int4`` or ``fp8``, by `dsv2_ref.quantize.quantize`; None for weights of ``dtype``.
            group: weights of a row that share a scale, for ``int4``.
            dtype: None is torch's default.
            device: None is the CPU.
        """
        model: Self = _random(lambda: cls(config), config.initializer_range, weights, group, dtype, device)  # type: ignore[call-arg]
        return model

    def save_pretrained(self, folder: str | Path, max_shard_size: int = 5_000_000_000) -> None:
        """Write ``config.json`` and the weights under their published names, in shards of at most so many bytes (a
        larger tensor has one of its own), as transformers reads them. A quantised model becomes codes and scales,
        which `from_pretrained` alone reads.

        Raises:
            ValueError: for a model quantised in several ways, or not throughout a part, and for one that has a share of
                its experts.
        """
        from safetensors.torch import save_file

        model: Any = self
        for part in model.modules():
            checks.all_experts(part)
        require(max_shard_size >= 1, "max_shard_size", max_shard_size, "a number of bytes")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = model.state_dict()
        if _is_tied(model):
            del weights["lm_head.weight"]
        dtype = model.model.embed_tokens.weight.dtype
        told = published.encode(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")} | _codes_in(model)
        (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        shards = list(_in_shards(weights, max_shard_size))
        names = (
            [tensors.SINGLE]
            if len(shards) == 1
            else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        )
        for name, shard in zip(names, shards, strict=True):
            save_file(
                {key: weight.detach().cpu().contiguous() for key, weight in shard.items()},
                folder / name,
                {"format": "pt"},
            )
        (folder / tensors.INDEX).unlink(missing_ok=True)
        if len(shards) > 1:
            (folder / tensors.SINGLE).unlink(missing_ok=True)
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
