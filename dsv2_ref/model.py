"""The stack: embedding, layers, final norm and head, with a cache for every layer."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dsv2_ref import checks, ops
from dsv2_ref.cache import LayerCache
from dsv2_ref.checkpoint import tie_head
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.layer import DeepseekV2DecoderLayer
from dsv2_ref.linear import linear
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm

Caches = tuple[LayerCache, ...]
"""The cache of every layer of a model, in the order of the layers."""


class DeepseekV2Model(nn.Module):
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
        vocab, hidden = config.vocab_size, config.hidden_size
        # On meta, torch's own initialisation, which is overwritten, costs nothing.
        self.embed_tokens = nn.Embedding(vocab, hidden, device="meta")
        weight = torch.empty(vocab, hidden).normal_(std=config.initializer_range)
        self.embed_tokens.weight = nn.Parameter(weight)
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
        for index, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[index]
            hidden_states, *cache = layer(
                hidden_states,
                attention_mask,
                position_ids,
                past_key_value=past,
                use_cache=use_cache,
            )
            present += cache
        return self.norm(hidden_states), tuple(present) if use_cache else None


class DeepseekV2ForCausalLM(nn.Module):
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

    @torch.no_grad()
    def generate(
        self, input_ids: Int[Tensor, "batch seq"], max_new_tokens: int
    ) -> Int[Tensor, "batch seq_and_new_tokens"]:
        """Continue each sequence by its most probable token, ``max_new_tokens`` times
        (greedy decoding).

        The prompt passes through once; after it, each step passes one token and reads
        the rest from the caches.

        Raises:
            ValueError: for a negative number of tokens, and for tokens that
                `DeepseekV2Model.forward` rejects.
        """
        fits = checks.is_int(max_new_tokens, 0)
        checks.require(fits, "max_new_tokens", max_new_tokens, "0 or more tokens")
        new, present, tokens = input_ids, None, [input_ids]
        for _ in range(max_new_tokens):
            logits, present = self(new, past_key_values=present, use_cache=True)
            new = logits[:, -1:].argmax(dim=-1)
            tokens.append(new)
        return torch.cat(tokens, dim=1)
