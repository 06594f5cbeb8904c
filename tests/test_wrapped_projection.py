"""Whatever replaces or wraps ``kv_b_proj`` counts in every form of latent attention, or is refused by name."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dsv2_ref import DeepseekV2Attention, DeepseekV2Config

TINY = DeepseekV2Config.tiny()


class Adapter(nn.Linear):
    """A low-rank adapter beside the weight, as fine-tuning libraries write it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ torch.full((32, 128), 0.05, dtype=x.dtype)


class Wrapper(nn.Module):
    """A module without a weight of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.base(x)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def adapted(attention: DeepseekV2Attention) -> None:
    attention.kv_b_proj.__class__ = Adapter


def wrapped(attention: DeepseekV2Attention) -> None:
    attention.kv_b_proj = Wrapper(attention.kv_b_proj)


def hooked(attention: DeepseekV2Attention) -> None:
    attention.kv_b_proj.register_forward_hook(lambda module, args, out: out * 1.5)


def hooked_before(attention: DeepseekV2Attention) -> None:
    attention.kv_b_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def biased(attention: DeepseekV2Attention) -> None:
    attention.kv_b_proj.bias = nn.Parameter(torch.linspace(-1, 1, 128).double())


def parametrized(attention: DeepseekV2Attention) -> None:
    parametrize.register_parametrization(attention.kv_b_proj, "weight", Doubled())


CHANGES = [adapted, wrapped, hooked, hooked_before, biased, parametrized]


def attention_of(form: str, change: Callable[[DeepseekV2Attention], None]) -> DeepseekV2Attention:
    torch.manual_seed(0)
    attention = DeepseekV2Attention(replace(TINY, mla_form=form), 0).double().eval()
    change(attention)
    return attention


@pytest.mark.parametrize("change", CHANGES)
def test_decoding_counts_it(change: Callable[[DeepseekV2Attention], None]) -> None:
    """``auto`` decodes as the whole sequence is computed, whose expanded form calls the module."""
    x = torch.randn(2, 9, 64).double()
    whole = attention_of("expanded", change)(x)[0]
    assert not torch.allclose(whole, attention_of("expanded", lambda attention: None)(x)[0])
    for form in ("auto", "expanded"):
        attention = attention_of(form, change)
        _, _, cache = attention(x[:, :8], use_cache=True)
        torch.testing.assert_close(attention(x[:, 8:], past_key_value=cache)[0], whole[:, 8:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", CHANGES)
def test_the_absorbed_form_counts_it_or_says_so(change: Callable[[DeepseekV2Attention], None]) -> None:
    x = torch.randn(2, 5, 64).double()
    attention = attention_of("absorbed", change)
    if change is parametrized:  # the weight that is read is the one that is used
        whole = attention_of("expanded", change)(x)[0]
        torch.testing.assert_close(attention(x)[0], whole, rtol=0, atol=1e-12)
        return
    with pytest.raises(
        ValueError, match=r"^kv_b_proj is a \w+; wanted a torch.nn.Linear without bias, hooks"
    ) as caught:
        attention(x)
    assert "\n" not in str(caught.value)


def test_dynamically_quantised_layers_run() -> None:
    """torch's quantised maps have a method in the place of a weight."""
    torch.manual_seed(0)
    attention = DeepseekV2Attention(TINY, 0).eval()
    x = torch.randn(1, 9, 64)
    expected = attention(x)[0]
    with pytest.warns(match="deprecated"):
        quantised = torch.ao.quantization.quantize_dynamic(attention, {nn.Linear}, dtype=torch.qint8)
    _, _, cache = quantised(x[:, :8], use_cache=True)
    out = quantised(x[:, 8:], past_key_value=cache)[0]
    # Eight bits per weight and activation: about a hundredth of the output's size per product.
    assert (out - expected[:, 8:]).norm() < 0.1 * expected[:, 8:].norm()
