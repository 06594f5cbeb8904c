"""Compiling and exporting the layer; `test_layer` runs these in a process without the checker of signatures."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, ops
from dsv2_ref.attention import attend
from dsv2_ref.balance import LossFreeBalancing
from dsv2_ref.checks import CHECKPOINTING
from dsv2_ref.fast import products  # noqa: F401  # ways registered later are tried first
from dsv2_ref.quantize import quantize
from tests import test_recompute as recomputed
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
            expected, expected_cache = layer(x, use_cache=True)
            assert_close(actual, expected, f"{seq} tokens")
            assert_close(cache.tokens, expected_cache.tokens, f"cache of {seq} tokens")
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


@torch.library.custom_op("dsv2_tests::attend_to_latents", mutates_args=())
def attend_to_latents(query: Tensor, tokens: Tensor, latent: int, scale: float) -> Tensor:
    """One query of all heads over all cached tokens, as an operator that the compiler does not look into."""
    weights = (query @ tokens[:, None].mT * scale).softmax(dim=-1)
    return weights @ tokens[:, None, :, :latent]


@attend_to_latents.register_fake
def _(query: Tensor, tokens: Tensor, latent: int, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:3], latent)


OPERATOR_SERVES = False


def only_in_its_test(*_: Any, **__: Any) -> str:
    return "" if OPERATOR_SERVES else "serves one test only"


@ops.faster(attend, "operator", where={"implementation": "products"}, gradients=False, why_not=only_in_its_test)
def attend_by_operator(
    query: Tensor, key: Tensor, value: Tensor, _: Any, scale: float, *__: Any, **___: Any
) -> tuple[Tensor, None]:
    return attend_to_latents(query, key[:, 0], value.shape[-1], scale), None


@all_the_way
def test_compiled_decoding_through_an_operator(
    compiler: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where kernels serve: one graph for any place."""
    layer, x = layer_of(SMALL), tokens(2, 12, torch.float64)
    with torch.no_grad():
        expected = layer(x)[0][:, 8:]
        _, cache = layer(x[:, :8], use_cache=True)
        monkeypatch.setitem(globals(), "OPERATOR_SERVES", True)
        run, parts = compiled(layer, compiler), []
        for place in range(8, 12):
            out, cache = run(x[:, place : place + 1], past_key_value=cache, use_cache=True)
            parts.append(out)
    assert_close(torch.cat(parts, dim=1), expected, "output")
    assert compiler.frame_count <= 2
    called = [str(node.target) for graph in compiler.graphs for node in graph.graph.nodes]
    assert sum("attend_to_latents" in target for target in called) == compiler.frame_count


@ops.defines()
def doubled(x: Tensor) -> Tensor:
    """A definition of this file's own, and two ways: the one tried first cannot be compiled."""
    return x + x


@ops.faster(doubled, "product")
def doubled_by_product(x: Tensor) -> Tensor:
    return x * 2


@ops.faster(doubled, "by hand", compiles=False)
def doubled_by_hand(x: Tensor) -> Tensor:
    return torch.tensor([2 * value for value in x.tolist()])


def targets_of(graph: torch.fx.GraphModule) -> list[str]:
    return [node.name for node in graph.graph.nodes if node.op == "call_function"]


def test_ways_under_the_compiler(compiler: CompileCounterWithBackend) -> None:
    """The compiler sees the way that it can trace, and other ones where some are switched off."""
    x = torch.arange(3.0)
    with ops.watch() as choices:
        assert torch.equal(doubled(x), 2 * x)
    assert [choice.way for choice in choices] == ["by hand"]
    assert torch.equal(torch.compile(doubled, fullgraph=True, backend=compiler)(x), 2 * x)
    assert targets_of(compiler.graphs[-1]) == ["mul"]
    with ops.plain():
        assert torch.equal(torch.compile(doubled, fullgraph=True, backend=compiler)(x), 2 * x)
    assert targets_of(compiler.graphs[-1]) == ["add"]
    assert torch.equal(torch.compile(doubled, fullgraph=True, backend=compiler)(x), 2 * x)  # again with all ways
    assert compiler.frame_count == 2


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return doubled(x)


def test_ways_in_exported_programs() -> None:
    x = torch.arange(3.0)
    for context, expected in ((nullcontext(), ["mul"]), (ops.without("product"), ["add"])):
        with context:
            program = torch.export.export(Doubled(), (x,))
        assert targets_of(program.graph_module) == expected
        assert torch.equal(program.module()(x), 2 * x)


