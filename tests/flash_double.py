"""flash-attn's own Python front end, over a double of the one module of it that is compiled for GPUs.

The double checks arguments as `flash_api.cpp` of flash-attn 2.8.3 does, and computes in float32 on the CPU. Memory that the
kernels leave unwritten holds NaN here, so that whoever reads it is found out.
"""

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

FRONT_END = Path(__file__).parent.parent / ".venv" / "flash-attn"
"""Where `make` installs it: on no path but that of these tests, as it cannot be imported without its compiled module."""


class CheckError(RuntimeError):
    """What the compiled module refuses."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


def _check_all(q: Tensor, k: Tensor, v: Tensor, width: int) -> None:
    check(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    check(k.dtype == q.dtype, "query and key must have the same dtype")
    check(v.dtype == q.dtype, "query and value must have the same dtype")
    check(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    check(width <= 256, "FlashAttention forward only supports head dimension at most 256")
    check(width % 8 == 0, "query, key, value, and out_ must have a head_size that is a multiple of 8")
    check(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")


def _weights(q: Tensor, k: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Of one sequence, (heads, seq, width), causal from the bottom right; zeros for a query without keys. And log-sum-exp."""
    scores = q @ k.mT * scale
    if causal:
        queries, keys = scores.shape[-2:]
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    blind = scores.isneginf().all(dim=-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(dim=-1).masked_fill(blind, 0), scores.logsumexp(dim=-1)


def _by_head(heads: int, *tensors: Tensor) -> list[Tensor]:
    """(seq, heads, width) to (heads, seq, width), in float32, every head with keys and values of its own."""
    swapped = [x.float().transpose(0, 1) for x in tensors]
    return [x.repeat_interleave(heads // len(x), dim=0) for x in swapped]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = _by_head(q.shape[1], q, k, v)
    weights, logs = _weights(q, k, scale, causal)
    return (weights @ v).transpose(0, 1), logs


class Double(ModuleType):
    """Stands for ``flash_attn_2_cuda``; ``calls`` holds the names of what was called."""

    def __init__(self) -> None:
        super().__init__("flash_attn_2_cuda")
        self.calls: list[str] = []

    def fwd(
        self, q: Tensor, k: Tensor, v: Tensor, out: None, alibi: None, dropout: float, scale: float, causal: bool,
        left: int, right: int, softcap: float, return_softmax: bool, generator: None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.calls.append("fwd")
        batch, width = len(q), q.shape[-1]
        _check_all(q, k, v, width)
        for name, x in (("k", k), ("v", v)):
            check(x.shape == (batch, k.shape[1], k.shape[2], width), f"{name} must have shape (..., {width})")
        check(dropout == 0, "the double has no dropout")
        parts = [_attend(*sequence, scale, causal) for sequence in zip(q, k, v, strict=True)]
        out_, logs = (torch.stack(x) for x in zip(*parts, strict=True))
        return torch.empty_like(q).copy_(out_), logs, q.new_empty(0), torch.zeros(2, dtype=torch.int64)

    def varlen_fwd(
        self, q: Tensor, k: Tensor, v: Tensor, out: None, q_ends: Tensor, k_ends: Tensor, used: None, left_pad: None,
        table: None, alibi: None, max_q: int, max_k: int, dropout: float, scale: float, zero: bool, causal: bool,
        left: int, right: int, softcap: float, return_softmax: bool, generator: None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.calls.append("varlen_fwd")
        total, heads, _ = q.shape
        _check_varlen(q, k, v, q_ends, k_ends, max_q, max_k)
        check(dropout == 0, "the double has no dropout")
        result, logs = torch.full(q.shape, float("nan")), torch.full((heads, total), float("nan"))
        for queries, keys in _sequences(q, k, q_ends, k_ends, max_q):
            part, log = _attend(q[queries], k[keys], v[keys], scale, causal and max_q > 1)
            result[queries], logs[:, queries] = part, log
        return result.to(q.dtype), logs, q.new_empty(0), torch.zeros(2, dtype=torch.int64)

    def bwd(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, alibi: None, dropout: float, scale: float, causal: bool, left: int, right: int, softcap: float,
        deterministic: bool, generator: None, state: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.calls.append("bwd")
        check(dout.dtype == q.dtype, "query and dout must have the same dtype")
        for place in range(len(q)):
            given = q[place], k[place], v[place]
            _differentiate(given, dout[place], (dq[place], dk[place], dv[place]), scale, causal)
        return dq, dk, dv, torch.empty_like(logs)

    def varlen_bwd(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, q_ends: Tensor, k_ends: Tensor, alibi: None, max_q: int, max_k: int, dropout: float, scale: float,
        zero: bool, causal: bool, left: int, right: int, softcap: float, deterministic: bool, generator: None,
        state: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.calls.append("varlen_bwd")
        _check_varlen(q, k, v, q_ends, k_ends, max_q, max_k)
        check(dout.dtype == q.dtype, "query and dout must have the same dtype")
        for grad in (dq, dk, dv):
            grad.fill_(float("nan"))
        for queries, keys in _sequences(q, k, q_ends, k_ends, 0):  # the backward goes by the ends, always
            given = q[queries], k[keys], v[keys]
            _differentiate(given, dout[queries], (dq[queries], dk[keys], dv[keys]), scale, causal)
        return dq, dk, dv, torch.empty_like(logs)


def _check_varlen(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, max_q: int, max_k: int) -> None:
    _check_all(q, k, v, q.shape[-1])
    for name, ends in (("cu_seqlens_q", q_ends), ("cu_seqlens_k", k_ends)):
        check(ends.dtype == torch.int32, f"{name} must have dtype int32")
        check(ends.is_contiguous(), f"{name} must be contiguous")
    for name, x in (("k", k), ("v", v)):
        check(x.shape == (len(k), k.shape[1], q.shape[-1]), f"{name} must have shape (..., {q.shape[-1]})")
    check(q_ends.shape == k_ends.shape, "cu_seqlens_k must have shape (batch_size + 1)")
    # Not checked by the real one, which then leaves rows out without a word.
    check(int(q_ends.diff().max()) <= max_q, "a sequence of queries is longer than max_seqlen_q")
    check(int(k_ends.diff().max()) <= max_k, "a sequence of keys is longer than max_seqlen_k")


def _sequences(q: Tensor, k: Tensor, q_ends: Tensor, k_ends: Tensor, max_q: int) -> list[tuple[slice, slice]]:
    """Rows of each sequence; with one query and grouped heads a row is taken by its number, whatever the ends say."""
    batch = len(q_ends) - 1
    by_number = max_q == 1 and q.shape[1] > k.shape[1]
    check(not by_number or len(q) == batch, f"shape is invalid for input: {len(q)} rows for {batch} sequences")
    queries = list(range(batch + 1)) if by_number else q_ends.tolist()
    ends = zip(queries, queries[1:], k_ends.tolist(), k_ends.tolist()[1:], strict=False)
    return [(slice(first, last), slice(start, stop)) for first, last, start, stop in ends]


def _differentiate(
    given: tuple[Tensor, ...], dout: Tensor, into: tuple[Tensor, ...], scale: float, causal: bool
) -> None:
    """The gradients written out: inside an operator autograd sees nothing."""
    heads, kv_heads = given[0].shape[1], given[1].shape[1]
    q, k, v, dout = _by_head(heads, *given, dout)
    weights, _ = _weights(q, k, scale, causal)
    by_weight = dout @ v.mT
    by_score = weights * (by_weight - (weights * by_weight).sum(dim=-1, keepdim=True)) * scale
    by_key, by_value = by_score.mT @ q, weights.mT @ dout
    for grad, place in zip((by_score @ k, by_key, by_value), into, strict=True):
        shared = grad if len(grad) == place.shape[1] else grad.unflatten(0, (kv_heads, -1)).sum(dim=1)
        place.copy_(shared.transpose(0, 1))


@functools.cache
def _front_end() -> tuple[dict[str, ModuleType], Double]:
    """Its modules, imported once a process, and the double they hold; out of ``sys.modules`` again."""
    before, double = set(sys.modules), Double()
    sys.path.insert(0, str(FRONT_END))
    sys.modules["flash_attn_2_cuda"] = double
    try:
        interface = importlib.import_module("flash_attn.flash_attn_interface")
    finally:
        sys.path.remove(str(FRONT_END))
        ours = {name: module for name, module in sys.modules.items() if name.split(".")[0].startswith("flash_attn")}
        for name in ours.keys() - before:
            del sys.modules[name]
    for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
        operator = getattr(interface, f"_flash_attn_{name}")
        operator.register_kernel("cpu", operator._init_fn)  # the front end's own body, where it is for CUDA alone
    return ours, double


def install_front_end(monkeypatch: pytest.MonkeyPatch) -> Double:
    """Make ``import flash_attn`` give the real front end over the double, and CPU tensors pass for CUDA ones, in one test."""
    if not (FRONT_END / "flash_attn").exists():
        missing = "the front end of flash-attn is not installed: make .venv/flash-attn/installed"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    if "flash_attn_2_cuda" not in sys.modules and importlib.util.find_spec("flash_attn_2_cuda") is not None:
        pytest.skip("flash-attn itself is installed: tests/cuda compares with it")
    modules, double = _front_end()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("dsv2_ref.checks.FLASH_DEVICES", ("cpu", "cuda"))
    double.calls.clear()
    return double
