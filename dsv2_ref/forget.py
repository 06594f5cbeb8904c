"""Fewer rows: policies beside the cache that drop tokens, or that leave them unread.

What returns a cache frees memory. What returns a mask only saves reading: the rows are
still there, and may be read at the next token.

Letters: B sequences, H heads, S queries, K rows of the cache.
"""

from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2_ref import checks
from dsv2_ref.cache import LayerCache

Cache = TypeVar("Cache", bound=LayerCache)


def window(cache: Cache, sinks: int, last: int) -> Cache:
    """The cache with the first ``sinks`` and the ``last`` tokens, or itself while there
    are no more.

    The next query sees these and its own token: `window_mask` with ``last + 1``.

    Source: StreamingLLM (arXiv 2309.17453), except for positions: there they are
    counted within the cache, so keys are cached unrotated. Here a row keeps its
    rotation.
    """
    checks.is_cache(cache)
    checks.budget(sinks=sinks, last=last)
    if cache.length <= sinks + last:
        return cache
    rows = torch.arange(cache.length, device=cache.stored.device)
    return cache.keep(torch.cat((rows[:sinks], rows[len(rows) - last :]))[None])


class HeavyHitters:
    """Keep the tokens that have been attended to most, and the newest.

    Args:
        budget: rows to keep. recent: how many of them are the newest ones.

    Attributes:
        totals: the attention that each kept row has received, (B, K); None before the
            first step.

    `Generation.generate` has no attention weights, so it takes no such policy:
    call the layers one by one.

    Source: H2O (arXiv 2306.14048), whose totals are per head; one row of a latent cache
    serves all heads, so here a token's total is over heads, too. There half of the
    budget is for the newest.
    """

    def __init__(self, budget: int, recent: int = 1) -> None:
        checks.budget(budget=budget)
        checks.require(
            checks.is_int(recent, 0, budget),
            "recent",
            recent,
            f"from 0 to the {budget} rows",
        )
        self.budget, self.recent = budget, recent
        self.totals: Float[Tensor, "batch kv_seq"] | None = None

    def step(
        self, cache: Cache, weights: Float[Tensor, "batch heads seq kv_seq"]
    ) -> Cache:
        """The cache after one call, whose attention weights these are: what a layer with
        ``_attn_implementation="eager"`` returns for ``output_attentions=True``.

        Raises:
            ValueError: for weights of another call: their keys are the cache's rows,
                and these are the rows kept last time and the new tokens.
        """
        checks.received(cache, weights, self.totals)
        wide = torch.promote_types(weights.dtype, torch.float32)
        received = weights.detach().sum(dim=(1, 2), dtype=wide)  # (B, K)
        if self.totals is not None:
            received[:, : self.totals.shape[1]] += self.totals
        self.totals = received
        if cache.length <= self.budget:
            return cache
        old = received[:, : cache.length - self.recent]
        best = old.topk(self.budget - self.recent, dim=-1).indices.sort(dim=-1).values
        newest = torch.arange(old.shape[1], cache.length, device=best.device)
        rows = torch.cat((best, newest.expand(len(best), -1)), dim=-1)
        self.totals = received.gather(1, rows)
        return cache.keep(rows)


def window_mask(
    seq: int, kv_seq: int, sinks: int, last: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "1 1 seq kv_seq"]:
    """The first ``sinks`` rows and the ``last`` up to each query's own: what a layer
    takes as ``attention_mask``. The cache may be whole, or what a window left of it."""
    checks.budget(sinks=sinks, last=last)
    checks.window_rows(seq, kv_seq)
    own = torch.arange(kv_seq - seq, kv_seq, device=device)[:, None]
    keys = torch.arange(kv_seq, device=device)
    return ((keys <= own) & ((keys < sinks) | (keys > own - last)))[None, None]


def chosen_mask(
    rows: Int[Tensor, "batch seq chosen"], kv_seq: int
) -> Bool[Tensor, "batch 1 seq kv_seq"]:
    """The rows that an indexer chose for each query, as an ``attention_mask``; what lies
    after a query stays hidden, whatever was chosen. All heads read the same rows, as
    one row of a latent cache serves all of them.

    Source: DeepSeek-V3.2-Exp, equation 2.
    """
    checks.chosen_rows(rows, kv_seq)
    batch, seq, _ = rows.shape
    mask = torch.zeros(batch, seq, kv_seq, dtype=torch.bool, device=rows.device)
    return mask.scatter(2, rows, True).tril(kv_seq - seq)[:, None]
