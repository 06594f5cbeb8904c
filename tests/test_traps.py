"""Where implementations of this layer disagree: one test a trap, which takes the wrong turn and measures how far it leads.

Expected values come from `oracle`, from transformers or from a closed form, never from the package.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2_ref import (
    DeepseekV2Attention,
    DeepseekV2Config,
    DeepseekV2DecoderLayer,
    DeepseekV2ForCausalLM,
    DeepseekV2MoE,
    DeepseekV2RMSNorm,
    KeyValueCache,
    LatentCache,
    MoEGate,
    RopeScaling,
)
from dsv2_ref import mha as mha_module
from dsv2_ref import rope as rope_module
from dsv2_ref.codes import from_codes, to_codes
from dsv2_ref.mha import MultiHeadAttention
from dsv2_ref.quantize import quantize
from dsv2_ref.recompute import checkpointed
from dsv2_ref.records import Record
from dsv2_ref.rope import inverse_frequencies, rotary_tables, rotate_half_split, rotate_interleaved
from tests import oracle
from tests.peers import SMALL, YARN, assert_close, native, native_config, randomised, tokens, with_weights_of

MHA = replace(SMALL, use_mla=False)
SEQ = 9


def attention_of(config: DeepseekV2Config, dtype: torch.dtype = torch.float64) -> nn.Module:
    kind = DeepseekV2Attention if config.use_mla else MultiHeadAttention
    return randomised(kind(config, 1), dtype)


def by_oracle(
    module: nn.Module, function: Callable[..., oracle.Array], x: Tensor, *args: Any, **options: Any
) -> Tensor:
    weights = {name: weight.double().numpy() for name, weight in module.state_dict().items()}
    rows = [torch.from_numpy(function(row.double().numpy(), weights, *args, **options)) for row in x]
    return torch.stack(rows)


def error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, over that of what is expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


RIGHT, WRONG = 1e-12, 1e-2
"""What counts in float64 as the same, with a thousand roundings to spare, and as a difference that anyone would see."""


# The table, row by row


@pytest.mark.parametrize(
    ("config", "module", "right", "wrong"),
    [
        (SMALL, rope_module, rotate_interleaved, rotate_half_split),
        (MHA, mha_module, rotate_half_split, rotate_interleaved),
    ],
    ids=["mla", "mha"],
)
def test_rope_layout(
    config: DeepseekV2Config, module: Any, right: Any, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interleaved pairs in MLA, half-split in MHA; the other layout is another model."""
    attention, x = attention_of(config), tokens(2, SEQ, torch.float64)
    expected = by_oracle(attention, oracle.attention, x, config)
    assert error(attention(x)[0], expected) < RIGHT
    monkeypatch.setattr(module, right.__name__, wrong)
    assert error(attention(x)[0], expected) > WRONG


def test_rope_layout_of_the_cache() -> None:
    """De-interleaving before turning halves, as the published code does, permutes the cached key and no score."""
    x, table = (
        tokens(1, SEQ, torch.float64, width=8),
        rotary_tables(torch.arange(SEQ)[None], 8, 1e4, dtype=torch.float64),
    )
    published = rotate_half_split(x[..., [0, 2, 4, 6, 1, 3, 5, 7]], *table)
    ours = rotate_interleaved(x, *table)
    assert torch.equal(published, ours[..., [0, 2, 4, 6, 1, 3, 5, 7]])
    assert error(published, ours) > WRONG
    assert error(published @ published.mT, ours @ ours.mT) < RIGHT


def test_cache_content() -> None:
    """MLA: the normalised latent, then the rotated key. MHA: rotated keys and values."""
    attention, x = attention_of(SMALL), tokens(1, SEQ, torch.float64)
    weights = {name: weight.numpy() for name, weight in attention.state_dict().items()}
    compressed = x[0].numpy() @ weights["kv_a_proj_with_mqa.weight"].T
    latent = oracle.rms_norm(compressed[:, :16], weights["kv_a_layernorm.weight"], 1e-6)
    angles = oracle.angles_of(SMALL, 8, np.arange(SEQ), np.full(SEQ, SEQ))
    rotated_key = oracle.turned(compressed[:, 16:], angles, SMALL, interleaved=True)
    cache = attention(x, use_cache=True)[2]
    assert_close(cache.tokens[0], torch.from_numpy(np.hstack((latent, rotated_key))), "MLA")

    attention = attention_of(MHA)
    weights = {name: weight.numpy() for name, weight in attention.state_dict().items()}
    angles = oracle.angles_of(MHA, 12, np.arange(SEQ), np.full(SEQ, SEQ))
    cache = attention(x, use_cache=True)[2]
    for head in range(4):
        key, value = (x[0].numpy() @ weights[f"{name}_proj.weight"][12 * head :][:12].T for name in "kv")
        assert_close(
            cache.keys[0, :, head], torch.from_numpy(oracle.turned(key, angles, MHA, interleaved=False)), "keys"
        )
        assert_close(cache.values[0, :, head], torch.from_numpy(value), "values")


