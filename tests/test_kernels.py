"""The fused kernels without a GPU: their results in Triton's interpreter, their machine code, and how torch sees them."""

import contextlib
import importlib.util
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsv2_ref import DeepseekV2DecoderLayer, ops
from dsv2_ref.attention import attend
from dsv2_ref.fast import cudnn, products, triton
from dsv2_ref.fast.triton import (
    LARGEST_LATENT,
    LARGEST_ROPE,
    decode,
    experts,
    few_rows,
    moe,
    norm,
    operators,
    plan,
    quantized,
    rotate,
)
from dsv2_ref.masks import Visibility
from dsv2_ref.moe import RoutedExperts
from dsv2_ref.quantize import KINDS
from dsv2_ref.quantized import QuantizedWeight, quantized_product
from dsv2_ref.records import QuantizedLatentCache, Record, attend_records
from dsv2_ref.rmsnorm import DeepseekV2RMSNorm
from dsv2_ref.rope import apply_rotary
from tests.examples import thorough
from tests.fake_cuda import DeviceFaultError, Watch, fake_cuda
from tests.peers import SMALL
from tools.kernel_report import HALF_ONLY, KERNELS, RESERVED, SHARED_BYTES, Resources, launched_with, main, resources

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton, which is published for Linux alone, is not here"
)


AT_LENGTH = "fp16 and (384 or groups or 5-4-70 or 16-1-96 or by_codes or unsorted) or any_gpu and 128"
"""What takes longest there, and comes in float32, or on another GPU, too."""


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("chosen", [f"not ({AT_LENGTH})", *thorough(AT_LENGTH)])
def test_kernels_in_the_interpreter(chosen: str) -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    file = Path(__file__).with_name("kernels_interpreted.py")
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "--color=no", "-o", "markers=without_bands"]
    options += ["-W", "ignore:Conversion of an array with ndim > 0:DeprecationWarning"]  # of Triton 3.6's own doing
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", chosen, str(file)],
        cwd=file.parent.parent,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Machine code


GENERATIONS = [90, *thorough(*(capability for capability in SHARED_BYTES if capability != 90))]


HEADS = (16, 32, 128)
"""Of the decoding kernel, each with a tile of its own: one narrow block, several, and wide ones on sm_90."""

LAUNCHED = [(kernel, heads) for kernel in KERNELS for heads in (HEADS if kernel.startswith("mla_partial") else (128,))]


def most_stack(kernel: str, capability: int, heads: int) -> int:
    """Bytes of a thread that may spill: some of wide blocks and where records are read, on sm_90 alone, where tiles that
    spill nothing, with fewer keys or rows, took longer on an H100."""
    if capability != 90 or not kernel.startswith("mla_partial"):
        return 0
    return 88 if kernel in HALF_ONLY else 32 if heads == 128 else 0


@needs_triton
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("capability", GENERATIONS)
@pytest.mark.parametrize(("kernel", "heads"), LAUNCHED)
def test_machine_code_fits_the_gpu_and_spills_nothing(kernel: str, heads: int, capability: int, dtype: str) -> None:
    found = resources(kernel, capability, dtype, heads)
    assert found.fits, found
    assert found.stack <= most_stack(kernel, capability, heads), found
    assert 0 < found.registers <= 255


def tile_of(rows: int, kind: str = "", shared: int = 0) -> dict[str, int]:
    """The tile and options of a product of so many rows of a group in half precision, by codes of a kind of which so many
    inputs share a scale."""
    if not kind:
        tall, wide, deep = experts.tile_sizes(rows, 1, 2)
        return {"ROWS": tall, "COLUMNS": wide, "INPUTS": deep, "num_warps": experts.warps(tall)}
    tile, whole = quantized.tile_of(kind, rows, 1, 2, shared)
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "INPUTS": tile.inputs, "SHARED": whole}
    return sizes | {"STAGES": tile.stages, "num_warps": tile.warps}


VARIANTS: dict[str, tuple[str, dict[str, int]]] = {
    "one new token": ("mla_partial", {"seq": 1}),
    "one new token without padding": ("mla_partial", {"seq": 1, "HAS_PADDING": False}),
    "one share of the keys": ("mla_partial", {"ONE_SHARE": True}),
    "one share without padding": ("mla_partial", {"ONE_SHARE": True, "HAS_PADDING": False}),
    "norm without a residual": ("add_rmsnorm", {"HAS_RESIDUAL": False}),
    "few rows a group": ("grouped_product", tile_of(8)),
    "some rows a group": ("grouped_product", tile_of(64)),
    "few tokens' choices": ("grouped_product", tile_of(8) | {"TOP_K": 6}),
    "some tokens' choices": ("grouped_product", tile_of(64) | {"TOP_K": 6}),
    "many tokens' choices": ("grouped_product", {"TOP_K": 6}),
    "few rows by codes": ("quantized_product, int8", tile_of(8, "int8", 5120)),
    "few rows by nibbles": ("quantized_product, int4", tile_of(8, "int4", 64)),
    "few rows by float8": ("quantized_product, fp8", tile_of(8, "fp8", 128)),
    "few tokens' choices by codes": ("quantized_product, int8", tile_of(8, "int8", 5120) | {"TOP_K": 6}),
    "few tokens' choices by nibbles": ("quantized_product, int4", tile_of(8, "int4", 64) | {"TOP_K": 6}),
    "many tokens' choices by nibbles": ("quantized_product, int4", {"TOP_K": 6}),
    "one matrix of codes": ("quantized_product, int8", {"GROUPED": False, "GROUPS": 1}),
    "nibbles in small groups": ("quantized_product, int4", tile_of(100, "int4", 4)),
    "few rows by nibbles in small groups": ("quantized_product, int4", tile_of(8, "int4", 4)),
    "nibbles in groups that no tile has whole": ("quantized_product, int4", tile_of(100, "int4", 48)),
    "few rows by nibbles in such groups": ("quantized_product, int4", tile_of(8, "int4", 48)),
    "one token's choices by nibbles in small groups": ("gate_up, int4", {"SHARED": 4}),
    "one token's choices by nibbles in large groups": ("down, int4", {"SHARED": 1024}),
    "eight choices of a token": ("combine", {"TOP_K": 8}),
    "records, one new token": ("mla_partial, fp8", {"seq": 1, "HAS_PADDING": False}),
    "records, one share": ("mla_partial, fp8", {"ONE_SHARE": True}),
    "records of int8, one share": ("mla_partial, int8", {"ONE_SHARE": True, "HAS_PADDING": False}),
    "records, a latent of one tile": ("mla_partial, fp8", {"TILE": 512}),
    "weights transposed, as in the backward pass": ("grouped_product", {"weight_output": 1, "weight_input": 1536}),
}


