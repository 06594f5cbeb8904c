"""Published weights: what layers and models have to be read from checkpoints in safetensors, of which only the tensors
wanted are read, and to be made with random weights. `dsv2_ref.loading` and `dsv2_ref.saving` say how.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

from dsv2_ref import checks
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.loading import How, allocated, load
from dsv2_ref.quantize import quantize
from dsv2_ref.quantized import QuantizedWeight
from dsv2_ref.saving import save


def _random(
    build: Callable[[], Any],
    config: DeepseekV2Config,
    weights: str | None,
    group: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Any:
    """A module with random weights that never existed in more bits, in evaluation mode."""
    checks.is_config(config)
    checks.weights_dtype(dtype)
    checks.weights_device(device)
    checks.group_size(group)
    dtype, std = torch.get_default_dtype() if dtype is None else dtype, config.initializer_range
    with torch.device("meta"):
        module = build().to(dtype)
    if weights is not None:
        module = quantize(module, weights, group)
    module = allocated(module, dtype, device)
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
            attn_implementation: as ``_attn_implementation`` of `DeepseekV2Config`; no checkpoint says it.
            mla_form: as ``mla_form`` of `DeepseekV2Config`.
            revision: a branch, tag or commit on the Hub.
            token: for what is not public: on the Hub, or sent with the requests to an address.
            weights: quantise each tensor as it is read, as `dsv2_ref.quantize.quantize` does, to ``int8``, ``int4`` or
                ``fp8``; a float8 checkpoint keeps its codes and scales in the last. None does not.
            group: weights of a row that share a scale, for ``int4``.
            experts_of: ``(rank, ranks)``: read only the routed experts of one of so many ranks, for
                `dsv2_ref.parallel.parallelize_experts`; None reads all. Experts that are or become codes are not shared;
                those of a float8 checkpoint are, if ``weights`` is None.

        Raises:
            ValueError: for an argument or a configuration that is rejected, files that are cut or damaged, and a tensor
                that is missing, left over, of another shape or in another format; it names the file and the tensor.
            FileNotFoundError: for a source or a file of it that does not exist.
            OSError: for a server that fails.
            ImportError: for a name on the Hub without huggingface_hub.

        Memory: the layer, and its largest tensor once more; where tensors are quantised, the largest of those four times
        in float32.

        Source: the safetensors format; float8 blocks as in DeepSeek-V3's published ``inference/fp8_cast_bf16.py``.
        """

        def build(config: DeepseekV2Config) -> Any:
            return cls(config, layer_idx)  # type: ignore[call-arg]

        how = How(dtype, device, attn_implementation, mla_form, revision, token, weights, group, experts_of)
        layer: Self = load(build, source, f"model.layers.{layer_idx}.", how)
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
        layer: Self = _random(lambda: cls(config, layer_idx), config, weights, group, dtype, device)  # type: ignore[call-arg]
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
        how = How(dtype, device, attn_implementation, mla_form, revision, token, weights, group, experts_of)
        model: Self = load(cls, source, "", how)
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
        model: Self = _random(lambda: cls(config), config, weights, group, dtype, device)  # type: ignore[call-arg]
        return model

    def save_pretrained(self, folder: str | Path, max_shard_size: int = 5_000_000_000) -> None:
        """Write ``config.json`` and the weights under their published names, in shards of at most so many bytes (a
        larger tensor has one of its own), as transformers reads them. A quantised model becomes codes and scales,
        which `from_pretrained` alone reads.

        Raises:
            ValueError: for a model quantised in several ways, or not throughout a part, and for one that has a share of
                its experts.
        """
        save(self, Path(folder), max_shard_size)