@pytest.mark.parametrize(
    "mscales", [{"mscale": 0.707}, {"mscale_all_dim": 0.707}, {"mscale": 1.0, "mscale_all_dim": 0.5}]
)
def test_yarn(mscales: dict[str, float]) -> None:
    """Tables are scaled by m(mscale) / m(mscale_all_dim), each with its own default where only one is given."""
    config = replace(SMALL, rope_scaling={**YARN, **mscales})
    mscale, all_dim = mscales.get("mscale", 1.0), mscales.get("mscale_all_dim", 0.0)
    theirs = native.DeepseekV2RotaryEmbedding(native_config(config)).inv_freq
    assert_close(inverse_frequencies(8, 1e4, config.rope_scaling), theirs, "angles, the same in transformers")
    cos, sin = rotary_tables(torch.arange(SEQ)[None], 8, 1e4, config.rope_scaling, dtype=torch.float64)
    magnitude = (0.1 * mscale * math.log(40) + 1) / (0.1 * all_dim * math.log(40) + 1)
    assert_close(torch.hypot(cos, sin), torch.full((1, SEQ, 4), magnitude, dtype=torch.float64), "magnitude")
    attention, x = attention_of(config), tokens(1, SEQ, torch.float64)
    expected = by_oracle(attention, oracle.attention, x, config)
    assert error(attention(x)[0], expected) < RIGHT
    attention.config = replace(config, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0})  # no magnitude
    assert error(attention(x)[0], expected) > WRONG


def test_softmax_scale() -> None:
    """(N + R)^-0.5 · m(mscale_all_dim)², which at s = 40 and 0.707 multiplies by 1.589626; MHA has none of the latter."""
    yarn = RopeScaling(type="yarn", factor=40, mscale=0.707, mscale_all_dim=0.707)
    with torch.device("meta"):
        mla = DeepseekV2Attention(replace(DeepseekV2Config.deepseek_v2(), rope_scaling=yarn), 0)
        mha = MultiHeadAttention(replace(DeepseekV2Config.deepseek_ocr(), rope_scaling=yarn), 0)
    assert mla.softmax_scale * 192**0.5 == pytest.approx(1.589626, abs=5e-7)
    assert mla.softmax_scale * 192**0.5 == pytest.approx((0.0707 * math.log(40) + 1) ** 2, rel=1e-14)
    assert mha.softmax_scale == 128**-0.5


def test_float32_inside() -> None:
    """Norm, softmax, gate and rotary tables, whatever the input: in bfloat16 each would be wrong in its own way."""
    many = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    assert error(DeepseekV2RMSNorm(4096, 2**-84).bfloat16()(many), torch.ones_like(many)) == 0
    sequential = torch.zeros((), dtype=torch.bfloat16)
    for square in many[0, :1000].square():
        sequential += square
    assert sequential < 0.5 * 1000 * 0.01  # a running sum in bfloat16 stops growing

    far = torch.tensor([[1000, 1001]])
    cos, _ = rotary_tables(far, 8, 1e4, dtype=torch.bfloat16)
    assert_close(cos[0, :, 0], torch.tensor([1000.0, 1001.0], dtype=torch.float64).cos().float(), "cos", roundings=1e3)
    assert far.bfloat16()[0, 0] == far.bfloat16()[0, 1]

    x = tokens(4, 64, torch.bfloat16)
    gate = randomised(MoEGate(SMALL), torch.bfloat16)
    exact = by_oracle(gate, lambda row, weights: oracle.softmax(row @ weights["weight"].T), x).flatten(0, 1)
    assert_close(gate(x)[1], exact.sort(descending=True).values[:, :2].float(), "gate")

    attention = attention_of(replace(SMALL, _attn_implementation="eager"), torch.float32)
    sums = attention(tokens(1, 64, torch.float32), output_attentions=True)[1].sum(-1)
    assert_close(sums, torch.ones_like(sums), "sums of weights")


