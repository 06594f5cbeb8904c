"""The stack: embedding, layers, final norm and head, with a cache for every layer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dsv2_ref import checks, ops
from dsv2_ref.cache import LayerCache
from dsv2_ref.checkpoint import tie_head
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.layer import ATTENTION_CLASSES, DeepseekV2DecoderLayer
from dsv2_ref.linear import linear
from dsv2_ref.pretrained import PretrainedModel
from dsv2_ref.recompute import GradientCheckpointing, checkpointed
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from dsv2_ref.rope import position_tables

Caches = tuple[LayerCache, ...]
"""The cache of every layer of a model, in the order of the layers."""


class DeepseekV2Model(GradientCheckpointing):
    """Token embedding, ``num_hidden_layers`` decoder layers, and a norm at the end.

    Layers run in pre-norm order, so the residual stream leaves the last of them without
    a norm: ``norm`` is applied before anything reads it.

    Args:
        config: hyperparameters.

    Raises:
        ImportError: for ``flash_attention_2`` where flash-attn is not installed.
        ValueError: from `forward`, for an input that does not fit.

    Source: DeepSeek-V2, figure 2; ``DeepseekV2Model`` of the published code.
    """

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        checks.is_config(config)
        self.config = config
        weight = torch.empty(config.vocab_size, config.hidden_size)
        weight.normal_(std=config.initializer_range)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(
            DeepseekV2DecoderLayer(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @ops.defines(checks.model_call)
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Shaped[Tensor, "..."] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        past_key_values: Sequence[LayerCache] | None = None,
        use_cache: bool = False,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Caches | None]:
        """Pass tokens through all layers.

        Args:
            input_ids: tokens, from 0 to ``vocab_size - 1``.
            attention_mask: as for `DeepseekV2DecoderLayer.forward`; every layer gets
                the same.
            position_ids: positions of the tokens; None continues from the caches.
            past_key_values: what this model returned with ``use_cache=True``, a cache
                for every layer. They are not changed, whatever happens.
            use_cache: return the caches of all layers.

        Returns:
            ``(hidden_states, present_key_values)``: the normalised residual stream, and
            the caches or None.
        """
        hidden_states = self.embed_tokens(input_ids)  # (B, S, D)
        present: list[LayerCache] = []
        mode = self.gradient_checkpointing if self.training else None
        if use_cache or past_key_values is not None:
            mode = None
        tables: dict[str, Any] = {}  # of the positions, the same for layers as made
        tabled: Any = None  # what they were made for
        for index, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[index]
            shared = takes_tables(layer, self.config, hidden_states)
            new = hidden_states.shape[1], hidden_states.dtype, hidden_states.device
            call = getattr(past, "seen", 0), *new
            if shared and call != tabled:
                made = position_tables(self.config, hidden_states, position_ids, past)
                tables, tabled = {"position_embeddings": made}, call
            run = layer if mode is None else checkpointed(layer, mode)
            hidden_states, *cache = run(
                hidden_states,
                attention_mask,
                position_ids,
                past_key_value=past,
                use_cache=use_cache,
                **(tables if shared else {}),
            )
            present += cache
        return self.norm(hidden_states), tuple(present) if use_cache else None


OWN_ATTENTION = tuple(ATTENTION_CLASSES.values())


def takes_tables(
    layer: Any, config: DeepseekV2Config, hidden_states: Float[Tensor, "..."]
) -> bool:
    """Whether a layer takes tables that its model makes: if it is as the model made it,
    not replaced, wrapped, sharded, of another configuration or with hooks that may
    change what it is given (but for those that say ``looks_only``), and computes them
    in the same dtype."""
    attention: Any = getattr(layer, "self_attn", None)
    own = type(layer) is DeepseekV2DecoderLayer and type(attention) in OWN_ATTENTION
    if not own or attention.config is not config:
        return False
    for module in (layer, attention):
        changed = [*module._forward_pre_hooks.values()]
        changed += [module.forward] if "forward" in module.__dict__ else []
        if any(not hasattr(function, "looks_only") for function in changed):
            return False
    norm, wide = checks.first_weight(layer.input_layernorm), torch.float64
    if norm is None:
        return False
    return (norm.dtype == wide) == (hidden_states.dtype == wide)


class DeepseekV2ForCausalLM(PretrainedModel, GradientCheckpointing):
    """A `DeepseekV2Model` and the head that scores every token of the vocabulary as the
    next one.

    With ``tie_word_embeddings`` the head is the embedding's own matrix. `state_dict`
    uses the published names: ``model.embed_tokens.weight``, ``model.layers.0.…``,
    ``model.norm.weight`` and ``lm_head.weight``.

    Args:
        config: hyperparameters.

    Source: ``DeepseekV2ForCausalLM`` of the published code, which returns its logits in
    float32, as this does.
    """

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.config = config
        self.model = DeepseekV2Model(config)
        self.lm_head = linear(
            config.hidden_size, config.vocab_size, config.initializer_range
        )
        if config.tie_word_embeddings:
            tie_head(self)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Shaped[Tensor, "..."] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        past_key_values: Sequence[LayerCache] | None = None,
        use_cache: bool = False,
    ) -> tuple[Float[Tensor, "batch seq vocab"], Caches | None]:
        """Score the token after each; arguments as for `DeepseekV2Model.forward`.

        Returns:
            ``(logits, present_key_values)``: in at least float32, before any softmax.
        """
        hidden_states, present = self.model(
            input_ids, attention_mask, position_ids, past_key_values, use_cache
        )
        logits = self.lm_head(hidden_states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), present

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

    def empty_caches(
        self, batch: int, capacity: int = 0, format: str | None = None
    ) -> Caches:
        """A cache without tokens for every layer: ``past_key_values`` of a first call;
        arguments as for `DeepseekV2Attention.empty_cache`."""
        checks.latent_format(self.config, "format", format)
        settings = () if format is None else (format,)
        layers: Any = self.model.layers
        return tuple(
            x.self_attn.empty_cache(batch, capacity, *settings) for x in layers
        )

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
