"""What users of this and of similar code have reported: modules that others replace or wrap, and float16 far out.

`shared/reviews/reports.md` lists the reports. Those on checkpoints are in `test_state_dict` and `test_model`, those on
derivatives in `test_transforms`, and those on published configurations in `test_config`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dsv2_ref import (
    ATTENTION_CLASSES,
    DeepseekV2Config,
    DeepseekV2DecoderLayer,
    DeepseekV2ForCausalLM,
    pack_weights,
)
from tests.peers import SMALL, assert_close, randomised, tokens

MHA = replace(SMALL, use_mla=False, num_key_value_heads=2)
FORMS = ("expanded", "absorbed", "auto")
KERNELS = pytest.mark.parametrize("kernel", ["eager", "sdpa"])


def attention_of(config: DeepseekV2Config, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    kind = ("mla_" if config.use_mla else "mha_") + config._attn_implementation
    return randomised(ATTENTION_CLASSES[kind](config, 0), dtype, seed)


# What may stand in the place of a linear map, W x: each of these gives W x + D x, with D a map of its own.


class Adapted(nn.Linear):
    """A subclass with a forward of its own, as fine-tuning libraries write adapters."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.delta)


class Wrapped(nn.Module):
    """A module without a ``weight``, around the one that was there."""

    def __init__(self, inner: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.inner, self.delta = inner, delta

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + F.linear(x, self.delta)


class Plus(nn.Module):
    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


def delta_of(linear: nn.Linear) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(linear.weight.shape, generator=generator, dtype=torch.float64)
    return (noise * linear.in_features**-0.5).to(linear.weight.dtype)


def subclassed(linear: nn.Linear) -> nn.Module:
    adapted = Adapted(linear.in_features, linear.out_features, bias=linear.bias is not None)
    adapted.weight, adapted.bias, adapted.delta = linear.weight, linear.bias, delta_of(linear)
    return adapted


def hooked(linear: nn.Linear) -> nn.Module:
    delta = delta_of(linear)
    linear.register_forward_hook(lambda _, inputs, out: out + F.linear(inputs[0], delta))
    return linear


def hooked_before(linear: nn.Linear) -> nn.Module:
    """Here it is the input that changes, from end to end: see `merge`."""
    linear.register_forward_pre_hook(lambda _, inputs: (inputs[0].flip(-1),))
    return linear


def parametrized(linear: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(linear, "weight", Plus(delta_of(linear)))
    return linear


def with_a_forward_of_its_own(linear: nn.Linear) -> nn.Module:
    delta, forward = delta_of(linear), linear.forward
    linear.forward = lambda x: forward(x) + F.linear(x, delta)  # type: ignore[method-assign]
    return linear


REPLACEMENTS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "subclass": subclassed,
    "wrapper": lambda linear: Wrapped(linear, delta_of(linear)),
    "hook": hooked,
    "pre-hook": hooked_before,
    "parametrization": parametrized,
    "forward": with_a_forward_of_its_own,
}


@torch.no_grad()
def merge(linear: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    """Change the weight such that the map does what the replacement does."""
    linear.weight.copy_(linear.weight.flip(1) if replacement is hooked_before else linear.weight + delta_of(linear))


every_replacement = pytest.mark.parametrize("replacement", REPLACEMENTS.values(), ids=REPLACEMENTS)


def in_one_pass_and_by_steps(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Eight tokens and one more, whose form `auto` chooses by itself, and all nine at once."""
    first, *_, cache = module(x[:, :8], use_cache=True)
    last = module(x[:, 8:], past_key_value=cache)[0]
    return [module(x)[0], torch.cat((first, last), dim=1)]


LINEARS = [
    *((SMALL, name) for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    *((MHA, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
]


@every_replacement
@KERNELS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("config", "name"), LINEARS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_replaced_projection_counts_in_every_form_or_is_refused(
    config: DeepseekV2Config, name: str, form: str, kernel: str, replacement: Callable[[nn.Linear], nn.Module]
) -> None:
    config = replace(config, _attn_implementation=kernel, mla_form=form)
    merged, attention, x = attention_of(config), attention_of(config), tokens(2, 9, torch.float64)
    merge(merged.get_submodule(name), replacement)
    setattr(attention, name, replacement(attention.get_submodule(name)))
    plain = replacement is parametrized  # its weight is what counts, and can be read
    if form == "absorbed" and name == "kv_b_proj" and not plain:
        with pytest.raises(ValueError, match=r"^kv_b_proj is .*; wanted a torch.nn.Linear .*form='expanded'") as caught:
            attention(x)
        assert "\n" not in str(caught.value)
        return
    for actual, expected in zip(
        in_one_pass_and_by_steps(attention, x), in_one_pass_and_by_steps(merged, x), strict=True
    ):
        assert_close(actual, expected, "output")
    assert not torch.allclose(attention(x)[0], attention_of(config)(x)[0], atol=1e-3)
    cache = attention.empty_cache(2, capacity=9)
    assert cache.append(attention(x, use_cache=True)[2].tokens).tokens.dtype == torch.float64


@KERNELS
@pytest.mark.parametrize("form", FORMS)
def test_a_bias_on_kv_b_proj(form: str, kernel: str) -> None:
    attention = attention_of(replace(SMALL, _attn_implementation=kernel, mla_form=form))
    expected = attention_of(replace(SMALL, _attn_implementation=kernel, mla_form="expanded"))
    x = tokens(2, 9, torch.float64)
    for module in (attention, expected):
        module.kv_b_proj.bias = nn.Parameter(tokens(1, 1, torch.float64, width=module.kv_b_proj.out_features)[0, 0])
    if form == "absorbed":
        with pytest.raises(ValueError, match=r"kv_b_proj is .*; wanted a torch.nn.Linear without bias"):
            attention(x)
        return
    for actual, wanted in zip(
        in_one_pass_and_by_steps(attention, x), in_one_pass_and_by_steps(expected, x), strict=True
    ):
        assert_close(actual, wanted, "output")
    assert not torch.allclose(attention(x)[0], attention_of(SMALL)(x)[0], atol=1e-3)


@every_replacement
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("layer_idx", [0, 1], ids=["dense", "experts"])
def test_a_replaced_projection_of_the_mlp(
    layer_idx: int, name: str, replacement: Callable[[nn.Linear], nn.Module]
) -> None:
    layer, merged = (randomised(DeepseekV2DecoderLayer(SMALL, layer_idx)) for _ in range(2))
    mlp, merged_mlp = (module.mlp if layer_idx == 0 else module.mlp.shared_experts for module in (layer, merged))
    merge(merged_mlp.get_submodule(name), replacement)
    setattr(mlp, name, replacement(mlp.get_submodule(name)))
    x = tokens(2, 5, torch.float64)
    assert_close(layer(x)[0], merged(x)[0], "output")
    assert_close(mlp(x), merged_mlp(x), "the part alone")


class Doubling(nn.Module):
    """Around any part: what it returns, or the first floating-point tensor of it, counts twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return doubled(self.inner(*args, **kwargs))


def doubled(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out * 2
    first = next(i for i, part in enumerate(out) if isinstance(part, Tensor) and part.is_floating_point())
    return (*out[:first], out[first] * 2, *out[first + 1 :])


PARTS = [
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn",
    "self_attn.q_a_layernorm",
    "self_attn.kv_a_layernorm",
    "mlp",
    "mlp.gate",
    "mlp.experts",
    "mlp.shared_experts",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PARTS)
def test_a_wrapped_part_counts(name: str, form: str) -> None:
    """A wrapper, which has no weight to read a dtype from, and a hook do the same, and something."""
    layers = [randomised(DeepseekV2DecoderLayer(replace(SMALL, mla_form=form), 1)) for _ in range(3)]
    wrapped, hooked, plain = layers
    parent, _, leaf = name.rpartition(".")
    setattr(wrapped.get_submodule(parent), leaf, Doubling(wrapped.get_submodule(name)))
    hooked.get_submodule(name).register_forward_hook(lambda _, __, out: doubled(out))
    x = tokens(2, 9, torch.float64)
    assert torch.equal(wrapped(x)[0], hooked(x)[0])
    assert not torch.allclose(wrapped(x)[0], plain(x)[0], atol=1e-3)
    whole, by_steps = in_one_pass_and_by_steps(wrapped, x)
    assert_close(by_steps, whole, "output")
    if name != "self_attn":
        assert wrapped.self_attn.empty_cache(2).tokens.dtype == torch.float64
    with pytest.raises(ValueError, match=r"hidden_states is \(2, 9, 47\)"):  # refused all the same
        wrapped(x[..., 1:])
    with pytest.raises(ValueError, match="position_ids is negative"):
        wrapped(x, position_ids=torch.arange(-1, 8)[None])
    if name.startswith("mlp."):
        assert_close(wrapped.mlp(x), hooked.mlp(x), "the experts alone")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own quantisation is about to move
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@KERNELS
@pytest.mark.parametrize("form", ["expanded", "auto"])
@pytest.mark.parametrize("config", [SMALL, MHA], ids=["mla", "mha"])
@torch.no_grad()
def test_a_layer_quantised_by_torch(config: DeepseekV2Config, form: str, kernel: str) -> None:
    """Its ``weight`` is a method, and its matrix int8."""
    layer = randomised(DeepseekV2DecoderLayer(replace(config, mla_form=form, _attn_implementation=kernel), 0))
    layer.float()
    x = tokens(2, 9, torch.float32)
    expected = layer(x)[0]
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.self_attn.o_proj, nn.Linear)
    for out in in_one_pass_and_by_steps(quantised, x):
        apart = (out - expected).norm() / expected.norm()
        assert 1e-4 < apart < 0.05  # 8 bits of every weight and input
    assert quantised.self_attn.empty_cache(2, capacity=4).tokens.dtype == torch.float32
    if config.use_mla:
        quantised.self_attn.form = "absorbed"
        with pytest.raises(ValueError, match=r"kv_b_proj is .*; wanted a torch.nn.Linear"):
            quantised(x)


def test_a_wrapped_norm_widens_as_the_norm_does() -> None:
    layer = DeepseekV2DecoderLayer(SMALL, 0)
    narrow = tokens(2, 5, torch.bfloat16)
    expected = layer(narrow)[0]
    layer.input_layernorm = nn.Sequential(layer.input_layernorm)
    assert torch.equal(layer(narrow)[0], expected)
    with pytest.raises(
        ValueError, match=r"hidden_states is .*float64.*; wanted floating-point numbers that torch.float32"
    ):
        layer(narrow.double())


# The same of packed weights

PLACES = [
    *(f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    *(f"mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]


@every_replacement
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_packing_leaves_what_is_not_plain_in_its_place(
    place: str, replacement: Callable[[nn.Linear], nn.Module]
) -> None:
    layer = randomised(DeepseekV2DecoderLayer(SMALL, 1), torch.float32)
    parent, _, leaf = place.rpartition(".")
    before = layer(tokens(2, 9, torch.float32))[0]
    setattr(layer.get_submodule(parent), leaf, replacement(layer.get_submodule(place)))
    replaced, x = layer.get_submodule(place), tokens(2, 9, torch.float32)
    expected = in_one_pass_and_by_steps(layer, x)
    names = layer.state_dict().keys()
    pack_weights(layer)
    assert layer.get_submodule(place) is replaced
    for actual, wanted in zip(in_one_pass_and_by_steps(layer, x), expected, strict=True):
        assert_close(actual, wanted, "output")
    assert layer.state_dict().keys() == names
    assert not torch.allclose(expected[0], before, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["mlp.experts", "mlp.gate", "self_attn.kv_a_layernorm", "mlp"])
@torch.no_grad()
def test_packing_keeps_hooks(place: str, form: str) -> None:
    layer = randomised(DeepseekV2DecoderLayer(replace(SMALL, mla_form=form), 1), torch.float32)
    layer.get_submodule(place).register_forward_hook(lambda _, __, out: doubled(out))
    x = tokens(2, 9, torch.float32)
    expected = in_one_pass_and_by_steps(layer, x)
    pack_weights(layer)
    for actual, wanted in zip(in_one_pass_and_by_steps(layer, x), expected, strict=True):
        assert_close(actual, wanted, "output")


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_hooks_on_packed_weights_count_in_every_form(place: str) -> None:
    layer, hooked = (randomised(DeepseekV2DecoderLayer(SMALL, 1), torch.float32) for _ in range(2))
    pack_weights(hooked)
    for module in (layer, hooked):
        module.get_submodule(place).register_forward_hook(lambda _, __, out: out * 2)
    x = tokens(2, 9, torch.float32)
    for actual, wanted in zip(in_one_pass_and_by_steps(hooked, x), in_one_pass_and_by_steps(layer, x), strict=True):
        assert_close(actual, wanted, "output")


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_packing_keeps_a_bias_on_kv_b_proj(form: str) -> None:
    layer = randomised(DeepseekV2DecoderLayer(replace(SMALL, mla_form="expanded"), 1), torch.float32)
    linear, x = layer.self_attn.kv_b_proj, tokens(2, 9, torch.float32)
    linear.bias = nn.Parameter(tokens(1, 1, torch.float32, width=linear.out_features)[0, 0])
    expected = in_one_pass_and_by_steps(layer, x)
    pack_weights(layer)
    layer.self_attn.form = form
    if form == "absorbed":
        with pytest.raises(ValueError, match=r"kv_b_proj is .*; wanted a torch.nn.Linear without bias"):
            layer(x)
        return
    for actual, wanted in zip(in_one_pass_and_by_steps(layer, x), expected, strict=True):
        assert_close(actual, wanted, "output")


# float16, whose largest number is 65504

LARGEST = torch.finfo(torch.float16).max  # 65504


def with_large_scores(config: DeepseekV2Config, seed: int) -> tuple[Any, Tensor]:
    """Attention whose scores go far beyond what float16 holds, while queries, latents, keys and values do not."""
    attention, x = attention_of(config, torch.float16, seed), tokens(2, 24, torch.float16, seed=seed)
    with torch.no_grad():
        if config.use_mla:
            attention.q_b_proj.weight.mul_(150)
            attention.kv_a_layernorm.weight.mul_(150)
            by_head = attention.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
            by_head[:, config.qk_nope_head_dim :].div_(150)  # values as they were
        else:
            attention.q_proj.weight.mul_(200)
            attention.k_proj.weight.mul_(200)
    return attention, x


def float16_masks(seq: int) -> dict[str, Tensor | None]:
    padding = torch.arange(seq) >= torch.tensor([[0], [5]])
    causal = torch.ones(seq, seq, dtype=torch.bool).tril()
    slopes = -torch.arange(seq, dtype=torch.float32).expand(seq, seq) / seq
    return {
        "causal": None,
        "padding": padding,
        "bool": causal[None, None],
        "floating": slopes[None, None].masked_fill(~causal, float("-inf")),
        "floating in float16": slopes[None, None].masked_fill(~causal, float("-inf")).half(),
        "lowest of float16": torch.zeros(1, 1, seq, seq).masked_fill(~causal, torch.finfo(torch.float16).min).half(),
    }


@pytest.mark.parametrize("mask", float16_masks(24))
@KERNELS
@pytest.mark.parametrize(
    ("config", "form"), [*((SMALL, form) for form in FORMS), (MHA, "expanded")], ids=[*FORMS, "mha"]
)
@pytest.mark.parametrize("gradients", [True, False])
def test_float16_scores_beyond_its_range(
    config: DeepseekV2Config, form: str, kernel: str, mask: str, gradients: bool
) -> None:
    """Against float64 of the same rounded weights: finite, and as near as float16 lets them be."""
    config = replace(config, mla_form=form, _attn_implementation=kernel)
    attention, x = with_large_scores(config, seed=3)
    wide = attention_of(config)
    wide.load_state_dict({name: weight.double() for name, weight in attention.state_dict().items()})
    given = float16_masks(24)[mask]
    with torch.set_grad_enabled(gradients):
        leaf = x.clone().requires_grad_(gradients)
        out = attention(leaf, attention_mask=given)[0]
        first, _, cache = attention(leaf[:, :23], cut(given, slice(0, 23), 23), use_cache=True)
        last = attention(leaf[:, 23:], cut(given, slice(23, 24), 24), past_key_value=cache)[0]
    # A mask that hides hides whatever the score: float64 is told by a bool one.
    hides = mask == "lowest of float16"
    expected = wide(x.double(), attention_mask=float16_masks(24)["bool"] if hides else given)[0]
    assert largest_score(config, wide, x.double()) > LARGEST  # or the test would show nothing
    for name, actual in (("one pass", out), ("steps", torch.cat((first, last), dim=1))):
        assert actual.dtype == torch.float16
        assert actual.isfinite().all(), name
        # So large a score is rounded by far more than 1 (eleven bits of each query and key), which decides which of two
        # near keys is seen: it is enough that most tokens agree to within the roundings of a few products.
        apart = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-9)
        assert apart.median() < 8 * torch.finfo(torch.float16).eps, f"{name}: {apart.median()}"
    if gradients:
        out.float().sum().backward()
        assert leaf.grad is not None
        assert not leaf.grad.isnan().any()


def cut(mask: Tensor | None, rows: slice, keys: int) -> Tensor | None:
    if mask is None:
        return None
    return mask[:, :keys] if mask.ndim == 2 else mask[:, :, rows, :keys]


@torch.no_grad()
def largest_score(config: DeepseekV2Config, attention: Any, x: Tensor) -> float:
    """Of the softmax's input, read off queries and keys as the oracle of `test_oracle` would."""
    query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x))) if config.use_mla else None
    if query is None:
        query, key = attention.q_proj(x), attention.k_proj(x)
        return float((query[..., :12] @ key[..., :12].mT * attention.softmax_scale).abs().max())
    latent = attention.kv_a_layernorm(attention.kv_a_proj_with_mqa(x)[..., : config.kv_lora_rank])
    nope = config.qk_nope_head_dim
    return float((query[..., :nope] @ attention.kv_b_proj(latent)[..., :nope].mT * attention.softmax_scale).abs().max())


# Messages


def test_the_advice_of_the_message_about_masks_can_be_followed(as_shipped: None) -> None:
    """Also where the batch is as large as the sequence, so that (seq, kv_seq) would be read as padding."""
    layer = randomised(DeepseekV2DecoderLayer(SMALL, 0))
    for batch in (2, 5):
        x, seq, kv_seq = tokens(batch, 5, torch.float64), 5, 5
        ones = torch.ones(seq, kv_seq).tril()
        with pytest.raises(ValueError, match="masks nothing") as caught:
            layer(x, attention_mask=ones[None, None])
        message = str(caught.value)
        advice = message[message.index("torch.ones") : message.index("; None is causal")]
        mask = eval(advice, {"torch": torch, "seq": seq, "kv_seq": kv_seq})
        assert_close(layer(x, attention_mask=mask)[0], layer(x)[0], "output")
        for two_axes in (ones, torch.ones(seq + 1, kv_seq).tril().bool()):
            with pytest.raises(ValueError, match=r"attention_mask is .*; wanted .*") as caught:
                layer(x, attention_mask=two_axes)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("build", [DeepseekV2DecoderLayer, *dict.fromkeys(ATTENTION_CLASSES.values())])
def test_a_layer_that_the_model_does_not_have(build: Any, as_shipped: None) -> None:
    config = replace(SMALL, use_mla=not build.__name__.startswith("MultiHead"))
    if "Flash" not in build.__name__:
        assert build(config, SMALL.num_hidden_layers - 1)
    for layer_idx in (SMALL.num_hidden_layers, 99, -1, True, "0", None, 0.0):
        with pytest.raises(ValueError, match=rf"^layer_idx is {layer_idx!r}; wanted .*num_hidden_layers is 2"):
            build(config, layer_idx)
    with pytest.raises(TypeError, match=r"^config is a dict; wanted a DeepseekV2Config; .*from_published"):
        build(SMALL.to_dict(), 0)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "model.layers.0", "model.layers.1.input_layernorm", "model.norm"]
)
def test_a_wrapped_part_of_a_model(name: str) -> None:
    wrapped, plain = (randomised(DeepseekV2ForCausalLM(SMALL)) for _ in range(2))
    parent, _, leaf = name.rpartition(".")
    setattr(wrapped.get_submodule(parent), leaf, Doubling(wrapped.get_submodule(name)))
    ids = torch.arange(6).repeat(2, 1)
    logits, caches = wrapped(ids[:, :5], use_cache=True)
    last, _ = wrapped(ids[:, 5:], past_key_values=caches)
    assert_close(torch.cat((logits, last), dim=1), wrapped(ids)[0], "by steps")
    assert not torch.allclose(logits, plain(ids[:, :5])[0], atol=1e-3)
    for bad in ({"position_ids": torch.arange(-1, 5)[None]}, {"attention_mask": torch.ones(2, 7).bool()}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            wrapped(ids, **bad)
