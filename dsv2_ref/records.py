"""The latent cache in fewer bits: one record of bytes per token."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dsv2_ref import checks, ops
from dsv2_ref.attention import attend
from dsv2_ref.cache import LatentCache
from dsv2_ref.codes import from_codes, pack_nibbles, to_codes, unpack_nibbles
from dsv2_ref.masks import Visibility

CACHE_FORMATS = ("fp8", "int8", "int4")
"""What a latent can become in a cache, which is eight-bit floating-point numbers (e4m3),
or whole numbers of eight or four bits."""

TILE = 128


@dataclass(frozen=True)
class Record:
    """How a token lies in bytes: the codes of its latent, a float32 scale for each tile
    of it, and its rotated key in the dtype of the model.

    For V2 in bfloat16 and ``fp8``, 512 + 4 · 4 + 64 · 2 = 656 bytes instead of 1,152.

    Attributes:
        format: one of `CACHE_FORMATS`.
        latent: features of the latent C. rope: features of the rotated key R.
        dtype: of the tokens.

    Source: the FP8 cache of FlashMLA, whose scales are powers of two.
    """

    format: str
    latent: int
    rope: int
    dtype: torch.dtype

    @property
    def tile(self) -> int:
        """How many neighbours share a scale, 128 or all where that does not divide C."""
        return self.latent if self.latent % TILE else TILE

    @property
    def parts(self) -> tuple[int, int, int]:
        """Bytes of codes, of scales and of the rotated key."""
        codes = self.latent // 2 if self.format == "int4" else self.latent
        return codes, 4 * (self.latent // self.tile), self.rope * self.dtype.itemsize

    def encode(
        self, tokens: Float[Tensor, "batch seq features"]
    ) -> UInt8[Tensor, "batch seq bytes"]:
        """The records of normalised latents and rotated keys. Each token has scales of
        its own, so nothing that comes later can be out of range."""
        latent, k_pe = tokens.split((self.latent, self.rope), dim=-1)
        most = torch.finfo(self.dtype).max  # infinity would come back as infinity
        codes, scales = to_codes(latent.clamp(-most, most), self.format, self.tile)
        codes = pack_nibbles(codes) if self.format == "int4" else codes
        parts = (codes, scales, k_pe.contiguous())
        return torch.cat([part.view(torch.uint8) for part in parts], dim=-1)

    def split(
        self, records: UInt8[Tensor, "batch kv_seq bytes"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (B, K, C), scales (B, K, tiles) and rotated keys (B, K, R)."""
        codes, scales, k_pe = records.split(self.parts, dim=-1)
        if self.format == "int4":
            codes = unpack_nibbles(codes)
        else:
            codes = codes.view(torch.int8 if self.format == "int8" else FLOAT8)
        return codes, read_as(scales, torch.float32), read_as(k_pe, self.dtype)

    def decode(
        self, records: UInt8[Tensor, "batch kv_seq bytes"]
    ) -> Float[Tensor, "batch kv_seq features"]:
        """Latents and rotated keys, in the dtype of the model."""
        codes, scales, k_pe = self.split(records)
        latent = from_codes(codes, scales).to(self.dtype)
        return torch.cat((latent, k_pe), dim=-1)


def read_as(
    part: UInt8[Tensor, "batch kv_seq bytes"], dtype: torch.dtype
) -> Float[Tensor, "batch kv_seq features"]:
    """Bytes as elements of this dtype: a copy if they lie where it cannot be read."""
    if torch.compiler.is_compiling() or any(
        place % dtype.itemsize for place in (part.storage_offset(), *part.stride()[:-1])
    ):  # the compiler does not know where a tensor lies
        part = part.clone(memory_format=torch.contiguous_format)
    return part.view(dtype)


FLOAT8 = torch.float8_e4m3fn


class QuantizedLatentCache(LatentCache):
    """A `LatentCache` that stores records of bytes. `tokens` computes what they stand
    for; all else is as there. It gives no gradients."""

    record: Record  # as it is never without one

    @classmethod
    def of(
        cls, attention: Any, batch: int, capacity: int, format: str | None = None
    ) -> Self:
        """An empty cache for a `DeepseekV2Attention`, with room for ``capacity`` tokens
        of each sequence.

        Raises:
            ValueError: for an unknown format, and ``int4`` for an odd latent.
        """
        latent, rope = attention.kv_lora_rank, attention.rotary_dim
        checks.cache_format(format, CACHE_FORMATS, latent)
        _, dtype, device = LatentCache.of(attention, batch, 0).like
        record = Record(str(format), latent, rope, dtype)
        place: dict[str, Any] = {"dtype": torch.uint8, "device": device}
        size = (sum(record.parts),)
        place |= {"capacity": capacity}
        room = LatentCache.empty(attention.layer_idx, batch, size, **place)
        return cls(attention.layer_idx, room.stored, room._storage, record=record)

    @property
    def tokens(self) -> Float[Tensor, "batch kv_seq features"]:  # type: ignore[override]
        """A copy of what the records stand for, in the dtype of the model."""
        return self.record.decode(self.stored)

    @property
    def like(self) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
        """Batch and features, dtype and device of the tokens that can be appended."""
        held, record = self._storage.buffer, self.record
        features = record.latent + record.rope
        return (held.shape[0], features), record.dtype, held.device


@ops.defines(autocast=False)
def attend_records(
    query: Float[Tensor, "batch heads seq features"],
    cache: QuantizedLatentCache,
    visible: Visibility,
    scale: float,
    dropout: float = 0.0,
    *,
    implementation: str = "eager",
) -> tuple[Float[Tensor, "batch heads seq latent"], Tensor | None]:
    """`attend` of all heads to what the records of a cache stand for: one key (B, 1, K,
    C + R), whose first C features are the value."""
    key, how = cache.tokens[:, None], implementation
    value = key[..., : cache.record.latent]
    return attend(query, key, value, visible, scale, dropout, implementation=how)
