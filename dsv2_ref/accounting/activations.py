"""Bytes of activations that are alive at once, counted on the layer itself.

The real layer or model runs on the meta device, whose tensors have a shape, a dtype and a storage but no memory, and
every storage that it makes is counted while it is alive. No way made for one device serves there, neither for CPUs nor
the Triton kernels; the fused attention of torch does, which never writes its scores. ``flash_attention_2`` runs as
``sdpa``. This differs only for several queries over a cache, where ``sdpa`` makes a mask that flash-attn does not need.

Not counted: weights and their gradients, the optimizer, the input of a layer, the cache, the loss and its gradient, and
what an operation uses inside its own kernel: the most on CUDA is the softmax's gradient in ``eager``, which holds the
product of its two inputs, as large as the scores in float32. A sum of gradients counts as a new tensor, as it is where
operations are watched; autograd alone may add in place, and then needs less. A matrix that is both embedding and head
has two gradients to add, of which one and the sum count here.

All layers of a kind cost the same, so one of each kind is run: a model of any depth takes as long as a model of two.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import noop_context_fn

from dsv2_ref.accounting.call import Call, layers_alike
from dsv2_ref.accounting.sizes import Sizes
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.fast.sdpa import SCORES_AT_ONCE
from dsv2_ref.layer import DeepseekV2DecoderLayer
from dsv2_ref.model import DeepseekV2ForCausalLM
from dsv2_ref.recompute import CONTEXTS, checkpointed

MOST = 10_000
"""Experts of a layer, and blocks of queries, that are followed one by one at most."""


class LiveBytes(TorchDispatchMode):
    """Notes after every operation how many bytes are alive, ``now`` and in ``totals``.

    Counted are storages that were made while the mode was on, by the first operation that returns a storage without
    having taken it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.totals: list[int] = []
        self._alive: dict[int, tuple[int, int]] = {}  # made when, and how large

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._alive[storage._cdata] = (len(self.totals), storage.nbytes())
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.totals.append(self.now)
        return out

    def _freed(self, address: int) -> None:
        self.now -= self._alive.pop(address)[1]

    def add(self, size: int, start: int, stop: int | None = None) -> None:
        """Count ``size`` more bytes from the operation ``start`` up to ``stop``."""
        self.totals[start:stop] = [total + size for total in self.totals[start:stop]]

    def made(self, x: Shaped[Tensor, "..."]) -> tuple[int, int]:
        """The operation that made a tensor, which is alive, and the bytes of it."""
        return self._alive[x.untyped_storage()._cdata]

    def leave_out(self, x: Shaped[Tensor, "..."]) -> None:
        """Do not count a tensor, which is alive, since it was made."""
        start, size = self.made(x)
        self.add(-size, start)


def _attention(
    query: Tensor, *others: Tensor, attn_mask: Tensor | None = None, enable_gqa: bool = False, **options: Any
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # kernels add masks
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, *others, attn_mask=attn_mask, **options)[0]


