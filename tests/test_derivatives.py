"""``torch.func`` and forward-mode derivatives through a layer: right, or refused in one line."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer

TINY = DeepseekV2Config.tiny()
CONFIGS = {
    "mla": TINY,
    "absorbed": replace(TINY, mla_form="absorbed"),
    "eager": replace(TINY, _attn_implementation="eager"),
    "mha": replace(TINY, use_mla=False),
}
LAYERS = [pytest.param(config, idx, id=f"{name}-{idx}") for name, config in CONFIGS.items() for idx in (0, 1)]


def layer_of(config: DeepseekV2Config, layer_idx: int) -> DeepseekV2DecoderLayer:
    torch.manual_seed(0)
    return DeepseekV2DecoderLayer(config, layer_idx).double().eval()


def decoding(layer: DeepseekV2DecoderLayer, seq: int = 3) -> Callable[[Tensor], Tensor]:
    """The outputs of a prompt whose last token passes through the cache."""

    def run(x: Tensor) -> Tensor:
        first, cache = layer(x[:, :-1], use_cache=True)
        return torch.cat((first, layer(x[:, -1:], past_key_value=cache)[0]), dim=1)

    return run


@pytest.mark.parametrize(("config", "layer_idx"), LAYERS)
def test_gradients_of_weights_equal_those_of_autograd(config: DeepseekV2Config, layer_idx: int) -> None:
    layer, x = layer_of(config, layer_idx), torch.randn(2, 4, 64).double()
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    found = grad(lambda w: functional_call(layer, w, (x,))[0].square().sum())(weights)
    layer(x)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, in its tangents
@pytest.mark.parametrize(("config", "layer_idx"), LAYERS)
@pytest.mark.parametrize("no_grad", [False, True], ids=["grad", "no_grad"])
def test_tangents_equal_differences(config: DeepseekV2Config, layer_idx: int, no_grad: bool) -> None:
    """Also under ``no_grad`` and through a cache, which is then not written in place."""
    layer = layer_of(config, layer_idx)
    run = decoding(layer)
    x, direction = torch.randn(2, 4, 64).double(), torch.randn(2, 4, 64).double()
    with torch.set_grad_enabled(not no_grad):
        _, tangent = jvp(run, (x,), (direction,))
        with forward_ad.dual_level():
            dual = run(forward_ad.make_dual(x, direction))
            same = forward_ad.unpack_dual(dual).tangent
    step = 1e-6  # errors of the central difference: step**2, and 1e-16 / step by rounding
    with torch.no_grad():
        expected = (run(x + step * direction) - run(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same, tangent, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("config", "layer_idx"), LAYERS)
def test_a_vmap_equals_a_loop(config: DeepseekV2Config, layer_idx: int) -> None:
    layer, many = layer_of(config, layer_idx), torch.randn(3, 2, 4, 64).double()
    run = decoding(layer)
    with torch.no_grad():
        found = vmap(run)(many)
        expected = torch.stack([run(x) for x in many])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer_idx", [0, 1])
def test_gradients_per_sample(layer_idx: int) -> None:
    """vmap over grad, as for the norms of single samples' gradients."""
    layer, many = layer_of(TINY, layer_idx), torch.randn(3, 1, 4, 64).double()
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(w: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(layer, w, (x,))[0].square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, many)
    for index, x in enumerate(many):
        for name, gradient in grad(loss)(weights, x).items():
            torch.testing.assert_close(found[name][index], gradient, rtol=1e-9, atol=1e-9)


def test_published_names_serve_a_functional_call() -> None:
    """The experts' names in a state dict stand for slices of their stacked weights."""
    layer, x = layer_of(TINY, 1), torch.randn(1, 4, 64).double()
    state = layer.state_dict()
    assert torch.equal(functional_call(layer, state, (x,))[0], layer(x)[0])
    other = layer_of(TINY, 1)
    changed = {name: 1.1 * weight for name, weight in state.items()}
    other.load_state_dict(changed)
    found = functional_call(layer, changed, (x,))[0]
    torch.testing.assert_close(found, other(x)[0], rtol=0, atol=1e-12)
    gradients = grad(lambda w: functional_call(layer, w, (x,))[0].square().sum())(state)
    layer(x)[0].square().sum().backward()
    stacked = layer.mlp.experts.gate_up_proj.grad
    assert stacked is not None
    torch.testing.assert_close(gradients["mlp.experts.3.gate_proj.weight"], stacked[3, :32], rtol=1e-9, atol=1e-9)
    assert torch.equal(layer.state_dict()["mlp.experts.3.gate_proj.weight"], state["mlp.experts.3.gate_proj.weight"])
