"""The stack: embedding, layers, final norm and head, with a cache for every layer."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dsv2_ref import checks, ops
from dsv2_ref.cache import Caches, LayerCache
from dsv2_ref.checkpoint import tie_head
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.generation import Generation
from dsv2_ref.layer import ATTENTION_CLASSES, DeepseekV2DecoderLayer
from dsv2_ref.linear import linear
from dsv2_ref.pretrained import PretrainedModel
from dsv2_ref.recompute import GradientCheckpointing, checkpointed
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from dsv2_ref.rope import position_tables


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


class DeepseekV2ForCausalLM(PretrainedModel, Generation, GradientCheckpointing):
    """A `DeepseekV2Model` and the head that scores every token of the vocabulary as the
    next one; `Generation` continues prompts with it.

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
