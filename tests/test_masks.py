"""Masks have one meaning in every implementation and form, and no finite input gives NaN."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv2_ref import ATTENTION_CLASSES, DeepseekV2Config, DeepseekV2DecoderLayer
from dsv2_ref.fast import sdpa as attending
from dsv2_ref.fast.sdpa import blocks
from dsv2_ref.masks import Visibility
from tests.peers import SMALL, assert_close, randomised, tokens

BATCH, SEQ = 2, 5
MHA = replace(SMALL, use_mla=False, num_key_value_heads=2)
WAYS = {
    f"{kind}-{form}-{kernel}": replace(config, mla_form=form, _attn_implementation=kernel)
    for kind, config, forms in (("mla", SMALL, ("expanded", "absorbed")), ("mha", MHA, ("expanded",)))
    for form in forms
    for kernel in ("eager", "sdpa")
}
every_way = pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)
every_eager_way = pytest.mark.parametrize(
    "config", [c for c in WAYS.values() if c._attn_implementation == "eager"], ids=[w for w in WAYS if "eager" in w]
)
INFINITY, NEVER = float("inf"), torch.zeros(1, 1, SEQ, SEQ, dtype=torch.bool)
CAUSAL = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).tril()


def attention_of(config: DeepseekV2Config, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    kind = ("mla_" if config.use_mla else "mha_") + config._attn_implementation
    return randomised(ATTENTION_CLASSES[kind](config, 0), dtype)


def stream(dtype: torch.dtype = torch.float64) -> Tensor:
    return tokens(BATCH, SEQ, dtype)


def added(keep: Tensor, dtype: torch.dtype = torch.float64, hidden: float = -INFINITY) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, hidden)


@every_way
@pytest.mark.parametrize(
    "mask",
    [
        CAUSAL,
        CAUSAL.expand(BATCH, 1, SEQ, SEQ),
        CAUSAL.expand(1, SMALL.num_attention_heads, SEQ, SEQ),
        added(CAUSAL),
        added(CAUSAL, torch.float32),
        added(CAUSAL, hidden=torch.finfo(torch.float64).min),
        added(CAUSAL, torch.float32, torch.finfo(torch.float32).min),
        added(CAUSAL, torch.bfloat16, torch.finfo(torch.bfloat16).min),
        torch.ones(BATCH, SEQ, dtype=torch.bool),
        torch.ones(BATCH, SEQ, dtype=torch.int64),
        torch.full((BATCH, SEQ), 255, dtype=torch.uint8),
    ],
    ids=lambda mask: f"{mask.dtype}-{tuple(mask.shape)}-{float(mask.min())}",
)
def test_ways_to_say_causal(config: DeepseekV2Config, mask: Tensor) -> None:
    attention, x = attention_of(config), stream()
    assert_close(attention(x, attention_mask=mask)[0], attention(x)[0], "output")


@every_way
def test_a_mask_for_each_query_decides_alone(config: DeepseekV2Config) -> None:
    """Nothing of causal order remains: with the mask reversed, time runs backwards, here at one position for all."""
    attention, x = attention_of(config), stream()
    nowhere = torch.zeros(1, SEQ, dtype=torch.int64)
    forward = attention(x, position_ids=nowhere)[0]
    backward = attention(x.flip(1), attention_mask=CAUSAL.flip(2, 3), position_ids=nowhere)[0]
    assert_close(backward.flip(1), forward, "output")


@every_way
def test_padding_hides_keys_beside_causal_order(config: DeepseekV2Config) -> None:
    attention, x = attention_of(config), stream()
    real = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 1, 0]])
    for_each_query = CAUSAL & real.bool()[:, None, None]
    assert_close(attention(x, attention_mask=real)[0], attention(x, attention_mask=for_each_query)[0], "output")


@every_way
def test_each_head_and_sequence_may_have_its_own_mask(config: DeepseekV2Config) -> None:
    attention, x = attention_of(config), stream()
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(BATCH, config.num_attention_heads, SEQ, SEQ, generator=generator) < 0.5
    together = attention(x, attention_mask=keep)[0]
    for row in range(BATCH):
        alone = attention(x[row : row + 1], attention_mask=keep[row : row + 1])[0]
        assert_close(together[row : row + 1], alone, f"sequence {row}")

    silent = keep.clone()
    silent[:, 1:] = False  # what only the first head sees, passes through its share of the output projection
    heads = attention.o_proj.weight.unflatten(1, (config.num_attention_heads, -1))
    with torch.no_grad():
        heads[:, 1:] = 0
    assert_close(attention(x, attention_mask=silent)[0], attention(x, attention_mask=keep)[0], "first head alone")


@every_eager_way
def test_weights_are_zero_where_hidden_and_sum_to_one(config: DeepseekV2Config) -> None:
    keep = CAUSAL & (torch.arange(SEQ) != 1)
    weights = attention_of(config)(stream(), attention_mask=keep, output_attentions=True)[1]
    assert weights.shape == (BATCH, config.num_attention_heads, SEQ, SEQ)
    assert torch.equal(weights > 0, keep.expand_as(weights))
    assert_close(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64), "sums")


@every_eager_way
def test_a_floating_mask_is_added_after_the_scale(config: DeepseekV2Config) -> None:
    """Adding b to a score multiplies its weight by e^b, before weights are made to sum to 1."""
    attention, x = attention_of(config), stream()
    bias = torch.randn(BATCH, 1, SEQ, SEQ, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    everything = torch.ones_like(CAUSAL)
    plain = attention(x, attention_mask=everything, output_attentions=True)[1]
    biased = attention(x, attention_mask=bias, output_attentions=True)[1]
    expected = plain * bias.exp()
    assert_close(biased, expected / expected.sum(-1, keepdim=True), "weights")


@every_eager_way
@pytest.mark.parametrize("past", [0, 3])
def test_causal_order_is_aligned_with_the_last_key(config: DeepseekV2Config, past: int) -> None:
    attention, x = attention_of(config), stream()
    present = attention(x[:, :past], use_cache=True)[2] if past else None
    weights = attention(x[:, past:], past_key_value=present, output_attentions=True)[1]
    seen = torch.arange(SEQ) <= torch.arange(past, SEQ)[:, None]
    assert torch.equal(weights > 0, seen.expand_as(weights))


@every_way
def test_one_query_that_sees_everything_may_say_so_with_zeros(config: DeepseekV2Config) -> None:
    """What other code hands a decoding step: nothing is hidden from the last token, so that nothing is missing."""
    attention, x = attention_of(config), stream()
    _, _, present = attention(x[:, :-1], use_cache=True)
    zeros = torch.zeros(BATCH, 1, 1, SEQ)
    masked = attention(x[:, -1:], attention_mask=zeros, past_key_value=present)[0]
    assert_close(masked, attention(x[:, -1:], past_key_value=present)[0], "output")


@every_way
@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("kind", ["causal", "padding", "bool", "floating"])
def test_blocks_of_queries_make_no_difference(
    config: DeepseekV2Config, kind: str, past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are made for two queries at a time, then for one, as where they would not fit."""
    attention, x = attention_of(config), stream()
    padding = torch.arange(SEQ) >= torch.tensor([[0], [3]])
    keep = torch.rand(BATCH, 1, SEQ - past, SEQ, generator=torch.Generator().manual_seed(0)) < 0.6
    mask = {"causal": None, "padding": padding, "bool": keep, "floating": added(keep)}[kind]
    present = attention(x[:, :past], use_cache=True)[2] if past else None

    def run() -> tuple[Tensor, Tensor | None]:
        weights = config._attn_implementation == "eager"
        return attention(x[:, past:], mask, past_key_value=present, output_attentions=weights)[:2]

    whole = run()
    scores_per_query = BATCH * SEQ * config.num_attention_heads
    for limit in (2 * scores_per_query, 1):
        monkeypatch.setattr(attending, "SCORES_AT_ONCE", limit)
        for name, blockwise, expected in zip(("output", "weights"), run(), whole, strict=True):
            if expected is not None:
                assert_close(blockwise, expected, f"{name}, {limit} scores at once")


