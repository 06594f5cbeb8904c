"""The seam between definitions and faster ways: who serves a call, who does not and why, and where checks are run."""

import ast
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import dsv2_ref.fast
from dsv2_ref import DeepseekV2Attention, DeepseekV2DecoderLayer, MoEGate, ops
from dsv2_ref.attention import attend
from tests.peers import SMALL, assert_close, randomised, tokens

X = torch.arange(3.0)


def definition(check: Callable[..., None] | None = None) -> Any:
    """A definition that says ``definition``; what serves a call of it can be read from its result."""

    @ops.defines(check)
    def served(x: Tensor, *, kind: str = "any") -> str:
        return "definition"

    return served


def add_way(served: Any, name: str, **rule: Any) -> None:
    ops.faster(served, name, **rule)(lambda *_, **__: name)


def reasons(served: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Why each way was passed over."""
    with ops.watch() as choices:
        served(*args, **kwargs)
    return dict(choices[0].passed_over)


# Who serves


def test_the_way_registered_last_is_tried_first() -> None:
    served = definition()
    assert served(X) == "definition"
    add_way(served, "first")
    assert served(X) == "first"
    add_way(served, "second")
    add_way(served, "third", device="cuda")
    assert served(X) == "second"


RULES: dict[str, tuple[dict[str, Any], tuple[Any, dict[str, Any]], tuple[Any, dict[str, Any]], str]] = {
    "device": ({"device": "meta"}, (X.to("meta"), {}), (X, {}), "for meta, not cpu"),
    "dtype": ({"dtypes": (torch.float32,)}, (X, {}), (X.double(), {}), "not for torch.float64"),
    "where": ({"where": {"kind": "this"}}, (X, {"kind": "this"}), (X, {"kind": "that"}), "kind is 'that', not 'this'"),
    "where, left out": ({"where": {"kind": "this"}}, (X, {"kind": "this"}), (X, {}), "kind is None, not 'this'"),
    "why not": (
        {"why_not": lambda x, **_: "" if len(x) < 4 else f"{len(x)} are too many"},
        (X, {}),
        (torch.ones(7), {}),
        "7 are too many",
    ),
    "gradients": ({"gradients": False}, (X, {}), (torch.ones(3, requires_grad=True), {}), "gives no gradients"),
}


@pytest.mark.parametrize(("rule", "fits", "does_not", "reason"), RULES.values(), ids=RULES)
def test_a_rule(rule: dict[str, Any], fits: Any, does_not: Any, reason: str) -> None:
    served = definition()
    add_way(served, "way", **rule)
    assert served(fits[0], **fits[1]) == "way"
    assert served(does_not[0], **does_not[1]) == "definition"
    assert reasons(served, does_not[0], **does_not[1]) == {"way": reason}


def test_a_way_without_gradients_serves_where_none_are_wanted() -> None:
    served, leaf = definition(), torch.ones(3, requires_grad=True)
    add_way(served, "way", gradients=False)
    with torch.no_grad():
        assert served(leaf) == "way"

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        @ops.defines()
        def forward(self, x: Tensor) -> str:
            return "definition"

    add_way(Scale.forward, "way", gradients=False)
    scale = Scale()
    assert scale(X) == "definition"  # its weight wants gradients, though its input does not
    assert scale.requires_grad_(False)(X) == "way"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # forward mode's own
def test_under_torch_func_and_forward_mode_only_what_says_so_serves() -> None:
    served = definition()
    add_way(served, "plain operations", transforms=True)
    add_way(served, "anything")
    seen = []

    def note(x: Tensor) -> Tensor:
        seen.append(served(x))
        return x.sum()

    note(X)
    torch.func.grad(note)(X)
    torch.func.vmap(note)(X[None])
    torch.func.jvp(note, (X,), (X,))
    with forward_ad.dual_level():
        note(forward_ad.make_dual(X, X))
    note(X)
    assert seen == ["anything", *["plain operations"] * 4, "anything"]


# Switching off and watching


def test_switching_ways_off_and_on_again() -> None:
    served = definition()
    add_way(served, "cpu one")
    add_way(served, "cpu two")
    add_way(served, "other")
    assert served(X) == "other"
    with ops.without("other", "cpu t"):
        assert served(X) == "cpu one"
        assert reasons(served, X) == {"other": "switched off", "cpu two": "switched off"}
        with ops.without("cpu"):
            assert served(X) == "definition"
        assert served(X) == "cpu one"
    with ops.plain():
        assert served(X) == "definition"
    with pytest.raises(KeyError), ops.plain():
        raise KeyError
    assert served(X) == "other"


def test_names_and_devices_that_can_be_none_are_refused() -> None:
    with pytest.raises(ValueError, match="the name of a way is None; wanted a string"), ops.without(None):
        pass
    for device in ("gpu", "cuda:0", torch.device("cuda"), 0):  # no way is for these, so that none would be chosen
        with (
            pytest.raises(ValueError, match=r"device is .*; wanted None or a type of device, such as 'cuda'"),
            ops.watch(device),
        ):
            pass


def test_watching_lists_calls_in_order_and_only_those_inside() -> None:
    layer, x = randomised(DeepseekV2DecoderLayer(SMALL, 1)), tokens(1, 5, torch.float64)
    with ops.watch() as outer:
        layer(x)
        with ops.watch() as inner:
            layer.mlp(x)
        count = len(outer)
    layer(x)
    assert len(outer) == count
    names = [choice.definition for choice in outer]
    of_attention = ["DeepseekV2Attention.forward", "DeepseekV2RMSNorm.forward", "apply_rotary"]
    of_attention += ["DeepseekV2RMSNorm.forward", "attend"]
    of_experts = ["DeepseekV2MoE.forward", "MoEGate.forward", "RoutedExperts.forward", "DeepseekV2MLP.forward"]
    norm = ["DeepseekV2RMSNorm.forward"]
    assert names == ["DeepseekV2DecoderLayer.forward", *norm, *of_attention, *norm, *of_experts]
    assert [choice.definition for choice in inner] == of_experts
    ways = {choice.definition: choice.way for choice in outer}
    assert (ways["attend"], ways["RoutedExperts.forward"]) == ("sdpa", "grouped")


def test_watching_as_if_on_another_device() -> None:
    served = definition()
    add_way(served, "for cpu", device="cpu")
    add_way(served, "for cuda", device="cuda")
    with ops.watch("cuda") as choices:
        assert served(X) == "for cuda"
    assert choices == [ops.Choice(choices[0].definition, "for cuda", ())]
    assert served(X) == "for cpu"
    assert reasons(served, X) == {"for cuda": "for cuda, not cpu"}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_definitions_alone_compute_the_same_layer(kernel: str) -> None:
    layer = randomised(DeepseekV2DecoderLayer(SMALL, 1))
    layer.self_attn.implementation = kernel
    x = tokens(2, 5, torch.float64)
    expected, cache = layer(x[:, :4], use_cache=True)
    last = layer(x[:, 4:], past_key_value=cache)[0]
    with ops.plain(), ops.watch() as choices:
        out, cache = layer(x[:, :4], use_cache=True)
        assert_close(out, expected, "prefill")
        assert_close(layer(x[:, 4:], past_key_value=cache)[0], last, "decode")
    assert {choice.way for choice in choices} == {"definition"}


# The door


@pytest.fixture
def counted() -> Iterator[tuple[list[str], Any, Any]]:
    """Two checked definitions, of which the outer calls the inner twice; the names of those that were checked."""
    checked: list[str] = []

    def check_inner(x: Tensor) -> None:
        checked.append("inner")
        if not x.numel():
            raise ValueError("x is empty")

    @ops.defines(check_inner)
    def inner(x: Tensor) -> Tensor:
        return x * 2

    @ops.defines(lambda *_: checked.append("outer"))
    def outer(x: Tensor, fail: bool = False) -> Tensor:
        if fail:
            raise ZeroDivisionError
        return inner(inner(x))

    return checked, outer, inner


def test_a_check_runs_once_per_public_call(counted: tuple[list[str], Any, Any]) -> None:
    checked, outer, inner = counted
    outer(X)
    assert checked == ["outer"]
    inner(X)
    assert checked == ["outer", "inner"]
    outer(X[:0])  # what its own check lets pass is not looked at again
    assert checked == ["outer", "inner", "outer"]


def test_after_an_exception_the_next_call_is_checked(counted: tuple[list[str], Any, Any]) -> None:
    checked, outer, inner = counted
    with pytest.raises(ValueError, match="x is empty"):
        inner(X[:0])
    with pytest.raises(ZeroDivisionError):
        outer(X, True)
    with pytest.raises(ValueError, match="x is empty"):
        inner(X[:0])
    outer(X)
    assert checked == ["inner", "outer", "inner", "outer"]


def test_a_check_runs_before_ways_and_for_them_too(counted: tuple[list[str], Any, Any]) -> None:
    checked, _, inner = counted
    add_way(inner, "way")
    assert inner(X) == "way"
    with pytest.raises(ValueError, match="x is empty"):
        inner(X[:0])
    assert checked == ["inner", "inner"]


def test_threads_do_not_meet(counted: tuple[list[str], Any, Any]) -> None:
    """While one thread is inside a call, with ways off and choices watched, another is served and checked as always."""
    checked, _, inner = counted
    served = definition()
    add_way(served, "way")
    found: dict[str, Any] = {}

    def elsewhere() -> None:
        found["way"] = served(X)
        inner(X)
        with ops.watch() as choices:
            served(X)
        found["choices"] = len(choices)

    @ops.defines(lambda *_: None)
    def outer(x: Tensor) -> str:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        inner(x)
        return served(x)

    with ops.plain(), ops.watch() as choices:
        assert outer(X) == "definition"
    assert found == {"way": "way", "choices": 1}
    assert checked == ["inner"]  # the other thread's; here the door was passed already
    assert len(choices) == 3


# What a reader sees


@pytest.mark.parametrize(
    ("defined", "line"),
    [
        (DeepseekV2DecoderLayer.forward, "hidden_states = residual + self.mlp(hidden_states)"),
        (DeepseekV2Attention.forward, 'if form == "expanded":'),
        (MoEGate.forward, "topk_weight = scores.gather(-1, topk_idx)"),
        (attend, "out = weights"),
    ],
)
def test_the_source_of_a_definition_is_its_plain_body(defined: Any, line: str) -> None:
    source = inspect.getsource(defined)
    assert source.lstrip().startswith("@ops.defines(")
    assert line in source
    assert "_choose" not in source
    assert defined.__doc__
    assert "hidden_states" in inspect.signature(defined).parameters or defined is attend


def test_autocast_is_left_where_a_definition_asks_for_it() -> None:
    kept, free = (ops.defines(autocast=autocast)(lambda x: x @ x) for autocast in (False, True))
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept(x).dtype == torch.float32
        assert free(x).dtype == torch.bfloat16


def test_the_core_imports_no_way() -> None:
    """`fast` imports the core, never the other way round: the core is complete without it."""
    core = Path(dsv2_ref.fast.__file__).parents[1]
    for file in core.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            lazily = file.name in ("__init__.py", "__main__.py")  # the public name, and the listing
            assert lazily or not any(name.startswith("dsv2_ref.fast") for name in names), file.name