def test_rmsnorm() -> None:
    """Cast before the weight; and the norms of the latents keep eps = 1e-6, whatever ``rms_norm_eps`` is."""
    norm, x = randomised(DeepseekV2RMSNorm(48), torch.bfloat16), tokens(4, 64, torch.bfloat16)
    theirs = with_weights_of(norm, native.DeepseekV2RMSNorm(48))
    assert torch.equal(norm(x), theirs(x))
    once = F.rms_norm(x, (48,), norm.weight, 1e-6)
    assert 0 < (norm(x) - once).abs().max() <= 0.0313  # what is seen between the two in bfloat16

    config = replace(SMALL, rms_norm_eps=0.5)
    layer = randomised(DeepseekV2DecoderLayer(config, 0))
    epsilons = {name: m.variance_epsilon for name, m in layer.named_modules() if isinstance(m, DeepseekV2RMSNorm)}
    assert epsilons == {
        "input_layernorm": 0.5,
        "post_attention_layernorm": 0.5,
        "self_attn.q_a_layernorm": 1e-6,
        "self_attn.kv_a_layernorm": 1e-6,
    }


def test_gate_precision() -> None:
    """Logits rounded to bfloat16, as a gate in the model's dtype has them, send some tokens to other experts."""
    config = replace(SMALL, n_routed_experts=64, num_experts_per_tok=6)
    gate, x = randomised(MoEGate(config), torch.bfloat16), tokens(8, 128, torch.bfloat16)
    exact = (x.double().flatten(0, 1) @ gate.weight.double().T).topk(6).indices.sort().values
    rounded = (x.flatten(0, 1) @ gate.weight.T).topk(6).indices.sort().values
    elsewhere = (rounded != exact).any(1).float().mean()
    assert elsewhere > 0.01
    assert (gate(x)[0].sort().values != exact).any(1).float().mean() < elsewhere / 10


