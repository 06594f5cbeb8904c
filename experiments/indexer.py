"""What followed the latent: the lightning indexer of DeepSeek-V3.2, and the compressed
entries of DeepSeek-V4.

Letters: B sequences of S new tokens, K tokens attended to, D hidden size, Q query
latent, H heads of the indexer, of width d each. Equation 1 is that of the V3.2-Exp
report. Nothing in ``dsv2_ref`` needs either.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2_ref.rope import rotate_half_split


class LightningIndexer(nn.Module):
    """Choose the ``top_k`` tokens that each query may attend to, by a small attention
    of its own: many narrow heads, one key per token, no softmax.

    Source: DeepSeek-V3.2-Exp, equation 1; ``DeepseekV32Indexer`` of transformers
    5.23.0. The published code also multiplies queries and keys by a Hadamard matrix,
    which changes no score, and rounds both to FP8: left out, as there.
    """

    def __init__(self, D: int, Q: int, heads: int, width: int, top_k: int) -> None:
        super().__init__()
        self.heads, self.top_k = heads, top_k
        self.scale = (heads * width) ** -0.5
        self.wq_b = nn.Linear(Q, heads * width, bias=False)
        self.wk = nn.Linear(D, width, bias=False)
        self.k_norm = nn.LayerNorm(width, eps=1e-6)
        self.weights_proj = nn.Linear(D, heads, bias=False)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq hidden"],
        q_latent: Float[Tensor, "batch seq q_latent"],
        cos: Float[Tensor, "#batch seq pairs"],
        sin: Float[Tensor, "#batch seq pairs"],
        past: Float[Tensor, "batch past width"] | None = None,
    ) -> tuple[Int[Tensor, "batch seq top_k"], Float[Tensor, "batch kv width"]]:
        """The chosen tokens of each query, best first, and the keys to cache."""
        scores, k = self.scores(hidden_states, q_latent, cos, sin, past)
        return scores.topk(min(self.top_k, k.shape[1]), dim=-1).indices, k

    def scores(
        self,
        hidden_states: Float[Tensor, "batch seq hidden"],
        q_latent: Float[Tensor, "batch seq q_latent"],
        cos: Float[Tensor, "#batch seq pairs"],
        sin: Float[Tensor, "#batch seq pairs"],
        past: Float[Tensor, "batch past width"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq kv"], Float[Tensor, "batch kv width"]]:
        """How much each query wants each token, and the keys to cache."""
        q = self.wq_b(q_latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q = rotate_first(q, cos[:, None], sin[:, None])  # (B, H, S, d)
        k = rotate_first(self.k_norm(self.wk(hidden_states)), cos, sin)
        k = k if past is None else torch.cat((past, k), dim=1)  # (B, K, d)
        w = self.weights_proj(hidden_states) * self.scale  # (B, S, H)
        per_head = (q @ k[:, None].mT).relu()  # (B, H, S, K)
        scores = torch.einsum("bsh,bhsk->bsk", w, per_head)  # equation 1

        S, K = scores.shape[1:]
        future = torch.ones(S, K, device=k.device).triu(K - S + 1).bool()
        return scores.masked_fill(future, -torch.inf), k


def rotate_first(
    x: Float[Tensor, "*batch width"],
    cos: Float[Tensor, "*table pairs"],
    sin: Float[Tensor, "*table pairs"],
) -> Float[Tensor, "*batch width"]:
    """Rotate the first 2 · pairs features, in halves: unlike MLA's rope key, which is
    rotated in neighbouring pairs and comes last."""
    rotating = 2 * cos.shape[-1]
    rotated = rotate_half_split(x[..., :rotating], cos, sin)
    return torch.cat((rotated, x[..., rotating:]), dim=-1)


def compress_entries(
    entries: Float[Tensor, "batch seq width"],
    gates: Float[Tensor, "batch seq width"],
    position_bias: Float[Tensor, "window width"],
) -> Float[Tensor, "batch windows width"]:
    """One entry for every m tokens in a row: their mean, in which every feature
    has its own weights, a softmax over the m tokens.

    Source: ``DeepseekV4HCACompressor`` of transformers 5.23.0, before norm and
    rotation.
    """
    m = len(position_bias)
    full = entries.shape[1] // m * m  # the rest waits for its m tokens
    entries = entries[:, :full].unflatten(1, (-1, m))  # (B, S / m, m, width)
    gates = gates[:, :full].unflatten(1, (-1, m)) + position_bias
    return (gates.softmax(dim=2) * entries).sum(dim=2)  # (B, S / m, width)
