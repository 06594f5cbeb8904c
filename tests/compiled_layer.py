"""Compiling and exporting the layer; `test_layer` runs these in a process without the checker of signatures."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, kernels
from dsv2_ref.kernels import mla_decode
from tests.fake_cuda import fake_cuda
from tests.peers import SMALL, assert_close, randomised, tokens

torch.set_num_threads(1)

MHA = replace(SMALL, use_mla=False, num_key_value_heads=2)
KINDS = {"mla": SMALL, "mha": MHA}
both_kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def layer_of(config: DeepseekV2Config) -> DeepseekV2DecoderLayer:
    return randomised(DeepseekV2DecoderLayer(config, layer_idx=1))


@pytest.fixture
def compiler(request: pytest.FixtureRequest) -> Iterator[CompileCounterWithBackend]:
    """Counts the graphs that it makes: ``eager`` only traces them, ``aot_eager`` takes them apart, gradients included."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend(getattr(request, "param", "eager"))
    torch._dynamo.reset()


all_the_way = pytest.mark.parametrize("compiler", ["aot_eager"], indirect=True)


def compiled(layer: DeepseekV2DecoderLayer, compiler: CompileCounterWithBackend) -> Any:
    return torch.compile(layer, fullgraph=True, backend=compiler)


@pytest.mark.parametrize(
    "config",
    [replace(SMALL, mla_form="expanded"), replace(SMALL, mla_form="absorbed"), MHA],
    ids=["expanded", "absorbed", "mha"],
)
@all_the_way
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of the compiler's own doing
def test_compiled_training(config: DeepseekV2Config, compiler: CompileCounterWithBackend) -> None:
    layer = layer_of(config).train()
    x, results = tokens(2, 7, torch.float64), []
    for run in (layer, compiled(layer, compiler)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = run(leaf, attention_mask=torch.arange(7) >= torch.tensor([[0], [2]]))[0]
        out.square().sum().backward()
        results.append({"output": out, "input": leaf.grad} | {n: p.grad for n, p in layer.named_parameters()})
    assert compiler.frame_count == 1
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, name)


@both_kinds
def test_compiled_prefill_of_any_length_is_two_graphs(
    config: DeepseekV2Config, compiler: CompileCounterWithBackend
) -> None:
    """The first for its own length, the second for all others."""
    layer = layer_of(replace(config, mla_form="expanded"))
    run = compiled(layer, compiler)
    with torch.no_grad():
        for seq in (7, 9, 12, 31):
            x = tokens(2, seq, torch.float64)
            actual, cache = run(x, use_cache=True)
            expected, remembered = layer(x, use_cache=True)
            assert_close(actual, expected, f"{seq} tokens")
            assert_close(cache.tokens, remembered.tokens, f"cache of {seq} tokens")
    assert compiler.frame_count == 2


@pytest.mark.parametrize(
    ("config", "compiler"), [(SMALL, "aot_eager"), (MHA, "eager")], ids=KINDS, indirect=["compiler"]
)
def test_compiled_decoding_makes_few_graphs(config: DeepseekV2Config, compiler: CompileCounterWithBackend) -> None:
    """One for the prompt; for a step and for one that grows the storage, each first with sizes fixed, then free."""
    layer, x = layer_of(config), tokens(1, 160, torch.float64)
    run = compiled(layer, compiler)
    with torch.no_grad():
        out, cache = run(x[:, :8], use_cache=True)
        parts, sizes = [out], set()
        for place in range(8, 160):
            out, cache = run(x[:, place : place + 1], past_key_value=cache, use_cache=True)
            parts.append(out)
            sizes.add(cache.reserved_nbytes)
        assert len(sizes) > 2  # it has grown more than once
        assert_close(torch.cat(parts, dim=1), layer(x)[0], "output")
    assert compiler.frame_count <= 6