@every_way
@pytest.mark.parametrize("kind", ["causal", "padding", "bool", "floating"])
@pytest.mark.parametrize("past", [0, 20])
def test_half_precision_with_and_without_gradients(config: DeepseekV2Config, kind: str, past: int) -> None:
    """Without gradients a processor may take its own path, in blocks; here more than one of them."""
    seq, dtype = 300, torch.bfloat16
    attention, x = attention_of(config, dtype), tokens(BATCH, seq, dtype)
    padding = torch.arange(seq) >= torch.tensor([[0], [270]])
    keep = torch.rand(BATCH, 1, seq - past, seq, generator=torch.Generator().manual_seed(0)) < 0.6
    bias = added(keep, torch.float32) + torch.linspace(-1, 1, seq)
    mask = {"causal": None, "padding": padding, "bool": keep, "floating": bias}[kind]
    with torch.no_grad():
        present = attention(x[:, :past], use_cache=True)[2] if past else None
        quiet = attention(x[:, past:], attention_mask=mask, past_key_value=present)[0]
    loud = attention(x[:, past:], attention_mask=mask, past_key_value=present)[0]
    # Each side rounds scores, weights and values once to bfloat16, at different places: a few roundings of the largest.
    assert_close(quiet, loud, "output", roundings=4)


def test_a_block_holds_no_more_scores_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "SCORES_AT_ONCE", 100)
    ranges = blocks(50, 30)
    assert ranges[0] == (0, 3)
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    assert ranges[-1][1] == 50
    assert blocks(3, 33) == [(0, 3)]
    assert blocks(2, 1000) == [(0, 1), (1, 2)]  # a query cannot be cut


def test_causal_blocks_read_only_the_keys_that_they_see() -> None:
    visible = Visibility(seq=4, kv_seq=6, device=torch.device("cpu"))
    assert [visible.keys_until(stop) for stop in (1, 2, 4)] == [3, 4, 6]
    mask, sees_any = visible.block(1, 3)
    assert sees_any is None
    assert mask is not None
    assert mask.squeeze().tolist() == [[True, True, True, True, False], [True] * 5]


