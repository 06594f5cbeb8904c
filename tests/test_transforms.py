"""torch.func and forward-mode differentiation through layers, attention and caches, in float64 against autograd.

Forward mode is checked against reverse mode: for tangent v, cotangent c and Jacobian J, c · (J v) is v · (Jᵀ c).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

from dsv2_ref import ATTENTION_CLASSES, DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM, DeepseekV2MoE
from dsv2_ref.balance import inject_loss
from dsv2_ref.quantize import quantize
from tests.peers import SMALL, assert_close, randomised, tokens

# torch's own doing, when it first differentiates in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

MHA = replace(SMALL, use_mla=False, num_key_value_heads=2)
WAYS = {
    f"{kind}-{form}-{kernel}": replace(config, mla_form=form, _attn_implementation=kernel)
    for kind, config, forms in (("mla", SMALL, ("expanded", "absorbed")), ("mha", MHA, ("expanded",)))
    for form in forms
    for kernel in ("eager", "sdpa")
}
SEQ = 5
X, TANGENT, COTANGENT = (tokens(2, SEQ, torch.float64, seed=seed) for seed in (1, 2, 3))
Map = Callable[[Tensor], Tensor]


def layer_of(config: DeepseekV2Config, layer_idx: int) -> nn.Module:
    return randomised(DeepseekV2DecoderLayer(config, layer_idx))


def attention_of(config: DeepseekV2Config) -> nn.Module:
    kind = ("mla_" if config.use_mla else "mha_") + config._attn_implementation
    return randomised(ATTENTION_CLASSES[kind](config, 0))


def in_one_pass(module: nn.Module) -> Map:
    return lambda x: module(x)[0]


def in_pieces(module: nn.Module) -> Map:
    """Three tokens, then one, then the last: each piece reads what the ones before it put into the cache."""

    def run(x: Tensor) -> Tensor:
        outputs, cache = [], None
        for piece in x.split([3, 1, 1], dim=1):
            out, *_, cache = module(piece, past_key_value=cache, use_cache=True)
            outputs.append(out)
        return torch.cat(outputs, dim=1)

    return run


MODULES: dict[str, Callable[[], nn.Module]] = {
    **{f"{name}-dense": lambda config=config: layer_of(config, 0) for name, config in WAYS.items()},
    **{f"{name}-attention": lambda config=config: attention_of(config) for name, config in WAYS.items()},
    "experts": lambda: layer_of(SMALL, 1),
    "quantised experts": lambda: quantize(layer_of(SMALL, 1), "int8"),
    "experts with groups": lambda: layer_of(
        replace(SMALL, topk_method="group_limited_greedy", n_group=4, topk_group=2, norm_topk_prob=True), 1
    ),
}
CASES = [
    pytest.param(run, make, id=f"{name}-{run.__name__}")
    for name, make in MODULES.items()
    for run in (in_one_pass, in_pieces)
]
every_case = pytest.mark.parametrize(("run", "make"), CASES)


def reverse_mode(run: Map, x: Tensor = X, cotangent: Tensor = COTANGENT) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad((run(leaf) * cotangent).sum(), leaf)[0]


@every_case
def test_grad(run: Callable[[nn.Module], Map], make: Callable[[], nn.Module]) -> None:
    mapped = run(make())
    actual = grad(lambda x: (mapped(x) * COTANGENT).sum())(X)
    assert_close(actual, reverse_mode(mapped), "gradient")


@every_case
def test_jvp(run: Callable[[nn.Module], Map], make: Callable[[], nn.Module]) -> None:
    mapped = run(make())
    out, tangent = jvp(mapped, (X,), (TANGENT,))
    assert_close(out, mapped(X), "output")
    assert tangent.abs().max() > 0
    assert_close((tangent * COTANGENT).sum(), (TANGENT * reverse_mode(mapped)).sum(), "tangent", roundings=1e3)


@every_case
def test_dual_numbers(run: Callable[[nn.Module], Map], make: Callable[[], nn.Module]) -> None:
    mapped = run(make())
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(mapped(forward_ad.make_dual(X, TANGENT))).tangent
    assert tangent is not None
    assert_close((tangent * COTANGENT).sum(), (TANGENT * reverse_mode(mapped)).sum(), "tangent", roundings=1e3)


@every_case
def test_vmap(run: Callable[[nn.Module], Map], make: Callable[[], nn.Module]) -> None:
    """Over inputs, each a batch of its own, and over their gradients."""
    mapped = run(make())
    many = torch.stack((X, 2 * X, X.flip(1)), dim=1)  # the second axis is the one to map over
    out = vmap(mapped, in_dims=1)(many)
    for index in range(3):
        assert_close(out[index], mapped(many[:, index]), f"input {index}")
    gradients = vmap(grad(lambda x: (mapped(x) * COTANGENT).sum()), in_dims=1)(many)
    for index in range(3):
        assert_close(gradients[index], reverse_mode(mapped, many[:, index]), f"gradient {index}")


@every_case
def test_jacrev(run: Callable[[nn.Module], Map], make: Callable[[], nn.Module]) -> None:
    mapped, x, v = run(make()), X[:1], TANGENT[:1]
    jacobian = jacrev(lambda x: mapped(x)[..., :3])(x)  # three features: a row for each of 15 numbers
    assert jacobian.shape == (1, SEQ, 3, *x.shape)
    expected = jvp(mapped, (x,), (v,))[1][..., :3]
    assert_close((jacobian * v).sum((-1, -2, -3)), expected, "Jacobian times tangent", roundings=1e3)
    future = jacobian[0, :, :, 0].amax(1).abs().amax(-1).triu(1)
    assert (future == 0).all()  # no token's output hangs on a later token


# Weights


@pytest.mark.parametrize("make", [MODULES["experts"], MODULES["mla-expanded-eager-dense"], lambda: attention_of(MHA)])
def test_gradients_of_weights_and_their_tangents(make: Callable[[], nn.Module]) -> None:
    module = make()
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return (functional_call(module, weights, (X,))[0] * COTANGENT).sum()

    actual = grad(loss)(weights)
    (module(X)[0] * COTANGENT).sum().backward()
    for name, parameter in module.named_parameters():
        assert_close(actual[name], parameter.grad, name)

    generator = torch.Generator().manual_seed(4)
    direction = {n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in weights.items()}
    expected = sum((direction[name] * actual[name]).sum() for name in weights)
    assert_close(jvp(loss, (weights,), (direction,))[1], expected, "tangent", roundings=1e4)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(weights[name], direction[name]) for name in weights}
        tangent = forward_ad.unpack_dual(loss(duals)).tangent
    assert_close(tangent, expected, "dual number", roundings=1e4)
    assert all(torch.equal(weight, weights[name]) for name, weight in module.named_parameters())


@pytest.mark.parametrize("layer_idx", [0, 1], ids=["dense", "experts"])
def test_an_ensemble_of_layers(layer_idx: int) -> None:
    """A batch of weights, as `torch.func.stack_module_state` makes it, on the same tokens."""
    layers = [randomised(DeepseekV2DecoderLayer(SMALL, layer_idx), seed=seed) for seed in range(3)]
    weights, buffers = stack_module_state(layers)
    together = vmap(lambda w, b, x: functional_call(layers[0], (w, b), (x,))[0], in_dims=(0, 0, None))
    for out, layer in zip(together(weights, buffers, X), layers, strict=True):
        assert_close(out, layer(X)[0], "output")


def test_second_derivatives() -> None:
    """Of the eager definition: forward over reverse and reverse over reverse; torch's fused attention has none."""
    layer = layer_of(replace(SMALL, _attn_implementation="eager"), 1)

    def loss(x: Tensor) -> Tensor:
        return (layer(x)[0] * COTANGENT).square().sum()

    leaf = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad((first * TANGENT).sum(), leaf)
    assert_close(jvp(grad(loss), (X,), (TANGENT,))[1], expected, "Hessian times tangent", roundings=1e3)


