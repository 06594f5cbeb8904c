"""What a `Ledger` writes on: stand-ins for tensors, and the operations that gradients will go back through."""

from collections.abc import Callable, Sequence


class Meter:
    """Counts the bytes ``alive`` and the most there ever were, ``peak``."""

    def __init__(self) -> None:
        self.alive = self.peak = 0


class Storage:
    """Bytes that are alive as long as anyone holds this."""

    __slots__ = ("_meter", "_size")

    def __init__(self, meter: Meter, size: int) -> None:
        self._meter, self._size = meter, size
        meter.alive += size
        meter.peak = max(meter.peak, meter.alive)

    def __del__(self) -> None:
        self._meter.alive -= self._size


class Sized:
    """Stands for a tensor of ``count`` numbers of ``width`` bytes; views share its storage."""

    __slots__ = ("count", "place", "step", "storage", "width")

    def __init__(self, storage: Storage | None, count: int, width: int) -> None:
        self.storage, self.count, self.width = storage, count, width
        self.step: Step | None = None
        self.place = 0


Gradients = list[Sized | None]
Rule = Callable[[Gradients], Gradients]
"""From the gradients of an operation's results to those of its inputs."""


class Step:
    """An operation that gradients will go back through."""

    __slots__ = ("checkpoint", "edges", "kept", "order", "place", "received", "rule", "sizes")

    def __init__(self, order: int, inputs: Sequence[Sized], rule: Rule | None) -> None:
        self.order, self.rule = order, rule
        self.edges = [None if x.step is None else (x.step, x.place) for x in inputs]
        self.sizes = [(x.count, x.width) for x in inputs]
        self.kept: list[Storage | None] = []
        self.received: dict[int, Sized] = {}
        self.checkpoint: Checkpoint | None = None
        self.place = 0


class Checkpoint:
    """Operations of which only the ``taken`` numbers are kept, until the last of them is gone back through.

    The first of them that reads something computes ``again`` what all of them read.
    """

    def __init__(self, taken: Storage | None, again: Callable[[], None]) -> None:
        self.taken = taken
        self.again: Callable[[], None] | None = again
        self.steps: list[Step] = []

    def hand_over(self, place: int) -> list[Storage | None]:
        """What the operation at this place reads, which nobody else holds."""
        if self.again is not None:
            again, self.again, self.steps = self.again, None, []
            again()
        step = self.steps[place]
        kept, step.kept = step.kept, []
        return kept
