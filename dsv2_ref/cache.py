"""What a layer caches of each token between calls, and how many bytes that is."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dsv2_ref import checks


@dataclass
class _Storage:
    """Room for tokens, shared by all caches that grew out of one another; the first
    ``used`` places are taken, the others hold zeros."""

    buffer: Tensor
    used: int


class LayerCache:
    """The first ``length`` tokens of a storage: a value that never changes, so that an
    old cache can be continued again.

    `append` writes after the cached tokens in place, without copying them, and returns
    a longer cache over the same storage. It copies when the storage is full (then with
    room for a quarter more), when another cache has already been continued from here,
    and when derivatives are wanted, which writing in place would lose.

    Attributes:
        layer_idx: index of the layer that the tokens belong to.
        length: number of cached tokens of each sequence: rows in memory.
        seen: number of tokens that have passed, those dropped since (`keep`) included:
            the position of the next one.
        tokens: everything cached, ``(batch, length, *features)``; only to be read.
        stored: the same as it lies in memory; a view, only to be read.
        record: how a token lies there in fewer bits (`Record`), or None.

    Use `LatentCache` for multi-head latent attention and `KeyValueCache` for multi-head
    attention.
    """

    def __init__(
        self,
        layer_idx: int,
        stored: Shaped[Tensor, "batch kv_seq *stored"],
        _storage: _Storage | None = None,
        seen: int | None = None,
        record: Any = None,
    ) -> None:
        if _storage is None and not getattr(stored, "ndim", 0) >= 3:
            checks.stored_tokens(stored)
        self.layer_idx, self.length, self.stored = layer_idx, stored.shape[1], stored
        self.seen = self.length if seen is None else seen
        self._storage = _storage or _Storage(stored, self.length)
        self.record = record
        if record is None:
            self.tokens = stored

    @classmethod
    def empty(
        cls,
        layer_idx: int,
        batch: int,
        features: tuple[int, ...],
        *,
        capacity: int = 0,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Self:
        """A cache without tokens, with room for ``capacity`` of each sequence.

        ``features`` is (C + R,) for MLA and (2, heads, head_dim) for MHA.

        Raises:
            ValueError: for a batch below 1, a capacity below 0, and for features that
                are no tuple.
        """
        checks.cache_sizes(batch, capacity, features)
        buffer = torch.zeros(batch, capacity, *features, dtype=dtype, device=device)
        return cls(layer_idx, buffer[:, :0], _Storage(buffer, 0))

    @classmethod
    def of(
        cls, attention: Any, batch: int, capacity: int, format: str | None = None
    ) -> Self:
        """An empty cache for an attention module, in the dtype and on the device of its
        weights; see `empty`. Only a `QuantizedLatentCache` has a ``format``."""
        wanted = "None: only `empty_cache` of latent attention has formats"
        checks.require(format is None, "format", format, wanted)
        like = checks.first_weight(attention.o_proj, *attention.children())
        like = torch.empty(0) if like is None else like
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        sizes = attention.layer_idx, batch, attention.cache_features
        return cls.empty(*sizes, capacity=capacity, **place)

    def __len__(self) -> int:
        return self.length

    @property
    def like(self) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
        """Batch and features, dtype and device of the tokens that can be appended."""
        held = self._storage.buffer  # not `stored`: see `append`
        return (*held.shape[:1], *held.shape[2:]), held.dtype, held.device

    @property
    def nbytes(self) -> int:
        """Bytes of the cached tokens, batch · length · bytes per token."""
        return self.stored.nbytes

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of the storage, room for later tokens included; shared with the caches
        grown from this one."""
        return self._storage.buffer.nbytes

    def append(self, new: Shaped[Tensor, "batch seq *features"]) -> Self:
        """The cache with the ``new`` tokens after its own; this one keeps its value.

        Raises:
            ValueError: if ``new`` differs from the cached tokens in batch, features,
                dtype or device. Nothing has changed then.
        """
        storage, past = self._storage, self.length
        # Not from `stored`: the compiler fails where two inputs share memory.
        buffer, eager = storage.buffer, not torch.compiler.is_compiling()
        alike = self.record is None and isinstance(new, Tensor)
        alike = alike and new.dtype == buffer.dtype
        alike = alike and new.device == buffer.device
        alike = alike and new.shape[:1] == buffer.shape[:1]
        if not alike or new.shape[2:] != buffer.shape[2:]:
            checks.appended(self, new)  # raises, but for what a record encodes
        derived = new.requires_grad or buffer.requires_grad
        derived = derived and torch.is_grad_enabled()
        if eager and not derived:
            # Tangents and batches of torch.func and of forward mode would be lost, too.
            derived = torch._C._functorch.is_functorch_wrapped_tensor(new)
            derived = derived or torch.autograd.forward_ad._current_level >= 0
        if self.record is not None:
            checks.without_derivatives(derived, new)
            new = self.record.encode(new)
        if derived:
            longer = torch.cat((buffer[:, :past], new), dim=1)
            return self._with(longer, self.seen + new.shape[1])
        present = self.extended(new.shape[1])
        # No graph holds these places, so autograd need not hear of the write.
        present._storage.buffer.data[:, past : present.length] = new
        return present

    def extended(self, seq: int) -> Self:
        """The cache after ``seq`` more tokens, which the caller writes to the end of
        its ``stored``; this one keeps its value."""
        storage, past = self._storage, self.length
        buffer, length = storage.buffer, past + seq
        sealed = not torch.compiler.is_compiling() and buffer.is_inference()
        sealed = sealed and not torch.is_inference_mode_enabled()
        if past != storage.used or length > buffer.shape[1] or sealed:
            room = length + max(64, length // 4)
            larger = buffer.new_zeros((buffer.shape[0], room, *buffer.shape[2:]))
            larger[:, :past] = buffer[:, :past]
            storage = _Storage(larger, length)
        storage.used = length  # at once: another thread may continue the same cache
        place = self.layer_idx, storage.buffer[:, :length], storage, self.seen + seq
        return type(self)(*place, self.record)

    def _with(self, stored: Tensor, seen: int) -> Self:
        """A cache of this kind that holds something else."""
        return type(self)(self.layer_idx, stored, None, seen, self.record)

    def select(self, sequences: Int[Tensor, "chosen"]) -> Self:
        """A copy with the given sequences of the batch, in that order; repeats are
        allowed (beam search)."""
        checks.chosen_sequences(self, sequences)
        return self._with(self.stored[sequences], self.seen)

    def keep(self, rows: Int[Tensor, "#batch kept"]) -> Self:
        """A copy with only these rows of each sequence, in that order. A row keeps the
        position that its key was rotated to, and the next token its own (`seen`)."""
        checks.kept_rows(self, rows)
        rows = rows.expand(len(self.stored), -1)
        each = torch.arange(len(rows), device=rows.device)[:, None]
        return self._with(self.stored[each, rows], self.seen)

    def __repr__(self) -> str:
        kind, held = type(self).__name__, checks.describe(self.stored)
        return f"{kind}(layer {self.layer_idx}, {held}, {self.nbytes} bytes)"


class LatentCache(LayerCache):
    """MLA: per token one latent and one rotated key, shared by all heads: C + R
    elements (DeepSeek-V2, section 2.1.4).

    The rotated key keeps the interleaved layout of the checkpoints.
    """

    def split(
        self, latent: int
    ) -> tuple[Float[Tensor, "batch seq latent"], Float[Tensor, "batch seq rope"]]:
        """Views of the normalised latents and of the rotated keys."""
        tokens = self.tokens
        return tokens[..., :latent], tokens[..., latent:]


class KeyValueCache(LayerCache):
    """MHA: per token a rotated key and a value for every key-value head, 2 · heads ·
    head_dim elements."""

    @property
    def keys(self) -> Float[Tensor, "batch kv_seq kv_heads head_dim"]:
        """View of the rotated keys."""
        return self.tokens[:, :, 0]

    @property
    def values(self) -> Float[Tensor, "batch kv_seq kv_heads head_dim"]:
        """View of the values."""
        return self.tokens[:, :, 1]


Caches = tuple[LayerCache, ...]
"""The cache of every layer of a model, in the order of the layers."""