# Caches that were there before


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)
def test_a_cache_from_outside_is_read_and_not_written_to(config: DeepseekV2Config) -> None:
    """Tokens inside a transform are wrapped: in a storage that others share they would be lost, or poison it."""
    layer = layer_of(config, 0)
    with torch.no_grad():
        _, cache = layer(X[:, :3], past_key_value=layer.self_attn.empty_cache(2, capacity=8), use_cache=True)
    before = cache.tokens.clone()

    def step(x: Tensor) -> Tensor:
        out, later = layer(x, past_key_value=cache, use_cache=True)
        return layer(out, past_key_value=later)[0]

    x, v, c = X[:, 3:], TANGENT[:, 3:], COTANGENT[:, 3:]
    with torch.no_grad():  # nothing but the tangent itself asks for a copy
        _, tangent = jvp(step, (x,), (v,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(step(forward_ad.make_dual(x, v))).tangent
        many = vmap(step)(torch.stack((x, -x)))
        assert_close(many[1], step(-x), "mapped")
    expected = (v * reverse_mode(step, x, c)).sum()
    assert_close((tangent * c).sum(), expected, "tangent", roundings=1e3)
    assert_close((dual * c).sum(), expected, "dual number", roundings=1e3)
    assert torch.equal(cache.tokens, before)
    with torch.no_grad():
        whole = layer(X)[0][:, 3:]
        assert_close(layer(x, past_key_value=cache)[0], whole, "continued after all")


# Training: the balance loss joins at full strength


def test_the_injected_loss_under_transforms() -> None:
    hidden, cotangent = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return (inject_loss(x * 2, x.square().sum()) * cotangent).sum()

    expected = 2 * cotangent + 2 * hidden
    assert_close(grad(loss)(hidden), expected, "gradient")
    assert_close(vmap(grad(loss))(hidden[None])[0], expected, "mapped gradient")
    assert_close(jvp(loss, (hidden,), (cotangent,))[1], (2 * cotangent).mul(cotangent).sum(), "tangent")


@pytest.mark.parametrize("seq_aux", [True, False], ids=["by_sequence", "pooled"])
def test_training_with_a_balance_loss(seq_aux: bool) -> None:
    moe = randomised(DeepseekV2MoE(replace(SMALL, aux_loss_alpha=0.5, seq_aux=seq_aux))).train()
    weights = {name: parameter.detach() for name, parameter in moe.named_parameters()}
    actual = grad(lambda w: (functional_call(moe, w, (X,)) * COTANGENT).sum())(weights)
    (moe(X) * COTANGENT).sum().backward()
    for name, parameter in moe.named_parameters():
        assert_close(actual[name], parameter.grad, name)
    # A gradient for every sample, each with the loss of its own sequence.
    of_samples = vmap(grad(lambda w, x, c: (functional_call(moe, w, (x[None],)) * c).sum()), in_dims=(None, 0, 0))
    for row, gradient in enumerate(of_samples(weights, X, COTANGENT)["gate.weight"]):
        moe.zero_grad()
        (moe(X[row : row + 1]) * COTANGENT[row]).sum().backward()
        assert_close(gradient, moe.gate.weight.grad, f"sample {row}")


# Other arguments


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_masks_and_positions_may_be_mapped_over(kernel: str) -> None:
    layer = layer_of(replace(SMALL, _attn_implementation=kernel), 0)
    padding = torch.ones(3, 2, SEQ, dtype=torch.bool)
    padding[1, :, :2], padding[2, 1, 0] = False, False
    positions = torch.stack([torch.arange(start, start + SEQ)[None] for start in (0, 7, 90)])
    causal = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    hidden = torch.zeros(3, 1, 1, SEQ, SEQ, dtype=torch.float64).masked_fill(~causal, float("-inf"))
    hidden[1:] -= torch.rand(2, 1, 1, SEQ, SEQ, generator=torch.Generator().manual_seed(0))
    for mask in (padding, causal[None, None].expand(3, 1, 1, SEQ, SEQ), hidden):
        out = vmap(lambda m, p: layer(X, m, p)[0])(mask, positions)
        for index in range(3):
            assert_close(out[index], layer(X, mask[index], positions[index])[0], f"mask {index}")


def test_a_model_for_each_of_many_prompts() -> None:
    model = randomised(DeepseekV2ForCausalLM(SMALL))
    ids = torch.randint(0, SMALL.vocab_size, (3, 1, 6), generator=torch.Generator().manual_seed(0))
    out: Any = vmap(lambda i: model(i)[0])(ids)
    for index in range(3):
        assert_close(out[index], model(ids[index])[0], f"prompt {index}")
    ids[1, 0, 2] = SMALL.vocab_size
    with pytest.raises(ValueError, match="input_ids is outside of the vocabulary somewhere"):
        vmap(lambda i: model(i)[0])(ids)
