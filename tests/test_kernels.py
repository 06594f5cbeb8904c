"""The fused kernels without a GPU: their numbers in Triton's interpreter, their machine code, and how torch sees them."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv2_ref import grouped, kernels, rope
from dsv2_ref.attend import DECODED_AT_ONCE, LARGEST_LATENT, LARGEST_ROPE, attend_latent
from dsv2_ref.grouped import grouped_product
from dsv2_ref.kernels import add_rmsnorm as norm_kernels
from dsv2_ref.kernels import grouped_experts, mla_decode, ops, rotate
from dsv2_ref.kernels.add_rmsnorm import add_rmsnorm_definition
from dsv2_ref.kernels.compile import KERNELS, SHARED_BYTES, Resources, launched_with, main, resources
from dsv2_ref.kernels.mla_decode import mla_decode_definition, split_keys
from dsv2_ref.kernels.rotate import rotate_definition
from dsv2_ref.masks import Visibility
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from tests.fake_cuda import DeviceFaultError, fake_cuda

needs_triton = pytest.mark.skipif(
    not kernels._installed, reason="Triton, which is published for Linux alone, is not here"
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    file = Path(__file__).with_name("kernels_interpreted.py")
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "--color=no"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        cwd=file.parent.parent,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Machine code


@needs_triton
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code_fits_the_gpu_and_spills_nothing(kernel: str, capability: int, dtype: str) -> None:
    found = resources(kernel, capability, dtype)
    assert found.fits, found
    assert found.stack == 0, found
    assert 0 < found.registers <= 255


VARIANTS: dict[str, tuple[str, dict[str, int]]] = {
    "one new token": ("mla_partial", {"seq": 1}),
    "one new token without padding": ("mla_partial", {"seq": 1, "HAS_PADDING": False}),
    "norm without a residual": ("add_rmsnorm", {"HAS_RESIDUAL": False}),
    "few rows a group": ("grouped_product", {"ROWS": 16}),
    "weights transposed, as on the way back": ("grouped_product", {"weight_output": 1, "weight_input": 1536}),
}


@needs_triton
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_of_a_launch_fits_and_spills_nothing(variant: str, capability: int) -> None:
    kernel, constants = VARIANTS[variant]
    found = resources(kernel, capability, "bf16", **constants)
    assert found.fits, found
    assert found.stack == 0, found


@needs_triton
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code_fits_and_spills_nothing_in_float32(kernel: str, capability: int) -> None:
    found = resources(kernel, capability, "fp32")
    assert found.fits, found
    assert found.stack == 0, found


@needs_triton
def test_a_tile_too_large_is_caught() -> None:
    """The planted fault: 128 keys a tile."""
    assert not resources("mla_partial", 89, "bf16", KEYS=128).fits


@needs_triton
def test_spills_are_caught() -> None:
    """The planted fault: rows so many that the sum of a program does not fit the registers of four warps."""
    assert resources("mla_partial", 80, "bf16", ROWS=128).stack > 0
    assert resources("mla_partial", 80, "bf16", ROWS=32).stack > 0
    shared_out = resources("mla_partial", 80, "bf16", ROWS=32, num_warps=8)
    assert (shared_out.stack, shared_out.warps) == (0, 8)


def test_blocks_that_a_multiprocessor_keeps() -> None:
    """By hand, each limit in turn: shared memory, registers, warps."""
    assert Resources("a", 90, "bf16", 128, 93_184, 0, 4).at_once == 233_472 // 94_208 == 2
    assert Resources("a", 80, "bf16", 187, 0, 0, 4).at_once == 65_536 // (192 * 128) == 2
    assert Resources("a", 89, "bf16", 16, 0, 0, 4).at_once == 48 // 4


@needs_triton
def test_the_command_prints_a_row_for_each_generation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kernel", "rotate"]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == ["bf16", "registers", "spilled", "shared", "at", "once"]
    assert [row.split()[-5] for row in rows] == ["sm_80", "sm_89", "sm_90", "sm_100"]
    assert rows[0].split()[2] == str(resources("rotate", 80).registers)
    assert main(["--kernel", "mla_partial", "--set", "KEYS=128"]) == 1
    assert capsys.readouterr().out.count("none") == 4


@needs_triton
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("norm", 90), "kernel is 'norm'; wanted one of"),
        (("rotate", 75), "capability is 75; wanted one of"),
        (("rotate", 90, "fp64"), "dtype is 'fp64'; wanted one of"),
    ],
)
def test_what_cannot_be_compiled_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resources(*given)


@needs_triton
def test_constants_that_a_kernel_does_not_have_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"a constant is 'KEY'; wanted one of .*'KEYS'"):
        resources("mla_partial", 90, KEY=64)
    with pytest.raises(SystemExit):
        main(["--set", "KEYS=64"])
    assert "--set is for one kernel" in capsys.readouterr().err


# Launches: what the kernels are started with, where, and what the host does before


MODULES = (norm_kernels, rotate, mla_decode, grouped_experts)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, dict[str, Any]]]:
    """By kernel, the device that was current and the constants and options given; nothing runs. Device 0 is current before."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    current = [0]

    def exchange(device: int) -> int:
        before, current[0] = current[0], device
        return before

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: found.update({self.name: (current[0], options)})

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    for module in MODULES:
        for name in KERNELS:
            if hasattr(module, f"{name}_kernel"):
                monkeypatch.setattr(module, f"{name}_kernel", Kernel(name))
    return found


