"""Multi-head latent attention (MLA): both of its forms in one forward pass.

Letters: B sequences, S new tokens, K tokens attended to (the cached ones included),
D hidden size, H heads, C latent of keys and values, N / R / V widths of a head without
position / rotating / value. Equations are those of DeepSeek-V2 (arXiv 2405.04434).
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dsv2_ref import checks, ops
from dsv2_ref.attention import attend
from dsv2_ref.cache import LatentCache
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.linear import linear
from dsv2_ref.masks import Visibility
from dsv2_ref.records import QuantizedLatentCache, attend_records
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from dsv2_ref.rope import Tables, apply_rotary, position_tables, softmax_temperature


class DeepseekV2Attention(nn.Module):
    """Multi-head latent attention: per token a latent and one rotated key are cached.

    A token is compressed to a latent of C = ``kv_lora_rank`` features and one key of R
    = ``qk_rope_head_dim`` features that carries the position. Head i then has the key
    [W_UK c, k_pe] and the value W_UV c. Queries are compressed as well, to
    ``q_lora_rank`` features, unless that is None.

    Two forms compute the same. *Expanded* makes every head's keys and values from the
    latents: cheap for many queries. *Absorbed* moves W_UK to the query and W_UV past
    the softmax, so that all heads attend to the latents: cheap for few queries over
    many keys. The attribute ``form`` is ``expanded``, ``absorbed`` or ``auto``, which
    counts (`cheaper_form`). The absorbed form reads ``kv_b_proj.weight`` without
    calling the module; where that would leave out an adapter, a hook or a bias,
    ``auto`` expands. ``torch.export`` as ``absorbed`` takes a prompt of one length.

    Args:
        config: hyperparameters; ``_attn_implementation`` chooses ``eager``, ``sdpa`` or
            ``flash_attention_2`` for the expanded form. No fused kernel of the last two
            takes keys of width C + R, so the absorbed form then runs as plain products.
        layer_idx: index of the layer; its cache carries it.

    Raises:
        ImportError: for ``flash_attention_2`` where flash-attn is not installed.
        ValueError: for an input that does not fit, before anything has changed.

    Source: DeepSeek-V2, equations 9 to 19, appendix C; the published class.
    """

    cache_class = LatentCache
    fixed_implementation: str | None = None

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__()
        checks.attention_of(config, layer_idx, True, self.fixed_implementation)
        self.implementation = self.fixed_implementation or config._attn_implementation
        self.config, self.layer_idx, self.form = config, layer_idx, config.mla_form
        self.num_heads = config.num_attention_heads
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.rotary_dim, self.v_head_dim = config.qk_rope_head_dim, config.v_head_dim
        self.qk_head_dim = self.qk_nope_head_dim + self.rotary_dim
        self.widest_head = max(self.qk_head_dim, self.v_head_dim)
        self.cache_features = (self.kv_lora_rank + self.rotary_dim,)
        self.attention_dropout = config.attention_dropout
        temperature = softmax_temperature(config.rope_scaling)
        self.softmax_scale = self.qk_head_dim**-0.5 * temperature

        D, H, C = config.hidden_size, self.num_heads, self.kv_lora_rank
        N, R, V = self.qk_nope_head_dim, self.rotary_dim, self.v_head_dim
        std, bias = config.initializer_range, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = linear(D, H * (N + R), std)
        else:
            self.q_a_proj = linear(D, config.q_lora_rank, std, bias)
            self.q_a_layernorm = DeepseekV2RMSNorm(config.q_lora_rank)
            self.q_b_proj = linear(config.q_lora_rank, H * (N + R), std)
        self.kv_a_proj_with_mqa = linear(D, C + R, std, bias)
        self.kv_a_layernorm = DeepseekV2RMSNorm(C)
        self.kv_b_proj = linear(C, H * (N + V), std)
        self.o_proj = linear(H * V, D, std, bias)

    @ops.defines(checks.attention_call)
    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq hidden"],
        attention_mask: Shaped[Tensor, "..."] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        past_key_value: LatentCache | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        position_embeddings: Tables | None = None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Tensor | None, LatentCache | None]:
        """Attend from every token to those before it, the cached ones included.

        Args:
            hidden_states: normalised tokens, in the dtype of the weights.
            attention_mask: see `Visibility`; None is causal.
            position_ids: positions, 0 or more; None continues from the cache.
            past_key_value: what this layer returned with ``use_cache=True``.
            output_attentions: return the attention weights as well (``eager`` only).
            use_cache: return a cache that includes these tokens.
            position_embeddings: `position_tables` of the call, if made before.

        Returns:
            ``(attn_output, attn_weights, present_key_value)``; the weights are (batch,
            heads, seq, kv_seq). The last two are None unless asked for.
        """
        config, (B, S, _) = self.config, hidden_states.shape
        H, C, R = self.num_heads, self.kv_lora_rank, self.rotary_dim
        N, V = self.qk_nope_head_dim, self.v_head_dim
        past, tables = past_key_value, position_embeddings
        K = S if past is None else past.length + S
        if tables is None:
            tables = position_tables(config, hidden_states, position_ids, past)
        cos, sin = tables  # (B, S, R / 2) each

        # Queries (equations 12 to 16): N features without position, and R that rotate.
        if config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.view(B, S, H, N + R).transpose(1, 2)  # (B, H, S, N + R)
        q_nope, q_pe = query.split((N, R), dim=-1)

        # What is cached (equations 9 and 15): a latent and a rotated key for all heads.
        compressed_kv = self.kv_a_proj_with_mqa(hidden_states)  # (B, S, C + R)
        compressed_kv, k_pe = compressed_kv.split((C, R), dim=-1)
        q_pe, k_pe = apply_rotary(q_pe, k_pe, cos, sin)
        new = torch.cat((self.kv_a_layernorm(compressed_kv), k_pe), dim=-1)
        if past_key_value is None:
            present = LatentCache(self.layer_idx, new)
        else:
            present = past_key_value.append(new)

        form = self.cheaper_form(S, K) if self.form == "auto" else self.form
        how, dropout = self.implementation, self.attention_dropout * self.training
        visible = Visibility(S, K, hidden_states.device, attention_mask)
        rest = visible, self.softmax_scale, dropout
        if form == "expanded":
            # Every head's keys and values are made from the latents (equations 10 and
            # 11); what follows is multi-head attention (equations 17 and 18).
            compressed_kv, k_pe = present.tokens.split((C, R), dim=-1)  # (B, K, ...)
            kv = self.kv_b_proj(compressed_kv).view(B, K, H, N + V).transpose(1, 2)
            k_nope, value = kv.split((N, V), dim=-1)  # (B, H, K, N), (B, H, K, V)
            key = torch.cat((k_nope, k_pe[:, None].expand(-1, H, -1, -1)), dim=-1)
            query = torch.cat((q_nope, q_pe), dim=-1)  # (B, H, S, N + R)
            out, weights = attend(query, key, value, *rest, implementation=how)
        else:
            # The queries come to the latents instead: q · (W_UK c) = (W_UKᵀ q) · c. All
            # heads share one key, whose latent is also the value.
            w_uk, w_uv = self.up_matrices()  # (H, N, C), (H, V, C)
            query = torch.cat((by_head(q_nope, w_uk), q_pe), dim=-1)  # (B, H, S, C + R)
            how = "eager" if how == "eager" else "products"
            del compressed_kv, k_pe  # not alive beside the scores
            if present.record is None:
                key = present.tokens[:, None]  # (B, 1, K, C + R)
                out, weights = attend(
                    query, key, key[..., :C], *rest, implementation=how
                )
            else:
                out, weights = attend_records(query, present, *rest, implementation=how)
            out = by_head(out, w_uv.mT)  # Σ p (W_UV c) = W_UV Σ p c
        attn_output = self.o_proj(out.transpose(1, 2).flatten(2))  # equation 19
        weights = weights if output_attentions else None
        return attn_output, weights, present if use_cache else None

    def cheaper_form(self, seq: int, kv_seq: int) -> str:
        """The form with fewer multiplications for ``seq`` causal queries over
        ``kv_seq``.

        A head costs K·C(N+V) + P(N+R+V) expanded and S·C(N+V) + P(2C+R) absorbed, where
        P is the number of query-key pairs; what both share is left out. Without a
        cache S = K, so the first terms are equal and the widths decide: a prompt of any
        length can be exported as one graph. A ``kv_b_proj`` that does more than
        multiply by its matrix, as with an adapter, is always called: expanded.
        """
        C, N, V = self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim
        more_per_pair = 2 * C - N - V  # of the absorbed form
        if seq == kv_seq:
            absorb = more_per_pair < 0
        else:
            pairs = seq * kv_seq - seq * (seq - 1) // 2
            absorb = pairs * more_per_pair < (kv_seq - seq) * C * (N + V)
        return "absorbed" if absorb and offers_matrices(self.kv_b_proj) else "expanded"

    def up_matrices(
        self,
    ) -> tuple[Float[Tensor, "heads nope latent"], Float[Tensor, "heads v latent"]]:
        """W_UK and W_UV of every head: parts of ``kv_b_proj``, or its ``matrices``."""
        if hasattr(self.kv_b_proj, "matrices"):
            w_uk, w_uv = cast(Any, self.kv_b_proj).matrices()
            return w_uk, w_uv
        N, V = self.qk_nope_head_dim, self.v_head_dim
        weight = self.kv_b_proj.weight.view(self.num_heads, N + V, self.kv_lora_rank)
        w_uk, w_uv = weight.split((N, V), dim=1)
        return w_uk, w_uv

    def empty_cache(
        self, batch: int, capacity: int = 0, format: str | None = None
    ) -> LatentCache:
        """A cache with room for ``capacity`` tokens; for ``format`` see `Record`."""
        kind = LatentCache if format is None else QuantizedLatentCache
        return kind.of(self, batch, capacity, format)


def by_head(
    x: Float[Tensor, "batch heads seq inputs"],
    weight: Float[Tensor, "heads inputs outputs"],
) -> Float[Tensor, "batch heads seq outputs"]:
    """Multiply the tokens of each head by that head's own matrix, in its dtype."""
    B, H, S, inputs = x.shape
    rows = x.transpose(0, 1).reshape(H, B * S, inputs).to(weight.dtype)
    # The same product either way; CPU kernels are slow where they must transpose.
    row_major = weight.stride(-1) == 1
    out = torch.bmm(rows, weight) if row_major else torch.bmm(weight.mT, rows.mT).mT
    return out.unflatten(1, (B, S)).transpose(0, 1).to(x.dtype)