@needs_triton
@pytest.mark.parametrize("capability", GENERATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_of_a_launch_fits_and_spills_nothing(variant: str, capability: int) -> None:
    kernel, constants = VARIANTS[variant]
    for heads in HEADS if kernel.startswith("mla_partial") else (128,):
        found = resources(kernel, capability, "bf16", heads, **constants)
        assert found.fits, found
        assert found.stack <= most_stack(kernel, capability, heads), found


@needs_triton
@pytest.mark.parametrize("capability", GENERATIONS)
@pytest.mark.parametrize(("kernel", "heads"), [launched for launched in LAUNCHED if launched[0] not in HALF_ONLY])
def test_machine_code_fits_and_spills_nothing_in_float32(kernel: str, heads: int, capability: int) -> None:
    found = resources(kernel, capability, "fp32", heads)
    assert found.fits, found
    assert found.stack == 0, found


@needs_triton
def test_a_tile_too_large_is_caught() -> None:
    """The planted fault: 128 keys per tile."""
    assert not resources("mla_partial", 89, "bf16", KEYS=128).fits


H100, A100, RTX_4090 = plan.H100, plan.Gpu(108, 164 * 1024, 8), plan.Gpu(128, 100 * 1024, 8)
GPUS = {80: A100, 89: RTX_4090, 90: H100, 100: plan.Gpu(148, 228 * 1024, 10)}


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", GPUS)
def test_as_many_blocks_run_together_as_the_launch_is_planned_for(capability: int, dtype: str) -> None:
    """By registers and shared memory, with padding and without, many shares and one."""
    itemsize, gpu = (4 if dtype == "fp32" else 2), GPUS[capability]
    assert gpu.shared == SHARED_BYTES[capability] + RESERVED
    for heads in (16, 32, 128):
        planned = plan.decode_tile(heads, 576, itemsize, gpu).at_once
        assert planned >= 2 or (capability, dtype) == (89, "fp32") or heads != 32
        for one_share in (True, False):
            for padding in (True, False) if dtype == "bf16" else (True,):
                found = resources("mla_partial", capability, dtype, heads, HAS_PADDING=padding, ONE_SHARE=one_share)
                assert found.at_once >= planned, found


@needs_triton
@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize("heads", [16, 128])
def test_blocks_that_read_records_run_together_as_planned_on_an_h100(heads: int, format: str) -> None:
    assert (
        resources(f"mla_partial, {format}", 90, heads=heads).at_once
        >= plan.decode_tile(heads, 576, 2, H100, True).at_once
    )


def test_wide_blocks_are_for_hopper_gpus_alone() -> None:
    """With 64 rows or more Triton 3.7 multiplies on sm_100 in a way that is wrong for two chained products."""
    for gpu in GPUS.values():
        for itemsize in (2, 4):
            for records in (False, True):
                wide = {
                    rows for rows in range(1, 1025) if plan.decode_tile(rows, 576, itemsize, gpu, records).rows != 16
                }
                assert wide == (set(range(49, 1025)) if gpu == H100 and itemsize == 2 else set())


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
    assert Resources("a", 90, "bf16", 128, 56_320, 0, 4).at_once == 233_472 // 57_344 == 4
    assert Resources("a", 80, "bf16", 187, 0, 0, 4).at_once == 65_536 // (192 * 128) == 2
    assert Resources("a", 89, "bf16", 16, 0, 0, 4).at_once == 48 // 4


@needs_triton
def test_the_command_prints_a_row_for_each_generation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kernel", "rotate"]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == ["bf16", "registers", "spilled", "shared", "warps", "at", "once"]
    assert [row.split()[-6] for row in rows] == ["sm_80", "sm_89", "sm_90", "sm_100"]
    assert rows[0].split()[2] == str(resources("rotate", 80).registers)
    assert main(["--kernel", "mla_partial", "--set", "KEYS=256"]) == 1
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


MODULES = (norm, rotate, decode, experts, quantized, few_rows, moe)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, dict[str, Any], tuple[int, ...]]]:
    """By kernel, the device that was current, the constants and options given, and the grid; nothing runs.

    Device 0 is current before.
    """
    found: dict[str, tuple[int, dict[str, Any], tuple[int, ...]]] = {}
    current = [0]

    def exchange(device: int) -> int:
        before, current[0] = current[0], device
        return before

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def start(*args: Any, **options: Any) -> None:
                codes = options.get("FORMAT") or options.get("KIND")
                found[self.name + (f", {codes}" if codes else "")] = current[0], options, grid

            return start

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    for module in MODULES:
        for name in {kernel.split(", ")[0] for kernel in KERNELS}:
            if hasattr(module, f"{name}_kernel"):
                monkeypatch.setattr(module, f"{name}_kernel", Kernel(name))
    return found


