"""Bytes that are alive together in a computation of which only the sizes are known: no number is computed.

A `Ledger` hands out `Sized` stand-ins for tensors. Their bytes count from the moment they are made to the moment Python
forgets them, as those of real tensors do. With gradients, every operation also keeps what its derivative will read;
`Ledger.backward` goes through the operations in reverse and makes the gradients. Weights never appear: their bytes do not
depend on the call.
"""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush


class Storage:
    """Bytes that are alive as long as anyone holds this."""

    __slots__ = ("_ledger", "_size")

    def __init__(self, ledger: "Ledger", size: int) -> None:
        self._ledger, self._size = ledger, size
        ledger.alive += size
        ledger.peak = max(ledger.peak, ledger.alive)

    def __del__(self) -> None:
        self._ledger.alive -= self._size


class Sized:
    """Stands for a tensor of ``count`` numbers of ``width`` bytes; views share its storage."""

    __slots__ = ("count", "place", "step", "storage", "width")

    def __init__(self, storage: Storage | None, count: int, width: int) -> None:
        self.storage, self.count, self.width = storage, count, width
        self.step: _Step | None = None
        self.place = 0


Gradients = list[Sized | None]
Rule = Callable[[Gradients], Gradients]
"""From the gradients of an operation's results to those of its inputs."""


class _Step:
    """An operation that gradients will go back through."""

    __slots__ = ("edges", "kept", "order", "received", "rule")

    def __init__(self, order: int, inputs: Sequence[Sized], keep: Sequence[Sized], rule: Rule | None) -> None:
        self.order, self.rule = order, rule
        self.edges = [None if x.step is None else (x.step, x.place) for x in inputs]
        self.kept: list[Storage | None] = [x.storage for x in keep]
        self.received: dict[int, Sized] = {}


