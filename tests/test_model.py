"""The stack against transformers' own, its caches, its names, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as native

from dsv2_ref import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV2Model
from tests.peers import (
    COMMON,
    SMALL,
    assert_close,
    assert_same_gradients,
    inside,
    native_config,
    randomised,
    with_weights_of,
)

# The roundings of `peers.ROUNDINGS` are those of one layer. Here two follow one another, and a norm and a head, each
# fed with what the one before rounded: the largest distance measured was 14 roundings in float32 and 12 in float64.
STACKED_ROUNDINGS = 80


def ids(batch: int, seq: int, vocab: int = SMALL.vocab_size) -> Tensor:
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(3))


def model(config: DeepseekV2Config = SMALL, dtype: torch.dtype = torch.float64) -> DeepseekV2ForCausalLM:
    return randomised(DeepseekV2ForCausalLM(config), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", COMMON)
def test_logits_and_gradients_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    ours = model(COMMON[name], dtype)
    with inside(dtype):  # rotary frequencies are kept from the start
        theirs = with_weights_of(ours, native.DeepseekV2ForCausalLM(native_config(COMMON[name])))
    logits, _ = ours(ids(2, 9))
    with inside(dtype):
        expected = theirs(ids(2, 9), use_cache=False).logits
    assert_close(logits, expected, "logits", STACKED_ROUNDINGS)
    for module, output in ((ours, logits), (theirs, expected)):
        module.zero_grad()
        output.log_softmax(-1)[..., 0].sum().backward()
    assert_same_gradients(ours, theirs, STACKED_ROUNDINGS)


@pytest.mark.parametrize("use_mla", [True, False], ids=["mla", "mha"])
@pytest.mark.parametrize("pieces", [(9,), (4, 4, 1), (1,) * 9], ids=str)
def test_any_chunking_through_the_caches_equals_one_pass(pieces: tuple[int, ...], use_mla: bool) -> None:
    ours = model(replace(SMALL, use_mla=use_mla))
    tokens = ids(2, 9)
    expected, nothing = ours(tokens)
    assert nothing is None
    outputs, caches = [], None
    with torch.no_grad():
        for piece in tokens.split(pieces, dim=1):
            logits, caches = ours(piece, past_key_values=caches, use_cache=True)
            outputs.append(logits)
    # One pass and many add the same numbers in another order, in float64.
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-10)
    assert [cache.layer_idx for cache in caches] == list(range(SMALL.num_hidden_layers))
    assert {cache.length for cache in caches} == {9}


def test_a_padded_sequence_gives_the_logits_it_gives_alone() -> None:
    ours, tokens = model(), ids(2, 8)
    keep = torch.arange(8) >= torch.tensor([[0], [3]])
    places = (keep.cumsum(1) - 1).clamp(min=0)
    together, _ = ours(tokens, attention_mask=keep, position_ids=places)
    alone, _ = ours(tokens[1:, 3:])
    torch.testing.assert_close(together[1:, 3:], alone, rtol=1e-10, atol=1e-10)


def test_generate_continues_by_the_most_probable_token() -> None:
    ours, tokens = model(), ids(2, 5)
    out = ours.generate(tokens, 6)
    assert out.shape == (2, 11)
    expected = tokens
    for _ in range(6):  # without a cache
        expected = torch.cat((expected, ours(expected)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(out, expected)
    assert torch.equal(ours.generate(tokens, 0), tokens)


def test_state_dict_speaks_the_published_names() -> None:
    names = set(DeepseekV2ForCausalLM(SMALL).state_dict())
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.mlp.experts.11.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    } <= names


def test_the_head_is_the_embedding_where_they_are_tied() -> None:
    tied = DeepseekV2ForCausalLM(replace(SMALL, tie_word_embeddings=True))
    free = DeepseekV2ForCausalLM(SMALL)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    spared = sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters())
    assert spared == SMALL.vocab_size * SMALL.hidden_size


def test_logits_of_a_bfloat16_model_are_float32() -> None:
    logits, _ = model(dtype=torch.bfloat16)(ids(1, 3))
    assert logits.dtype == torch.float32


def test_embedding_and_head_begin_as_the_published_ones() -> None:
    # Of 4096 x 48 normal numbers, the deviation is known to 0.2 % (one in 441 is the standard error); 2 % is ten of them.
    wide = DeepseekV2ForCausalLM(replace(SMALL, vocab_size=4096))
    for weight in (wide.lm_head.weight, wide.model.embed_tokens.weight):
        assert abs(weight.std().item() / SMALL.initializer_range - 1) < 0.02


def test_what_does_not_fit_is_refused_and_changes_no_cache(as_shipped: None) -> None:
    ours, tokens = model(), ids(2, 4)
    with torch.no_grad():
        _, caches = ours(tokens, use_cache=True)
        before = [cache.tokens.clone() for cache in caches]
        for wrong, message in (
            ({"input_ids": tokens.float()}, r"input_ids is \(2, 4\) torch.float32 on cpu; wanted integers"),
            ({"input_ids": tokens[0]}, r"input_ids is \(4,\)"),
            ({"input_ids": tokens[:, :0]}, "at least one token"),
            ({"past_key_values": caches[:1]}, "past_key_values is a tuple of 1; wanted a cache for each of 2 layers"),
            ({"past_key_values": caches[::-1]}, "past_key_value is LatentCache"),
        ):
            with pytest.raises(ValueError, match=message):
                ours(**{"input_ids": tokens, "past_key_values": caches, **wrong})
        with pytest.raises(ValueError, match="max_new_tokens is -1; wanted 0 or more tokens"):
            ours.generate(tokens, -1)
    assert all(torch.equal(cache.tokens, old) for cache, old in zip(caches, before, strict=True))
    with pytest.raises(TypeError, match="input_ids"):
        DeepseekV2Model(SMALL)([[1, 2]])
