"""Which keys a query may see: causal order, padding and masks of one's own, in one meaning for every kernel."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from dsv2_ref.checks import require, require_tensor, require_values


@dataclass(frozen=True)
class Visibility:
    """The keys that each query of a call may see, handed out for a block of queries at a time.

    Query i of ``seq`` is the token at place ``kv_seq - seq + i``, so it sees the first ``kv_seq - seq + i + 1`` keys
    (bottom-right alignment), unless ``mask`` decides alone.

    Attributes:
        seq: queries S. kv_seq: keys K, those remembered included. device: where masks are made.
        padding: (B, K), True for a real token, or None for no padding.
        mask: (B or 1, H or 1, S, K), bool (True keeps) or floating (added to the scores), or None for causal order.
    """

    seq: int
    kv_seq: int
    device: torch.device
    padding: Bool[Tensor, "batch kv_seq"] | None = None
    mask: Shaped[Tensor, "#batch #heads seq kv_seq"] | None = None

    @classmethod
    def of(
        cls, attention_mask: Tensor | None, batch: int, heads: int, seq: int, kv_seq: int, device: torch.device
    ) -> Self:
        """Read the ``attention_mask`` of a layer.

        None is causal. (B, K) bool or integer marks real tokens, beside causal order. (B or 1, H or 1, S, K) decides
        alone: bool True keeps, floating is added to the scores.

        Raises:
            ValueError: for another shape, dtype or device, for a floating mask with infinity or NaN (minus infinity is
                welcome), and for one that nowhere goes below zero: it would mask nothing (ones and zeros meant as keep
                and drop must be given as bool).
        """
        if attention_mask is None:
            return cls(seq, kv_seq, device)
        require_tensor(attention_mask, "attention_mask")
        shape, dtype = tuple(attention_mask.shape), attention_mask.dtype
        require(attention_mask.device == device, "attention_mask", attention_mask, "a mask on {}", device)
        if attention_mask.ndim == 2:
            require(
                shape == (batch, kv_seq), "attention_mask", attention_mask, "shape {}, cache included", (batch, kv_seq)
            )
            require(
                not dtype.is_floating_point and not dtype.is_complex,
                "attention_mask",
                attention_mask,
                "bool or integers in a (batch, kv_seq) mask",
            )
            return cls(seq, kv_seq, device, padding=attention_mask.bool())
        require(
            len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == (seq, kv_seq),
            "attention_mask",
            attention_mask,
            "shape {} or, for each query, ({} or 1, {} or 1, {}, {})",
            (batch, kv_seq),
            batch,
            heads,
            seq,
            kv_seq,
        )
        require(
            dtype == torch.bool or dtype.is_floating_point,
            "attention_mask",
            attention_mask,
            "bool (True keeps) or floating point (added to the scores)",
        )
        if dtype.is_floating_point:
            lowest, highest = attention_mask.aminmax()
            require_values(
                highest < float("inf"), "attention_mask", "infinite or NaN somewhere", "numbers below infinity"
            )
            masks_something = lowest < 0
            if seq == 1:
                masks_something |= (lowest == 0) & (highest == 0)
            require_values(
                masks_something,
                "attention_mask",
                "a floating-point mask without a negative entry, which masks nothing",
                "negative entries where keys are hidden: it is added to the scores. Ones and zeros that mean keep and "
                "drop must be bool, as in torch.ones(seq, kv_seq).tril().bool(); None is causal",
            )
        return cls(seq, kv_seq, device, mask=attention_mask)

    @property
    def plainly_causal(self) -> bool:
        """Whether causal order is all there is."""
        return self.padding is None and self.mask is None

    def keys_until(self, stop: int) -> int:
        """How many leading keys the queries before ``stop`` can see at most."""
        return self.kv_seq if self.mask is not None else self.kv_seq - self.seq + stop

    def block(self, start: int, stop: int) -> tuple[Tensor | None, Bool[Tensor, "#batch #heads rows 1"] | None]:
        """The mask of queries start … stop - 1 over their first `keys_until` keys, and the queries that see any.

        A query that sees no key at all is given every key here, so that its softmax is finite; the caller must zero
        its result where the second tensor is False. None stands for "all of them" in both.
        """
        if self.mask is not None:
            mask = self.mask[:, :, start:stop]
            keep = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            sighted = keep.any(dim=-1, keepdim=True)
            return (mask | ~sighted if mask.dtype == torch.bool else mask.where(sighted, 0)), sighted
        end = self.keys_until(stop)
        causal = None
        if stop - start > 1:
            places = torch.arange(end - (stop - start), end, device=self.device)
            causal = (torch.arange(end, device=self.device) <= places[:, None])[None, None]
        if self.padding is None:
            return causal, None
        keep = self.padding[:, None, None, :end]
        keep = keep if causal is None else keep & causal
        sighted = keep.any(dim=-1, keepdim=True)
        return keep | ~sighted, sighted


def additive(
    mask: Shaped[Tensor, "#batch #heads rows kv_seq"], dtype: torch.dtype
) -> Float[Tensor, "#batch #heads rows kv_seq"]:
    """What to add to the scores for ``mask``: minus infinity where a bool one drops.

    A floating one stays finite, so that a query whose keys all have a bias beyond ``dtype`` does not turn to NaN.
    """
    if mask.dtype != torch.bool:
        return mask.to(dtype).clamp(min=torch.finfo(dtype).min / 2)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
