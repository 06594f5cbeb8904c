"""Gate, experts and their combination: what is chosen, what it counts, and that nothing waits for the device."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2MLP, DeepseekV2MoE, MoEGate, ops
from dsv2_ref.fast import products
from tests.peers import SMALL, assert_close, experts_with, randomised, tokens

GROUPS = replace(SMALL, topk_method="group_limited_greedy", n_group=4, topk_group=2, num_experts_per_tok=3)


def gate_with_logits(config: DeepseekV2Config, logits: Tensor) -> tuple[MoEGate, Tensor]:
    """A gate, and one token for each row of ``logits``, which are its experts' scores before the softmax."""
    gate = MoEGate(replace(config, hidden_size=config.n_routed_experts, num_attention_heads=1)).double().eval()
    with torch.no_grad():
        gate.weight.copy_(torch.eye(len(gate.weight)))
    return gate, logits[None].double()


# Choosing


def test_greedy_takes_the_best_first() -> None:
    gate, x = gate_with_logits(replace(SMALL, num_experts_per_tok=3), torch.arange(12.0).roll(5)[None])
    topk_idx, topk_weight, aux_loss = gate(x)
    assert topk_idx.tolist() == [[4, 3, 2]]
    assert_close(topk_weight, x[0].softmax(-1)[:, [4, 3, 2]], "weights")
    assert aux_loss is None


def test_groups_are_chosen_by_their_best_expert() -> None:
    """Of four groups of three the second and last have the two best experts, though the first has the best sum."""
    logits = torch.tensor([[4.0, 4, 4, 0, 5, 0, 1, 1, 1, 0, 0, 6]])
    topk_idx, _, _ = gate_with_logits(GROUPS, logits)[0](logits[None].double())
    assert topk_idx[0, :2].tolist() == [11, 4]
    assert topk_idx[0, 2] in (3, 5, 9, 10)


def test_experts_outside_the_groups_are_never_chosen_whatever_the_scores_underflow_to() -> None:
    """All other scores of the best two groups round to 0: a fill of 0 could tie with them."""
    logits = torch.full((1, 12), -2000.0)
    logits[0, [0, 11]] = torch.tensor([1000.0, 999.0])
    config = replace(GROUPS, num_experts_per_tok=6)
    topk_idx, topk_weight, _ = gate_with_logits(config, logits)[0](logits[None].double())
    assert sorted(topk_idx[0].tolist()) == [0, 1, 2, 9, 10, 11]
    assert topk_weight.isfinite().all()


def test_all_groups_are_no_limit() -> None:
    everything = replace(GROUPS, topk_group=4)
    x = tokens(2, 9, torch.float64)
    limited, free = (randomised(MoEGate(c)) for c in (everything, replace(SMALL, num_experts_per_tok=3)))
    for actual, expected in zip(limited(x)[:2], free(x)[:2], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 16.0])
