"""A pass in sizes, and the operations that all parts of a layer share: norm, rotation, feed-forward network."""

from dataclasses import dataclass

from dsv2_ref.accounting.memory.ledger import Ledger
from dsv2_ref.accounting.memory.tape import Gradients, Sized
from dsv2_ref.config import DeepseekV2Config

Tables = tuple[Sized, Sized]
"""Cosines and sines."""

INTEGER = 8
"""Bytes of an index."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Sizes of a pass: ``batch`` sequences of ``seq`` new tokens over ``kv``, in numbers of ``width`` bytes."""

    config: DeepseekV2Config
    batch: int
    seq: int
    kv: int
    width: int
    absorbed: bool

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return self.batch * self.seq

    @property
    def wide(self) -> int:
        """Bytes of a number where at least float32 is used."""
        return max(4, self.width)

    @property
    def whole(self) -> bool:
        """Whether a fused kernel takes all queries at once, and no mask."""
        return self.seq == self.kv or self.config._attn_implementation == "flash_attention_2"

    @property
    def eager(self) -> bool:
        """Whether all scores of a layer are held at once."""
        return self.config._attn_implementation == "eager"


def norm(ledger: Ledger, x: Sized, features: int, wide: int) -> Sized:
    """Root-mean-square normalisation of tokens of so many features, in numbers of ``wide`` bytes inside."""
    tokens, width = x.count // features, x.width
    x = ledger.cast(x, wide)
    x = ledger.times(x, _root_mean_square(ledger, x, tokens))
    return ledger.times_weight(ledger.cast(x, width))


def _root_mean_square(ledger: Ledger, x: Sized, tokens: int) -> Sized:
    mean = ledger.make(tokens, x.width, _square(ledger, x))
    return ledger.softmax(ledger.make(tokens, x.width, mean))


def _square(ledger: Ledger, x: Sized) -> Sized:
    count, width = x.count, x.width

    def rule(_: Gradients) -> Gradients:
        twice = [ledger.make(count, width) for _ in range(2)]
        return [ledger.make(twice[0].count, width)]

    return ledger.make(count, width, x, keep=[x], rule=rule)


def rotated(ledger: Ledger, x: Sized, tables: Tables) -> Sized:
    """Pairs turned by their angles, in the width of the tables inside."""
    width, half = x.width, x.count // 2
    first, second = ledger.split(ledger.cast(x, tables[0].width), half, half)
    cos, sin = tables
    turned = ledger.join(
        ledger.subtract(ledger.scaled(first, cos), ledger.scaled(second, sin)),
        ledger.add(ledger.scaled(first, sin), ledger.scaled(second, cos)),
    )
    return ledger.cast(turned, width)


def mlp(ledger: Ledger, x: Sized, hidden: int, wide: int) -> Sized:
    """SwiGLU of ``wide`` features between."""
    gated = ledger.times(
        ledger.mapped(ledger.linear(x, hidden, wide)),
        ledger.linear(x, hidden, wide),
    )
    return ledger.linear(gated, wide, hidden)