def launch_all(itemsize: int) -> None:
    """At the sizes of DeepSeek-V2, on a device that is not the current one."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32 if itemsize == 4 else torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda:1")

    x, weight, statistics = empty(3, 5120), empty(5120), empty(3, dtype=torch.float32)
    norm_kernels.add_rmsnorm_launch(x, x, weight, 1e-6)
    norm_kernels.add_rmsnorm_backward_launch(x, x, weight, statistics)
    tables = [empty(2, 1, 3, 32, dtype=torch.float32) for _ in range(2)]
    rotate.rotate_launch(empty(2, 3, 128, 192).transpose(1, 2)[..., 128:], *tables)
    query, cache, padding = empty(2, 128, 1, 576), empty(2, 100, 576), empty(2, 70, dtype=torch.bool)
    mla_decode.mla_decode_launch(query, cache[:, :70], 512, 0.1, padding)
    ends = empty(160, dtype=torch.int32)
    grouped_experts.grouped_product_launch(empty(160 * 64, 5120), empty(160, 3072, 5120), ends)


@needs_triton
@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("itemsize", [2, 4])
def test_kernels_start_on_their_tensors_gpu_as_they_were_compiled(
    itemsize: int, launches: dict[str, tuple[int, dict[str, Any]]]
) -> None:
    """And nothing on the way to them is on the CPU or waits."""
    with fake_cuda() as watch, watch:
        launch_all(itemsize)
    assert launches.keys() == set(KERNELS)
    assert torch.cuda._exchange_device(0) == 0  # given back
    for name, (device, given) in launches.items():
        fixed, options = launched_with(name, itemsize)
        arguments = {"p_token", "weight_input"}  # constants only because they are 1
        assert given == {key: value for key, value in fixed.items() if key not in arguments} | options, name
        assert device == 1, name


@needs_triton
@pytest.mark.usefixtures("as_shipped")
def test_a_launch_that_waits_is_seen(launches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: as many tiles as the groups need, for which the host asks the device."""
    monkeypatch.setattr(grouped_experts, "most_tiles", lambda *_: int(torch.empty((), device="cuda:1")))
    with fake_cuda() as watch, pytest.raises(DeviceFaultError, match="the host reads a number"), watch:
        launch_all(2)


