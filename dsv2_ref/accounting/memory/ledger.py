"""Bytes that are alive together in a computation of which only the sizes are known: no number is computed.

A `Ledger` hands out `Sized` stand-ins for tensors. Their bytes count from the moment they are made to the moment Python
forgets them, as those of real tensors do. With gradients, every operation also keeps what its derivative will read;
`Ledger.backward` goes through the operations in reverse and makes the gradients. Weights never appear: their bytes do not
depend on the call.
"""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from dsv2_ref.accounting.memory.tape import Checkpoint, Gradients, Meter, Rule, Sized, Step, Storage


class Ledger(Meter):
    """Counts bytes as they come and go; ``recording`` keeps what gradients need."""

    def __init__(self, recording: bool) -> None:
        super().__init__()
        self.recording = recording
        self._peak_when_kept = self._steps = 0
        self._checkpoint: Checkpoint | None = None

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
        x.step = self._step((), None) if self.recording else None
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
            step = self._step((x,), self.fresh(x))
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
            self._keep(made.step, made)
            self._peak_when_kept = self.peak
        return made

    def add(self, x: Sized, y: Sized) -> Sized:
        """A sum, whose gradient is that of both."""
        return self.make(x.count, max(x.width, y.width), x, y, rule=lambda gradients: [gradients[0], gradients[0]])

    def subtract(self, x: Sized, y: Sized) -> Sized:
        """A difference, whose gradient is that of ``x`` and, in a new tensor with the other sign, that of ``y``."""

        def rule(gradients: Gradients) -> Gradients:
            return [gradients[0], self.make(y_count, y_width)]

        y_count, y_width = y.count, y.width
        return self.make(x.count, max(x.width, y.width), x, y, rule=rule)

    def times(self, x: Sized, y: Sized) -> Sized:
        """Elementwise; a smaller factor is repeated, and has a gradient of full size."""
        count, width = max(x.count, y.count), max(x.width, y.width)
        wants = [z.step is not None for z in (x, y)]

        def rule(_: Gradients) -> Gradients:
            return [self.make(count, width) if wanted else None for wanted in wants]

        keep = [y] * wants[0] + [x] * wants[1]
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
        """``run`` on ``x`` keeping nothing but ``x``; the way back runs it once more when it first wants more."""
        if not self.recording:
            return run(x)
        count, width = x.count, x.width

        def again() -> None:
            taken = Sized(checkpoint.taken, count, width)
            taken.step = self._step((), None)
            self._checkpoint = checkpoint
            run(taken)
            self._checkpoint = None
            self.peak = self._peak_when_kept  # it stops at the last number that it was for

        self._checkpoint = checkpoint = Checkpoint(x.storage, again)
        made = run(x)
        self._checkpoint = None
        return made

    def backward(self, out: Sized) -> None:
        """Go back from ``out``, whose gradient comes from outside; what an operation kept is let go when it is done."""
        if out.step is None:
            return
        waiting: list[tuple[int, Step]] = []
        self._receive(waiting, out.step, out.place, Sized(None, out.count, out.width))
        while waiting:  # the latest operation first
            step = heappop(waiting)[1]
            if step.rule is None:  # a leaf, which keeps what it received
                continue
            received, step.received = step.received, {}
            given = [received.get(place) for place in range(1 + max(received))]
            del received
            if step.checkpoint is not None:
                step.kept = step.checkpoint.hand_over(step.place)
            made = step.rule(given)
            if step.checkpoint is not None:
                step.kept, step.checkpoint = [], None
            for place, size in enumerate(step.sizes):
                made[place] = self._fitted(made[place], *size)
            del given
            step.kept, step.rule = [], None
            for edge in reversed(step.edges):
                part = made.pop()
                if edge is not None and part is not None:
                    self._receive(waiting, *edge, part)
                del part
            step.edges = []

    def _receive(self, waiting: list[tuple[int, Step]], step: Step, place: int, gradient: Sized) -> None:
        """Add to what has come for this result; a sum is a new tensor."""
        if not step.received:
            heappush(waiting, (-step.order, step))
        if place in step.received:
            gradient = self.make(gradient.count, gradient.width)
        step.received[place] = gradient

    def _follow(self, made: Sized, inputs: Sequence[Sized], keep: Sequence[Sized], rule: Rule | None) -> Sized:
        if self.recording and any(x.step is not None for x in inputs):
            made.step = self._step(inputs, rule or self.fresh(*inputs))
            self._keep(made.step, *keep)
        return made

    def fresh(self, *inputs: Sized) -> Rule:
        """A new gradient for every input that wants one."""
        sizes = [(x.count, x.width) if x.step is not None else None for x in inputs]
        return lambda _: [size and self.make(*size) for size in sizes]

    def _fitted(self, gradient: Sized | None, count: int, width: int) -> Sized | None:
        """As large and as wide as what it is the gradient of: summed where that was repeated, and cast."""
        if gradient is None:
            return None
        if gradient.count != count:
            gradient = self.make(count, gradient.width)
        return self.cast(gradient, width)

    def _step(self, inputs: Sequence[Sized], rule: Rule | None) -> Step:
        self._steps += 1
        step = Step(self._steps, inputs, rule)
        if self._checkpoint is not None:
            step.place = len(self._checkpoint.steps)
            self._checkpoint.steps.append(step)
        return step

    def _keep(self, step: Step, *read: Sized) -> None:
        """Hold what the derivative will read, or know where to get it."""
        if not read:
            return
        if self._checkpoint is not None and self._checkpoint.again is not None:
            step.checkpoint = self._checkpoint
        else:
            step.kept += [x.storage for x in read]


def _unchanged(gradients: Gradients) -> Gradients:
    return gradients[:1]