def launch_all(itemsize: int) -> None:
    """At the sizes of DeepSeek-V2, on a device that is not the current one."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32 if itemsize == 4 else torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda:1")

    x, weight, statistics = empty(3, 5120), empty(5120), empty(3, dtype=torch.float32)
    norm.add_rms_norm_launch(x, x, weight, 1e-6)
    norm.rms_norm_backward_launch(x, x, weight, statistics)
    tables = [empty(2, 1, 3, 32, dtype=torch.float32) for _ in range(2)]
    rotate.rotate_launch(empty(2, 3, 128, 192).transpose(1, 2)[..., 128:], *tables)
    query, cache, padding = empty(2, 128, 1, 576), empty(2, 900, 576), empty(2, 870, dtype=torch.bool)
    decode.mla_decode_launch(query, cache[:, :870], 512, 0.1, padding)
    ends = empty(160, dtype=torch.int32)
    rows = empty(160 * 65, 5120)
    experts.grouped_product_launch(rows, empty(160, 3072, 5120), ends)
    chosen = empty(50, 6, dtype=torch.int64)
    moe.sort_launch(chosen, 160)
    moe.swiglu_launch(empty(300, 3072))
    moe.combine_launch(empty(300, 5120), chosen.int(), empty(50, 6, dtype=torch.float32))
    for format in ("fp8", "int8") if itemsize == 2 else ():
        record = Record(format, 512, 64, torch.bfloat16)
        cache = empty(2, 900, 656, dtype=torch.uint8)
        decode.mla_records_launch(query, cache[:, :870], record, 0.1, padding)
    for kind in KINDS:
        weight, down = (
            QuantizedWeight(kind, shape, 64, x.dtype, x.device) for shape in ((160, 3072, 5120), (160, 5120, 1536))
        )
        quantized.quantized_product_launch(rows, weight.codes, weight.scales, weight.group, ends)
        quantized.dense_launch(weight.codes, weight.scales, weight.group, x.dtype)
        stacks = [few_rows.Matrices(held.codes, held.scales, held.group) for held in (weight, down)]
        few_rows.experts_launch(x, *stacks, chosen[:3], empty(3, 6, dtype=torch.float32))
        few_rows.product_launch(x, few_rows.Matrices(weight.codes[0], weight.scales[0], weight.group))
    few_rows.product_launch(x, few_rows.Matrices(empty(700, 5120)))
    plain = few_rows.Matrices(empty(160, 3072, 5120)), few_rows.Matrices(empty(160, 5120, 1536))
    few_rows.experts_launch(x, *plain, chosen[:3], empty(3, 6, dtype=torch.float32))


@needs_triton
@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("itemsize", [2, 4])
def test_kernels_start_on_their_tensors_gpu_as_they_were_compiled(itemsize: int, launches: dict[str, Any]) -> None:
    """And nothing on the way to them is on the CPU or waits."""
    with fake_cuda() as watch, watch:
        launch_all(itemsize)
    assert launches.keys() == set(KERNELS) - set(HALF_ONLY if itemsize == 4 else ())
    assert torch.cuda._exchange_device(0) == 0  # given back
    for name, (device, given, _) in launches.items():
        fixed, options = launched_with(name, itemsize)
        arguments = {"p_token", "weight_input"}  # constants only because they are 1
        assert given == {key: value for key, value in fixed.items() if key not in arguments} | options, name
        assert device == 1, name


def run_experts(watch: Watch, tokens: int, dtype: torch.dtype, width: int = 16) -> None:
    """Inside the operator, watched: 4 experts, of which each token chooses two."""
    x, gate_up, down = (
        torch.empty(shape, dtype=dtype) for shape in ((tokens, width), (4, 2 * width, width), (4, width, width))
    )
    chosen, weights = torch.empty(tokens, 2, dtype=torch.int64), torch.empty(tokens, 2)
    with watch:
        out = operators._routed_experts.__wrapped__(x, gate_up, down, chosen, weights)
    assert (out.shape, out.dtype, out.device.type) == (x.shape, dtype, "cuda")


FEW = {"sort", "grouped_product", "swiglu", "combine"}
"""Kernels of the experts of few tokens, sorted."""

UNSORTED = {"gate_up", "down"}
"""Kernels of so few that none is sorted."""


@needs_triton
@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("generation", "tokens", "dtype", "kernels"),
    [
        (8, 1, torch.bfloat16, UNSORTED),
        (9, 2, torch.bfloat16, UNSORTED),
        (9, 3, torch.bfloat16, FEW),
        (9, 192, torch.bfloat16, FEW),
        (9, 193, torch.bfloat16, FEW - {"grouped_product"}),
        (10, 65, torch.bfloat16, FEW - {"grouped_product"}),
        (8, 65, torch.bfloat16, FEW),
        (9, 65, torch.float16, FEW),
        (9, moe.MOST_SORTED // 2, torch.float16, FEW),
        (9, moe.MOST_SORTED // 2 + 1, torch.float16, FEW - {"sort"}),
    ],
)
def test_the_kernels_of_the_experts(
    generation: int,
    tokens: int,
    dtype: torch.dtype,
    kernels: set[str],
    launches: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None makes the host wait. In bfloat16 many rows go to torch's products on sm_90 and sm_100, and more choices than are
    compared with one another are sorted by torch."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (generation, 0))
    with fake_cuda() as watch:
        run_experts(watch, tokens, dtype)
    assert launches.keys() == kernels


@needs_triton
@pytest.mark.usefixtures("as_shipped")
def test_the_experts_of_few_tokens_take_five_launches(
    launches: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else of torch but memory to write to."""
    done: list[str] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            done.append(func.name())
            return func(*args, **(kwargs or {}))

    product = experts.grouped_product_launch
    given: list[tuple[int, ...]] = []
    noted = lambda rows, weights, *rest: (given.append((len(rows), *rest[2:])), product(rows, weights, *rest))[1]  # noqa: E731
    monkeypatch.setattr(experts, "grouped_product_launch", noted)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with fake_cuda() as watch, Noted():
        x, gate_up, down = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((3, 16), (4, 32, 16), (4, 16, 16)))
        chosen, weights = torch.empty(3, 2, dtype=torch.int64), torch.empty(3, 2)
        done.clear()
        with watch:
            operators._routed_experts.__wrapped__(x, gate_up, down, chosen, weights)
    assert launches.keys() == FEW
    assert given == [(3, 2)]  # tokens that chose two each; of the second product the shape alone is told
    changes = [name for name in done if not name.startswith(("aten::empty", "aten::view", "prim::device"))]
    assert changes == ["dsv2_ref::grouped_product"], done