# Operators


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, weight = normal(2, 3, 8).requires_grad_(), normal(8, seed=1).requires_grad_()
    cos, sin = normal(2, 1, 3, 4), normal(2, 1, 3, 4, seed=1)
    padding = torch.tensor([[False, True, True], [True, True, True]])
    named = torch.ops.dsv2_ref
    return {
        "rms_norm": (named.rms_norm.default, (x, weight, 1e-6)),
        "rms_norm of a view": (named.rms_norm.default, (normal(3, 2, 8).mT.mT.transpose(0, 1), normal(8), 1e-6)),
        "add_rms_norm": (
            named.add_rms_norm.default,
            (x, normal(2, 3, 8, seed=2).requires_grad_(), weight, 1e-6),
        ),
        "rms_norm_backward": (
            named.rms_norm_backward.default,
            (x.detach(), normal(2, 3, 8, seed=2), weight.detach(), normal(2, 3).abs()),
        ),
        "rotate": (named.rotate.default, (normal(2, 2, 3, 8).requires_grad_(), cos, sin, False)),
        "mla_decode": (named.mla_decode.default, (normal(2, 2, 1, 8), normal(2, 3, 8), 6, 0.3, padding)),
    }


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("name", samples())
def test_operators_keep_their_word(name: str) -> None:
    torch.library.opcheck(*samples()[name])


@pytest.mark.usefixtures("as_shipped")
def test_operators_are_their_definitions_and_their_gradients_true() -> None:
    x, residual, weight = (normal(*shape).requires_grad_() for shape in ((2, 3, 8), (2, 3, 8), (8,)))
    total, normed = ops.add_rms_norm(x, residual, weight, 1e-6)
    expected = add_rmsnorm_definition(x, residual, weight, 1e-6)
    assert torch.equal(total, expected[0])
    assert torch.equal(normed, expected[1])
    assert torch.autograd.gradcheck(lambda *a: ops.add_rms_norm(*a, 1e-6), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda *a: ops.rms_norm(*a, 1e-6), (x, weight))
    cos, sin = normal(3, 4), normal(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda x: ops.rotate(x, cos, sin), (x,))


def test_definitions_are_the_reference() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        norm, x = DeepseekV2RMSNorm(8).to(dtype), normal(2, 3, 8, dtype=torch.float32).to(dtype)
        torch.nn.init.normal_(norm.weight)
        assert torch.equal(norm(x), add_rmsnorm_definition(x, None, norm.weight, 1e-6)[1])
        total, normed = norm.after_adding(x, x)
        assert torch.equal(total, x + x)
        assert torch.equal(normed, norm(x + x))
        cos, sin = (normal(3, 4, dtype=torch.float32, seed=s) for s in (1, 2))
        assert torch.equal(rope.rotate_interleaved(x, cos, sin), rotate_definition(x, cos, sin))


def test_decoding_is_softmax_attention() -> None:
    query, keys = normal(1, 2, 2, 6), normal(1, 5, 6, seed=1)
    out = mla_decode_definition(query, keys, 4, 0.5)
    for head in range(2):
        for i, seen in enumerate((4, 5)):
            weights = (keys[0, :seen] @ query[0, head, i] * 0.5).softmax(0)
            torch.testing.assert_close(out[0, head, i], weights @ keys[0, :seen, :4], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("as_shipped")
def test_decoding_refuses_gradients() -> None:
    out = ops.mla_decode(normal(1, 2, 1, 6).requires_grad_(), normal(1, 5, 6), 4, 0.5)
    with pytest.raises(RuntimeError, match="gives no gradients"):
        out.sum().backward()


@pytest.mark.usefixtures("as_shipped")
def test_gradients_that_operators_do_not_give_are_refused() -> None:
    """Instead of none, or an error from inside: a gradient's gradient, and the gradient of the rotation's tables."""
    x, weight = normal(2, 8).requires_grad_(), normal(8).requires_grad_()
    for out in (ops.rms_norm(x, weight, 1e-6), ops.add_rms_norm(x, x, weight, 1e-6)[1]):
        grad = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"run within kernels\.enabled\(False\)"):
            grad.sum().backward()
    cos, sin = normal(2, 4).requires_grad_(), normal(2, 4, seed=1)
    with pytest.raises(RuntimeError, match="gives its tables no gradients"):
        ops.rotate(x, cos, sin).sum().backward()


