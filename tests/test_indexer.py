"""The indexer of DeepSeek-V3.2 and the compressed entries of V4 against transformers' own, with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HCACompressor
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

from dsv2_ref.rope import rotary_tables
from experiments.indexer import LightningIndexer, compress_entries
from tests.peers import assert_close, inside, randomised, tokens

HIDDEN, Q_LATENT, HEADS, WIDTH, ROPE, SEQ = 20, 14, 13, 12, 8, 11
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def native_config(top_k: int) -> DeepseekV32Config:
    return DeepseekV32Config(
        hidden_size=HIDDEN, q_lora_rank=Q_LATENT, index_n_heads=HEADS, index_head_dim=WIDTH, qk_rope_head_dim=ROPE,
        index_topk=top_k, num_hidden_layers=1, first_k_dense_replace=1,
    )  # fmt: skip


def both(top_k: int, dtype: torch.dtype) -> tuple[LightningIndexer, DeepseekV32Indexer]:
    """Ours and theirs, with the same weights under the same names."""
    ours = randomised(LightningIndexer(HIDDEN, Q_LATENT, HEADS, WIDTH, top_k), dtype)
    theirs = DeepseekV32Indexer(native_config(top_k), 0).to(dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, query latents, cosines and sines of two sequences."""
    positions = torch.arange(SEQ)[None].expand(2, -1)
    tables = rotary_tables(positions, ROPE, 10000.0, dtype=dtype)
    return tokens(2, SEQ, dtype, width=HIDDEN), tokens(2, SEQ, dtype, seed=1, width=Q_LATENT), *tables


class Scores:
    """Notes the scores of each choice of one process, made by ``Tensor.topk``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        original = torch.Tensor.topk

        def noting(scores: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(scores)
            return original(scores, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "topk", noting)


@DTYPES
@pytest.mark.parametrize("top_k", [4, SEQ, 100])
def test_scores_choices_and_cache_are_those_of_transformers(
    dtype: torch.dtype, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = both(top_k, dtype)
    hidden, q_latent, cos, sin = inputs(dtype)
    wide = [torch.cat((table, table), dim=-1) for table in (cos, sin)]
    future = torch.ones(SEQ, SEQ).triu(1).bool()
    mask = torch.zeros(2, SEQ, SEQ, dtype=dtype).masked_fill(future, -torch.inf)
    cache = DynamicCache(config=native_config(top_k))
    cache.update(hidden[:, None], hidden[:, None], 0)  # as the attention does before it calls the indexer
    noted = Scores(monkeypatch)
    with torch.no_grad(), inside(dtype):
        chosen, keys = ours(hidden, q_latent, cos, sin)
        expected = theirs(hidden, q_latent, wide, mask, None, past_key_values=cache)
    scores, expected_scores = noted.seen[0], noted.seen[-1]
    seen = ~future.expand(2, -1, -1)
    assert_close(scores[seen], expected_scores[seen], "scores")
    assert torch.isneginf(scores[~seen]).all()
    assert chosen.shape == expected.shape == (2, SEQ, min(top_k, SEQ))
    for query in range(SEQ):  # of the future nothing is chosen but where there is too little past
        past = min(query + 1, chosen.shape[-1])
        assert torch.equal(chosen[:, query, :past], expected[:, query, :past].long())
    assert_close(keys, cache.layers[0].indexer_keys, "cached keys")


def test_the_weights_of_heads_may_be_negative_and_scores_below_zero_are_cut_before_them() -> None:
    """By hand, as the book has it: heads (1, 0) and (0, 1) with weights 2 and 1."""
    indexer = LightningIndexer(2, 1, heads=2, width=2, top_k=2).double().requires_grad_(False)
    indexer.k_norm = torch.nn.Identity()
    indexer.scale = 1.0
    indexer.wk.weight.copy_(torch.eye(2))
    indexer.wq_b.weight.copy_(torch.tensor([[1.0], [0], [0], [1]]))
    indexer.weights_proj.weight.copy_(torch.tensor([[1.0, 1.0], [-0.5, 1.5]]))  # (1, 1) gives 2 and 1
    keys = torch.tensor([[[3.0, -1], [-2, 4], [1, 1]]]).double()
    flat = torch.ones(1, 3, 0).double()
    chosen, cached = indexer(keys, torch.ones(1, 3, 1).double(), flat, flat)
    assert chosen[0, -1].tolist() == [0, 1]
    assert torch.equal(cached, keys)


@DTYPES
def test_decoding_with_cached_keys_chooses_what_one_pass_chooses(dtype: torch.dtype) -> None:
    ours, _ = both(4, dtype)
    hidden, q_latent, cos, sin = inputs(dtype)
    with torch.no_grad():
        whole, keys = ours(hidden, q_latent, cos, sin)
        past = None
        for begin, end in ((0, 6), (6, 7), (7, SEQ)):
            piece = slice(begin, end)
            chosen, past = ours(hidden[:, piece], q_latent[:, piece], cos[:, piece], sin[:, piece], past)
            for query in range(begin, end):
                count = min(query + 1, 4)
                assert torch.equal(chosen[:, query - begin, :count], whole[:, query, :count])
    assert_close(past, keys, "cached keys")


@DTYPES
@pytest.mark.parametrize("seq", [3, 4, 11, 12])
def test_entries_are_compressed_as_in_transformers(dtype: torch.dtype, seq: int) -> None:
    config = DeepseekV4Config(
        hidden_size=HIDDEN, head_dim=WIDTH, qk_rope_head_dim=4, num_hidden_layers=2, num_attention_heads=2,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    )  # fmt: skip
    theirs = randomised(DeepseekV4HCACompressor(config), dtype)
    before_norm: list[Tensor] = []
    theirs.kv_norm.register_forward_pre_hook(lambda module, given: before_norm.append(given[0]))
    hidden = tokens(2, seq, dtype, width=HIDDEN)
    with torch.no_grad(), inside(dtype):
        theirs(hidden, hidden, torch.arange(seq)[None].expand(2, -1), None, 0)
        ours = compress_entries(theirs.kv_proj(hidden), theirs.gate_proj(hidden), theirs.position_bias)
    assert ours.shape == (2, seq // 4, WIDTH)
    if before_norm:
        assert_close(ours, before_norm[0], "entries")
    assert len(before_norm) == (seq >= 4)
