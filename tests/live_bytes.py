"""Bytes of live tensors, counted operation by operation on any device: what memory a call really takes."""

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Remembers after every operation which storages made since the mode was entered are alive.

    A storage is made by the first operation that returns it and did not take it. What an operation uses inside its own
    kernel is not seen. Where anyone watches, torch adds the bias of a product of strided rows into a new tensor; else it
    adds in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[dict[int, int]] = []
        self._made: dict[StorageWeakRef, tuple[int, int]] = {}
        self._numbers = itertools.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        taken = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and (storage := StorageWeakRef(made.untyped_storage())) not in taken:
                self._made[storage] = next(self._numbers), made.untyped_storage().nbytes()
        self.moments.append(self._alive())
        return out

    def _alive(self) -> dict[int, int]:
        """Bytes of every storage that is alive, by a number of its own: addresses are used again."""
        self._made = {storage: made for storage, made in self._made.items() if not storage.expired()}
        return dict(self._made.values())

    def now(self) -> int:
        """Bytes that are alive."""
        return sum(self._alive().values())

    def peak(self, without: Iterable[Tensor] = ()) -> int:
        """The most bytes that were alive together after any operation, those that ``without`` hold left out."""
        self._alive()
        left_out = {self._made[StorageWeakRef(x.untyped_storage())][0] for x in without}
        return max(sum(size for number, size in alive.items() if number not in left_out) for alive in self.moments)
