"""Attention in bfloat16 on the CPU: each way of it, whichever this processor would choose, against the definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2_ref import ops
from dsv2_ref.attention import attend
from dsv2_ref.fast.cpu import attend_blocks, attend_in_float32, attend_rounded_up
from dsv2_ref.fast.processor import has_amx, has_bfloat16
from dsv2_ref.masks import Visibility

HEADS, WIDTH, VALUE_WIDTH, SCALE = 6, 24, 16, 0.2

MASKS: dict[str, Callable[[int, int], Tensor | None]] = {
    "causal": lambda seq, kv_seq: None,
    "padding": lambda seq, kv_seq: torch.arange(kv_seq) >= torch.tensor([[0], [3]]),
    "additive": lambda seq, kv_seq: torch.randn(2, 1, seq, kv_seq, dtype=torch.bfloat16),
    "per head": lambda seq, kv_seq: torch.rand(2, HEADS, seq, kv_seq) < 0.7,
}


def drawn(seq: int, kv_seq: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query = torch.randn(2, HEADS, seq, WIDTH, dtype=torch.bfloat16)
    room = -(-kv_seq // 64) * 64
    key = torch.randn(2, kv_heads, room, WIDTH, dtype=torch.bfloat16)[:, :, :kv_seq]
    return query, key, key[..., :VALUE_WIDTH]


@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("way", "seq", "kv_seq", "kv_heads"),
    [
        (attend_blocks, 300, 300, HEADS),  # more than one block of queries
        (attend_blocks, 5, 300, 2),
        (attend_rounded_up, 1, 70, 1),
        (attend_in_float32, 1, 70, 1),
        (attend_in_float32, 5, 70, 1),
    ],
)
def test_a_way_is_as_exact_as_the_definition(way: Any, mask: str, seq: int, kv_seq: int, kv_heads: int) -> None:
    query, key, value = drawn(seq, kv_seq, kv_heads)
    given = MASKS[mask](seq, kv_seq)
    visible = Visibility(seq, kv_seq, query.device, given)
    wide = (x.double() for x in (query, key, value))
    with ops.plain():
        rounded, _ = attend(query, key, value, visible, SCALE)
        exact, _ = attend(*wide, visible, SCALE)
    error, by_definition = (
        (x - exact).norm() / exact.norm() for x in (way(query, key, value, visible, SCALE)[0], rounded)
    )
    # A way may round the scores and the weights once more: 2⁻⁸ of scores that are a few units large.
    assert error < 2 * max(by_definition, 2**-8)


@torch.no_grad()
def test_the_processor_decides() -> None:
    query, key, value = drawn(5, 70, 1)
    with ops.watch() as choices:
        for implementation in ("sdpa", "products"):
            attend(query, key, value, Visibility(5, 70, query.device), SCALE, implementation=implementation)
    blocks = has_bfloat16() and not has_amx()
    assert [choice.way for choice in choices] == [
        "cpu blocks" if blocks else "sdpa",
        "products" if has_bfloat16() else "cpu float32",
    ]
