"""What holds for every configuration and input: causality, padding, chunking, and ways of computing that must agree."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2MoE, MoEGate, ops
from dsv2_ref.balance import expert_balance_loss
from tests.peers import assert_close, experts_with, randomised, tokens

SCALINGS: list[dict[str, Any] | None] = [
    None,
    {"type": "linear", "factor": 4.0},
    {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.7},
]


@st.composite
def expert_fields(draw: st.DrawFn) -> dict[str, Any]:
    groups, in_group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    return {
        "n_routed_experts": groups * in_group,
        "num_experts_per_tok": draw(st.integers(1, kept * in_group)),
        "topk_method": "group_limited_greedy",
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "n_shared_experts": draw(st.sampled_from([None, 1, 2])),
        "moe_intermediate_size": draw(st.integers(1, 8)),
        "seq_aux": draw(st.booleans()),
    }


@st.composite
def attention_fields(draw: st.DrawFn) -> dict[str, Any]:
    heads, use_mla = draw(st.integers(1, 4)), draw(st.booleans())
    return {
        "use_mla": use_mla,
        "num_attention_heads": heads,
        "hidden_size": 2 * heads * draw(st.integers(2, 4)),
        "num_key_value_heads": None
        if use_mla
        else draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        "q_lora_rank": draw(st.sampled_from([None, 3, 7])),
        "kv_lora_rank": draw(st.integers(3, 9)),
        "qk_rope_head_dim": 2 * draw(st.integers(1, 4)),
        "qk_nope_head_dim": draw(st.integers(1, 8)),
        "v_head_dim": draw(st.integers(1, 9)),
        "attention_bias": draw(st.booleans()),
        "rope_scaling": draw(st.sampled_from(SCALINGS)),
        "_attn_implementation": draw(st.sampled_from(["eager", "sdpa"])),
        "mla_form": draw(st.sampled_from(["auto", "expanded", "absorbed"])),
    }


configs = st.builds(
    lambda attention, experts: DeepseekV2Config(vocab_size=8, intermediate_size=6, **attention, **experts),
    attention_fields(),
    expert_fields(),
)


def layer_of(config: DeepseekV2Config, layer_idx: int = 1) -> DeepseekV2DecoderLayer:
    return randomised(DeepseekV2DecoderLayer(config, layer_idx))


def stream(layer: DeepseekV2DecoderLayer, batch: int, seq: int) -> Tensor:
    return tokens(batch, seq, torch.float64, width=layer.hidden_size)


@given(configs, st.integers(1, 6), st.integers(0, 5))
def test_no_position_sees_the_future(config: DeepseekV2Config, seq: int, last: int) -> None:
    assume(last < seq)
    layer = layer_of(config)
    x = stream(layer, 2, seq).requires_grad_()
    out = layer(x)[0]
    out[:, last].square().sum().backward()
    assert x.grad is not None
    assert (x.grad[:, last + 1 :] == 0).all()
    assert (x.grad[:, last] != 0).any()

    other_future = torch.cat((x[:, : last + 1], 5 * x.flip(1)[:, last + 1 :]), dim=1)
    assert_close(layer(other_future)[0][:, : last + 1], out[:, : last + 1], "outputs before the change")


@given(configs, st.lists(st.integers(1, 5), min_size=2, max_size=3), st.booleans())
def test_a_sequence_alone_equals_it_in_a_left_padded_batch(
    config: DeepseekV2Config, lengths: list[int], positions_given: bool
) -> None:
    """Without ``position_ids`` the padded sequences stand at later positions: only distances may count."""
    layer = layer_of(config)
    longest = max(lengths)
    x = stream(layer, len(lengths), longest)
    real = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    x[~real] *= 1e3  # what stands in the padding must not matter
    position_ids = (real.cumsum(1) - 1).clamp(min=0) if positions_given else None
    out = layer(x, attention_mask=real, position_ids=position_ids)[0]
    assert out.isfinite().all()
    for row, length in enumerate(lengths):
        alone = layer(x[row : row + 1, longest - length :])[0]
        assert_close(out[row : row + 1, longest - length :], alone, f"sequence {row}")


@given(
    configs,
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.lists(st.integers(0, 3), min_size=2, max_size=2),
    st.data(),
)
def test_any_chunking_through_the_cache_equals_one_pass(
    config: DeepseekV2Config, chunks: list[int], padding: list[int], data: st.DataObject
) -> None:
    """Each chunk in a form of its own: what is cached must not depend on how it was used."""
    layer = layer_of(config)
    seq = sum(chunks)
    x = stream(layer, 2, seq)
    real = torch.arange(seq) >= torch.tensor(padding).clamp(max=seq - 1)[:, None]
    position_ids = (real.cumsum(1) - 1).clamp(min=0)
    whole, cached = layer(x, real, position_ids, use_cache=True)

    parts, cache, start = [], None, 0
    for length in chunks:
        layer.self_attn.form = data.draw(st.sampled_from(["auto", "expanded", "absorbed"]))
        now = slice(start, start := start + length)
        with torch.set_grad_enabled(data.draw(st.booleans())):
            part, cache = layer(x[:, now], real[:, :start], position_ids[:, now], cache, use_cache=True)
        assert len(cache) == start
        parts.append(part)
    assert_close(torch.cat(parts, dim=1)[real], whole[real], "output")
    assert_close(cache.tokens, cached.tokens, "cache")


def attention_masks(batch: int, heads: int, seq: int, kv_seq: int) -> list[Tensor | None]:
    """One of each kind; the second sequence has a query that sees nothing."""
    generator = torch.Generator().manual_seed(4)
    keep = torch.rand(batch, 1, seq, kv_seq, generator=generator) < 0.7
    keep[0, :, :, 0] = True
    keep[-1, :, 0] = False
    bias = torch.randn(batch, heads, seq, kv_seq, generator=generator, dtype=torch.float64)
    padding = torch.arange(kv_seq) >= torch.arange(batch)[:, None]
    hidden = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, float("-inf"))
    return [
        None,
        padding,
        keep,
        bias.masked_fill(~keep, float("-inf")),
        hidden,
        hidden.clamp(min=torch.finfo(torch.float64).min),
    ]


@given(configs, st.integers(1, 5), st.integers(0, 4), st.integers(0, 5))
def test_every_way_of_computing_attention_agrees(config: DeepseekV2Config, seq: int, past: int, mask_kind: int) -> None:
    """Both forms of MLA in both implementations, outputs and all gradients, through a cache or not."""
    ways = [(form, kernel) for form in ("expanded", "absorbed") for kernel in ("eager", "sdpa")]
    mask = attention_masks(2, config.num_attention_heads, seq, past + seq)[mask_kind]
    results = []
    for form, kernel in ways if config.use_mla else ways[:2]:
        layer = layer_of(replace(config, mla_form=form, _attn_implementation=kernel))
        x = stream(layer, 2, past + seq).requires_grad_()
        present = layer.self_attn(x[:, :past], use_cache=True)[2] if past else None
        out = layer.self_attn(x[:, past:], attention_mask=mask, past_key_value=present)[0]
        out.backward(tokens(2, seq, torch.float64, seed=2, width=layer.hidden_size))
        gradients = {name: p.grad for name, p in layer.self_attn.named_parameters()}
        results.append({"output": out, "gradient of the input": x.grad, **gradients})
    for way, result in zip(ways[1:], results[1:], strict=False):
        for name, expected in results[0].items():
            # Of order one, but where norms of a few numbers cancel nearly all of a gradient; rounding is 2e-16.
            torch.testing.assert_close(
                result[name], expected, rtol=1e-9, atol=1e-11, msg=lambda text, of=(name, way): f"{of}: {text}"
            )


@given(expert_fields(), st.randoms(use_true_random=False))
def test_permuting_experts_with_their_weights_changes_nothing(fields: dict[str, Any], random: Any) -> None:
    """Groups, and experts within a group, may change places; the balance loss reaches the gate all the same."""
    config = DeepseekV2Config(hidden_size=6, num_attention_heads=1, aux_loss_alpha=0.1, **fields)
    groups, in_group = config.n_group or 1, (config.n_routed_experts or 1) // (config.n_group or 1)
    places = [[group * in_group + i for i in random.sample(range(in_group), in_group)] for group in range(groups)]
    random.shuffle(places)
    permutation = torch.tensor(places).flatten()

    moe = randomised(DeepseekV2MoE(config)).train()
    permuted = randomised(DeepseekV2MoE(config)).train()
    with torch.no_grad():
        for weights in (permuted.gate.weight, permuted.experts.gate_up_proj, permuted.experts.down_proj):
            weights.copy_(weights[permutation])
    x = tokens(2, 5, torch.float64, width=6)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    out, permuted_out = moe(inputs[0]), permuted(inputs[1])
    out.square().sum().backward()
    permuted_out.square().sum().backward()
    assert_close(permuted_out, out, "output")
    assert_close(inputs[1].grad, inputs[0].grad, "gradient of the input")
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        expected = moe.get_parameter(name).grad
        assert_close(permuted.get_parameter(name).grad, expected[permutation], f"gradient of {name}")


def routings(kind: str, count: int, experts: int, top_k: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "random":
        return torch.rand(count, experts, generator=generator).topk(top_k).indices
    return torch.full((count, top_k), {"all to the first": 0, "all to the last": experts - 1}[kind])


@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    count=st.integers(1, 9),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    hidden=st.sampled_from([3, 8, 16]),
    width=st.sampled_from([1, 5, 8]),
    kind=st.sampled_from(["random", "all to the first", "all to the last"]),
)
@example(dtype=torch.float32, count=9, experts=6, top_k=1, hidden=8, width=8, kind="all to the first")
@example(dtype=torch.float32, count=1, experts=6, top_k=6, hidden=8, width=8, kind="random")
@example(dtype=torch.bfloat16, count=1, experts=6, top_k=2, hidden=8, width=8, kind="all to the last")
@example(dtype=torch.float64, count=9, experts=6, top_k=6, hidden=3, width=5, kind="random")
def test_the_loop_over_experts_and_the_grouped_product_agree(
    dtype: torch.dtype, count: int, experts: int, top_k: int, hidden: int, width: int, kind: str
) -> None:
    """Sizes that torch's grouped product takes and sizes that it does not; experts that nobody chose; all chosen."""
    assume(top_k <= experts)
    topk_idx = routings(kind, count, experts, top_k)
    shapes = [(count, hidden), (count, top_k), (experts, 2 * width, hidden), (experts, hidden, width)]
    generator = torch.Generator().manual_seed(5)
    arguments = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    arguments[1] = arguments[1].to(torch.promote_types(dtype, torch.float32))

    routed = experts_with(*arguments[2:])

    def run(way: str) -> list[Tensor]:
        leaves = [argument.clone().requires_grad_() for argument in arguments[:2]]
        with ops.watch() as choices:
            out = routed(leaves[0], topk_idx, leaves[1])
        assert [choice.way for choice in choices] == [way]
        return [out, *torch.autograd.grad(out, [*leaves, *routed.parameters()], torch.ones_like(out) / 8)]

    with ops.plain():
        expected = run("definition")
    names = ["output", "hidden_states", "topk_weight", "gate_up_proj", "down_proj"]
    for name, looped, grouped in zip(names, expected, run("grouped"), strict=True):
        assert_close(grouped, looped, name)