@pytest.mark.parametrize("normalise", [False, True])
def test_what_a_chosen_expert_counts(normalise: bool, scale: float, top_k: int) -> None:
    config = replace(SMALL, num_experts_per_tok=top_k, norm_topk_prob=normalise, routed_scaling_factor=scale)
    gate, x = randomised(MoEGate(config)), tokens(2, 5, torch.float64)
    topk_idx, topk_weight, _ = gate(x)
    expected = (x.flatten(0, 1) @ gate.weight.T).softmax(-1).gather(-1, topk_idx)
    if normalise and top_k > 1:
        expected = expected / expected.sum(-1, keepdim=True)
        assert_close(topk_weight.sum(-1), torch.full((10,), scale, dtype=torch.float64), "sums")
    assert_close(topk_weight, expected * scale, "weights")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_gate_computes_in_float32_at_least(dtype: torch.dtype) -> None:
    gate, x = randomised(MoEGate(SMALL), dtype), tokens(2, 5, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    topk_idx, topk_weight, _ = gate(x)
    scores = (x.to(wide).flatten(0, 1) @ gate.weight.to(wide).T).softmax(-1)
    assert topk_idx.dtype == torch.int64
    assert topk_weight.dtype == wide
    assert torch.equal(topk_idx, scores.topk(2).indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(x)[0], topk_idx)


@pytest.mark.parametrize(
    ("training", "alpha", "there"), [(True, 0.001, True), (True, 0.0, False), (False, 0.001, False)]
)
def test_when_there_is_a_balance_loss(training: bool, alpha: float, there: bool) -> None:
    gate = randomised(MoEGate(replace(SMALL, aux_loss_alpha=alpha))).train(training)
    aux_loss = gate(tokens(2, 5, torch.float64))[2]
    assert (aux_loss is not None) == there
    out = DeepseekV2MoE(replace(SMALL, aux_loss_alpha=alpha)).train(training)(tokens(2, 5, torch.float32))
    out.sum().backward()


# Combining


def test_routed_and_shared_experts_are_added() -> None:
    moe, x = randomised(DeepseekV2MoE(SMALL)), tokens(2, 5, torch.float64)
    routed = randomised(DeepseekV2MoE(replace(SMALL, n_shared_experts=None)))
    routed.gate, routed.experts = moe.gate, moe.experts
    assert routed.shared_experts is None
    assert moe.shared_experts is not None
    assert moe.shared_experts.intermediate_size == 3 * SMALL.moe_intermediate_size
    assert_close(moe(x), routed(x) + moe.shared_experts(x), "output")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_weight_learns(training: bool) -> None:
    moe, x = randomised(DeepseekV2MoE(SMALL)).train(training), tokens(4, 8, torch.float64).requires_grad_()
    moe(x).square().sum().backward()
    chosen = moe.gate(x)[0].unique()
    for weight in (moe.experts.gate_up_proj, moe.experts.down_proj):
        learns = weight.grad.flatten(1).abs().amax(1) > 0
        assert learns.nonzero().flatten().tolist() == chosen.tolist()
    assert (moe.gate.weight.grad.abs().amax(1) > 0).all()
    assert (x.grad != 0).all()


def test_the_order_of_tokens_makes_no_difference_between_runs() -> None:
    """No atomic additions: to the last bit the same, run after run."""
    moe, x = randomised(DeepseekV2MoE(SMALL), torch.bfloat16), tokens(4, 8, torch.bfloat16)
    assert torch.equal(moe(x), moe(x))


def test_outputs_are_summed_in_float32() -> None:
    """In bfloat16 256 + 1 is 256, so that in whichever order three choices come, a 1 would be lost."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    gate_up = torch.full((3, 2, 1), 10.0, dtype=torch.bfloat16)  # silu(10) · 10 is 100 in bfloat16
    down = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16).view(3, 1, 1) / 100
    weights = torch.full((1, 3), 1.0)
    experts = torch.arange(3)[None]
    routed = experts_with(gate_up, down)
    with ops.plain():
        single = [routed(hidden, experts[:, i : i + 1], weights[:, :1]) for i in range(3)]
        expected = sum(part.float() for part in single).to(torch.bfloat16)
        assert expected != single[0] + single[1] + single[2]
        assert torch.equal(routed(hidden, experts, weights), expected)
    with ops.watch() as choices:
        assert torch.equal(routed(hidden, experts, weights), expected)
    assert [choice.way for choice in choices] == ["grouped"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_one_token_alone_is_what_it_is_among_others(autocast: bool, dtype: torch.dtype) -> None:
    experts = randomised(DeepseekV2MoE(SMALL), dtype).experts
    x, topk_idx = tokens(1, 1, dtype)[0], torch.tensor([[3, 0, 2]])
    topk_weight = torch.rand(1, 3, dtype=torch.promote_types(dtype, torch.float32))
    with torch.autocast("cpu", enabled=autocast):
        with_gradients = experts(x, topk_idx, topk_weight)
        with torch.no_grad():
            alone = experts(x, topk_idx, topk_weight)
    with ops.plain():
        exact = copy.deepcopy(experts).double()(x.double(), topk_idx, topk_weight.double())
    # Rounding of one product after another, in the dtype of the products.
    eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    for out in (alone, with_gradients):
        assert (out - exact).norm() < 4 * eps * exact.norm()
    assert alone.dtype == with_gradients.dtype


def test_the_mlp_is_swiglu() -> None:
    mlp, x = randomised(DeepseekV2MLP(SMALL, intermediate_size=7)), tokens(2, 5, torch.float64)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    assert_close(mlp(x), (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T, "output")


# The grouped product as an operator

grouped_product, grouped_outer = torch.ops.dsv2_ref.grouped_product, torch.ops.dsv2_ref.grouped_outer

SIZES = {"16-byte rows": (8, 16), "odd rows": (3, 5), "one number": (1, 1)}
ENDS = {"all used": [2, 3, 7], "empty ones": [0, 7, 7], "the last alone": [0, 0, 7]}


def operands(dtype: torch.dtype, inputs: int, outputs: int, ends: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ends[-1], inputs, generator=generator, dtype=torch.float64)
    weights = torch.randn(len(ends), outputs, inputs, generator=generator, dtype=torch.float64)
    return rows.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_(), torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_grouped_product(dtype: torch.dtype, inputs: int, outputs: int, ends: list[int]) -> None:
    rows, weights, group_ends = operands(dtype, inputs, outputs, ends)
    bounds = list(zip([0, *ends], ends, strict=False))
    product = grouped_product(rows, weights, group_ends)
    expected = torch.cat([rows[a:b] @ weight.T for (a, b), weight in zip(bounds, weights, strict=True)])
    # One product of up to 16 numbers a side, each rounded once: two roundings, in whatever order it sums.
    assert_close(product, expected, "output", roundings=2)
    with torch.no_grad():
        assert_close(products.grouped_product(rows, weights, group_ends), expected, "plain meaning", roundings=2)
    cotangent = torch.ones_like(product) / 4
    actual = torch.autograd.grad(product, (rows, weights), cotangent)
    for name, a, e in zip(
        ("rows", "weights"), actual, torch.autograd.grad(expected, (rows, weights), cotangent), strict=True
    ):
        assert_close(a, e, f"gradient of {name}", roundings=2)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("instructions", [True, False])
def test_bfloat16_is_multiplied_with_or_without_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, instructions: bool, autocast: bool
) -> None:
    monkeypatch.setattr("dsv2_ref.fast.products.has_bfloat16", lambda: instructions)
    rows, weights, ends = operands(torch.bfloat16, 96, 300, [7, 7, 15, 40])  # 7, 0, 8 and 25 rows
    exact = products.grouped_product(rows.double(), weights.double(), ends)
    with torch.autocast("cpu", enabled=autocast):
        out = products.grouped_product(rows, weights, ends)
    # Summed in float32, and rounded once to 8 bits.
    assert ((out - exact).abs() <= 2**-8 * exact.abs() + 96 * 2**-24 * exact.abs().max()).all()
    transposed = products.grouped_product(out, weights.mT, ends)
    back = products.grouped_product(out.double(), weights.double().mT, ends)
    assert ((transposed - back).abs() <= 2**-8 * back.abs() + 300 * 2**-24 * back.abs().max()).all()


def test_grouped_product_has_second_derivatives() -> None:
    rows, weights, group_ends = operands(torch.float64, 3, 2, ENDS["empty ones"])
    assert torch.autograd.gradgradcheck(lambda r, w: grouped_product(r, w, group_ends), (rows, weights))


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float64, "odd rows"),
        (torch.float32, "16-byte rows"),
        (torch.bfloat16, "one number"),
        (torch.bfloat16, "torch leaves gaps between the results"),
    ],
)
def test_grouped_operators_keep_the_rules_of_torch(dtype: torch.dtype, sizes: str) -> None:
    """Nothing is changed in place, shapes are known beforehand, gradients come under the compiler as well."""
    inputs, outputs = SIZES.get(sizes, (16, 12))
    rows, weights, group_ends = operands(dtype, inputs, outputs, ENDS["empty ones"])
    torch.library.opcheck(grouped_product.default, (rows, weights, group_ends))
    other = operands(dtype, outputs, 1, ENDS["empty ones"])[0]
    torch.library.opcheck(grouped_outer.default, (rows, other, group_ends))


# Nothing waits for the device


class NoReadingBack(TorchDispatchMode):
    """Refuses operations whose result, or its shape, the host has to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if func is torch.ops.aten.index.Tensor:  # with numbers the shape is known, with a mask it is not
            waits = any(places is not None and places.dtype == torch.bool for places in args[1])
        assert not waits, f"{func} makes the host wait"
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_makes_the_host_wait() -> None:
    for wait in (
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: bool(x.any()),
    ):
        with pytest.raises(AssertionError, match="makes the host wait"), NoReadingBack():
            wait(torch.ones(3))


VARIETIES = {
    "greedy": SMALL,
    "groups": GROUPS,
    "pooled loss": replace(SMALL, seq_aux=False, norm_topk_prob=True),
    "mha": replace(SMALL, use_mla=False, num_key_value_heads=2),
    "expanded eager": replace(SMALL, mla_form="expanded", _attn_implementation="eager"),
    "absorbed": replace(SMALL, mla_form="absorbed"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", VARIETIES.values(), ids=VARIETIES)
def test_a_layer_trains_and_decodes_without_reading_back(config: DeepseekV2Config, dtype: torch.dtype) -> None:
    """On the meta device, which holds no numbers to read: masks, positions, routing, cache and gradients."""
    with torch.device("meta"):
        layer: nn.Module = DeepseekV2DecoderLayer(config, 1).to(dtype)
        x = torch.empty(2, 9, SMALL.hidden_size, dtype=dtype)
        padding = torch.ones(2, 9, dtype=torch.int64)
        for_each_query = torch.zeros(2, 1, 1, 10)
    with NoReadingBack():
        out, _ = layer(x, attention_mask=padding, use_cache=True)
        out.sum().backward()
        with torch.no_grad():
            _, cache = layer(x, attention_mask=padding, position_ids=padding.cumsum(1), use_cache=True)
            last, cache = layer(x[:, :1], for_each_query, past_key_value=cache, use_cache=True)
    assert out.shape == x.shape
    assert last.shape == (2, 1, SMALL.hidden_size)
    assert len(cache) == 10
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("config", VARIETIES.values(), ids=VARIETIES)
def test_the_shapes_of_a_layer_do_not_depend_on_numbers(config: DeepseekV2Config) -> None:
    """Fake tensors refuse whatever would have to know a value, in the gate above all."""
    with FakeTensorMode():
        layer = DeepseekV2DecoderLayer(config, 1)
        out = layer(torch.empty(2, 9, SMALL.hidden_size))[0]
        out.sum().backward()
    assert out.shape == (2, 9, SMALL.hidden_size)