def _dropout(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    return torch.native_dropout(x, p, training)[0]


FUSED: dict[Any, Any] = {F.scaled_dot_product_attention: _attention, F.dropout: _dropout}


class Fused(TorchFunctionMode):
    """Lets attention and dropout run as the single operations that they are on an accelerator. The meta device would
    take them apart, and write all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return FUSED.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def without_memory(call: Call, training: bool = False) -> Iterator[None]:
    """Inside the ``with`` block modules and tensors are made on the meta device, in the dtype of a call, and run with
    what gradients need only in training."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, call.dtype))
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(training), torch.device("meta"), Fused():
            yield
    finally:
        torch.set_default_dtype(before)


def _require_followable(config: DeepseekV2Config, call: Call) -> None:
    """Raise OverflowError for a call of more steps than anyone waits for."""
    s, absorbed = Sizes.of(config), config.use_mla and call.form == "absorbed"
    blocks = 0
    if config._attn_implementation != "eager" and (absorbed or call.kv > call.seq):
        scores = call.batch * call.seq * call.kv * (s.H if absorbed else 1)
        blocks = min(call.seq, scores // SCORES_AT_ONCE)
    for what, number in (("experts", s.E), ("blocks of queries", blocks)):
        if number > MOST:
            raise OverflowError(f"{number:,} {what}: at most {MOST:,} can be followed")


def as_run(config: DeepseekV2Config, call: Call) -> DeepseekV2Config:
    """The configuration of the layers that run in place of those that are counted."""
    implementation = "eager" if config._attn_implementation == "eager" else "sdpa"
    # What a tied head takes more is added by `_of_model`.
    return replace(config, mla_form=call.form, _attn_implementation=implementation, tie_word_embeddings=False)


def layer_and_cache(config: DeepseekV2Config, call: Call, layer_idx: int) -> tuple[DeepseekV2DecoderLayer, Any]:
    """A layer, and its cache before a call, with room for the new tokens; or None."""
    layer, past = DeepseekV2DecoderLayer(config, layer_idx), call.kv - call.seq
    if past == 0:
        return layer, None
    cache = layer.self_attn.empty_cache(call.batch, capacity=call.kv + 1)
    return layer, cache.append(torch.zeros(call.batch, past, *layer.self_attn.cache_features))


def _count(live: LiveBytes, module: nn.Module, run: Callable[[], Tensor], training: bool) -> None:
    """Count a call, and in training its backward pass, less the weights' gradients."""
    with live:
        out = run()
    if training:
        gradient = torch.empty_like(out)
        with live:
            out.backward(gradient)
        for weight in module.parameters():
            if weight.grad is not None:
                live.leave_out(weight.grad)


def checkpoint_in_place(layer: DeepseekV2DecoderLayer, mode: str) -> None:
    """Checkpoint a layer that runs `without_memory`."""

    def contexts() -> tuple[Any, Any]:
        first, again = CONTEXTS.get(mode, noop_context_fn)()
        return first, _both(again, Fused())  # function modes are off in a backward pass

    run: Any = checkpointed(layer.forward, mode, preserve_rng_state=False, context_fn=contexts)
    run.looks_only = True  # it hands on what it is given
    layer.forward = run


@contextmanager
def _both(one: AbstractContextManager[Any], other: AbstractContextManager[Any]) -> Iterator[None]:
    with one, other:
        yield


def _of_layer(
    config: DeepseekV2Config, call: Call, layer_idx: int, training: bool, checkpointing: str | None
) -> LiveBytes:
    layer, cache = layer_and_cache(config, call, layer_idx)
    x = torch.zeros(call.batch, call.seq, config.hidden_size, requires_grad=training)
    layer.train(training)
    if checkpointing:
        checkpoint_in_place(layer, checkpointing)
    live = LiveBytes()
    _count(live, layer, lambda: layer(x, past_key_value=cache)[0], training)
    return live


def _of_model(config: DeepseekV2Config, call: Call, training: bool, checkpointing: str | None, tied: bool) -> LiveBytes:
    """The last layer of each kind runs. What the layers before it keep for the backward pass is added while it runs; no
    other layer of its kind has as much beside it."""
    (last, alike), *others = layers_alike(config)
    model = DeepseekV2ForCausalLM(replace(config, num_hidden_layers=1))
    model.model.config = config  # that of the layers, which come next
    layers, caches = zip(*(layer_and_cache(config, call, i) for i in (last, *(i for i, _ in others))), strict=True)
    model.model.layers = nn.ModuleList(layers)
    model.train(training)
    ids = torch.zeros(call.batch, call.seq, dtype=torch.long)

    # When each layer starts, and the norm after the last: operations so far, and bytes alive. When the backward pass of
    # a layer is over: operations so far.
    live = LiveBytes()
    starts: list[tuple[int, int]] = []
    ends: dict[int, int] = {}

    def started(module: nn.Module, args: Any, kwargs: Any) -> None:
        index = len(starts)
        starts.append((len(live.totals), live.now))
        if training:
            (x,) = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            x.register_hook(lambda gradient: ends.update({index: len(live.totals)}))

    started.looks_only = True  # type: ignore[attr-defined]  # so that layers share tables as without it
    for module in (*layers, model.model.norm):
        module.register_forward_pre_hook(started, with_kwargs=True)
    for layer in layers if checkpointing else ():
        checkpoint_in_place(layer, str(checkpointing))
    past = caches if call.kv > call.seq else None
    _count(live, model, lambda: model(ids, past_key_values=past)[0], training)

    kept = [after - before for (_, before), (_, after) in pairwise(starts)]
    # All layers before the first that runs are of its kind or the other; all between the two are of the other.
    skipped = [(alike - 1) * kept[0] + (last + 1 - alike) * kept[-1]]
    skipped += [(index - last - 1) * kept[-1] for index, _ in others]
    for index, size in enumerate(skipped):
        live.add(size, starts[index][0], ends.get(index))
    head, embedding = model.lm_head.weight.grad, model.model.embed_tokens.weight.grad
    if tied and head is not None and embedding is not None:  # the first waits for the second, and both are added
        start, size = live.made(head)
        live.add(size, start)
        live.totals.append(live.totals[live.made(embedding)[0]] + size)
    return live


def peak(config: DeepseekV2Config, call: Call, layer_idx: int | None, training: bool, checkpointing: str | None) -> int:
    """See `activation_peak`, which has checked the arguments and chosen the form."""
    _require_followable(config, call)
    tied, config = config.tie_word_embeddings, as_run(config, call)
    try:
        with without_memory(call, training):
            if layer_idx is None:
                live = _of_model(config, call, training, checkpointing, tied)
            else:
                live = _of_layer(config, call, layer_idx, training, checkpointing)
    except RuntimeError as error:
        if "overflow" not in str(error).lower():
            raise
        raise OverflowError(f"the call is too large for torch: {error}") from error
    return max(live.totals)