# The balance loss

loss_sizes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))


def routed(sizes: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Softmax scores (batch, seq, experts) and the best experts of each token."""
    batch, seq, experts, top_k = sizes
    assume(top_k <= experts)
    scores = tokens(batch, seq, torch.float64, width=experts).softmax(-1)
    return scores, scores.topk(top_k).indices


@given(loss_sizes, st.booleans(), st.randoms(use_true_random=False))
def test_balance_loss_ignores_order_and_names(sizes: tuple[int, int, int, int], seq_aux: bool, random: Any) -> None:
    """The order of sequences, of tokens in each, of a token's choices, and which expert carries which index."""
    scores, topk_idx = routed(sizes)
    loss = expert_balance_loss(scores, topk_idx, 0.1, seq_aux)
    batch, seq, experts, top_k = (random.sample(range(n), n) for n in (*scores.shape, topk_idx.shape[-1]))
    moved = expert_balance_loss(scores[batch][:, seq], topk_idx[batch][:, seq][..., top_k], 0.1, seq_aux)
    assert_close(moved, loss, "tokens moved")
    renamed = torch.tensor(experts).argsort()[topk_idx]
    assert_close(expert_balance_loss(scores[..., experts], renamed, 0.1, seq_aux), loss, "experts renamed")


@given(loss_sizes)
def test_balance_loss_by_sequence_and_pooled(sizes: tuple[int, int, int, int]) -> None:
    scores, topk_idx = routed(sizes)
    alone = [expert_balance_loss(s[None], i[None], 0.1) for s, i in zip(scores, topk_idx, strict=True)]
    assert_close(expert_balance_loss(scores, topk_idx, 0.1, seq_aux=True), torch.stack(alone).mean(), "by sequence")
    as_one = scores.flatten(0, 1)[None], topk_idx.flatten(0, 1)[None]
    assert_close(expert_balance_loss(scores, topk_idx, 0.1, seq_aux=False), expert_balance_loss(*as_one, 0.1), "pooled")


@given(loss_sizes)
def test_balance_loss_is_alpha_where_all_experts_are_liked_alike(sizes: tuple[int, int, int, int]) -> None:
    """Σ f is the number of experts, so that with P = 1 / E the sum is 1, whoever is chosen."""
    scores, topk_idx = routed(sizes)
    alike = torch.full_like(scores, 1 / scores.shape[-1])
    assert_close(expert_balance_loss(alike, topk_idx, 0.1), torch.tensor(0.1, dtype=torch.float64), "loss")


@given(loss_sizes)
def test_balance_loss_is_alpha_where_all_experts_are_used_alike(sizes: tuple[int, int, int, int]) -> None:
    """f = 1 for every expert when each token goes to all of them; Σ P is always 1."""
    scores, _ = routed(sizes)
    everyone = torch.arange(scores.shape[-1]).expand(scores.shape)
    assert_close(expert_balance_loss(scores, everyone, 0.1), torch.tensor(0.1, dtype=torch.float64), "loss")


@given(loss_sizes)
def test_gradient_of_the_balance_loss_is_alpha_f_over_the_tokens(sizes: tuple[int, int, int, int]) -> None:
    """How often an expert was chosen has no gradient; every token of a sequence is pushed alike."""
    scores, topk_idx = routed(sizes)
    batch, seq, experts = scores.shape
    scores.requires_grad_()
    (gradient,) = torch.autograd.grad(expert_balance_loss(scores, topk_idx, 0.1), scores)
    chosen = torch.zeros_like(scores).scatter(-1, topk_idx, 1.0).mean(dim=1, keepdim=True)
    expected = 0.1 * chosen * experts / topk_idx.shape[-1] / (batch * seq)
    assert_close(gradient, expected.expand_as(scores), "gradient")


@given(expert_fields(), st.booleans(), st.sampled_from([0.0, 1.0, 16.0]))
def test_scaling_and_normalising_weights_do_not_touch_the_balance_loss(
    fields: dict[str, Any], norm_topk_prob: bool, routed_scaling_factor: float
) -> None:
    config = DeepseekV2Config(hidden_size=6, num_attention_heads=1, **fields)
    changed = replace(config, norm_topk_prob=norm_topk_prob, routed_scaling_factor=routed_scaling_factor)
    x = tokens(2, 5, torch.float64, width=6)
    gates = [randomised(MoEGate(c)).train() for c in (config, changed)]
    losses = [gate(x)[2] for gate in gates]
    gradients = [torch.autograd.grad(loss, gate.weight)[0] for loss, gate in zip(losses, gates, strict=True)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("upstream", [0.0, 1.0, 1e3])
def test_the_balance_loss_weighs_the_same_whatever_the_model_loses(upstream: float) -> None:
    """The gate's gradient is upstream · (that of the output) + 1 · (that of the loss)."""
    config = DeepseekV2Config(hidden_size=6, num_attention_heads=1, n_routed_experts=4, moe_intermediate_size=3)
    moe = randomised(DeepseekV2MoE(config)).train()
    x = tokens(2, 5, torch.float64, width=6)
    weight = moe.gate.weight
    (of_loss,) = torch.autograd.grad(moe.gate(x)[2], weight)
    (of_output,) = torch.autograd.grad(moe.eval()(x).sum(), weight)
    (together,) = torch.autograd.grad(upstream * moe.train()(x).sum(), weight)
    assert of_loss.abs().max() > 0
    assert_close(together, upstream * of_output + of_loss, "gradient of the gate")


@given(configs, st.integers(0, 10**6))
def test_only_distances_between_positions_count(config: DeepseekV2Config, shift: int) -> None:
    layer = layer_of(config)
    x = stream(layer, 1, 4)
    position_ids = torch.tensor([[0, 1, 5, 6]])
    # Angles of up to 1e6 radians are rounded to 1e-10, of which a few add up in a score.
    torch.testing.assert_close(
        layer(x, position_ids=position_ids + shift)[0], layer(x, position_ids=position_ids)[0], rtol=0, atol=1e-8
    )


@given(configs)
def test_order_of_tokens_matters_only_through_positions_and_the_mask(config: DeepseekV2Config) -> None:
    """Without causal order, tokens that carry their positions along can be given in any order."""
    layer = layer_of(config)
    x = stream(layer, 1, 4)
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    order = torch.tensor([2, 0, 3, 1])
    straight = layer(x, everything, torch.arange(4)[None])[0]
    assert_close(layer(x[:, order], everything, order[None])[0], straight[:, order], "output")


@given(configs, st.lists(st.integers(0, 1), min_size=3, max_size=3))
def test_selecting_sequences_of_a_cache_continues_those(config: DeepseekV2Config, chosen: list[int]) -> None:
    """Beam search: each beam goes on from the sequence that it took over."""
    layer = layer_of(config)
    x = stream(layer, 2, 4)
    beams = torch.tensor(chosen)
    _, cache = layer(x[:, :3], use_cache=True)
    continued, _ = layer(x[beams, 3:], past_key_value=cache.select(beams), use_cache=True)
    assert_close(continued, layer(x)[0][beams, 3:], "output")


@given(configs, st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_every_earlier_cache_can_be_continued(config: DeepseekV2Config, branches: list[int]) -> None:
    """Caches that grew from one another share storage; going on from an old one changes none of the others."""
    layer = layer_of(config)
    x = stream(layer, 1, 6)
    with torch.no_grad():
        caches = [layer.self_attn.empty_cache(1, capacity=3)]
        for now, after in pairwise(range(7)):
            caches.append(layer(x[:, now:after], past_key_value=caches[-1], use_cache=True)[1])
        values = [cache.tokens.clone() for cache in caches]
        for branch in branches:
            out, _ = layer(x[:, branch : branch + 1].neg(), past_key_value=caches[branch], use_cache=True)
            expected = layer(torch.cat((x[:, :branch], -x[:, branch : branch + 1]), dim=1))[0]
            assert_close(out, expected[:, -1:], f"branch at {branch}")
        for cache, value in zip(caches, values, strict=True):
            assert torch.equal(cache.tokens, value)
