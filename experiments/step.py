"""One training step over time: bytes of activations that are alive, against the FLOPs that have been done.

The real layers run on fake tensors, as for `dsv2_ref.accounting.activation_peak`, and what all layers of a kind have in
common is measured once.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

import dsv2_ref.fast.products  # noqa: F401  # registers the grouped product
from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM
from dsv2_ref.accounting import Call
from dsv2_ref.accounting.activations import LiveBytes, as_run, checkpoint_in_place, without_memory

Curve = tuple[Sequence[int], Sequence[int]]
"""FLOPs done and bytes alive after each operation."""

ALIKE = 3
"""Layers of a kind that run: the first, one between, which stands for all between, and the last."""


def _grouped(rows: Tensor, weights: Tensor, *_: Any, **__: Any) -> int:
    return 2 * rows.shape[0] * weights.shape[1] * weights.shape[2]


def _outer(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


class Step(LiveBytes):
    """Notes after every operation the FLOPs of products so far as well, of causal attention only seen pairs."""

    def __init__(self, config: DeepseekV2Config, call: Call) -> None:
        super().__init__()
        self.value, self.pairs = config.v_head_dim, call.pairs
        self.flops: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.flops.append(self._of(func, args, kwargs or {}, out))
        return out

    def _of(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        name = func.name().split(".")[0]
        if name == "dsv2_ref::grouped_product":
            return _grouped(*args, **kwargs)
        if name == "dsv2_ref::grouped_outer":
            return _outer(*args, **kwargs)
        if name.startswith("aten::_scaled_dot_product_flash_attention"):
            # Values come filled up with zeros to the width of keys, which is not counted.
            query, keys, values = args[0], 1, 1
            if name.endswith("backward"):  # scores once more, and two products for each of the forward pass
                query, keys, values = args[1], 3, 2
            batch, heads, _, width = query.shape
            return int(2 * batch * heads * self.pairs * (keys * width + values * self.value))
        count = flop_registry.get(func.overloadpacket)
        return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def timeline(config: DeepseekV2Config, call: Call, mode: str | None) -> Curve:
    """A forward and a backward pass of a model whose dense layers come first, with its layers checkpointed (``full``,
    ``selective``) or not; without weights and their gradients."""
    config = as_run(config, call)
    kinds = [config.is_moe_layer(index) for index in range(config.num_hidden_layers)]
    order: list[int] = []
    run: list[int] = []  # which of the layers that run stands for each layer; their indices
    for moe in sorted(set(kinds)):
        first, number = len(run), kinds.count(moe)
        fewer = min(number, ALIKE)
        run += [kinds.index(moe) + i for i in range(fewer)]
        order += [first] + [first + 1] * (number - 2) * (number > 1) + [first + fewer - 1] * (number > 1)
    with without_memory(call, training=True):
        model = DeepseekV2ForCausalLM(replace(config, num_hidden_layers=1)).train()
        model.model.config = config  # that of the layers
        layers = [DeepseekV2DecoderLayer(config, index).train() for index in run]
        model.model.layers = nn.ModuleList(layers)
        ids = torch.zeros(call.batch, call.seq, dtype=torch.long)
        live = Step(config, call)
        starts: list[int] = []
        ends: dict[int, int] = {}

        def started(module: nn.Module, args: Any, kwargs: Any) -> None:
            index = len(starts)
            starts.append(len(live.totals))
            (x,) = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            x.register_hook(lambda gradient: ends.update({index: len(live.totals)}))

        started.looks_only = True  # type: ignore[attr-defined]  # so that layers share tables as without it
        for module in (*layers, model.model.norm):
            module.register_forward_pre_hook(started, with_kwargs=True)
        for layer in layers if mode else ():
            checkpoint_in_place(layer, str(mode))
        with live:
            out = model(ids)[0]
        gradient = torch.empty_like(out)
        with live:
            out.backward(gradient)
        for weight in model.parameters():
            if weight.grad is not None:
                live.leave_out(weight.grad)

    last = len(run)
    stretches = [(0, starts[0]), *((starts[i], starts[i + 1]) for i in order), (starts[last], ends[last])]
    stretches += [(ends[i + 1], ends[i]) for i in reversed(order)] + [(ends[0], len(live.totals))]
    changes = [after - before for before, after in zip([0, *live.totals], live.totals, strict=False)]
    done, alive = (
        [values[i] for i in chain(*(range(*each) for each in stretches))] for values in (live.flops, changes)
    )
    return list(accumulate(done)), list(accumulate(alive))


def thinned(curve: Curve, parts: int = 200) -> dict[float, float]:
    """The most bytes that were alive in each of so many equal stretches of FLOPs: GB, by the TFLOPs done."""
    done, alive = curve
    most: dict[int, int] = {}
    for flops, size in zip(done, alive, strict=True):
        part = flops * parts // done[-1]
        most[part] = max(most.get(part, 0), size)
    return {part / parts * done[-1] / 1e12: size / 1e9 for part, size in most.items()}
