"""Training in less memory: what a layer keeps for the backward pass is dropped, and
computed once more when it is due.

Modes: ``full`` keeps the input of each layer and runs all of it again. ``selective``
keeps also what `SAVED` lists, which is then not run again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.module_tracker import ModuleTracker

from dsv2_ref import ops
from dsv2_ref.checks import CHECKPOINTING, require

SAVED = frozenset(
    {
        # The router's choice. Its scores may come out differently the second time, and
        # then a token's gradients would belong to experts that it never met.
        "aten::topk",
        # The order of affinities, by which token dropping decides.
        "aten::sort",
        # Fused attention: T · K products for an output of T rows.
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "flash_attn::_flash_attn_forward",
        # What came from other devices: it is not sent again.
        "_c10d_functional::all_to_all_single",
    }
)
"""Operations whose results ``selective`` keeps."""


def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether the result of an operation is kept, as torch asks for each."""
    saved = operation.name().split(".")[0] in SAVED
    if saved and operation.name().startswith("aten::sort"):
        saved = args[0].is_floating_point()  # whole numbers come out the same
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


CONTEXTS = {"selective": partial(create_selective_checkpoint_contexts, policy)}
"""By mode, what makes the contexts of the forward pass and of its repetition."""


def checkpointed(
    layer: Callable[..., Any], mode: str = "full", **options: Any
) -> Callable[..., Any]:
    """A function that calls the layer, and calls it once more in the backward pass.

    The second call has the random numbers, the autocast and the ways of computing of
    the first.

    Args:
        layer: any module or function, called with the same arguments.
        mode: ``full`` or ``selective``.
        options: further ones of ``torch.utils.checkpoint.checkpoint``.

    Raises:
        ValueError: for another mode.
        RuntimeError: torch's ``CheckpointError``, in the backward pass, where something
            has another shape the second time. What has the same shape and other values
            goes unnoticed.
    """
    require(mode in CHECKPOINTING, "mode", mode, " or ".join(CHECKPOINTING))

    if mode in CONTEXTS:
        options = {"context_fn": CONTEXTS[mode]} | options

    def run(*args: Any, **kwargs: Any) -> Any:
        again = layer if is_compiling() else ops.as_now(layer)
        return checkpoint(again, *args, use_reentrant=False, **options, **kwargs)

    return run


_TRACKER = ModuleTracker()  # not entered, so that it tracks nothing: it only tells


def is_recomputing() -> bool:
    """Whether this is a backward pass, in which a forward pass is a repetition: what a
    forward hook counts has been counted."""
    return not is_compiling() and _TRACKER.is_bw  # compiled code runs each hook once


class GradientCheckpointing(nn.Module):
    """Base of models that can checkpoint their layers; names as in transformers."""

    gradient_checkpointing: str | None = None  #: the mode, or None

    def gradient_checkpointing_enable(self, mode: str = "full") -> None:
        """Checkpoint every layer, in training and without caches; see `checkpointed`.

        Raises:
            ValueError: unless the mode is ``full`` or ``selective``.
        """
        require(mode in CHECKPOINTING, "mode", mode, " or ".join(CHECKPOINTING))
        self._set(mode)

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything again."""
        self._set(None)

    def _set(self, mode: str | None) -> None:
        for module in self.modules():
            if isinstance(module, GradientCheckpointing):
                module.gradient_checkpointing = mode
