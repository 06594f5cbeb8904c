"""What a layer remembers of each token between calls, and how many bytes that is."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv2_ref.checks import require, require_tensor


@dataclass
class _Storage:
    """Room for tokens, shared by all caches that grew out of one another; ``used`` tokens of it are taken."""

    buffer: Tensor
    used: int


class LayerCache:
    """The first ``length`` tokens of a storage: a value that never changes, so an old one can be continued again.

    `append` writes behind the tokens in place, without copying them, and returns a longer cache over the same
    storage. It copies when the storage is full (then with room for a quarter more), when another cache already
    continued from here, and when gradients are wanted, which writing in place would break.

    Attributes:
        layer_idx: index of the layer that the tokens belong to.
        length: tokens remembered for each sequence of the batch.

    Use `LatentCache` for multi-head latent attention and `KeyValueCache` for multi-head attention.
    """

    def __init__(self, layer_idx: int, tokens: Float[Tensor, "batch kv_seq *features"]) -> None:
        self.layer_idx = layer_idx
        self.length = tokens.shape[1]
        self._storage = _Storage(tokens, self.length)

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
        """No tokens yet, room for ``capacity`` of them: (C + R,) ``features`` for MLA, (2, heads, head_dim) for MHA.

        Raises:
            ValueError: for a batch below 1 and a capacity below 0.
        """
        require(batch >= 1, "batch", batch, "at least one sequence")
        require(capacity >= 0, "capacity", capacity, "room for 0 or more tokens")
        buffer = torch.zeros(batch, capacity, *features, dtype=dtype, device=device)
        return cls._over(layer_idx, _Storage(buffer, 0), 0)

    @classmethod
    def _over(cls, layer_idx: int, storage: _Storage, length: int) -> Self:
        cache = cls.__new__(cls)
        cache.layer_idx, cache._storage, cache.length = layer_idx, storage, length
        return cache

    def __len__(self) -> int:
        return self.length

    @property
    def tokens(self) -> Float[Tensor, "batch kv_seq *features"]:
        """All numbers remembered; a view, to be read only."""
        return self._storage.buffer[:, : self.length]

    def rounded_up(self, multiple: int) -> Float[Tensor, "batch at_least_kv_seq *features"]:
        """`tokens`, and zeros behind them up to a multiple of their number, where there is room not yet written to."""
        storage, length = self._storage, -(-self.length // multiple) * multiple
        room = self.length == storage.used and length <= storage.buffer.shape[1]
        return storage.buffer[:, : length if room else self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of the remembered tokens, batch · length · numbers a token · bytes a number."""
        return self.tokens.numel() * self.tokens.element_size()

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of the storage, room for tokens to come included; shared with caches grown from this one."""
        return self._storage.buffer.numel() * self._storage.buffer.element_size()

    def append(self, new: Float[Tensor, "batch seq *features"]) -> Self:
        """The cache with ``new`` tokens behind its own; this one keeps its value.

        Raises:
            ValueError: if ``new`` differs from the tokens in batch, features, dtype or device. Nothing has changed then.
        """
        require_tensor(new, "new")
        buffer = self._storage.buffer
        alike = ((*new.shape[:1], *new.shape[2:]), new.dtype, new.device)
        wanted = ((*buffer.shape[:1], *buffer.shape[2:]), buffer.dtype, buffer.device)
        require(alike == wanted, "past_key_value", self, "one that fits the new tokens, {} {} on {}", *alike)
        if torch.is_grad_enabled() and (new.requires_grad or buffer.requires_grad):
            return type(self)(self.layer_idx, torch.cat((self.tokens, new), dim=1))
        storage, length = self._storage, self.length + new.shape[1]
        sealed = not torch.compiler.is_compiling() and buffer.is_inference() and not torch.is_inference_mode_enabled()
        if self.length != storage.used or length > buffer.shape[1] or sealed:
            roomy = buffer.new_zeros((buffer.shape[0], length + max(64, length // 4), *buffer.shape[2:]))
            roomy[:, : self.length] = self.tokens
            storage = _Storage(roomy, length)
        storage.buffer.data[:, self.length : length] = new  # no graph holds these places: it need not hear of the write
        storage.used = length
        return self._over(self.layer_idx, storage, length)

    def select(self, sequences: Int[Tensor, "chosen"]) -> Self:
        """A copy that holds the given sequences of the batch, in that order; repeats allowed (beam search)."""
        return type(self)(self.layer_idx, self.tokens[sequences])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layer {self.layer_idx}, {_describe(self.tokens)}, {self.nbytes} bytes)"


class LatentCache(LayerCache):
    """MLA: one latent and one rotated key a token, shared by all heads: C + R numbers (DeepSeek-V2, section 2.1.4).

    The rotated key keeps the interleaved layout of the checkpoints.
    """

    def split(self, latent: int) -> tuple[Float[Tensor, "batch kv_seq latent"], Float[Tensor, "batch kv_seq rope"]]:
        """Views of the normalised latents ``compressed_kv`` and of the rotated keys ``k_pe``."""
        return self.tokens[..., :latent], self.tokens[..., latent:]


class KeyValueCache(LayerCache):
    """MHA: a rotated key and a value for every key-value head, 2 · heads · head_dim numbers a token."""

    @property
    def keys(self) -> Float[Tensor, "batch kv_seq kv_heads head_dim"]:
        """View of the rotated keys."""
        return self.tokens[:, :, 0]

    @property
    def values(self) -> Float[Tensor, "batch kv_seq kv_heads head_dim"]:
        """View of the values."""
        return self.tokens[:, :, 1]


def _describe(tokens: Tensor) -> str:
    return f"{tuple(tokens.shape)} {tokens.dtype} on {tokens.device}"
