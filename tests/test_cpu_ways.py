"""Attention in bfloat16 on the CPU: each way of it, whichever this processor would choose, against the definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv2_ref import ops
from dsv2_ref.attention import attend
from dsv2_ref.fast import cpu
from dsv2_ref.fast.cpu import FEW_KEYS, attend_blocks, attend_fused, attend_in_float32, attend_rounded_up, rotate
from dsv2_ref.fast.processor import has_amx, has_bfloat16
from dsv2_ref.masks import Visibility
from dsv2_ref.rope import apply_rotary, rotary_tables

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
        (attend_fused, 1, 1, 1),
        (attend_fused, 1, 70, 1),
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


@torch.no_grad()
@pytest.mark.parametrize("kv_seq", [1, FEW_KEYS, FEW_KEYS + 1])
def test_one_query_is_fused_over_few_keys(kv_seq: int) -> None:
    query, key, value = drawn(1, kv_seq, 1)
    with ops.watch() as choices:
        attend(query, key, value, Visibility(1, kv_seq, query.device), SCALE, implementation="products")
        attend(query, key, value, Visibility(1, kv_seq, query.device), SCALE, 0.5, implementation="products")
        attend(query, key, key, Visibility(1, kv_seq, query.device), SCALE, implementation="products")
        attend(query, key, value.clone(), Visibility(1, kv_seq, query.device), SCALE, implementation="products")
        attend(query, key, value, Visibility(1, kv_seq, query.device), SCALE, dropout=0.5, implementation="products")
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            attend(query, key, value, Visibility(1, kv_seq, query.device), SCALE, implementation="products")
    fused = kv_seq <= FEW_KEYS or not has_bfloat16()
    served = [choice.way == "cpu fused query" for choice in choices]
    assert served == [fused, False, fused, False, False, False]


@torch.no_grad()
def test_without_bfloat16_products_one_query_is_always_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    query, key, value = drawn(1, FEW_KEYS + 1, 1)
    with ops.watch() as choices:
        attend(query, key, value, Visibility(1, FEW_KEYS + 1, query.device), SCALE, implementation="products")
    assert choices[0].way == "cpu fused query"


@torch.no_grad()
@pytest.mark.parametrize("seq", [1, 5])
def test_rotation_takes_any_layout_and_leaves_other_dtypes_to_the_definition(seq: int) -> None:
    torch.manual_seed(0)
    q_pe = torch.randn(2, HEADS, 8, seq).bfloat16().mT
    k_pe = torch.randn(2, 8, seq).bfloat16().mT
    cos, sin = rotary_tables(torch.arange(seq)[None], 8, 10000.0)
    for given in (
        (q_pe, k_pe, cos, sin),
        (q_pe, k_pe.float(), cos, sin),
        (q_pe, k_pe, cos.double(), sin.double()),
        (q_pe, k_pe, cos.bfloat16(), sin.bfloat16()),
    ):
        found = apply_rotary(*given)
        with ops.plain():
            expected = apply_rotary(*given)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("seq", [1, 5])
def test_complex_numbers_rotate_as_the_definition_does(seq: int, batch: int) -> None:
    """To the bit: real and imaginary part are the sums that the definition writes, in float32."""
    torch.manual_seed(0)
    q_pe = torch.randn(batch, seq, HEADS, 3 * 8).bfloat16().transpose(1, 2)[..., 16:]
    k_pe = torch.randn(batch, seq, 24).bfloat16()[..., 16:]
    tables = rotary_tables(torch.arange(100, 100 + seq).expand(batch, -1), 8, 10000.0)
    with ops.watch() as choices:
        found = apply_rotary(q_pe, k_pe, *tables)
    with ops.plain():
        expected = apply_rotary(q_pe, k_pe, *tables)
    assert choices[0].way == "cpu complex"
    for one, other in zip((*found, *rotate(q_pe, k_pe, *tables)), expected * 2, strict=True):
        assert torch.equal(one, other)
        assert one.shape == other.shape