@pytest.mark.usefixtures("as_shipped")
def test_operators_take_a_single_token() -> None:
    x, weight = normal(8).requires_grad_(), normal(8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: ops.rms_norm(*a, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: ops.add_rms_norm(a[0], *a, 1e-6), (x, weight))


@pytest.mark.parametrize("kv_seq", [0, 1, 31, 33, 4096, 131072])
@pytest.mark.parametrize("programs", [1, 8, 1000])
def test_shares_of_the_keys_cover_them_once(kv_seq: int, programs: int) -> None:
    splits, size = split_keys(kv_seq, programs, 132, 32)
    assert size % 32 == 0
    assert splits * size >= kv_seq
    assert kv_seq == 0 or (splits - 1) * size < kv_seq
    assert 1 <= splits <= 64


# When they are used


@needs_triton
def test_only_cuda_tensors_of_one_known_dtype_are_served() -> None:
    assert not kernels.serve(torch.ones(2))
    with FakeTensorMode():
        half, double = (torch.empty(2, device="cuda", dtype=d) for d in (torch.float16, torch.float64))
        single = torch.empty(2, device="cuda")
        assert kernels.serve(half, half)
        assert not kernels.serve(half, single)
        assert not kernels.serve(double)
        assert not kernels.serve(half, torch.empty(2, device="cuda:1", dtype=torch.float16))
        with kernels.enabled(False):
            assert not kernels.serve(half)
        assert kernels.serve(half)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels serve everything, by their definitions, and note that they were called."""
    called: list[str] = []

    def noting(name: str) -> Any:
        operator = getattr(ops, name)
        return lambda *args: (called.append(name), operator(*args))[1]

    for name in ("mla_decode", "add_rms_norm"):
        monkeypatch.setattr(ops, name, noting(name))
    monkeypatch.setattr(kernels, "serve", lambda *_: True)
    return called


@pytest.mark.usefixtures("as_shipped")
def test_the_decoding_kernel_serves_plain_steps_alone(served: list[str]) -> None:
    """Not masks that decide alone, dropout, weights that are wanted, gradients, or a prompt: it computes none of these."""
    query, keys = normal(2, 3, 1, 24), normal(2, 9, 24, seed=1)
    visible = Visibility(1, 9, keys.device)
    plain, _ = attend_latent(query, keys, 16, visible, 0.2)
    assert served == ["mla_decode"]
    roomy = torch.cat((keys, torch.zeros(2, 7, 24, dtype=keys.dtype)), dim=1)
    assert torch.equal(attend_latent(query, roomy, 16, visible, 0.2)[0], plain)
    served.clear()
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    mask[..., :4] = False
    masked, _ = attend_latent(query, keys, 16, Visibility(1, 9, keys.device, mask=mask), 0.2)
    torch.testing.assert_close(masked, attend_latent(query, keys[:, 4:], 16, Visibility(1, 5, keys.device), 0.2)[0])
    assert served.pop() == "mla_decode"  # of the shorter cache
    assert not torch.equal(attend_latent(query, keys, 16, visible, 0.2, dropout=0.5)[0], plain)
    _, weights = attend_latent(query, keys, 16, visible, 0.2, want_weights=True)
    assert weights is not None
    assert weights.shape == (2, 3, 1, 9)
    attend_latent(query.clone().requires_grad_(), keys, 16, visible, 0.2)[0].sum().backward()
    many = DECODED_AT_ONCE + 1
    attend_latent(normal(2, 3, many, 24), normal(2, many, 24), 16, Visibility(many, many, keys.device), 0.2)
    assert served == []


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(("latent", "rope", "kernel"), [(512, 64, True), (513, 64, False), (512, 66, False)])
def test_the_decoding_kernel_serves_sizes_that_fit(latent: int, rope: int, kernel: bool, served: list[str]) -> None:
    query, keys = normal(1, 2, 1, latent + rope), normal(1, 3, latent + rope)
    attend_latent(query, keys, latent, Visibility(1, 3, keys.device), 0.2)
    assert served == ["mla_decode"] * kernel


@needs_triton
def test_sizes_beyond_these_would_not_fit() -> None:
    """Compiled: they leave the shared memory of an RTX 4090."""
    assert resources("mla_partial", 89, LATENT=LARGEST_LATENT, ROPE=LARGEST_ROPE).fits
    assert not resources("mla_partial", 89, LATENT=2 * LARGEST_LATENT).fits
    assert not resources("mla_partial", 89, ROPE=2 * LARGEST_ROPE).fits


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("generation", [7, 8, 9, 10, 12])
def test_groups_go_where_nothing_waits_for_their_sizes(
    generation: int, aligned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To torch in bfloat16 on sm_90 and sm_100, if rows begin at 16 bytes; else to the kernel; before Ampere to torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (generation, 0))
    width = 16 if aligned else 5
    with FakeTensorMode():
        rows, weights = (torch.empty(*shape, width, device="cuda", dtype=dtype) for shape in ((3,), (2, 8)))
        by_torch = generation in (9, 10) and dtype == torch.bfloat16 and aligned
        assert grouped._triton_should(rows, weights) == (generation >= 8 and not by_torch)


@needs_triton
def test_rows_too_many_for_a_launch_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch has 65,535 tiles of rows at most."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with FakeTensorMode():
        weights = torch.empty(160, 16, 16, device="cuda", dtype=torch.float16)
        most = 64 * (65_535 - len(weights))
        for count, serves in ((most, True), (most + 1, False)):
            rows = torch.empty(count, 16, device="cuda", dtype=torch.float16)
            assert grouped._triton_should(rows, weights) == serves


@needs_triton
def test_kernels_serve_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with FakeTensorMode():
        half = torch.empty(2, device="cuda", dtype=torch.float16)
        for capability, serves in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
            assert kernels.serve(half, half) == serves


@needs_triton
def test_the_environment_turns_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        half = torch.empty(2, device="cuda", dtype=torch.float16)
        monkeypatch.setenv("DSV2_KERNELS", "0")
        try:
            assert not importlib.reload(kernels).serve(half)
            with kernels.enabled():
                assert kernels.serve(half)
        finally:
            monkeypatch.undo()
            assert importlib.reload(kernels).serve(half)


def test_a_compiled_step_asks_once_for_the_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in its graph, where the question would run in every step."""
    asked: list[torch.device] = []
    gpu = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda x: (asked.append(x), (9, 0))[1])
    monkeypatch.setattr(kernels, "torch", SimpleNamespace(cuda=gpu))
    step = torch.compile(lambda x: x + 1 if kernels._from_ampere_on(x.device) else x, backend="eager", fullgraph=True)
    assert torch.equal(step(torch.ones(2)), step(torch.ones(2)))
    assert asked == [torch.device("cpu")]


