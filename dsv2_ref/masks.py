"""Which keys a query may see: causal order, padding and masks of one's own, with one
meaning for every way to attend."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """The keys that each query of a call may see, handed out per block of queries.

    Query i is the token at position ``kv_seq - seq + i``, so it sees the first
    ``kv_seq - seq + i + 1`` keys (bottom-right alignment), unless a mask per query
    decides alone.

    Attributes:
        seq: number of queries S.
        kv_seq: number of keys K, the cached ones included.
        device: where masks are made.
        attention_mask: None is causal. (B, K) bool or integer marks real tokens, beside
            causal order. (B or 1, H or 1, S, K) decides alone: bool True keeps,
            floating is added to the scores.
    """

    seq: int
    kv_seq: int
    device: torch.device
    attention_mask: Shaped[Tensor, "..."] | None = None

    @property
    def padding(self) -> Bool[Tensor, "batch kv_seq"] | None:
        """(B, K), True for a real token; None for no padding."""
        mask = self.attention_mask
        return None if mask is None or mask.ndim != 2 else mask.bool()

    @property
    def mask(self) -> Shaped[Tensor, "#batch #heads seq kv_seq"] | None:
        """The mask per query, which decides alone; None for causal order."""
        mask = self.attention_mask
        return None if mask is None or mask.ndim == 2 else mask

    def keys_until(self, stop: int) -> int:
        """How many leading keys the queries before ``stop`` may see at most."""
        own = self.attention_mask is not None and self.attention_mask.ndim == 4
        return self.kv_seq if own else self.kv_seq - self.seq + stop

    def block(
        self, start: int, stop: int
    ) -> tuple[Tensor | None, Bool[Tensor, "#batch #heads rows 1"] | None]:
        """The mask of queries start … stop - 1 over their first `keys_until` keys, and
        whether each of them sees any key. None stands for "all of them" in both.

        A query that sees no key is given every key here, so that its softmax is finite;
        the caller must zero its result where the second tensor is False.
        """
        attention_mask = self.attention_mask
        if attention_mask is not None and attention_mask.ndim == 4:
            mask = attention_mask[:, :, start:stop]
            if mask.dtype == torch.bool:
                sees_any = mask.any(dim=-1, keepdim=True)
                return mask | ~sees_any, sees_any
            keep = mask > torch.finfo(mask.dtype).min / 2
            sees_any = keep.any(dim=-1, keepdim=True)
            # Whatever the scores: the lowest float16, added to 90,000, hides nothing.
            hidden = mask.masked_fill(~keep, float("-inf"))
            return hidden.where(sees_any, 0), sees_any
        end = self.kv_seq - self.seq + stop
        causal = None
        if stop - start > 1:
            keys = torch.arange(end, device=self.device)
            places = torch.arange(end - (stop - start), end, device=self.device)
            causal = (keys <= places[:, None])[None, None]  # (1, 1, stop - start, end)
        if attention_mask is None:
            return causal, None
        keep = attention_mask.bool()[:, None, None, :end]
        keep = keep if causal is None else keep & causal
        sees_any = keep.any(dim=-1, keepdim=True)
        return keep | ~sees_any, sees_any


def additive(
    mask: Shaped[Tensor, "#batch #heads rows kv_seq"], dtype: torch.dtype
) -> Float[Tensor, "#batch #heads rows kv_seq"]:
    """What to add to the scores for a mask of `Visibility.block`: minus infinity where
    it hides a key.

    Other entries stay finite. Where ``dtype`` has a smaller range than the mask, each
    query's largest entry becomes 0, which its softmax does not notice, so that entries
    beyond that range keep their differences.
    """
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
    if torch.finfo(mask.dtype).max > torch.finfo(dtype).max:
        mask = mask - mask.detach().amax(dim=-1, keepdim=True)
    finite = mask.to(dtype).clamp(min=torch.finfo(dtype).min / 2)
    return finite.masked_fill(mask == float("-inf"), float("-inf"))