def test_compiled_for_any_length_with_positions_and_masks(compiler: CompileCounterWithBackend) -> None:
    """Sizes are symbols from the second length on, in which ``in`` finds no number."""
    layer = layer_of(SMALL)
    run = compiled(layer, compiler)
    for seq in (5, 1, 4):
        x, causal = tokens(2, seq, torch.float64), torch.ones(2, 1, seq, seq).tril()
        given = {"attention_mask": causal.log(), "position_ids": torch.arange(seq).expand(2, seq)} if seq == 4 else {}
        assert_close(run(x, **given)[0], layer(x, **given)[0], "output")


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
    """A decoding step as a function of tensors: a token, and what is cached before it and after it."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.layer = DeepseekV2DecoderLayer(config, layer_idx=1)

    def forward(self, token: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        batch, seq = past.shape[:2]
        cache = self.layer.self_attn.empty_cache(batch, capacity=seq + 1).append(past)
        out, cache = self.layer(token, past_key_value=cache, use_cache=True)
        return out, cache.tokens


@both_kinds
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton, which is published for Linux alone, is not here")
def test_a_decoding_step_exported_for_cuda_calls_the_kernels(config: DeepseekV2Config) -> None:
    with fake_cuda() as watch:
        step = Step(config).eval()
        given = torch.empty(2, 1, config.hidden_size), torch.empty(2, 8, *step.layer.self_attn.cache_features)
        with watch, torch.no_grad():
            program = torch.export.export(step, given)
    assert_on_cuda_alone(program)
    called = {str(node.target).split(".")[1] for node in program.graph.nodes if "dsv2_ref" in str(node.target)}
    assert called == {"rms_norm", "add_rms_norm", "routed_experts"} | (
        {"rotate", "mla_decode"} if config.use_mla else set()
    )


def assert_on_cuda_alone(program: torch.export.ExportedProgram) -> None:
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    named = [node.kwargs["device"] for node in program.graph.nodes if node.kwargs.get("device") is not None]
    devices = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    assert devices == {"cuda"}
    assert {torch.device(device).type for device in named} == {"cuda"}


# Fewer bits


def rounded_layer(config: DeepseekV2Config, kind: str) -> DeepseekV2DecoderLayer:
    config = replace(config, moe_intermediate_size=128, n_routed_experts=4)
    return quantize(layer_of(config), kind, 4)


@pytest.mark.parametrize(("config", "kind"), [(SMALL, "int4"), (SMALL, "fp8"), (MHA, "int8")])
def test_compiled_with_quantised_weights(
    config: DeepseekV2Config, kind: str, compiler: CompileCounterWithBackend
) -> None:
    layer, x = rounded_layer(config, kind), tokens(2, 7, torch.float64)
    with torch.no_grad():
        assert_close(compiled(layer, compiler)(x)[0], layer(x)[0], "output")
    assert compiler.frame_count == 1


@pytest.mark.parametrize(("format", "form"), [("fp8", "absorbed"), ("int8", "absorbed"), ("int4", "expanded")])
def test_compiled_steps_with_records(format: str, form: str, compiler: CompileCounterWithBackend) -> None:
    """A prompt and four tokens: a graph for the prompt, for a token, and at most one with symbolic sizes."""
    layer, x = layer_of(replace(SMALL, mla_form=form)), tokens(2, 9, torch.float64)
    run, outputs = compiled(layer, compiler), []
    with torch.no_grad():
        for step in (run, layer):
            cache, parts = layer.self_attn.empty_cache(2, 9, format), []
            for piece in x.split([5, 1, 1, 1, 1], dim=1):
                out, cache = step(piece, past_key_value=cache, use_cache=True)
                parts.append(out)
            outputs.append((torch.cat(parts, dim=1), cache.tokens))
    for actual, expected in zip(*outputs, strict=True):
        assert_close(actual, expected, "output or cache")
    assert compiler.frame_count <= 5


def test_exported_with_quantised_weights() -> None:
    layer, x = rounded_layer(replace(SMALL, mla_form="expanded"), "int4"), tokens(2, 7, torch.float64)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        assert_close(program.module()(x)[0], layer(x)[0], "output")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own tracing does so
@all_the_way
@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_a_checkpointed_model_is_one_graph(compiler: CompileCounterWithBackend, mode: str) -> None:
    """Loads are counted in the graph. The compiler may sum in another order: a few roundings of 1e-16 times the sizes."""
    model = recomputed.model_of(**recomputed.V3, first_k_dense_replace=1)
    model.model.layers = model.model.layers[1:]
    balancing = LossFreeBalancing(model)
    wanted = {name: grad.clone() for name, grad in recomputed.gradients(model, None).items()}
    (load,) = balancing.loads.values()
    expected = load.clone()
    load.zero_()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    found = recomputed.gradients(model, mode, lambda: compiled(recomputed.tokens()))
    assert compiler.frame_count == 1
    assert torch.equal(load, expected)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12)
