"""The sizes of a model, by the letters of the book."""

from dataclasses import dataclass
from typing import Self

from dsv2_ref.checks import is_config
from dsv2_ref.config import DeepseekV2Config


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model as integers; 0 for a part that the model does not have."""

    D: int  #: hidden size
    H: int  #: attention heads
    G: int  #: heads that have keys and values of their own
    N: int  #: width of the part of a head's key that does not rotate
    R: int  #: width of the part that does; without latent attention, of the whole key
    V: int  #: width of a head's value
    C: int  #: latent of keys and values; 0 without latent attention
    Q: int  #: latent of queries; 0 where they are not compressed
    E: int  #: routed experts
    k: int  #: experts that each token chooses
    #: width of an expert
    I: int  # noqa: E741
    shared: int  #: experts that serve every token
    dense: int  #: width of a dense feed-forward network
    vocab: int  #: tokens of the vocabulary

    @classmethod
    def of(cls, config: DeepseekV2Config) -> Self:
        """The sizes of a model. Only here is an optional field read as 0."""
        is_config(config)
        heads, experts, latent = config.num_attention_heads, config.n_routed_experts or 0, config.use_mla
        width = config.hidden_size // heads
        return cls(
            D=config.hidden_size,
            H=heads,
            G=config.num_key_value_heads or heads,
            N=config.qk_nope_head_dim if latent else 0,
            R=config.qk_rope_head_dim if latent else width,
            V=config.v_head_dim if latent else width,
            C=config.kv_lora_rank if latent else 0,
            Q=config.q_lora_rank or 0 if latent else 0,
            E=experts,
            k=config.num_experts_per_tok if experts else 0,
            I=config.moe_intermediate_size if experts else 0,
            shared=config.n_shared_experts or 0 if experts else 0,
            dense=config.intermediate_size,
            vocab=config.vocab_size,
        )

    @property
    def rotated(self) -> int:
        """Values that rotate per token, of every query and of every key that is kept (one with latent attention)."""
        return (self.H + (1 if self.C else self.G)) * self.R