# Queries that see nothing

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def blind_masks(dtype: torch.dtype) -> dict[str, Tensor]:
    """The first two queries of the second sequence see nothing."""
    keep = CAUSAL.repeat(BATCH, 1, 1, 1)
    keep[1, :, :, :2] = False
    return {
        "padding": keep[:, 0, -1],
        "bool": keep,
        "minus infinity": added(keep, dtype),
        "finfo.min": added(keep, dtype, torch.finfo(dtype).min),
        "float32 minus infinity": added(keep, torch.float32),
        "float32 finfo.min": added(keep, torch.float32, torch.finfo(torch.float32).min),
    }


@every_way
@pytest.mark.parametrize("kind", blind_masks(torch.float32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_that_sees_nothing_gives_zeros(config: DeepseekV2Config, kind: str, dtype: torch.dtype) -> None:
    attention = attention_of(config, dtype)
    x = stream(dtype).requires_grad_()
    out = attention(x, attention_mask=blind_masks(dtype)[kind])[0]
    out.backward(torch.ones_like(out))
    assert (out[1, :2] == 0).all()
    assert (out[0] != 0).any()
    assert out.isfinite().all()
    for tensor in (x, *attention.parameters()):
        assert tensor.grad.isfinite().all()
    with torch.no_grad():  # which takes another path where the processor is faster on it
        out = attention(x, attention_mask=blind_masks(dtype)[kind])[0]
    assert (out[1, :2] == 0).all()
    assert out.isfinite().all()


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_biases_beyond_the_range_of_the_scores_keep_their_order(config: DeepseekV2Config, dtype: torch.dtype) -> None:
    """float16 ends at 65504, and a mask in float32 need not."""
    attention, x = attention_of(config, dtype), stream(dtype)
    first = torch.zeros(CAUSAL.shape[-2:], dtype=torch.bool)[None, None]
    first[..., 0] = True
    expected = attention(x, attention_mask=first)[0]
    for best, others in ((1e5, -1.0), (-1e5, -2e5)):
        out = attention(x, attention_mask=torch.where(first, best, others))[0]
        torch.testing.assert_close(out, expected)


@every_eager_way
def test_its_weights_are_zeros(config: DeepseekV2Config) -> None:
    mask = blind_masks(torch.float64)["bool"]
    weights = attention_of(config)(stream(), attention_mask=mask, output_attentions=True)[1]
    assert (weights[1, :, :2] == 0).all()


@every_way
def test_nothing_visible_at_all(config: DeepseekV2Config) -> None:
    attention, x = attention_of(config), stream().requires_grad_()
    out = attention(x, attention_mask=NEVER)[0]
    out.sum().backward()
    assert (out == 0).all()
    assert (x.grad == 0).all()


@every_way
@pytest.mark.parametrize("hidden", [-1e4, -1e9, -1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearly_hidden_keys_give_no_nan(config: DeepseekV2Config, hidden: float, dtype: torch.dtype) -> None:
    """A finite bias that a narrower dtype rounds to minus infinity, for all keys of a query."""
    attention = attention_of(config, dtype)
    x = stream(dtype).requires_grad_()
    mask = added(NEVER.repeat(BATCH, 1, 1, 1), torch.float32, hidden)
    out = attention(x, attention_mask=mask)[0]
    out.backward(torch.ones_like(out))
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    with torch.no_grad():
        assert attention(x, attention_mask=mask)[0].isfinite().all()


# Extreme numbers

NARROW = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@every_way
@NARROW
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30, 1e38])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_finite_tokens_stay_finite(config: DeepseekV2Config, dtype: torch.dtype, size: float, training: bool) -> None:
    layer = randomised(DeepseekV2DecoderLayer(config, 1), dtype).train(training)
    x = stream().clamp(-1, 1).mul(size).to(dtype).requires_grad_()
    mask = torch.tensor([[1] * SEQ, [0, 0, 1, 1, 1]])
    out = layer(x, attention_mask=mask)[0]
    assert out.isfinite().all()
    with torch.no_grad():
        assert layer(x, attention_mask=mask)[0].isfinite().all()
    if size <= 1e30:  # beyond, the gradient of the norm sums to infinity, as in the published code
        out.backward(torch.ones_like(out))
        for tensor in (x, *layer.parameters()):
            assert tensor.grad.isfinite().all()


@every_way
@NARROW
def test_scores_far_beyond_the_range_of_exp_stay_finite(config: DeepseekV2Config, dtype: torch.dtype) -> None:
    attention = attention_of(config, dtype)
    x = stream(dtype).requires_grad_()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if "o_proj" not in name:
                parameter.mul_(1e4)
    for mask in (None, *blind_masks(dtype).values()):
        out = attention(x, attention_mask=mask)[0]
        out.backward(torch.ones_like(out))
        assert out.isfinite().all()
        assert x.grad.isfinite().all()
        with torch.no_grad():
            assert attention(x, attention_mask=mask)[0].isfinite().all()
