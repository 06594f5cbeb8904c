"""Continuing prompts: one token per step, of each sequence, with the rest in the caches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dsv2_ref import checks
from dsv2_ref.cache import Caches, LayerCache


class Generation:
    """What lets a model that scores the next token write it, and the one after."""

    config: Any
    empty_caches: Callable[..., Caches]
    __call__: Callable[..., Any]

    def generate(
        self,
        input_ids: Int[Tensor, "batch seq"],
        max_new_tokens: int,
        attention_mask: Shaped[Tensor, "batch seq"] | None = None,
        **settings: Any,
    ) -> Int[Tensor, "batch seq_and_new_tokens"]:
        """The prompts, each continued by the tokens that `stream` gives, which also
        takes the ``settings``: where a sequence ends, how tokens are chosen, and what
        is cached."""
        new = self.stream(input_ids, max_new_tokens, attention_mask, **settings)
        return torch.cat([input_ids, *(tokens[:, None] for tokens in new)], dim=1)

    def stream(
        self,
        input_ids: Int[Tensor, "batch seq"],
        max_new_tokens: int,
        attention_mask: Shaped[Tensor, "batch seq"] | None = None,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        cache_format: str | None = None,
        policy: Callable[[LayerCache], LayerCache] | None = None,
    ) -> Iterator[Int[Tensor, "batch"]]:
        """The next token of each sequence, as soon as it is known, up to
        ``max_new_tokens`` times.

        The prompt passes through once; after it, each step passes one token and reads
        the rest from the caches.

        Args:
            input_ids: the prompts; shorter ones are padded on the left.
            max_new_tokens: after so many it ends.
            attention_mask: True, or 1, for tokens of a prompt, False for padding;
                positions count the tokens. None: there is no padding.
            eos_token_id: tokens that end a sequence. It ends when all have ended.
            pad_token_id: what follows the end of a sequence while others go on; None is
                the first of ``eos_token_id``.
            temperature: 0 takes the most probable token; else logits are divided by it
                and a token is drawn.
            top_p: drawn from the fewest tokens whose probabilities reach this sum.
            generator: draws the tokens; None is torch's own.
            cache_format: what latents become in the caches, one of `CACHE_FORMATS`;
                None leaves them as they are.
            policy: what each layer's cache becomes after each call: the cache or
                `keep` of it, as in ``partial(window, sinks=4, last=1020)``. The prompt
                passes through whole before that.

        Raises:
            ValueError: for settings out of range, padding that is not on the left or
                beside a policy, and tokens that `DeepseekV2Model.forward` rejects.
        """
        ends = checks.ending_tokens(self.config, eos_token_id, pad_token_id)
        checks.generation(
            self.config, input_ids, max_new_tokens, attention_mask, temperature, top_p,
            generator, cache_format, policy,
        )  # fmt: skip
        pad = (ends[0] if ends else 0) if pad_token_id is None else pad_token_id
        caches = None
        if cache_format is not None:
            later = 0 if policy else max_new_tokens  # a policy makes its own room
            room = input_ids.shape[1] + later
            caches = self.empty_caches(len(input_ids), room, cache_format)
        return self._stream(
            input_ids, max_new_tokens, None if policy else attention_mask, ends, pad,
            lambda logits: choose(logits, temperature, top_p, generator), caches,
            policy,
        )  # fmt: skip

    def _stream(
        self,
        new: Tensor,
        max_new_tokens: int,
        mask: Tensor | None,
        ends: list[int],
        pad: int,
        choose_from: Callable[[Tensor], Tensor],
        present: Caches | None,
        policy: Callable[[LayerCache], LayerCache] | None,
    ) -> Iterator[Tensor]:
        positions = None
        if mask is not None:
            mask = mask.bool()
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        ended = torch.zeros(len(new), dtype=torch.bool, device=new.device)
        stops = torch.tensor(ends, dtype=new.dtype, device=new.device)
        for _ in range(max_new_tokens):
            with torch.no_grad():
                logits, present = self(new, mask, positions, present, use_cache=True)
            if policy is not None:
                present = tuple(followed(policy, cache) for cache in present)
            tokens = choose_from(logits[:, -1]).to(new.dtype).masked_fill(ended, pad)
            yield tokens
            if ends:
                ended = ended | torch.isin(tokens, stops)
                if ended.all():
                    return
            new = tokens[:, None]
            if mask is not None and positions is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                positions = positions[:, -1:] + 1


def followed(
    policy: Callable[[LayerCache], LayerCache], cache: LayerCache
) -> LayerCache:
    """What a policy leaves of a layer's cache."""
    kept = policy(cache)
    checks.after_policy(kept, cache)
    return kept


def choose(
    logits: Float[Tensor, "batch vocab"],
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch"]:
    """One token for each row: the most probable at temperature 0, else drawn from the
    fewest tokens whose probabilities reach ``top_p`` (Holtzman et al., 2020)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    below = logits - logits.amax(dim=-1, keepdim=True)  # 0 for the most probable
    divisor = max(temperature, torch.finfo(logits.dtype).tiny)  # no zero once rounded
    probabilities = (below / divisor).softmax(dim=-1)
    if top_p < 1:
        best, order = probabilities.sort(dim=-1, descending=True)  # (B, vocab)
        beyond = best.cumsum(dim=-1) - best >= top_p
        beyond[..., 0] = False  # the first is always kept
        kept = best.masked_fill(beyond, 0)
        probabilities = torch.zeros_like(kept).scatter(-1, order, kept)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