@needs_triton
@pytest.mark.usefixtures("as_shipped")
def test_a_launch_that_waits_is_seen(launches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: as many tiles as the groups need, for which the host asks the device."""
    monkeypatch.setattr(experts, "most_tiles", lambda *_: int(torch.empty((), device="cuda:1")))
    with fake_cuda() as watch, pytest.raises(DeviceFaultError, match="the host reads a number"), watch:
        launch_all(2)


# The plan of a decoding launch


def launch(batch: int, heads: int, kv_seq: int, dtype: torch.dtype = torch.bfloat16) -> None:
    with fake_cuda():
        query, cache = (torch.empty(batch, *shape, dtype=dtype) for shape in ((heads, 1, 576), (kv_seq, 576)))
        decode.mla_decode_launch(query, cache, 512, 0.1)


@needs_triton
@pytest.mark.usefixtures("as_shipped")
def test_blocks_of_queries_of_one_sequence_are_neighbours(launches: dict[str, Any]) -> None:
    """The grid's first axis runs fastest: blocks of queries, then sequences, then shares of the keys."""
    launch(3, 128, 8192)
    assert launches["mla_partial"][2] == (2, 3, 22)
    assert launches["mla_combine"][2] == (3 * 128, 4)


@needs_triton
@pytest.mark.usefixtures("as_shipped")
def test_a_single_share_needs_no_second_kernel_and_no_float32(launches: dict[str, Any]) -> None:
    launch(64, 128, 8192)
    assert launches.keys() == {"mla_partial"}
    assert launches["mla_partial"][1]["ONE_SHARE"]
    launches.clear()
    launch(1, 128, 8192)
    assert launches.keys() == {"mla_partial", "mla_combine"}
    assert not launches["mla_partial"][1]["ONE_SHARE"]


@needs_triton
@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("gpu", "dtype", "heads", "tile"),  # rows, keys, warps, stages
    [
        (H100, torch.bfloat16, 128, (64, 64, 8, 2)),
        (H100, torch.bfloat16, 49, (64, 64, 8, 2)),
        (H100, torch.bfloat16, 48, (16, 32, 4, 2)),
        (H100, torch.float16, 17, (16, 32, 4, 2)),
        (H100, torch.float16, 16, (16, 32, 4, 3)),
        (H100, torch.float32, 128, (16, 16, 4, 2)),
        (H100, torch.float32, 16, (16, 16, 4, 2)),
        (A100, torch.float16, 128, (16, 32, 4, 2)),
        (A100, torch.float16, 16, (16, 32, 4, 2)),
        (RTX_4090, torch.bfloat16, 128, (16, 16, 4, 2)),
        (RTX_4090, torch.bfloat16, 16, (16, 16, 4, 2)),
    ],
)
def test_a_tile_is_as_large_as_two_blocks_can_have(
    gpu: plan.Gpu,
    dtype: torch.dtype,
    heads: int,
    tile: tuple[int, ...],
    launches: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for wide blocks, and with three stages where one narrow block reads all keys and two of twice the keys fit."""
    monkeypatch.setattr(plan, "gpu_of", lambda device: gpu)
    launch(1, heads, 8192, dtype)
    given = launches["mla_partial"][1]
    assert tuple(given[name] for name in ("ROWS", "KEYS", "num_warps", "num_stages")) == tile


@pytest.mark.parametrize(
    ("gpu", "rows", "tile"),
    [
        (H100, 128, (64, 64, 8, 2, 1)),
        (H100, 16, (16, 32, 4, 2, 2)),
        (A100, 128, (16, 32, 8, 2, 1)),
        (A100, 16, (16, 32, 8, 2, 1)),
        (RTX_4090, 16, (16, 16, 8, 2, 1)),
    ],
)
def test_tiles_of_records(gpu: plan.Gpu, rows: int, tile: tuple[int, ...]) -> None:
    assert plan.decode_tile(rows, 576, 2, gpu, records=True) == tile


def test_a_gpu_is_asked_for_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(multi_processor_count=108, shared_memory_per_multiprocessor=167_936, major=8)
    assert plan.gpu_of(torch.device("cuda", 3)) == plan.H100  # where there is none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    plan.gpu_of.cache_clear()
    try:
        assert plan.gpu_of(torch.device("cuda", 3)) == A100
    finally:
        plan.gpu_of.cache_clear()


@pytest.mark.parametrize("kv_seq", [0, 1, 31, 33, 4096, 131072])
@pytest.mark.parametrize("programs", [1, 8, 1000])
def test_shares_of_the_keys_cover_them_once(kv_seq: int, programs: int) -> None:
    splits, size = plan.split_keys(kv_seq, programs, 132, 32)
    assert size % 32 == 0
    assert splits * size >= kv_seq
    assert kv_seq == 0 or (splits - 1) * size < kv_seq
    assert 1 <= splits <= plan.MAX_SHARES


def waves(batch: int, heads: int, gpu: plan.Gpu, kv_seq: int = 8192) -> tuple[float, float]:
    """Of a launch in bfloat16: its blocks over those that run together, and the busy part of its waves."""
    tile = plan.decode_tile(heads, 576, 2, gpu)
    programs, slots = batch * -(-heads // tile.rows), gpu.processors * tile.at_once
    splits, size = plan.split_keys(kv_seq, programs, slots, tile.keys)
    found = programs * splits / slots
    return found, programs * kv_seq / (math.ceil(found) * slots * size)


@pytest.mark.parametrize("gpu", [H100, A100, RTX_4090], ids=["H100", "A100", "RTX 4090"])
@pytest.mark.parametrize("heads", [128, 16])
def test_shares_fill_one_wave_or_several_evenly(heads: int, gpu: plan.Gpu) -> None:
    """Never a second wave of a few blocks, which once left a GPU half idle for 4 to 9, 12, 17 to 19, 34 to 40 sequences."""
    for batch in range(1 if heads == 128 else 4, 129):
        found, busy = waves(batch, heads, gpu)
        assert busy >= 0.8, (batch, found, busy)
        assert found <= 1 or found > 1.5, (batch, found, busy)


def test_few_keys_are_split_while_a_wave_has_room() -> None:
    assert plan.split_keys(256, 8, 528, 32) == (8, 32)
    assert plan.split_keys(256, 200, 528, 32) == (2, 128)
    assert plan.split_keys(256, 300, 528, 32) == (1, 256)  # two waves of half the keys would take longer
    assert plan.split_keys(32, 8, 528, 32) == (1, 32)


FASTEST = {
    # heads, keys, sequences: shares of the fastest launch that was timed on an H100 (torch 2.11, Triton 3.6)
    (16, 8192, 4): 32, (16, 8192, 16): 8, (16, 8192, 64): 2, (16, 131_072, 1): 128,
    (128, 8192, 1): 64, (128, 8192, 4): 16, (128, 8192, 16): 4, (128, 8192, 64): 1, (128, 8192, 128): 1,
    (128, 131_072, 1): 64, (128, 131_072, 8): 8,
}  # fmt: skip


@pytest.mark.parametrize("case", FASTEST)
def test_keys_are_split_as_was_fastest(case: tuple[int, int, int]) -> None:
    heads, kv_seq, batch = case
    tile = plan.decode_tile(heads, 576, 2, H100)
    slots, programs = H100.processors * tile.at_once, batch * -(-heads // tile.rows)
    assert plan.split_keys(kv_seq, programs, slots, tile.keys)[0] == FASTEST[case]


def test_the_decoding_kernel_serves_where_it_was_faster() -> None:
    """Narrow blocks for up to 64 rows of a sequence, wide ones always."""
    assert all(plan.decoding_pays(rows, 2, H100) for rows in (1, 64, 128, 1024))
    for gpu, itemsize in ((A100, 2), (RTX_4090, 2), (H100, 4)):
        assert [rows for rows in (16, 64, 65, 128) if plan.decoding_pays(rows, itemsize, gpu)] == [16, 64]


# When they are used


def why(definition: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
    """The way of the outermost call, and for each way of Triton that was passed over the reason."""
    with ops.watch() as choices:
        definition(*args, **kwargs)
    choice = choices[0]
    return {"way": choice.way} | {name: reason for name, reason in choice.passed_over if name.startswith("triton")}


def on_cuda(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cuda") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def norm_on_cuda(features: int = 8, dtype: torch.dtype = torch.float16) -> DeepseekV2RMSNorm:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return DeepseekV2RMSNorm(features)
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def gpu() -> Iterator[None]:
    """Fake tensors, and what was found out of this machine forgotten before and after."""
    triton.available.cannot_compile.cache_clear()
    with fake_cuda():
        yield
    triton.available.cannot_compile.cache_clear()


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_only_cuda_tensors_of_one_known_dtype_are_served() -> None:
    half, double = norm_on_cuda(), norm_on_cuda(dtype=torch.float64)
    assert why(half, on_cuda(2, 8))["way"] == "triton norm"
    assert "not all of one dtype" in why(half, on_cuda(2, 8, dtype=torch.float32))["triton norm"]
    assert "not for torch.float64" in why(double, on_cuda(2, 8, dtype=torch.float64))["triton norm"]
    with torch.device("cpu"):
        assert why(DeepseekV2RMSNorm(8), torch.empty(2, 8))["way"] == "definition"
    assert triton.alike(on_cuda(2), on_cuda(2, device="cuda:1")) != ""
    for switched_off in (ops.plain(), ops.without("triton")):
        with switched_off:
            assert why(half, on_cuda(2, 8)) == {"way": "definition", "triton norm": "switched off"}
    assert why(half, on_cuda(2, 8))["way"] == "triton norm"


def decoding(
    seq: int = 1,
    kv_seq: int = 9,
    latent: int = 16,
    rope: int = 8,
    heads: int = 3,
    batch: int = 2,
    dtype: torch.dtype = torch.float16,
    mask: Tensor | None = None,
    **options: Any,
) -> dict[str, str]:
    query = on_cuda(batch, heads, seq, latent + rope, dtype=dtype).requires_grad_(options.pop("grad", False))
    key = on_cuda(batch, 1, kv_seq, latent + rope, dtype=dtype)
    visible = Visibility(seq, kv_seq, key.device, mask)
    options = {"dropout": 0.0, "implementation": "products"} | options
    return why(attend, query, key, key[..., :latent], visible, 0.2, **options)


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_the_decoding_kernel_serves_plain_steps_alone() -> None:
    """Not masks that decide alone, dropout, weights that are wanted, gradients, or a prompt: it computes none of these."""
    assert decoding()["way"] == "triton decoding"
    assert decoding(mask=on_cuda(2, 9, dtype=torch.bool))["way"] == "triton decoding"
    assert decoding(seq=8)["way"] == "triton decoding"
    reasons = {
        "mask": decoding(mask=on_cuda(1, 1, 1, 9, dtype=torch.bool)),
        "dropout": decoding(dropout=0.5),
        "gradients": decoding(grad=True),
        "float64": decoding(dtype=torch.float64),
        "weights": decoding(implementation="eager"),
        "prompt": decoding(seq=9),
        "latent": decoding(latent=LARGEST_LATENT + 1),
        "rope": decoding(rope=LARGEST_ROPE + 2),
        "rows": decoding(heads=128, latent=512, rope=64, dtype=torch.float32),
        "sequences": decoding(batch=2**16, heads=1),
    }
    said = {
        "mask": "no masks per query",
        "dropout": "no dropout",
        "gradients": "gives no gradients",
        "float64": "not for torch.float64",
        "weights": "implementation is 'eager'",
        "prompt": "for up to 8 queries",
        "latent": "do not fit a tile",
        "rope": "do not fit a tile",
        "rows": "128 · 1 queries of a sequence suit plain products better",
        "sequences": "65535 sequences",
    }
    for name, reason in reasons.items():
        assert said[name] in reason["triton decoding"], name
        assert reason["way"] != "triton decoding"
    assert decoding(latent=LARGEST_LATENT, rope=LARGEST_ROPE)["way"] == "triton decoding"


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_many_rows_of_a_sequence_need_a_wide_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 64 go to narrow blocks; more to wide ones, which Hopper GPUs have in half precision, or to plain products."""
    for gpu, dtype in ((H100, torch.float32), (A100, torch.bfloat16), (RTX_4090, torch.bfloat16)):
        monkeypatch.setattr(plan, "gpu_of", lambda device, gpu=gpu: gpu)
        for heads, seq, way in ((64, 1, True), (8, 8, True), (65, 1, False), (9, 8, False)):
            assert (decoding(seq, heads=heads, dtype=dtype)["way"] == "triton decoding") == way
    monkeypatch.setattr(plan, "gpu_of", lambda device: H100)
    assert decoding(8, heads=128, batch=64)["way"] == "triton decoding"


@needs_triton
def test_sizes_beyond_these_would_not_fit() -> None:
    """Compiled: they leave the shared memory of an RTX 4090, with the tile that an A100 gets."""
    assert resources("mla_partial", 89, LATENT=LARGEST_LATENT, ROPE=LARGEST_ROPE).at_once == 2
    assert resources("mla_partial", 89, LATENT=2 * LARGEST_LATENT).at_once < 2
    assert not resources("mla_partial", 89, LATENT=2 * LARGEST_LATENT, KEYS=32).fits


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_a_norm_too_wide_for_its_gradient_is_left_to_autograd() -> None:
    """Of more than 8,192 features the backward kernel spills. Without gradients the kernel serves any width."""
    wide, fits = norm_on_cuda(8193), norm_on_cuda(8192)
    assert "does not fit the registers" in why(wide, on_cuda(2, 8193))["triton norm"]
    assert why(fits, on_cuda(2, 8192))["way"] == "triton norm"
    with torch.no_grad():
        assert why(wide, on_cuda(2, 8193))["way"] == "triton norm"
    wide.requires_grad_(False)
    assert why(wide, on_cuda(2, 8193))["way"] == "triton norm"
    assert why(wide, on_cuda(2, 8193).requires_grad_())["way"] == "definition"


@needs_triton
def test_gradients_of_wider_rows_would_spill() -> None:
    """Compiled: so the limit is where it must be, and the forward kernel has none."""
    assert resources("add_rmsnorm_backward", 90, BLOCK=16384).stack > 0
    assert resources("add_rmsnorm", 90, BLOCK=16384).stack == 0


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("generation", [7, 8, 9, 10, 12])
def test_groups_go_where_nothing_waits_for_their_sizes(
    generation: int, aligned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To torch in bfloat16 on sm_90 and sm_100, if rows begin at 16 bytes; else to the kernel; before Ampere to torch."""
    present(monkeypatch, (generation, 0))
    width = 16 if aligned else 5
    rows, weights = (on_cuda(*shape, width, dtype=dtype) for shape in ((193,), (2, 8)))
    by_torch = generation in (9, 10) and dtype == torch.bfloat16 and aligned
    assert experts.should_serve(rows, weights) == (generation >= 8 and not by_torch)


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_few_rows_of_a_group_go_to_the_kernel_on_hopper_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 96 on average: torch was slower with up to 77."""
    weights = on_cuda(4, 8, 16, dtype=torch.bfloat16)
    for generation, borders in ((9, {1: True, 384: True, 385: False}), (10, {1: False, 385: False}), (8, {385: True})):
        present(monkeypatch, (generation, 0))
        for count, by_kernel in borders.items():
            assert experts.should_serve(on_cuda(count, 16, dtype=torch.bfloat16), weights) == by_kernel


def present(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A GPU of this generation, on a machine that can compile."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    driver = pytest.importorskip("triton").runtime.driver
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=lambda: None))


def decoding_records(
    format: str = "fp8", latent: int = 16, seq: int = 1, dtype: torch.dtype = torch.float16, **options: Any
) -> dict[str, str]:
    record = Record(format, latent, 8, options.pop("cached", dtype))
    cache = QuantizedLatentCache(0, on_cuda(2, 9, sum(record.parts), dtype=torch.uint8), record=record)
    heads, batch = options.pop("heads", 3), options.pop("batch", 2)
    query = on_cuda(batch, heads, seq, latent + 8, dtype=dtype)
    visible = Visibility(seq, 9, query.device, options.pop("mask", None))
    options = {"implementation": "products"} | options
    with ops.watch() as choices, contextlib.suppress(RuntimeError):  # of the definition, which these do not fit
        attend_records(query, cache, visible, 0.2, **options)
    return {"way": choices[0].way} | dict(choices[0].passed_over)


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_the_kernel_for_records_serves_plain_steps_alone() -> None:
    way = "triton decoding of records"
    assert decoding_records()["way"] == way
    assert decoding_records("int8", mask=on_cuda(2, 9, dtype=torch.bool))["way"] == way
    said = {
        "no records in int4": decoding_records("int4"),
        "no records in fp8 of torch.bfloat16 for queries in torch.float16": decoding_records(cached=torch.bfloat16),
        "not for torch.float32": decoding_records(dtype=torch.float32),
        "records of 18 codes in 38 bytes hold no aligned float32": decoding_records(latent=18),
        "no masks per query and no dropout": decoding_records(dropout=0.5),
        "for up to 8 queries": decoding_records(seq=9),
        "do not fit a tile": decoding_records(latent=LARGEST_LATENT + 128),
        "implementation is 'eager'": decoding_records(implementation="eager"),
    }
    for reason, found in said.items():
        assert reason in found[way], found
        assert found["way"] != way


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_codes_are_multiplied_by_the_kernel_for_few_rows_of_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = QuantizedWeight("int4", (6, 8), 4, torch.float16, torch.device("cuda"))
    stack = QuantizedWeight("int8", (3, 6, 8), 8, torch.float16, torch.device("cuda"))
    x, way = on_cuda(2, 3, 8), "triton codes"
    for args, shape in (((x, weight), (2, 3, 6)), ((x[0, 0], weight), (6,)), ((x, stack, 1), (2, 3, 6))):
        assert why(quantized_product, *args)["way"] == way
        assert quantized_product(*args).shape == shape
    said = {
        "for one matrix": (on_cuda(3, 3, 8), stack),
        "not all of one dtype": (x.float(), weight),
        "more than 512 rows": (on_cuda(plan.MOST_ROWS + 1, 8), weight),
        "gives no gradients": (on_cuda(3, 8).requires_grad_(), weight),
    }
    for reason, args in said.items():
        with ops.watch() as choices, contextlib.suppress(RuntimeError):
            quantized_product(*args)
        assert (way, reason) in [(name, why[: len(reason)]) for name, why in choices[0].passed_over], reason
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # fake CUDA has none
    assert "autocast" in why(quantized_product, x, weight)[way]


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_experts_are_served_where_nothing_needs_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one of the kernels' dtypes, and not under autocast, whose dtype is another."""
    way, chosen, weights = "triton experts", on_cuda(3, 2, dtype=torch.int64), on_cuda(3, 2, dtype=torch.float32)

    def stack(dtype: torch.dtype) -> RoutedExperts:
        experts = RoutedExperts(SMALL).requires_grad_(False)
        for name, weight in tuple(experts.named_parameters()):
            setattr(experts, name, torch.nn.Parameter(on_cuda(*weight.shape, dtype=dtype), requires_grad=False))
        return experts

    half, x = stack(torch.float16), on_cuda(3, SMALL.hidden_size)
    assert why(half, x, chosen, weights)["way"] == way
    half.gate_up_proj.requires_grad_()
    with torch.no_grad():
        assert why(half, x, chosen, weights)["way"] == way
    assert why(half, x, chosen, weights) == {"way": "grouped", way: "gives no gradients"}
    half.gate_up_proj.requires_grad_(False)
    assert why(half, x.clone().requires_grad_(), chosen, weights)[way] == "gives no gradients"
    assert why(half, x, chosen, weights.clone().requires_grad_())[way] == "gives no gradients"
    double = stack(torch.float64)
    assert why(double, x.double(), chosen, weights) == {"way": "grouped", way: "not for torch.float64"}
    with ops.watch() as choices, contextlib.suppress(RuntimeError):
        double(x, chosen, weights)
    assert (way, "not all of one dtype on one GPU") in choices[0].passed_over
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # fake CUDA has none
    with ops.watch() as choices, contextlib.suppress(RuntimeError):
        half(x, chosen, weights)
    assert (way, "torch.autocast chooses the dtype") in choices[0].passed_over


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_groups_that_torch_would_reject_go_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100 in bfloat16: 1,024 groups and more, and a matrix whose first element is not at 16 bytes."""
    present(monkeypatch, (9, 0))

    def by_torch(groups: int, first: int) -> bool:
        count = (experts.FEW_ROWS + 1) * groups
        rows = on_cuda(count * 16 + first, dtype=torch.bfloat16)[first:].view(count, 16)
        return not experts.should_serve(rows, on_cuda(groups, 8, 16, dtype=torch.bfloat16))

    assert by_torch(1023, 0)
    assert by_torch(4, 8)
    assert not by_torch(1024, 0)
    assert not by_torch(4, 1)
    assert products.torch_can_group(torch.empty(24 * 16 + 1, device="cpu")[1:].view(24, 16), groups=2000)  # a CPU's way


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_the_grouped_product_is_switched_off_with_the_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, (9, 0))
    rows, weights = on_cuda(8, 16, dtype=torch.bfloat16), on_cuda(4, 8, 16, dtype=torch.bfloat16)
    assert experts.should_serve(rows, weights)
    for name in ("triton", ""):
        with ops.without(name):
            assert not experts.should_serve(rows, weights)
    with ops.without("cpu"):
        assert experts.should_serve(rows, weights)


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_float16_decodes_in_the_kernel_with_any_number_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain products could not hold its scores, and the definition is slower than both."""
    monkeypatch.setattr(plan, "gpu_of", lambda device: A100)
    assert decoding(heads=128, dtype=torch.float16)["way"] == "triton decoding"
    assert decoding(heads=128, dtype=torch.bfloat16)["way"] == "products"


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
@pytest.mark.parametrize(("dtype", "tall"), [(torch.float16, 128), (torch.float32, 64)], ids=str)
def test_rows_too_many_for_a_launch_go_to_torch(dtype: torch.dtype, tall: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch has 65,535 tiles of rows at most."""
    present(monkeypatch, (8, 0))
    weights = on_cuda(160, 16, 16, dtype=dtype)
    most = tall * (65_535 - len(weights))
    for count, serves in ((most, True), (most + 1, False)):
        assert experts.should_serve(on_cuda(count, 16, dtype=dtype), weights) == serves


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_tiles_are_as_tall_as_groups_are() -> None:
    """16 rows for up to 8 of a group, 64 for up to 64, and 128 for more, which do not fit in float32."""
    for groups in (1, 64, 160):
        tall = {rows: experts.tile_sizes(rows * groups, groups, 2)[0] for rows in (1, 8, 9, 64, 65, 1000)}
        assert tall == {1: 16, 8: 16, 9: 64, 64: 64, 65: 128, 1000: 128}
        assert experts.tile_sizes(8 * groups + 1, groups, 2)[0] == 64
        assert experts.tile_sizes(1000 * groups, groups, 4)[0] == 64


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_kernels_serve_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, serves in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        present(monkeypatch, capability)
        assert (triton.cannot_run(torch.device("cuda")) == "") == serves


@needs_triton
@pytest.mark.usefixtures("gpu")
def test_the_environment_turns_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV2_KERNELS", "0")
    assert triton.alike(on_cuda(2)) == "DSV2_KERNELS is 0"


@needs_triton
@pytest.mark.usefixtures("gpu")
def test_kernels_are_not_for_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert triton.alike(on_cuda(2)) == "not for AMD GPUs"


def without_compiler(folder: Path) -> dict[str, str]:
    return {"PATH": str(folder), "CC": ""}


def without_headers(folder: Path) -> dict[str, str]:
    """A compiler that finds no Python.h, as where python3-dev is not installed."""
    compiler = folder / "gcc"
    compiler.write_text(
        "#!/bin/sh\necho 'driver.c:9:10: fatal error: Python.h: No such file or directory' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    return {"CC": str(compiler)}


@needs_triton
@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("missing", [without_compiler, without_headers])
def test_a_machine_that_cannot_compile_gets_plain_pytorch_and_one_warning(
    missing: Callable[[Path], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own first step, on a machine with a GPU (pretended), which is where a layer would fail in every call."""
    driver = pytest.importorskip("triton").runtime.driver
    for name in ("_active", "_default"):
        monkeypatch.setattr(driver, name, None)
    (tmp_path / "libcuda.so.1").touch()
    found = {"TRITON_LIBCUDA_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")} | missing(tmp_path)
    for name, value in found.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    triton.available.cannot_compile.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"plain PyTorch is used; .*gcc python3-dev") as caught:
            assert triton.cannot_run(torch.device("cuda")) == "Triton cannot compile here"
        assert len(caught) == 1
        print(caught[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert triton.cannot_run(torch.device("cuda")) == "Triton cannot compile here"  # and no second warning
            with FakeTensorMode():
                assert why(norm_on_cuda(), on_cuda(2, 8))["way"] == "definition"
                with torch.no_grad():
                    assert decoding()["way"] == "definition"
    finally:
        triton.available.cannot_compile.cache_clear()


def test_a_compiled_step_asks_once_for_the_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in its graph, where the question would run in every step."""
    asked: list[torch.device] = []
    gpu = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda x: (asked.append(x), (9, 0))[1])
    monkeypatch.setattr(triton.available, "torch", SimpleNamespace(cuda=gpu))
    monkeypatch.setattr(triton.available, "cannot_compile", lambda: "")
    step = torch.compile(lambda x: x if triton.cannot_run(x.device) else x + 1, backend="eager", fullgraph=True)
    assert torch.equal(step(torch.ones(2)), step(torch.ones(2)))
    assert asked == [torch.device("cpu")]


class Causal:
    """Of `Visibility` what is asked here: its signature is checked in tests, into which the compiler cannot see."""

    attention_mask = mask = None

    def __init__(self, kv_seq: int) -> None:
        self.kv_seq = kv_seq


@pytest.mark.usefixtures("as_shipped")
def test_a_compiled_step_may_be_of_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second number on the compiler takes it for a variable, which it gives to no function whose result it keeps."""
    monkeypatch.setattr(triton.available, "cannot_compile", lambda: "")

    def step(query: Tensor, key: Tensor) -> Tensor:
        visible: Any = Causal(key.shape[2])
        return query if triton._not_decoding(query, key, key[..., :16], visible, 0.2) else query + 1

    run = torch.compile(step, backend="eager", fullgraph=True)
    for batch, seq, kv_seq, served in ((2, 1, 9, 1), (3, 1, 10, 1), (2, 2, 12, 1), (2, 3, 20, 1), (2, 9, 21, 0)):
        query, key = torch.zeros(batch, 4, seq, 24), torch.zeros(batch, 1, kv_seq, 24)
        assert (run(query, key) == served).all()


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_a_hook_on_the_norm_is_called() -> None:
    """The layer's fused addition and norm would pass it by."""
    with torch.no_grad():
        layer, x, seen = DeepseekV2DecoderLayer(SMALL, 0), on_cuda(2, 3, SMALL.hidden_size, dtype=torch.float32), []
        assert why(layer, x)["way"] == "triton add and norm"
        layer.post_attention_layernorm.register_forward_hook(lambda module, given, result: seen.append(result))
        assert "has hooks" in why(layer, x)["triton add and norm"]
    assert len(seen) == 1


@needs_triton
@pytest.mark.usefixtures("as_shipped", "gpu")
def test_fake_cuda_tensors_go_through_the_operators() -> None:
    x, weight = on_cuda(2, 3, 8), on_cuda(8)
    total, normed = operators.add_rms_norm(x, x, weight, 1e-6)
    out = operators.mla_decode(on_cuda(2, 4, 1, 24), on_cuda(2, 9, 24), 16, 1.0)
    ends = on_cuda(2, dtype=torch.int32)
    product = torch.ops.dsv2_ref.grouped_product(on_cuda(3, 8), on_cuda(2, 5, 8), ends)
    tables = [on_cuda(2, 3, 4, dtype=torch.float32) for _ in range(2)]
    assert why(apply_rotary, on_cuda(2, 4, 3, 8), on_cuda(2, 3, 8), *tables)["way"] == "triton rotation"
    assert [t.shape for t in (total, normed, out, product)] == [(2, 3, 8), (2, 3, 8), (2, 4, 1, 16), (3, 5)]
    assert all(t.device.type == "cuda" for t in (total, normed, out, product))


# Attention of few queries through SDPA


def cudnn_allowed(seq: int, kv_seq: int, monkeypatch: pytest.MonkeyPatch, mask: Tensor | None = None) -> bool:
    """Whether a call of torch's fused attention may go to cuDNN."""
    allowed: list[bool] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def noted(*args: Any, **options: Any) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return fused(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
        query, key = on_cuda(2, 4, seq, 16).requires_grad_(torch.is_grad_enabled()), on_cuda(2, 2, kv_seq, 16)
        attend(query, key, key, Visibility(seq, kv_seq, key.device, mask), 0.2, implementation="sdpa")
    return any(allowed)


@pytest.mark.usefixtures("as_shipped", "gpu")
@pytest.mark.parametrize("seq", [1, 2, 8])
def test_prompts_of_few_tokens_never_go_to_cudnn(seq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would build a plan for each of their lengths, too."""
    assert not cudnn_allowed(seq, seq, monkeypatch)
    assert cudnn_allowed(9, 9, monkeypatch)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # as before


@pytest.mark.usefixtures("as_shipped", "gpu")
def test_gradients_with_a_mask_never_come_from_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper GPUs some are NaN where the number of keys is 64 more than a multiple of 128 (pytorch issue 196678)."""
    padding = on_cuda(2, 192, dtype=torch.bool)
    for seq, mask in ((192, padding), (64, None)):  # padding, and a prompt behind a cache
        assert not cudnn_allowed(seq, 192, monkeypatch, mask)
        with torch.no_grad():
            assert cudnn_allowed(seq, 192, monkeypatch, mask)
    assert cudnn_allowed(192, 192, monkeypatch)


@pytest.mark.usefixtures("as_shipped", "gpu")
def test_decoding_steps_never_go_to_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would build a plan for every number of keys, which is another in each step; for a prompt it may."""
    with torch.no_grad():
        assert not any(cudnn_allowed(1, kv_seq, monkeypatch) for kv_seq in (2, 3, 4, 700))
        assert not cudnn_allowed(8, 70, monkeypatch)
        assert cudnn_allowed(9, 70, monkeypatch)
    assert cudnn_allowed(64, 64, monkeypatch)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # as before


def test_the_choice_without_cudnn_compiles_for_any_number_of_keys() -> None:
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention import sdpa_kernel

    from dsv2_ref.fast.sdpa import NOT_CUDNN

    def step(query: Tensor, key: Tensor) -> Tensor:
        with sdpa_kernel(NOT_CUDNN):
            return torch.nn.functional.scaled_dot_product_attention(query, key, key)

    counter = CompileCounter()
    run = torch.compile(step, backend=counter, fullgraph=True)
    query = torch.ones(1, 2, 1, 8)
    for kv_seq in (2, 3, 4, 5):
        assert torch.equal(run(query, torch.ones(1, 2, kv_seq, 8)), query)
    assert counter.frame_count == 2


# Values narrower than keys through cuDNN

Case = tuple[torch.device, torch.dtype, int, int, bool]


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """What cuDNN is asked for, all of which it takes; and torch's fused attention gives an empty result there."""
    asked: list[Case] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
        assert value.shape[-1] == 16  # without zeros behind it
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    monkeypatch.setattr(cudnn, "takes", lambda *case: (asked.append(case), True)[1])
    fused = torch.nn.functional.scaled_dot_product_attention
    by_way = lambda *args, **options: (attention if asked else fused)(*args, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", by_way)
    return asked


def through_sdpa(
    seq: int = 64,
    kv_seq: int = 64,
    heads: int = 4,
    kv_heads: int = 4,
    value_width: int = 16,
    dtype: torch.dtype = torch.float16,
    cached: torch.dtype | None = None,
    device: str = "cuda",
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[str, str]:
    """The way of a prompt with keys of 24 features, and why cuDNN was passed over."""
    query = on_cuda(2, heads, seq, 24, dtype=dtype)
    key, value = (
        on_cuda(2, kv_heads, kv_seq, width, dtype=cached or dtype, device=device) for width in (24, value_width)
    )
    options = {"dropout": 0.0, "implementation": "sdpa"} | options
    with ops.watch() as choices, contextlib.suppress(RuntimeError):  # of others, which mixed dtypes do not fit
        out, weights = attend(query, key, value, Visibility(seq, kv_seq, query.device, mask), 0.2, **options)
        if choices[0].way == "cudnn":
            assert (weights, out.shape, out.dtype) == (None, (2, heads, seq, value_width), dtype)
    return choices[0].way, dict(choices[0].passed_over).get("cudnn", "")


@pytest.mark.usefixtures("as_shipped", "gpu")
def test_narrow_values_go_to_cudnn_as_they_are(cases: list[Case]) -> None:
    assert through_sdpa() == ("cudnn", "")
    assert through_sdpa(seq=9, kv_seq=9, dtype=torch.bfloat16, kv_heads=2) == ("cudnn", "")
    assert [(case[0].type, *case[1:]) for case in cases] == [
        ("cuda", torch.float16, 24, 16, False),
        ("cuda", torch.bfloat16, 24, 16, True),
    ]


@pytest.mark.usefixtures("as_shipped", "gpu")
def test_masks_and_dropout_leave_torch_its_choice(cases: list[Case]) -> None:
    """It has conditions on masks and their strides, and on dropout, under which cuDNN does not take them."""
    padding, window = (on_cuda(*shape, dtype=torch.bool) for shape in ((2, 64), (1, 1, 64, 64)))
    for given in ({"mask": padding}, {"mask": window}, {"seq": 9}, {"dropout": 0.5}):
        assert through_sdpa(**given) == ("sdpa", "for whole prompts without a mask and dropout")  # type: ignore[arg-type]
    assert not cases


NOT_BY_CUDNN: dict[str, dict[str, Any]] = {
    "values are as wide as keys": {"value_width": 24},
    "for more than 8 queries": {"seq": 8},
    "not for torch.float32": {"dtype": torch.float32},
    "not for torch.float64": {"dtype": torch.float64},
    "not all of one dtype on one GPU": {"cached": torch.bfloat16},
    "not all of one dtype on one GPU, but two": {"device": "cuda:1"},
    "implementation is 'eager', not 'sdpa'": {"implementation": "eager"},
}


@pytest.mark.usefixtures("as_shipped", "gpu")
@pytest.mark.parametrize("reason", NOT_BY_CUDNN)
def test_what_cudnn_is_not_asked_for(reason: str, cases: list[Case]) -> None:
    way, said = through_sdpa(**NOT_BY_CUDNN[reason])
    assert way != "cudnn"
    assert said == reason.split(", but")[0]
    assert not cases


@pytest.mark.usefixtures("as_shipped", "gpu")
def test_what_cudnn_does_not_take_goes_elsewhere() -> None:
    """Here there is none."""
    assert through_sdpa() == ("sdpa", "no GPU here whose cuDNN takes values of 16 features for keys of 24")


def test_cudnn_is_not_for_other_devices(cases: list[Case]) -> None:
    query, value = torch.zeros(1, 2, 9, 24).half(), torch.zeros(1, 2, 9, 16).half()
    with ops.watch() as choices:
        attend(query, query, value, Visibility(9, 9, query.device), 0.2, implementation="sdpa")
    assert ("cudnn", "for cuda, not cpu") in choices[0].passed_over
    assert not cases


@pytest.fixture
def asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """On a machine with a Hopper GPU (pretended), whose cuDNN takes values of up to 16 features: what torch is asked."""
    asked: list[Any] = []
    monkeypatch.setattr(
        cudnn,
        "torch",
        SimpleNamespace(
            cuda=SimpleNamespace(is_available=lambda: True, get_device_capability=lambda _: (9, 0)),
            backends=torch.backends,
            are_deterministic_algorithms_enabled=torch.are_deterministic_algorithms_enabled,
            empty=torch.empty,
        ),
    )
    takes = lambda given: (asked.append(given), given.value.shape[-1] <= 16)[1]  # noqa: E731
    monkeypatch.setattr(cudnn, "can_use_cudnn_attention", takes)
    cudnn._takes.cache_clear()
    yield asked
    cudnn._takes.cache_clear()


CPU, HALF = torch.device("cpu"), torch.float16


def test_torch_tells_once_what_cudnn_takes(asked_of_torch: list[Any]) -> None:
    """By tensors of these widths, whose values have gradients, in and outside of fake tensors."""
    for _ in range(2):
        with FakeTensorMode():
            assert cudnn.takes(CPU, HALF, 24, 16, True)
        assert cudnn.takes(CPU, HALF, 24, 16, False)
        assert not cudnn.takes(CPU, HALF, 24, 20, False)
    grouped, plain, wider = asked_of_torch  # once each
    for given, heads, width in ((grouped, 1, 16), (plain, 2, 16), (wider, 2, 20)):
        assert (given.query.shape[1], given.query.shape[3]) == (2, 24)
        assert given.key.shape[1] == given.value.shape[1] == heads
        assert (given.key.shape[3], given.value.shape[3]) == (24, width)
        assert given.query.dtype == given.key.dtype == given.value.dtype == HALF
        assert given.value.requires_grad
        assert (given.attn_mask, given.dropout, given.is_causal) == (None, 0.0, True)
    assert (grouped.enable_gqa, plain.enable_gqa) == (True, False)


def test_cudnn_is_left_out_where_it_is_switched_off(asked_of_torch: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time, whatever it took before; and where torch would prefer another kernel."""
    assert cudnn.takes(CPU, HALF, 24, 16, False)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert not cudnn.takes(CPU, HALF, 24, 16, False)
    monkeypatch.undo()
    assert not cudnn.takes(CPU, HALF, 24, 16, False)  # without CUDA


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_cudnn_is_for_hopper_gpus_and_newer(
    capability: tuple[int, int], asked_of_torch: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudnn.torch.cuda, "get_device_capability", lambda _: capability)
    assert not cudnn.takes(CPU, HALF, 24, 16, False)
    assert not asked_of_torch


def test_deterministic_algorithms_leave_cudnn_out(asked_of_torch: list[Any]) -> None:
    try:
        torch.use_deterministic_algorithms(True)
        assert not cudnn.takes(CPU, HALF, 24, 16, False)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_compiled_prompt_asks_once_what_cudnn_takes(asked_of_torch: list[Any]) -> None:
    """For any number of tokens, and not in its graph."""

    def step(query: Tensor, key: Tensor) -> Tensor:
        visible: Any = Causal(key.shape[2])
        return query if cudnn._not_by_cudnn(query, key, key[..., :16], visible, 0.2) else query + 1

    run = torch.compile(step, backend="eager", fullgraph=True)
    for seq, kv_seq, served in ((9, 9, 1), (10, 10, 1), (12, 12, 1), (12, 20, 0), (13, 21, 0), (8, 8, 0)):
        assert (run(torch.zeros(2, 4, seq, 24), torch.zeros(2, 4, kv_seq, 24)) == served).all()
    assert len(asked_of_torch) == 1