def test_group_limited_selection() -> None:
    """Groups rank by their best expert; configurations that would have to fill up with forbidden experts are refused."""
    config = replace(SMALL, topk_method="group_limited_greedy", n_group=4, topk_group=2, num_experts_per_tok=6)
    gate, x = randomised(MoEGate(config)), tokens(4, 64, torch.float64)
    scores = (x.flatten(0, 1) @ gate.weight.T).softmax(-1)
    expected = [oracle.chosen_experts(s, {}, config) for s in scores.detach().numpy()]
    assert gate(x)[0].tolist() == expected
    by_sum = scores.unflatten(-1, (4, 3)).sum(-1).topk(2).indices.sort().values
    by_best = torch.tensor([sorted({e // 3 for e in experts}) for experts in expected])
    assert (by_sum != by_best).any()
    with pytest.raises(ValueError, match="num_experts_per_tok is 7; wanted at most 6, the experts in topk_group=2"):
        replace(config, num_experts_per_tok=7)


def test_norm_topk_prob_with_routed_scaling_factor() -> None:
    """Normalise, then scale: both count. One expert is never normalised. The paper does neither."""
    x = tokens(2, SEQ, torch.float64)

    def sums(**fields: Any) -> Tensor:
        return randomised(MoEGate(replace(SMALL, **fields)))(x)[1].sum(-1)

    plain = sums()
    assert (plain < 1).all()
    assert_close(sums(routed_scaling_factor=16.0), 16 * plain, "scaled")
    assert_close(sums(norm_topk_prob=True), torch.ones_like(plain), "normalised")
    assert_close(sums(norm_topk_prob=True, routed_scaling_factor=16.0), torch.full_like(plain, 16.0), "both")
    one = sums(num_experts_per_tok=1)
    assert_close(sums(num_experts_per_tok=1, norm_topk_prob=True), one, "one expert")


def test_combining_experts() -> None:
    """Weights and sum in float32, and one cast: closer than adding up in bfloat16, choice by choice."""
    config = replace(SMALL, n_shared_experts=None, num_experts_per_tok=12, norm_topk_prob=True)
    moe, x = randomised(DeepseekV2MoE(config), torch.bfloat16), tokens(4, 64, torch.bfloat16)
    topk_idx, topk_weight, _ = moe.gate(x)
    flat = x.flatten(0, 1)
    gate, up = torch.einsum("th,eih->tei", flat, moe.experts.gate_up_proj).chunk(2, dim=-1)
    expert_out = torch.einsum("tei,ehi->teh", F.silu(gate) * up, moe.experts.down_proj)
    chosen = expert_out.gather(1, topk_idx[..., None].expand(-1, -1, flat.shape[1]))
    exact = (chosen.double() * topk_weight.double()[..., None]).sum(1)
    piecewise = torch.zeros_like(flat)
    for choice in range(12):
        piecewise = piecewise + chosen[:, choice] * topk_weight[:, choice, None].bfloat16()
    actual = error(moe(x).flatten(0, 1), exact)
    assert actual < error(piecewise, exact) / 2
    assert actual < 2**-8  # the outputs themselves are rounded to 8 bits, once


def test_combining_experts_in_transformers() -> None:
    """Its grouped and its batched form add in float32, as the published code does; its loop adds in the model's format."""
    config = native_config(replace(SMALL, moe_intermediate_size=24))  # rows in 16-byte steps, as grouped_mm wants
    with torch.device("meta"):
        default = native.DeepseekV2ForCausalLM(type(config)(**{**config.to_dict(), "experts_implementation": None}))
    assert default.config._experts_implementation == "grouped_mm"

    experts, x = randomised(native.DeepseekV2Experts(config), torch.bfloat16), tokens(1, 512, torch.bfloat16)[0]
    topk_idx = torch.arange(12).expand(512, -1)
    topk_weight = tokens(1, 512, torch.float32, seed=2, width=12)[0].softmax(-1)
    gate, up = torch.einsum("th,eih->tei", x, experts.gate_up_proj).chunk(2, dim=-1)
    expert_out = torch.einsum("tei,ehi->teh", F.silu(gate) * up, experts.down_proj)
    exact = (expert_out.double() * topk_weight.double()[..., None]).sum(1)
    errors = {}
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        config._experts_implementation = implementation
        errors[implementation] = error(experts(x, topk_idx, topk_weight), exact)
    assert max(errors["grouped_mm"], errors["batched_mm"]) < errors["eager"] / 1.5


def test_eval_gradient() -> None:
    """The published inference path runs without gradients; here they are those of training without the balance loss."""
    moe, x = randomised(DeepseekV2MoE(replace(SMALL, aux_loss_alpha=0.0))), tokens(2, SEQ, torch.float64)
    gradients = {}
    for training in (True, False):
        moe.train(training).zero_grad()
        moe(x).square().sum().backward()
        gradients[training] = {name: parameter.grad.clone() for name, parameter in moe.named_parameters()}
    for name, gradient in gradients[False].items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, gradients[True][name])


@pytest.mark.parametrize("seq_aux", [True, False])
def test_expert_balance_loss(seq_aux: bool) -> None:
    """α Σ f P by sequence or pooled, of scores before scaling; injected with weight 1; and α = 0 works."""
    config = replace(SMALL, seq_aux=seq_aux, aux_loss_alpha=0.3, norm_topk_prob=True, routed_scaling_factor=16.0)
    moe, x = randomised(DeepseekV2MoE(config)).train(), tokens(3, SEQ, torch.float64)
    weights = {name: weight.numpy() for name, weight in moe.state_dict().items()}
    expected = oracle.balance_loss(list(x.numpy()), weights, config)
    other = oracle.balance_loss(list(x.numpy()), weights, replace(config, seq_aux=not seq_aux))
    assert abs(expected - other) > 1e-3
    assert moe.gate(x)[2].item() == pytest.approx(expected, rel=1e-14)

    def gate_gradient(upstream: float) -> Tensor:
        return torch.autograd.grad(upstream * moe(x).sum(), moe.gate.weight)[0]

    (of_loss,) = torch.autograd.grad(moe.gate(x)[2], moe.gate.weight)
    assert_close(gate_gradient(0.0), of_loss, "gradient where the model's loss has none")
    off = randomised(DeepseekV2MoE(replace(config, aux_loss_alpha=0.0))).train()
    assert off.gate(x)[2] is None
    off(x).sum().backward()


def test_topk_method() -> None:
    with pytest.warns(UserWarning, match="'gready' is a misspelling in published configurations; read as 'greedy'"):
        config = replace(SMALL, topk_method="gready")
    assert config.topk_method == "greedy"
    with pytest.raises(ValueError, match="topk_method is 'best'; wanted greedy, group_limited_greedy, noaux_tc"):
        replace(SMALL, topk_method="best")
    with pytest.raises(ValueError, match="scoring_func is 'tanh'; wanted softmax or sigmoid"):
        replace(SMALL, scoring_func="tanh")


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_mask(kernel: str, as_shipped: None) -> None:
    """None is causal, bool keeps, floating is added, ones and zeros in floating point are refused, blind rows are zero."""
    config = replace(SMALL, _attn_implementation=kernel)
    attention, x = attention_of(config), tokens(1, SEQ, torch.float64)
    causal = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).tril()
    expected = by_oracle(attention, oracle.attention, x, config)
    assert error(attention(x)[0], expected) < RIGHT
    assert error(attention(x, attention_mask=causal)[0], expected) < RIGHT
    lowest = torch.finfo(torch.float64).min
    for hidden in (-math.inf, lowest):
        added = torch.zeros(causal.shape, dtype=torch.float64).masked_fill(~causal, hidden)
        assert error(attention(x, attention_mask=added)[0], expected) < RIGHT

    bool_added = by_oracle(
        attention, oracle.attention, x, config, np.broadcast_to(causal[0].numpy() * 1.0, (4, SEQ, SEQ))
    )
    assert error(bool_added, expected) > WRONG
    with pytest.raises(ValueError, match="attention_mask is a floating-point mask without a negative entry"):
        attention(x, attention_mask=causal.double())

    blind = causal.clone()
    blind[..., 3, :] = False
    out = attention(x, attention_mask=blind)[0]
    assert (out[0, 3] == 0).all()
    assert torch.cat((out[:, :3], out[:, 4:]), dim=1).isfinite().all()


def test_a_row_that_sees_nothing_in_transformers() -> None:
    """Zeros here; there NaN after minus infinity, and the mean of all values after the lowest number of the format."""
    attention, value = nn.Module(), tokens(1, SEQ, torch.float32)[None]
    attention.num_key_value_groups = 1
    for hidden, expected in (
        (-math.inf, torch.full_like(value[..., :1, :], math.nan)),
        (torch.finfo(torch.float32).min, value.mean(-2, keepdim=True)),
    ):
        mask = torch.full((1, 1, 1, SEQ), hidden)
        out, _ = native.eager_attention_forward(attention, value[..., :1, :], value, value, mask, scaling=1.0)
        assert torch.allclose(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_causal_alignment(kernel: str, form: str) -> None:
    """With three tokens remembered the first of two queries sees four keys, not one."""
    attention = attention_of(replace(SMALL, _attn_implementation=kernel, mla_form=form))
    x = tokens(1, 5, torch.float64)
    _, _, cache = attention(x[:, :3], use_cache=True)
    expected = by_oracle(attention, oracle.attention, x, SMALL)[:, 3:]
    assert error(attention(x[:, 3:], past_key_value=cache)[0], expected) < RIGHT
    top_left = torch.ones(1, 1, 2, 5, dtype=torch.bool).tril()
    assert error(attention(x[:, 3:], attention_mask=top_left, past_key_value=cache)[0], expected) > WRONG


def test_position_ids(as_shipped: None) -> None:
    """Any id, None goes on from the cache, and angles are float32 after a bfloat16 call as before."""
    attention, x = attention_of(SMALL), tokens(1, SEQ, torch.float64)
    far = torch.arange(SEQ)[None] * 1000
    expected = by_oracle(attention, oracle.attention, x, SMALL, positions=far[0].numpy())
    assert error(attention(x, position_ids=far)[0], expected) < RIGHT

    _, _, cache = attention(x[:, :5], use_cache=True)
    continued = attention(x[:, 5:], past_key_value=cache)[0]
    assert error(continued, by_oracle(attention, oracle.attention, x, SMALL)[:, 5:]) < RIGHT

    narrow = attention_of(SMALL, torch.bfloat16)
    narrow(x.bfloat16(), position_ids=far)
    widened = narrow.double()
    exact = by_oracle(widened, oracle.attention, x, SMALL, positions=far[0].numpy())
    assert error(widened(x, position_ids=far)[0], exact) < RIGHT
    with pytest.raises(ValueError, match="position_ids is negative somewhere; wanted positions from 0 on"):
        attention(x, position_ids=far - 1)


def test_experts_storage() -> None:
    """Stacked inside, published outside: one matrix an expert and projection."""
    moe = randomised(DeepseekV2MoE(SMALL))
    published = moe.state_dict()
    names = {f"experts.{i}.{p}_proj.weight" for i in range(12) for p in ("gate", "up", "down")}
    assert names | {"gate.weight"} == {name for name in published if not name.startswith("shared_experts.")}
    assert published["experts.3.gate_proj.weight"].shape == (20, 48)
    assert published["experts.3.down_proj.weight"].shape == (48, 20)
    other = DeepseekV2MoE(SMALL).double().eval()
    other.load_state_dict(published, strict=True)
    x = tokens(2, SEQ, torch.float64)
    assert torch.equal(other(x), moe(x))
    theirs = with_weights_of(moe, native.DeepseekV2Moe(native_config(SMALL)))
    assert theirs.experts.gate_up_proj.shape == (12, 40, 48)
    assert torch.equal(theirs.experts.gate_up_proj, moe.experts.gate_up_proj)


def test_layer_choice() -> None:
    """Fields that transformers ignores, and the published code does not."""
    assert [replace(SMALL, moe_layer_freq=2, first_k_dense_replace=1).is_moe_layer(i) for i in range(5)] == (
        [False, False, True, False, True]
    )
    assert isinstance(DeepseekV2DecoderLayer(MHA, 0).self_attn, MultiHeadAttention)
    assert DeepseekV2MoE(replace(SMALL, n_shared_experts=None)).shared_experts is None
    assert DeepseekV2MoE(replace(SMALL, n_shared_experts=2)).shared_experts is not None


@pytest.mark.parametrize("attention_bias", [False, True])
def test_bias_dropout(attention_bias: bool) -> None:
    """A bias on q_a, kv_a and o, or q, k, v and o in MHA, and nowhere else; dropout on attention weights in training."""

    def biased(config: DeepseekV2Config) -> set[str]:
        layer = DeepseekV2DecoderLayer(replace(config, attention_bias=attention_bias), 1)
        return {name for name, _ in layer.named_parameters() if name.endswith("bias")}

    def names(*projections: str) -> set[str]:
        return {f"self_attn.{name}.bias" for name in projections} if attention_bias else set()

    assert biased(SMALL) == names("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
    assert biased(replace(SMALL, q_lora_rank=None)) == names("kv_a_proj_with_mqa", "o_proj")
    assert biased(MHA) == names("q_proj", "k_proj", "v_proj", "o_proj")

    config = replace(SMALL, attention_dropout=0.5, _attn_implementation="eager")
    attention, x = attention_of(config), tokens(1, SEQ, torch.float64)
    seen = attention(x, output_attentions=True)[1]
    dropped = attention.train()(x, output_attentions=True)[1]
    assert_close(dropped, 2 * seen.where(dropped != 0, 0), "weights kept")
    assert (dropped == 0).sum() > (seen == 0).sum()


def test_absorbed_weights() -> None:
    """V2's layer holds 138M numbers for queries and keys-values; merged with W_UK and W_UV it would hold 449M and more."""
    with torch.device("meta"):
        attention = DeepseekV2Attention(DeepseekV2Config.deepseek_v2(), 0)
    config = attention.config
    up = {name: attention.get_parameter(f"{name}_proj.weight").numel() for name in ("q_b", "kv_b", "o")}
    heads, latent = config.num_attention_heads, config.kv_lora_rank or 0
    # W_UQ then has C + R outputs a head in place of N + R, and W_O C inputs a head in place of V.
    merged_queries = (config.q_lora_rank or 0) * heads * (latent + config.qk_rope_head_dim)
    merged_output = config.hidden_size * heads * latent
    assert up["q_b"] + up["kv_b"] + up["o"] == 138_412_032
    assert merged_queries + merged_output == 448_790_528

    absorbed, expanded = (attention_of(replace(SMALL, mla_form=form)) for form in ("absorbed", "expanded"))
    assert [p.shape for p in absorbed.parameters()] == [p.shape for p in expanded.parameters()]
    assert absorbed.softmax_scale == expanded.softmax_scale == (12 + 8) ** -0.5


@pytest.mark.parametrize(
    ("config", "layers", "cached", "expanded"),
    [
        (DeepseekV2Config.deepseek_v2(), 60, 69_120, 4_915_200),
        (DeepseekV2Config.deepseek_v2_lite(), 27, 31_104, 276_480),
    ],
    ids=["V2", "V2-Lite"],
)
def test_cache_arithmetic(config: DeepseekV2Config, layers: int, cached: int, expanded: int) -> None:
    """Bytes a token in bfloat16: 512 + 64 numbers a layer, against a key and a value of every head."""
    with torch.device("meta"):
        attention = DeepseekV2Attention(config, 0).to(torch.bfloat16)
        cache = attention(torch.empty(1, 1, config.hidden_size, dtype=torch.bfloat16), use_cache=True)[2]
    assert cache.tokens.shape == (1, 1, 576)
    assert cache.nbytes * layers == cached
    heads, key, value = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    assert 2 * heads * (key + value) * layers == expanded


def test_position_of_the_query_latent() -> None:
    """Queries are compressed at inference too: the result passes through ``q_lora_rank`` numbers, normalised."""
    attention, x = attention_of(replace(SMALL, q_lora_rank=2)), tokens(1, SEQ, torch.float64)
    seen: list[Tensor] = []
    attention.q_a_layernorm.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.inference_mode():
        out = attention(x)[0]
    assert seen[0].shape == (1, SEQ, 2)
    assert error(out, by_oracle(attention, oracle.attention, x, replace(SMALL, q_lora_rank=2))) < RIGHT


# Known mistakes in material that readers will have met


def test_slip_positions_restarted_at_every_step() -> None:
    attention, x = attention_of(SMALL), tokens(1, SEQ, torch.float64)
    expected = by_oracle(attention, oracle.attention, x, SMALL)[:, -1:]
    _, _, cache = attention(x[:, :-1], use_cache=True)
    assert error(attention(x[:, -1:], past_key_value=cache)[0], expected) < RIGHT
    restarted = attention(x[:, -1:], position_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_value=cache)[0]
    assert error(restarted, expected) > WRONG


def test_slip_scale_of_the_absorbed_width() -> None:
    """The absorbed query is C + R wide, but its scores are those of the N + R wide one: 1/√192, not 1/√576."""
    attention, x = attention_of(replace(SMALL, mla_form="absorbed")), tokens(1, SEQ, torch.float64)
    expected = by_oracle(attention, oracle.attention, x, SMALL)
    assert error(attention(x)[0], expected) < RIGHT
    attention.softmax_scale = sum(attention.cache_features) ** -0.5
    assert error(attention(x)[0], expected) > WRONG


def test_slip_a_cache_that_saves_nothing() -> None:
    """Storing every head's keys and values takes 57 times the latent's numbers at the card's size."""
    card = DeepseekV2Config.card()
    with torch.device("meta"):
        latent = DeepseekV2Attention(card, 0).empty_cache(1, capacity=1)
    key, value = card.qk_nope_head_dim + card.qk_rope_head_dim, card.v_head_dim
    expanded = KeyValueCache.empty(
        0, 1, (card.num_attention_heads, key + value), capacity=1, dtype=torch.float32, device="meta"
    )
    assert isinstance(latent, LatentCache)
    assert round(expanded.reserved_nbytes / latent.reserved_nbytes, 1) == 71.1
    plain = KeyValueCache.empty(
        0, 1, (2, card.num_attention_heads, 128), capacity=1, dtype=torch.float32, device="meta"
    )
    assert round(plain.reserved_nbytes / latent.reserved_nbytes) == 57  # against 128-wide heads without rotary keys


def test_slip_the_rope_key_forgotten() -> None:
    """An estimate of 512 numbers a token is an eighth short of the 576 that are there."""
    with torch.device("meta"):
        cache = DeepseekV2Attention(DeepseekV2Config.card(), 0).empty_cache(1, capacity=8192)
    forgotten = 512 * 8192 * 4
    assert cache.reserved_nbytes / forgotten == 1.125


def test_slip_a_bias_that_also_weighs() -> None:
    """What is chosen by and what it counts with are apart: groups are masked for the choice, weights are raw scores."""
    config = replace(SMALL, topk_method="group_limited_greedy", n_group=4, topk_group=1, num_experts_per_tok=3)
    gate, x = randomised(MoEGate(config)), tokens(2, SEQ, torch.float64)
    topk_idx, topk_weight, _ = gate(x)
    scores = (x.flatten(0, 1) @ gate.weight.T).softmax(-1)
    assert_close(topk_weight, scores.gather(-1, topk_idx), "weights")
    among_allowed = scores.unflatten(-1, (4, 3)).gather(1, (topk_idx[:, :1] // 3)[..., None].expand(-1, -1, 3)).sum(-1)
    assert error(topk_weight / among_allowed, topk_weight) > WRONG


def test_slip_sixteen_times_smaller() -> None:
    """4096 numbers to a latent of 256: 16 times less than keys, but keys and values together are 8192 numbers."""
    config = replace(SMALL, hidden_size=4096, num_attention_heads=32)
    with torch.device("meta"):
        plain = MultiHeadAttention(replace(config, use_mla=False), 0).empty_cache(1, capacity=1)
    latent = LatentCache.empty(0, 1, (256,), capacity=1, dtype=torch.float32, device="meta")
    assert plain.reserved_nbytes / latent.reserved_nbytes == 32


def test_experts_skipped() -> None:
    """What a quantiser finds that looks for nn.Linear, against the widths of V2-Lite; experts are three-dimensional."""
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(DeepseekV2Config.deepseek_v2_lite()).bfloat16()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 2048 * 2048
    shared, dense, head = 3 * 2048 * 2816, 3 * 2048 * 10944, 2048 * 102400
    assert linear == 27 * attention + 26 * shared + dense + head
    whole = sum(weight.nbytes for weight in model.parameters())
    assert linear / whole < 0.04
    held = sum(tensor.nbytes for tensor in quantize(model, "int8").state_dict().values())
    assert 0.5 < held / whole < 0.52  # embedding and head are 2.7% of all


def test_saturation() -> None:
    ends = torch.tensor([0x7E, 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert ends[0] == 448
    assert ends[1].isnan()
    # In float32 the largest of a group over its scale may come out above 448, by its last digit.
    x = torch.rand(4096, 4, generator=torch.Generator().manual_seed(0)) * 1e4
    codes, scales = to_codes(x, "fp8", 4)
    assert codes.float().abs().max() == 448
    assert error(from_codes(codes, scales), x) < 1 / 16  # three bits after the leading one


def test_frozen_scale() -> None:
    """Tokens that grow: with a scale of its own each keeps its relative error, with the first one's they are cut off."""
    growing = tokens(1, 8, torch.float64, width=40) * 2.0 ** torch.arange(8)[:, None]
    record = Record("int8", 32, 8, torch.float64)
    right = record.decode(record.encode(growing))
    limit = growing[:, :1, :32].abs().amax()
    frozen = growing[..., :32].clamp(-limit, limit)
    for place in range(8):
        assert error(right[:, place], growing[:, place]) < 1 / 127
    assert error(frozen[:, 0], growing[:, 0, :32]) == 0
    assert error(frozen[:, -1], growing[:, -1, :32]) > 0.9


def test_recomputed_choices() -> None:
    """A gate that sees other noise the second time: sorted rows keep their shape, gradients are wrong unless the choice is
    kept. Right are those of autograd without recomputation, in which the first noise decides."""
    layer = randomised(DeepseekV2DecoderLayer(SMALL, 1), torch.float64).train()
    noise, runs = 3e-3, iter(())

    def disturbed(gate: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        (u,) = inputs
        return u + noise * torch.randn(u.shape, dtype=u.dtype, generator=torch.Generator().manual_seed(next(runs)))

    layer.mlp.gate.register_forward_pre_hook(disturbed)
    x = tokens(4, 128, torch.float64, width=SMALL.hidden_size)
    found = {}
    for mode in (None, "full", "selective"):
        runs = iter((1, 2))
        layer.zero_grad()
        (layer if mode is None else checkpointed(layer, mode))(x)[0].square().sum().backward()
        found[mode] = layer.mlp.experts.down_proj.grad.clone()
    assert error(found["full"], found[None]) > WRONG
    # The choices' weights are computed again, from the other noise, and are off by about as much.
    assert error(found["selective"], found[None]) < 2 * noise