@needs_triton
def test_kernels_are_not_for_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        half = torch.empty(2, device="cuda", dtype=torch.float16)
        monkeypatch.setattr(torch.version, "hip", "6.4")
        try:
            assert not importlib.reload(kernels).serve(half)
        finally:
            monkeypatch.undo()
            assert importlib.reload(kernels).serve(half)


@pytest.mark.usefixtures("as_shipped")
def test_a_hook_on_the_norm_is_called(served: list[str]) -> None:
    norm, x, seen = DeepseekV2RMSNorm(8).double(), normal(2, 3, 8), []
    fused = norm.after_adding(x, x)
    assert served == ["add_rms_norm"]
    norm.register_forward_hook(lambda module, given, result: seen.append(result))
    hooked = norm.after_adding(x, x)
    assert served == ["add_rms_norm"]
    assert len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(fused, hooked, strict=True))


@needs_triton
@pytest.mark.usefixtures("as_shipped")
def test_fake_cuda_tensors_go_through_the_operators() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(2, 3, 8, device="cuda"), torch.empty(8, device="cuda")
        total, normed = ops.add_rms_norm(x, x, weight, 1e-6)
        out = ops.mla_decode(torch.empty(2, 4, 1, 24, device="cuda"), torch.empty(2, 9, 24, device="cuda"), 16, 1.0)
        ends = torch.empty(2, dtype=torch.int32, device="cuda")
        product = grouped_product(torch.empty(3, 8, device="cuda"), torch.empty(2, 5, 8, device="cuda"), ends)
        assert [t.shape for t in (total, normed, out, product)] == [(2, 3, 8), (2, 3, 8), (2, 4, 1, 16), (3, 5)]
        assert all(t.device.type == "cuda" for t in (total, normed, out, product))