def offers_matrices(kv_b_proj: nn.Module) -> bool:
    """Whether W_UK and W_UV are all that ``kv_b_proj`` does: it need not be called."""
    if hasattr(kv_b_proj, "matrices"):
        return not kv_b_proj._forward_hooks and not kv_b_proj._forward_pre_hooks
    return is_plain_linear(kv_b_proj) and kv_b_proj.bias is None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module does no more than ``F.linear`` with its weight and bias.

    Not so for a subclass with a ``forward`` of its own (an adapter), a module that
    wraps or quantises the map, or one with hooks. ``torch.nn.utils.parametrize`` is
    fine: it computes the weight where that is read.
    """
    before, after = module._forward_pre_hooks, module._forward_hooks
    hooks = before or after or module._backward_hooks or module._backward_pre_hooks
    own = not isinstance(module, nn.Linear) or type(module).forward is not LINEAR
    if own or hooks or "forward" in module.__dict__:
        return False
    weight: Any = module.weight
    usual = type(weight).__torch_function__ in TORCH_FUNCTIONS
    return usual and not is_traceable_wrapper_subclass(weight)


LINEAR = nn.Linear.forward
TORCH_FUNCTIONS = Tensor.__torch_function__, nn.Parameter.__torch_function__


class DeepseekV2FlashAttention2(DeepseekV2Attention):
    """`DeepseekV2Attention` whose expanded form always runs in flash-attn 2."""

    fixed_implementation = "flash_attention_2"
