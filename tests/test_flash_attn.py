"""Attention through flash-attn's own front end, of which only the compiled module is replaced (`flash_double`).

Results are held against SDPA in float64, on the same half-precision weights and inputs. The double computes in float32 and
rounds once; the layer's own products round to 2**-11 (float16) or 2**-8 (bfloat16) some ten times on the way.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, checks
from dsv2_ref.attention import attend
from dsv2_ref.fast.flash import attend_flash
from dsv2_ref.fast.sdpa import equally_wide
from dsv2_ref.masks import Visibility
from tests.fake_cuda import fake_cuda
from tests.flash_double import CheckError, Double, install_front_end
from tests.peers import SMALL, randomised, tokens

pytestmark = pytest.mark.usefixtures("as_shipped")

CONFIGS = {
    "mla": replace(SMALL, mla_form="expanded"),
    "mha": replace(SMALL, use_mla=False, num_key_value_heads=4),
    "gqa": replace(SMALL, use_mla=False, num_key_value_heads=2),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp16", "bf16"])
DEVICE = torch.device("cpu")


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Double:
    return install_front_end(monkeypatch)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the norm; NaN where anything is NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


# The kernel alone

HEADS, WIDTH, VALUE_WIDTH = 4, 24, 16
PADDINGS = {
    "none": None,
    "left": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1, 0]],
    "a sequence of padding": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1]],
}


def visibility(seq: int, padding: list[list[int]] | None) -> Visibility:
    return Visibility(seq, 7, DEVICE, None if padding is None else torch.tensor(padding, dtype=torch.bool))


def queries_keys_values(seq: int, kv_heads: int, value_width: int = VALUE_WIDTH) -> list[Tensor]:
    shapes = (HEADS, seq, WIDTH), (kv_heads, 7, WIDTH), (kv_heads, 7, value_width)
    made = [torch.randn(3, *shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    return [x.half().requires_grad_() for x in made]


def compare(seq: int, kv_heads: int, padding: list[list[int]] | None, value_width: int = VALUE_WIDTH) -> float:
    """The largest error of the output and of the three gradients, against the definition in float64."""
    given, visible = queries_keys_values(seq, kv_heads, value_width), visibility(seq, padding)
    exact = [x.detach().double().requires_grad_() for x in given]
    real = torch.ones(3, 1, seq, 1) if padding is None else visible.padding[:, None, 7 - seq :, None]  # type: ignore[index]
    expected = attend(*exact, visible, 0.3)[0] * real  # a query that is padding gives zeros here
    actual = attend_flash(*given, visible, 0.3)[0]
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    expected.backward(upstream.double())
    actual.backward(upstream.half())
    pairs = [(actual, expected), *((a.grad, e.grad) for a, e in zip(given, exact, strict=True))]
    worst = 0.0
    for mine, theirs in pairs:
        if theirs.any():
            found = error(mine, theirs)
            worst = found if not found <= worst else worst  # NaN is the worst
        else:
            assert not mine.any()
    return worst


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("seq", [7, 3, 1])
@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
def test_output_and_gradients_are_the_definitions(
    seq: int, kv_heads: int, padding: list[list[int]] | None, double: Double
) -> None:
    """Prompt, chunk and step; padding anywhere, also where a query, or all of a sequence, is padding."""
    assert compare(seq, kv_heads, padding) < 2e-3
    assert double.calls == (["fwd", "bwd"] if padding is None else ["varlen_fwd", "varlen_bwd"])


def test_wider_values_and_a_width_that_is_no_multiple_of_8(double: Double) -> None:
    assert compare(3, 2, PADDINGS["left"], value_width=30) < 2e-3


# The layer


def outputs(config: DeepseekV2Config, dtype: torch.dtype, implementation: str, train: bool) -> list[Tensor]:
    """A left-padded batch in three pieces through the cache, and the gradient of a prompt's weights."""
    exact = implementation == "sdpa"
    layer = randomised(DeepseekV2DecoderLayer(config, layer_idx=0)).to(dtype)
    if exact:
        layer = layer.double()
    else:
        layer = DeepseekV2DecoderLayer(replace(config, _attn_implementation=implementation), 0).to(dtype)
        layer.load_state_dict(randomised(DeepseekV2DecoderLayer(config, layer_idx=0)).to(dtype).state_dict())
    layer.train(train)
    x = tokens(3, 10, torch.float64).to(dtype).to(layer.input_layernorm.weight.dtype)
    keep = torch.arange(10) >= torch.tensor([[0], [2], [5]])
    found, cache = [], None
    with torch.no_grad():
        for start, stop in ((0, 6), (6, 9), (9, 10)):
            out, cache = layer(x[:, start:stop], keep[:, :stop], past_key_value=cache, use_cache=True)
            found.append(out[keep[:, start:stop]])
    for mask in (None, keep):
        layer.zero_grad()
        out = layer(x, mask)[0]
        out[keep].float().square().sum().backward() if not exact else out[keep].square().sum().backward()
        found += [out[keep].detach(), *(p.grad for p in layer.self_attn.parameters() if p.ndim == 2)]
    return found


