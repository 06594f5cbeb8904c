"""Multi-head latent attention (MLA), and the table from which a layer picks its attention."""

from typing import cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dsv2_ref.attend import attend_latent
from dsv2_ref.attend_cpu import CPU_SIZES, suits_cpu_products
from dsv2_ref.attention_base import AttentionBase
from dsv2_ref.cache import LatentCache
from dsv2_ref.checks import require
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.masks import Visibility
from dsv2_ref.multi_head import MultiHeadAttention, MultiHeadFlashAttention2
from dsv2_ref.projection import projection
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from dsv2_ref.rope import rotate_interleaved, softmax_temperature


class DeepseekV2Attention(AttentionBase):
    """Multi-head latent attention: keys and values of all heads are read from one latent vector a token.

    With the letters of DeepSeek-V2, section 2.1: a token h is compressed to a latent c of C = ``kv_lora_rank`` numbers
    and one key of R = ``qk_rope_head_dim`` numbers that carries the position; these C + R numbers are all that is
    cached. Head i then has the key [W_UK c, k_rope] and the value W_UV c. Queries are compressed as well, to
    ``q_lora_rank`` numbers, unless that is None.

    Two forms compute the same from the same weights. *Expanded* makes every head's keys and values from the latents,
    which is cheap for many queries. *Absorbed* moves W_UK to the query and W_UV behind the softmax, so that all heads
    attend to the latents themselves, which is cheap for few queries over many keys. The attribute ``form`` holds
    ``expanded``, ``absorbed`` or ``auto``, which picks by the count of operations (`cheaper_form`). The absorbed form
    reads ``kv_b_proj.weight`` itself, without calling the module.

    ``torch.export`` takes a prompt of any length as ``expanded`` and ``auto``. As ``absorbed``, of one length only: torch
    2.13 cannot order seq and seq² while it flattens the scores' heads and queries, and refuses the range.

    Args:
        config: hyperparameters; ``_attn_implementation`` chooses ``eager``, ``sdpa`` or ``flash_attention_2``. The
            absorbed form runs as plain products in all three: no fused kernel takes keys of width C + R.
        layer_idx: index of the layer; its cache carries it.

    Raises:
        ImportError: for ``flash_attention_2`` where flash-attn is not installed.
        ValueError: from `forward`, before anything has changed, for an input that does not fit.

    Source: DeepSeek-V2, equations 1 to 19 and appendix C; ``DeepseekV2Attention`` of the published code.
    """

    cache_class = LatentCache

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        require(
            config.use_mla and config.kv_lora_rank is not None, "use_mla", config.use_mla, "True for latent attention"
        )
        self.kv_lora_rank: int = config.kv_lora_rank or 0
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.v_head_dim = config.v_head_dim
        self.rotary_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.cache_features = (self.kv_lora_rank + self.rotary_dim,)
        self.softmax_scale = self.qk_head_dim**-0.5 * softmax_temperature(config.rope_scaling)
        self.form = config.mla_form

        hidden, heads, std, bias = config.hidden_size, self.num_heads, config.initializer_range, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = projection(hidden, heads * self.qk_head_dim, std)
        else:
            self.q_a_proj = projection(hidden, config.q_lora_rank, std, bias)
            self.q_a_layernorm = DeepseekV2RMSNorm(config.q_lora_rank)
            self.q_b_proj = projection(config.q_lora_rank, heads * self.qk_head_dim, std)
        self.kv_a_proj_with_mqa = projection(hidden, self.kv_lora_rank + self.rotary_dim, std, bias)
        self.kv_a_layernorm = DeepseekV2RMSNorm(self.kv_lora_rank)
        self.kv_b_proj = projection(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), std)
        self.o_proj = projection(heads * self.v_head_dim, hidden, std, bias)

    def cheaper_form(self, seq: int, kv_seq: int) -> str:
        """The form with fewer multiplications for ``seq`` causal queries over ``kv_seq`` keys.

        A head costs K·C(N+V) + P(N+R+V) expanded and S·C(N+V) + P(2C+R) absorbed, where P is the number of
        query-key pairs; what both share (compression, queries, output) is left out. Where nothing is remembered, S = K,
        the pairs alone decide, whatever their number: a prompt of any length is exported as one form.
        """
        latent, rope, value = self.kv_lora_rank, self.rotary_dim, self.v_head_dim
        more_for_a_pair = 2 * latent + rope - self.qk_head_dim - value
        if seq == kv_seq:
            return "absorbed" if more_for_a_pair < 0 else "expanded"
        pairs = seq * kv_seq - seq * (seq - 1) // 2
        saved = (kv_seq - seq) * latent * (self.qk_nope_head_dim + value)
        return "absorbed" if pairs * more_for_a_pair < saved else "expanded"

    def up_matrices(self) -> tuple[Float[Tensor, "heads nope latent"], Float[Tensor, "heads v latent"]]:
        """Every head's W_UK and W_UV, the parts of ``kv_b_proj``."""
        kv_b_proj: nn.Module = self.kv_b_proj
        if not isinstance(kv_b_proj, nn.Linear):  # packed, and holds them apart
            w_uk, w_uv = cast(tuple[Tensor, Tensor], kv_b_proj.matrices)
            return w_uk, w_uv
        by_head = kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank)
        w_uk, w_uv = by_head.split((self.qk_nope_head_dim, self.v_head_dim), dim=1)
        return w_uk, w_uv

    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq hidden"],
        attention_mask: Shaped[Tensor, "..."] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        past_key_value: LatentCache | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch heads seq kv_seq"] | None, LatentCache | None]:
        """Attend from every token to those before it, the remembered ones included.

        Args:
            hidden_states: normalised tokens, in the dtype of the weights.
            attention_mask: see `Visibility.of`; None is causal.
            position_ids: places of the tokens, 0 or more; None continues from the cache.
            past_key_value: what an earlier call of this layer returned with ``use_cache=True``.
            output_attentions: return the weights as well (``eager`` only).
            use_cache: return a cache that includes these tokens.

        Returns:
            ``(attn_output, attn_weights, present)``; the last two are None where not asked for.
        """
        visible, cos, sin = self._read(hidden_states, attention_mask, position_ids, past_key_value, output_attentions)
        q_nope, q_pe = self._queries(hidden_states, cos, sin)
        form = self.cheaper_form(visible.seq, visible.kv_seq) if self.form == "auto" else self.form
        require(form in ("expanded", "absorbed"), "form", form, "expanded, absorbed or auto")
        if form == "expanded":
            self._check_kernel(q_nope, max(self.qk_head_dim, self.v_head_dim), visible)
        present = self._remember(self._compress(hidden_states, cos, sin), past_key_value, use_cache)

        if form == "absorbed":
            out, weights = self._absorbed(q_nope, q_pe, present, visible, output_attentions)
        else:
            out, weights = self._expanded(q_nope, q_pe, present, visible)
        attn_output = self.o_proj(out.transpose(1, 2).flatten(2))
        return attn_output, weights if output_attentions else None, present if use_cache else None

    def _queries(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Float[Tensor, "batch heads seq nope"], Float[Tensor, "batch heads seq rope"]]:
        """Each head's query: the part without position, and the rotated part (equations 12 to 16)."""
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (self.num_heads, self.qk_head_dim)).transpose(1, 2)
        q_nope, q_pe = query.split((self.qk_nope_head_dim, self.rotary_dim), dim=-1)
        return q_nope, rotate_interleaved(q_pe, cos[:, None], sin[:, None])

    def _compress(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Float[Tensor, "batch seq latent_and_rope"]:
        """What is remembered of each token: its latent, normalised, and its rotated key (equations 9 and 15)."""
        compressed_kv, k_pe = self.kv_a_proj_with_mqa(hidden_states).split((self.kv_lora_rank, self.rotary_dim), dim=-1)
        return torch.cat((self.kv_a_layernorm(compressed_kv), rotate_interleaved(k_pe, cos, sin)), dim=-1)

    def _expanded(
        self, q_nope: Tensor, q_pe: Tensor, remembered: LatentCache, visible: Visibility
    ) -> tuple[Float[Tensor, "batch heads seq v"], Float[Tensor, "batch heads seq kv_seq"] | None]:
        """Make every head's keys and values from the latents, then attend as any multi-head attention."""
        compressed_kv, k_pe = remembered.split(self.kv_lora_rank)
        kv = self.kv_b_proj(compressed_kv).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, value = kv.split((self.qk_nope_head_dim, self.v_head_dim), dim=-1)
        key = torch.cat((k_nope, k_pe[:, None].expand(-1, self.num_heads, -1, -1)), dim=-1)
        return self._attend(torch.cat((q_nope, q_pe), dim=-1), key, value, visible)

    def _absorbed(
        self, q_nope: Tensor, q_pe: Tensor, remembered: LatentCache, visible: Visibility, want_weights: bool
    ) -> tuple[Float[Tensor, "batch heads seq v"], Float[Tensor, "batch heads seq kv_seq"] | None]:
        """Take the queries to the latents instead: qᵀ(W_UK c) = (W_UKᵀ q)ᵀ c and Σ p (W_UV c) = W_UV Σ p c."""
        batch, heads, seq, _ = q_nope.shape
        w_uk, w_uv = self.up_matrices()
        by_head = q_nope.transpose(0, 1).reshape(heads, batch * seq, -1)
        q_latent = torch.bmm(by_head, w_uk).view(heads, batch, seq, -1).transpose(0, 1)
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attend_latent(
            torch.cat((q_latent, q_pe), dim=-1),
            remembered.rounded_up(CPU_SIZES) if seq == 1 and suits_cpu_products(q_nope, w_uk) else remembered.tokens,
            self.kv_lora_rank,
            visible,
            self.softmax_scale,
            dropout,
            want_weights,
        )
        by_head = attended.transpose(0, 1).reshape(heads, batch * seq, -1)
        # The same product either way; the CPU's kernels are several times faster when they need not transpose W_UV.
        transposed = w_uv.mT.is_contiguous()
        out = torch.bmm(by_head, w_uv.mT) if transposed else torch.bmm(w_uv, by_head.mT).mT
        return out.reshape(heads, batch, seq, -1).transpose(0, 1), weights


class DeepseekV2FlashAttention2(DeepseekV2Attention):
    """`DeepseekV2Attention` whose expanded form runs in flash-attn 2, whatever the configuration says.

    Raises:
        ImportError: where flash-attn is not installed, with what to do.
    """

    fixed_implementation = "flash_attention_2"


ATTENTION_CLASSES: dict[str, type[DeepseekV2Attention] | type[MultiHeadAttention]] = {
    "mla_eager": DeepseekV2Attention,
    "mla_sdpa": DeepseekV2Attention,
    "mla_flash_attention_2": DeepseekV2FlashAttention2,
    "mha_eager": MultiHeadAttention,
    "mha_sdpa": MultiHeadAttention,
    "mha_flash_attention_2": MultiHeadFlashAttention2,
}
"""The class for ``"mla_"`` or ``"mha_"`` + ``config._attn_implementation``, as a layer looks it up."""