class Ledger:
    """Counts the bytes ``alive`` and the most there ever were, ``peak``; ``recording`` keeps what gradients need."""

    def __init__(self, recording: bool) -> None:
        self.recording = recording
        self.alive = self.peak = self._peak_when_kept = self._steps = 0

    def make(
        self, count: int, width: int, *inputs: Sized, keep: Sequence[Sized] = (), rule: Rule | None = None
    ) -> Sized:
        """A new tensor computed from ``inputs``, whose derivative reads what it is to ``keep``.

        ``rule`` makes the gradients of the inputs; by default each gets a new one of its own size.
        """
        if keep:
            self._peak_when_kept = self.peak
        return self._follow(Sized(Storage(self, count * width), count, width), inputs, keep, rule)

    def leaf(self, count: int, width: int, counted: bool = False) -> Sized:
        """A tensor from outside, whose own bytes are not ``counted``; its gradient's are."""
        x = self.make(count, width) if counted else Sized(None, count, width)
        x.step = self._step((), (), None) if self.recording else None
        return x

    def view(self, x: Sized, count: int | None = None, rule: Rule | None = None) -> Sized:
        """The same bytes or a part of them; by default the gradient is looked at differently as well."""
        part = Sized(x.storage, x.count if count is None else count, x.width)
        return self._follow(part, (x,), (), rule or _unchanged)

    def part(self, x: Sized, count: int) -> Sized:
        """A slice, whose gradient is as large as the whole."""
        return self.view(x, count, self.fresh(x))

    def reordered(self, x: Sized) -> Sized:
        """A transposed view, whose gradient is copied back into order."""
        return self.view(x, rule=self.fresh(x))

    def copied(self, x: Sized) -> Sized:
        """A copy in another order; its gradient is copied back."""
        return self.make(x.count, x.width, x)

    def split(self, x: Sized, *counts: int) -> list[Sized]:
        """Parts of the same bytes, whose gradients are put together in one new tensor."""
        parts = [Sized(x.storage, count, x.width) for count in counts]
        if self.recording and x.step is not None:
            step = self._step((x,), (), self.fresh(x))
            for place, part in enumerate(parts):
                part.step, part.place = step, place
        return parts

    def join(self, *parts: Sized) -> Sized:
        """One new tensor of all parts, which look at their shares of its gradient."""
        counts = [part.count for part in parts]

        def shares(gradients: Gradients) -> Gradients:
            whole = gradients[0]
            return [whole and Sized(whole.storage, count, whole.width) for count in counts]

        return self.make(sum(counts), parts[0].width, *parts, rule=shares)

    def cast(self, x: Sized, width: int) -> Sized:
        """The same numbers in another width, copied only where it is another."""
        return x if x.width == width else self.make(x.count, width, x)

    def mapped(self, x: Sized) -> Sized:
        """A function of every number that reads its argument, or what is as large, for the derivative."""
        return self.make(x.count, x.width, x, keep=[x])

    def scaled(self, x: Sized, *table: Sized) -> Sized:
        """Times a constant, or a table that has no gradient."""
        return self.make(x.count, x.width, x, keep=table)

    def softmax(self, x: Sized) -> Sized:
        """Reads its result for the derivative."""
        return self.with_result(self.make(x.count, x.width, x))

    def with_result(self, made: Sized) -> Sized:
        """The same, whose derivative reads the result as well."""
        if made.step is not None:
            made.step.kept.append(made.storage)
            self._peak_when_kept = self.peak
        return made

    def add(self, x: Sized, y: Sized) -> Sized:
        """A sum, whose gradient is that of both."""
        return self.make(x.count, max(x.width, y.width), x, y, rule=lambda gradients: [gradients[0], gradients[0]])

    def times(self, x: Sized, y: Sized) -> Sized:
        """Elementwise; a smaller factor is repeated, and its gradient summed from one of full size."""
        count, width = max(x.count, y.count), max(x.width, y.width)
        sizes = [(z.count, z.width, z.step is not None) for z in (x, y)]

        def rule(_: Gradients) -> Gradients:
            full = [self.make(count, width) if wants else None for _, _, wants in sizes]
            return [z and self._summed(z, *size[:2]) for z, size in zip(full, sizes, strict=True)]

        keep = [y] * sizes[0][2] + [x] * sizes[1][2]
        return self.make(count, width, x, y, keep=keep, rule=rule)

    def times_weight(self, x: Sized) -> Sized:
        """Every token times the same weights, whose gradient is summed from one of full size."""

        def rule(_: Gradients) -> Gradients:
            of_numbers, of_weights = self.make(count, width), self.make(count, width)
            del of_weights
            return [of_numbers]

        count, width = x.count, x.width
        return self.make(count, width, x, keep=[x], rule=rule)

    def linear(self, x: Sized, inputs: int, outputs: int, *groups: Sized) -> Sized:
        """A product with a weight matrix, which reads its input again for the weights' gradient."""
        return self.make(x.count // inputs * outputs, x.width, x, keep=[x, *groups])

    def product(self, x: Sized, y: Sized, count: int) -> Sized:
        """A matrix product of two tensors."""
        return self.make(count, x.width, x, y, keep=[x, y])

    def gathered(self, x: Sized, count: int, index: Sized) -> Sized:
        """Numbers that ``index`` chooses; their gradient is added into zeros."""
        size = x.count, x.width

        def rule(_: Gradients) -> Gradients:
            zeros = self.make(*size)
            return [self.make(zeros.count, zeros.width)]

        return self.make(count, x.width, x, keep=[index], rule=rule)

    def injected(self, x: Sized, loss: Sized) -> Sized:
        """The same bytes, through which a loss of one number is given its gradient as well."""
        width = loss.width
        view = Sized(x.storage, x.count, x.width)
        return self._follow(view, (x, loss), (), lambda gradients: [gradients[0], self.make(1, width)])

    def held(self, x: Sized, size: int) -> Sized:
        """The same bytes, beside so many that are held until the way back comes here."""
        if not (size and self.recording):
            return x
        beside = Sized(Storage(self, size), size, 1)
        return self._follow(Sized(x.storage, x.count, x.width), (x,), (beside,), _unchanged)

    def checkpointed(self, run: Callable[[Sized], Sized], x: Sized) -> Sized:
        """``run`` on ``x`` keeping nothing but ``x``; the way back runs it once more."""
        count, width = x.count, x.width
        storage = x.storage

        def rule(gradients: Gradients) -> Gradients:
            again = Sized(storage, count, width)
            again.step = leaf = self._step((), (), None)
            out = run(again)
            self.peak, out.storage = self._peak_when_kept, None  # it stops at the last number that it was for
            self.backward(out, gradients)
            return [leaf.received.get(0)]

        self.recording, recording = False, self.recording
        made = run(x)
        self.recording = recording
        return self._follow(made, (x,), (), rule)

    def backward(self, out: Sized, gradients: Gradients) -> None:
        """Go back from ``out``, the latest operation first; what an operation kept is let go when it is done.

        The gradient of ``out`` is taken from the list, so that no caller holds it longer than it is read.
        """
        gradient = gradients.pop()
        if out.step is None or gradient is None:
            return
        waiting: list[tuple[int, _Step]] = []
        self._receive(waiting, out.step, out.place, gradient)
        del gradient
        while waiting:
            step = heappop(waiting)[1]
            if step.rule is None:  # a leaf, which keeps what it received
                continue
            received, step.received = step.received, {}
            given = [received.get(place) for place in range(1 + max(received))]
            del received
            made = step.rule(given)
            del given
            step.kept, step.rule = [], None
            for edge in reversed(step.edges):
                part = made.pop()
                if edge is not None and part is not None:
                    self._receive(waiting, *edge, part)
                del part
            step.edges = []

    def _receive(self, waiting: list[tuple[int, _Step]], step: _Step, place: int, gradient: Sized) -> None:
        """Add to what has come for this result; a sum is a new tensor."""
        if not step.received:
            heappush(waiting, (-step.order, step))
        if place in step.received:
            gradient = self.make(gradient.count, gradient.width)
        step.received[place] = gradient

    def _follow(self, made: Sized, inputs: Sequence[Sized], keep: Sequence[Sized], rule: Rule | None) -> Sized:
        if self.recording and any(x.step is not None for x in inputs):
            made.step = self._step(inputs, keep, rule or self.fresh(*inputs))
        return made

    def fresh(self, *inputs: Sized) -> Rule:
        """A new gradient for every input that wants one."""
        sizes = [(x.count, x.width) if x.step is not None else None for x in inputs]
        return lambda _: [size and self.make(*size) for size in sizes]

    def _summed(self, gradient: Sized, count: int, width: int) -> Sized:
        gradient = self.cast(gradient, width)
        return gradient if gradient.count == count else self.make(count, width)

    def _step(self, inputs: Sequence[Sized], keep: Sequence[Sized], rule: Rule | None) -> _Step:
        self._steps += 1
        return _Step(self._steps, inputs, keep, rule)


def _unchanged(gradients: Gradients) -> Gradients:
    return gradients[:1]