@every_config
@every_dtype
def test_layer_is_the_one_with_sdpa(config: DeepseekV2Config, dtype: torch.dtype, double: Double) -> None:
    actual = outputs(config, dtype, "flash_attention_2", train=True)
    expected = outputs(config, dtype, "sdpa", train=True)
    assert max(error(*pair) for pair in zip(actual, expected, strict=True)) < 4 * TOLERANCE[dtype]
    assert set(double.calls) == {"fwd", "varlen_fwd", "bwd", "varlen_bwd"}


@every_config
def test_autocast(config: DeepseekV2Config, double: Double) -> None:
    """Norms and rotations are float32 there, products bfloat16: all three must reach flash-attn alike."""
    exact = randomised(DeepseekV2DecoderLayer(config, layer_idx=0)).float()
    layer = DeepseekV2DecoderLayer(replace(config, _attn_implementation="flash_attention_2"), 0)
    layer.load_state_dict(exact.state_dict())
    x = tokens(2, 9, torch.float32)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, cache = layer(x[:, :8], use_cache=True)
            last = layer(x[:, 8:], past_key_value=cache)[0]
        assert error(torch.cat((out, last), dim=1), exact(x)[0]) < 0.02
    assert double.calls == ["fwd", "fwd"]


def test_absorbed_does_not_go_through_flash_attn(double: Double) -> None:
    config = replace(SMALL, mla_form="absorbed", _attn_implementation="flash_attention_2")
    with torch.no_grad():
        DeepseekV2DecoderLayer(config, 0).half()(tokens(1, 3, torch.float16))
    assert double.calls == []


def test_dropout_is_handed_on(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training alone."""
    config = replace(SMALL, mla_form="expanded", _attn_implementation="flash_attention_2", attention_dropout=0.25)
    layer, x = DeepseekV2DecoderLayer(config, 0).half(), tokens(1, 3, torch.float16)
    layer.eval()(x)
    assert double.calls == ["fwd"]
    given: list[float] = []
    right = Double.fwd

    def noted(self: Double, *args: Any) -> Any:
        given.append(args[5])
        return right(self, *args[:5], 0.0, *args[6:])

    monkeypatch.setattr(Double, "fwd", noted)
    layer.train()(x)
    assert given == [0.25]


# What it cannot take


@pytest.mark.parametrize(
    ("config", "dtype", "mask", "said"),
    [
        (CONFIGS["mla"], torch.float32, None, "float16 or bfloat16"),
        (CONFIGS["mla"], torch.float16, torch.ones(1, 1, 3, 3, dtype=torch.bool), r"None or \(batch, kv_seq\)"),
        (replace(CONFIGS["mla"], qk_nope_head_dim=250), torch.float16, None, "width of a head is 258; .* 256"),
        (replace(CONFIGS["mla"], v_head_dim=264), torch.float16, None, "width of a head is 264; .* 256"),
        (replace(CONFIGS["mha"], hidden_size=1040), torch.float16, None, "width of a head is 260; .* 256"),
    ],
    ids=["float32", "mask", "keys", "values", "mha"],
)
def test_refused_before_anything_is_remembered(
    config: DeepseekV2Config, dtype: torch.dtype, mask: Tensor | None, said: str, double: Double
) -> None:
    layer = DeepseekV2DecoderLayer(replace(config, _attn_implementation="flash_attention_2"), 0).to(dtype)
    cache = layer.self_attn.empty_cache(1, capacity=3)
    with pytest.raises(ValueError, match=said):
        layer(torch.zeros(1, 3, config.hidden_size, dtype=dtype), mask, past_key_value=cache, use_cache=True)
    assert cache._storage.used == 0
    assert double.calls == []


def test_the_front_end_without_its_compiled_module_is_not_installed(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it was built without CUDA: importing it fails inside, and the error says what to do."""
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", None)
    monkeypatch.syspath_prepend(str(__import__("tests.flash_double", fromlist=["FRONT_END"]).FRONT_END))
    with pytest.raises(ImportError, match="pip install flash-attn"):
        checks.flash_attn()


def test_a_folder_of_that_name_is_not_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash-attn 4 makes, which lies in ``flash_attn/cute``: it can be imported, and has none of the functions."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # what is imported below is taken out again
    del sys.modules["flash_attn"]
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="pip install flash-attn"):
        DeepseekV2DecoderLayer(replace(SMALL, _attn_implementation="flash_attention_2"), 0)


