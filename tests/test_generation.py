"""Generation: padded prompts, where sequences end, how tokens are drawn, and that each is given as soon as it is known."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2_ref import DeepseekV2ForCausalLM
from dsv2_ref.generation import choose
from tests.peers import SMALL, V3_GATE, YARN, native_config, native_of, randomised, with_weights_of

PROMPTS = [[5, 9, 2, 33, 7], [11, 4], [60]]
CONFIGS = {
    "v2": SMALL,
    "v3": V3_GATE,
    "yarn": replace(SMALL, rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
}


def padded(pad: int = 0) -> tuple[Tensor, Tensor]:
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return ids, mask


def model_of(name: str) -> DeepseekV2ForCausalLM:
    return randomised(DeepseekV2ForCausalLM(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    model, (ids, mask) = model_of(name), padded()
    together = model.generate(ids, 7, mask)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), 7)[0, len(prompt) :]
        assert torch.equal(together[row, ids.shape[1] :], alone)
    other = model.generate(padded(pad=50)[0], 7, mask.bool())
    assert torch.equal(together[:, ids.shape[1] :], other[:, ids.shape[1] :])


@pytest.mark.parametrize("name", ["v2", "v3"])
def test_transformers_generates_the_same(name: str) -> None:
    ours, (ids, mask) = model_of(name), padded()
    theirs = with_weights_of(ours, native_of(CONFIGS[name]).causal_lm(native_config(CONFIGS[name])))
    found = ours.generate(ids, 8, mask)
    ends = [int(found[0, 7]), int(found[1, 9])]
    for eos in (None, ends):
        settings: dict[str, Any] = {} if eos is None else {"eos_token_id": eos}
        actual = ours.generate(ids, 8, mask, pad_token_id=0, **settings)
        expected = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=0
        )
        assert torch.equal(actual, expected)


def test_a_sequence_that_has_ended_is_padded_until_all_have() -> None:
    model, (ids, mask) = model_of("v2"), padded()
    free = model.generate(ids, 8, mask)[:, ids.shape[1] :]
    end = int(free[0, 2])
    found = model.generate(ids, 8, mask, eos_token_id=end)[:, ids.shape[1] :]
    for row in range(3):
        ended = (free[row] == end).nonzero()
        last = int(ended[0]) + 1 if len(ended) else 8
        assert torch.equal(found[row, :last], free[row, :last])
        assert (found[row, last:] == end).all()
    alone = model.generate(ids[:1], 8, mask[:1], eos_token_id=end, pad_token_id=1)
    assert alone.shape[1] - ids.shape[1] == int((free[0] == end).nonzero()[0]) + 1


def test_tokens_are_given_as_soon_as_they_are_known() -> None:
    model, (ids, mask) = model_of("v2"), padded()
    stream = model.stream(ids, 10**9, mask)
    taken = torch.stack([next(stream) for _ in range(5)], dim=1)
    assert torch.equal(taken, model.generate(ids, 5, mask)[:, ids.shape[1] :])


def test_drawing_follows_the_probabilities() -> None:
    """10,000 draws: shares are within five standard deviations, 0.005 each, of softmax(logits / temperature)."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(10_000, 4)
    for temperature in (0.5, 1.0, 2.0):
        drawn = choose(logits, temperature, generator=torch.Generator().manual_seed(0))
        shares = drawn.bincount(minlength=4) / len(drawn)
        assert torch.allclose(shares, (logits[0] / temperature).softmax(-1), atol=0.025)
    assert choose(logits).unique().tolist() == [0]
    for lowest in (1e-6, 1e-40, 5e-324):  # logits divided by it would be infinite
        assert choose(logits, lowest).unique().tolist() == [0]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(5e-324, [0]), (1e-9, [0]), (0.64, [0]), (0.65, [0, 1]), (0.89, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_draws_from_the_fewest_tokens_that_reach_it(top_p: float, kept: list[int]) -> None:
    """Probabilities 0.64, 0.24, 0.09, 0.03, in another order."""
    order = torch.tensor([2, 0, 3, 1])
    probabilities = torch.tensor([0.6439, 0.2369, 0.0871, 0.0321])
    logits = torch.empty(4).scatter(0, order, probabilities.log()).expand(20_000, 4)
    drawn = choose(logits, 1.0, top_p, torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4)[order] / len(drawn)
    expected = torch.where(torch.isin(torch.arange(4), torch.tensor(kept)), probabilities, 0)
    assert torch.allclose(shares, expected / expected.sum(), atol=0.02)


def test_a_generator_repeats_itself() -> None:
    model, (ids, mask) = model_of("v2"), padded()
    draws = [
        model.generate(ids, 6, mask, temperature=1.5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1; wanted 0 or more tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5; wanted 0 or more tokens"),
        ({"temperature": -0.1}, "temperature is -0.1; wanted 0, or more to draw"),
        ({"temperature": float("nan")}, "temperature is nan; wanted 0, or more to draw"),
        ({"top_p": 0}, "top_p is 0; wanted above 0, at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5; wanted above 0, at most 1"),
        ({"eos_token_id": 64}, "eos_token_id is 64; wanted tokens from 0 to 63"),
        ({"eos_token_id": [1, None]}, "eos_token_id is None; wanted tokens from 0 to 63"),
        ({"eos_token_id": 2.5}, "eos_token_id is 2.5; wanted tokens from 0 to 63"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; wanted tokens from 0 to 63"),
        ({"eos_token_id": torch.tensor(3)}, "eos_token_id is .*; wanted tokens from 0 to 63"),
        ({"eos_token_id": 3, "pad_token_id": -100}, "pad_token_id is -100; wanted tokens from 0 to 63"),
        ({"eos_token_id": 3, "pad_token_id": 64}, "pad_token_id is 64; wanted tokens from 0 to 63"),
        (
            {"attention_mask": torch.ones(2, 5)},
            r"attention_mask is \(2, 5\) .*; wanted the shape and device of input_ids, \(3, 5\)",
        ),
        (
            {"attention_mask": padded()[1].flip(1)},
            r"attention_mask is .*; wanted padding on the left only, and a token last",
        ),
        ({"attention_mask": [1]}, "attention_mask is a list of 1; wanted a tensor"),
        ({"generator": 3}, "generator is 3; wanted None or a torch.Generator"),
        ({"cache_format": 3}, "cache_format is 3; wanted None or one of fp8, int8, int4"),
    ],
)
def test_what_is_rejected_is_rejected_at_once(settings: dict[str, Any], message: str, as_shipped: None) -> None:
    model = model_of("v2")
    for call in (model.generate, model.stream):
        with pytest.raises(ValueError, match=f"^{message}"):
            call(padded()[0], **({"max_new_tokens": 3} | settings))


def test_prompts_that_are_none_are_rejected_at_once(as_shipped: None) -> None:
    model = model_of("v2")
    for prompts in ([[1, 2]], torch.tensor([1, 2]), None):
        for number in (0, 3):
            with pytest.raises(ValueError, match=r"^input_ids is .*; wanted (a tensor|integers \(batch, seq\))"):
                model.generate(prompts, number)  # type: ignore[arg-type]


def test_where_a_sequence_ends_may_be_left_out() -> None:
    model, (ids, mask) = model_of("v2"), padded()
    free = model.generate(ids, 4, mask)
    for nothing in (None, (), []):
        assert torch.equal(model.generate(ids, 4, mask, eos_token_id=nothing), free)
    end = int(free[0, 7])
    assert torch.equal(
        model.generate(ids, 4, mask, eos_token_id=(end,)), model.generate(ids, 4, mask, eos_token_id=end)
    )