@all_the_way
def test_compiled_decoding_through_the_operators(
    compiler: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where kernels serve: one graph for any place. On the CPU the operators run their definitions."""
    layer, x = layer_of(SMALL), tokens(2, 12, torch.float64)
    with torch.no_grad():
        expected = layer(x)[0][:, 8:]
        _, cache = layer(x[:, :8], use_cache=True)
        called: list[str] = []
        monkeypatch.setattr(kernels, "serve", lambda *_: True)
        monkeypatch.setattr("dsv2_ref.grouped._triton_should", lambda *_: False)
        decode = mla_decode.mla_decode_definition
        monkeypatch.setattr(
            mla_decode, "mla_decode_definition", lambda *args: (called.append("step"), decode(*args))[1]
        )
        run, parts = compiled(layer, compiler), []
        for place in range(8, 12):
            out, cache = run(x[:, place : place + 1], past_key_value=cache, use_cache=True)
            parts.append(out)
    assert_close(torch.cat(parts, dim=1), expected, "output")
    assert called == ["step"] * 4
    assert compiler.frame_count <= 2


def test_compiled_code_refuses_bad_positions(compiler: CompileCounterWithBackend) -> None:
    layer = layer_of(SMALL)
    run = compiled(layer, compiler)
    x = tokens(1, 2, torch.float64)
    assert_close(
        run(x, position_ids=torch.tensor([[3, 4]]))[0], layer(x, position_ids=torch.tensor([[3, 4]]))[0], "out"
    )
    with pytest.raises(RuntimeError, match="position_ids is negative somewhere"):
        run(x, position_ids=torch.tensor([[3, -4]]))


EXPORTED = {"expanded": replace(SMALL, mla_form="expanded"), "auto": SMALL, "mha": MHA}


@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)
def test_exported_for_any_length(config: DeepseekV2Config) -> None:
    layer = layer_of(config)
    seq = torch.export.Dim("seq", min=2, max=64)
    program = torch.export.export(layer, (tokens(2, 9, torch.float64),), dynamic_shapes={"hidden_states": {1: seq}})
    for length in (2, 13, 64):
        x = tokens(2, length, torch.float64)
        assert_close(program.module()(x)[0], layer(x)[0], f"{length} tokens")


def test_absorbed_is_exported_for_one_length() -> None:
    """For any length torch 2.13 wants to know which of seq and seq² is smaller: `DeepseekV2Attention` says so."""
    layer, x = layer_of(replace(SMALL, mla_form="absorbed")), tokens(2, 9, torch.float64)
    assert_close(torch.export.export(layer, (x,)).module()(x)[0], layer(x)[0], "output")


@both_kinds
def test_exported_for_cuda_names_no_other_device(config: DeepseekV2Config) -> None:
    with fake_cuda() as watch:
        layer, x = DeepseekV2DecoderLayer(config, layer_idx=1).eval(), torch.empty(2, 9, config.hidden_size)
        with watch:
            program = torch.export.export(layer, (x,))
    assert_on_cuda_alone(program)


class Step(nn.Module):
    """A decoding step as a function of tensors: a token, and what is remembered before it and after it."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.layer = DeepseekV2DecoderLayer(config, layer_idx=1)

    def forward(self, token: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        batch, seq = past.shape[:2]
        cache = self.layer.self_attn.empty_cache(batch, capacity=seq + 1).append(past)
        out, cache = self.layer(token, past_key_value=cache, use_cache=True)
        return out, cache.tokens


@both_kinds
@pytest.mark.skipif(not kernels._installed, reason="Triton, which is published for Linux alone, is not here")
def test_a_decoding_step_exported_for_cuda_calls_the_kernels(config: DeepseekV2Config) -> None:
    with fake_cuda() as watch:
        step = Step(config).eval()
        given = torch.empty(2, 1, config.hidden_size), torch.empty(2, 8, *step.layer.self_attn.cache_features)
        with watch, torch.no_grad():
            program = torch.export.export(step, given)
    assert_on_cuda_alone(program)
    called = {str(node.target).split(".")[1] for node in program.graph.nodes if "dsv2_ref" in str(node.target)}
    assert called == {"rms_norm", "add_rms_norm", "grouped_product"} | (
        {"rotate", "mla_decode"} if config.use_mla else set()
    )


def assert_on_cuda_alone(program: torch.export.ExportedProgram) -> None:
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    named = [node.kwargs["device"] for node in program.graph.nodes if node.kwargs.get("device") is not None]
    devices = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    assert devices == {"cuda"}
    assert {torch.device(device).type for device in named} == {"cuda"}