# On a GPU


@every_config
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layer_idx", [0, 1], ids=["dense", "experts"])
def test_it_stays_on_the_device(config: DeepseekV2Config, train: bool, layer_idx: int, double: Double) -> None:
    """With fake CUDA tensors, through the shapes that flash-attn itself tells of its operators."""
    config = replace(config, first_k_dense_replace=1)
    with fake_cuda() as watch, torch.set_grad_enabled(train):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            config = replace(config, _attn_implementation="flash_attention_2")
            layer = DeepseekV2DecoderLayer(config, layer_idx).train(train)
        finally:
            torch.set_default_dtype(before)
        for mask in (None, torch.ones(2, 9, dtype=torch.bool)):
            cache: Any = None
            for start, stop in ((0, 5), (5, 8), (8, 9)):
                x = torch.empty(2, stop - start, config.hidden_size, dtype=torch.bfloat16)
                part = None if mask is None else mask[:, :stop]
                with watch:
                    out, cache = layer(x, part, past_key_value=cache, use_cache=True)
                assert (out.shape, out.device.type) == (x.shape, "cuda")


# Planted faults


def altered(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """flash-attn's functions, called with other arguments than the package gave."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        flash_attn = checks.flash_attn()
        for name in ("flash_attn_func", "flash_attn_varlen_func"):
            right = getattr(flash_attn, name)

            def call(*args: Any, right: Any = right, **options: Any) -> Any:
                return right(*args, **options | changes)

            monkeypatch.setattr(flash_attn, name, call)

    return plant


def top_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal order counted from the first key, as SDPA's ``is_causal`` does."""
    right = torch.Tensor.triu
    monkeypatch.setattr(torch.Tensor, "triu", lambda self, diagonal: right(self, 1))


def zeros_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What flash-attn leaves unwritten is handed on."""
    monkeypatch.setattr(Tensor, "where", lambda self, *_: self)


FAULTS = {
    "no scale": altered(softmax_scale=None),
    "not causal": altered(causal=False),
    "causal from the top left": top_left,
    "unwritten memory": zeros_not_put_back,
}


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("plant", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], padding: str, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, visible = queries_keys_values(3, 2), visibility(3, PADDINGS[padding])
    with torch.no_grad():
        right = attend_flash(*given, visible, 0.3)[0]
        expected = attend(*(x.double() for x in given), visible, 0.3)[0]
        if visible.padding is not None:
            expected = expected * visible.padding[:, None, 4:, None]
        assert error(right, expected) < 2e-3
        plant(monkeypatch)
        wrong = attend_flash(*given, visible, 0.3)[0]
    if plant is zeros_not_put_back and padding == "none":
        assert torch.equal(wrong, right)  # nothing is left unwritten there
    else:
        assert not error(wrong, expected) < 0.1


@pytest.mark.parametrize("padding", ["none", "left"])
def test_values_that_are_not_padded_are_refused(padding: str, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv2_ref.fast.flash.equally_wide", lambda *tensors: list(tensors))
    with pytest.raises(CheckError, match="v must have shape"):
        attend_flash(*queries_keys_values(3, 2), visibility(3, PADDINGS[padding]), 0.3)
    assert [x.shape[-1] for x in equally_wide(*queries_keys_values(3, 2))] == [WIDTH] * 3


def test_ends_must_be_int32(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Tensor.cumsum
    monkeypatch.setattr(Tensor, "cumsum", lambda self, dim, dtype=None: right(self, dim))
    with pytest.raises(CheckError, match="cu_seqlens_q must have dtype int32"):
        attend_flash(*queries_keys_values(3, 2), visibility(3, PADDINGS["left"]), 0.3)


def test_dropped_queries_with_grouped_heads_are_refused_by_the_real_module(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query a sequence, of which one is padding: were it left out, no row would be where flash-attn looks for it."""
    monkeypatch.setattr(torch, "ones_like", lambda kept: kept)
    padding = [[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
    given, visible = queries_keys_values(1, 2), visibility(1, padding)
    expected = attend(*(x.double() for x in given), visible, 0.3)[0]
    wrong = attend_flash(*given, visible, 0.3)[0]
    assert not error(wrong[1:], expected[1:]) < 0.1
