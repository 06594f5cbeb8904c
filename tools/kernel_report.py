"""What Triton's compiler makes of the kernels for a GPU generation, without a GPU: registers, shared memory, spills.

``python -m tools.kernel_report`` prints it for every kernel and generation.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2_ref.checks import require
from dsv2_ref.fast.triton import plan

SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one block may use, by compute capability (CUDA C++ Programming Guide, technical
specifications)."""

REGISTERS = 2**16
"""Registers of a multiprocessor, in every generation here (as above)."""

WARPS = {80: 64, 89: 48, 90: 64, 100: 64}
"""Warps that a multiprocessor keeps at once (as above)."""

RESERVED = 1024
"""Bytes of shared memory that a block takes besides its own (as above)."""


@dataclass(frozen=True)
class Resources:
    """What the compiler reports of one kernel for one GPU generation.

    Attributes:
        kernel: its name. capability: 10 · major + minor, as 90 for sm_90. dtype: fp16, bf16 or fp32.
        registers: of a thread. shared: bytes of a block. stack: bytes of a thread in memory, where registers spill.
        warps: of a block, 32 threads each.
    """

    kernel: str
    capability: int
    dtype: str
    registers: int
    shared: int
    stack: int
    warps: int

    @property
    def fits(self) -> bool:
        """Whether a block may use so much shared memory there."""
        return self.shared <= SHARED_BYTES[self.capability]

    @property
    def at_once(self) -> int:
        """Blocks that a multiprocessor keeps at once, as many as shared memory, registers and warps allow."""
        by_shared = (SHARED_BYTES[self.capability] + RESERVED) // (self.shared + RESERVED)
        registers = -(-self.registers // 8) * 8  # given out by eight
        return min(by_shared, REGISTERS // (registers * 32 * self.warps), WARPS[self.capability] // self.warps)


DTYPES = ("fp16", "bf16", "fp32")
"""What the kernels know, as Triton calls it."""

_DECODED = {"query": "*x", "ropes": "*x", "padding": "*u8", "sums": "*fp32", "log_sums": "*fp32", "scale": "fp32"}
_DECODING = {"HAS_PADDING": True, "ONE_SHARE": False, "LATENT": 512, "ROPE": 64, "p_token": 1}

_KERNELS: dict[str, tuple[str, str, dict[str, str], dict[str, Any], dict[str, Any]]] = {
    # name: module, function, types of its arguments ("x" stands for the dtype), constants, options
    "add_rmsnorm": (
        "norm", "add_rmsnorm_kernel",
        {"inverse_rms": "*fp32", "eps": "fp32"} | dict.fromkeys(("update", "residual", "weight", "total", "normed"), "*x"),
        {"HAS_RESIDUAL": True, "BLOCK": 8192}, {"num_warps": 16},
    ),
    "add_rmsnorm_backward": (
        "norm", "add_rmsnorm_backward_kernel",
        {"inverse_rms": "*fp32", "by_weight": "*fp32"} | dict.fromkeys(("grad", "total", "weight", "by_input"), "*x"),
        {"BLOCK": 8192}, {"num_warps": 16},
    ),
    "rotate": (
        "rotate", "rotate_kernel",
        {"x": "*x", "out": "*x", "cos": "*fp32", "sin": "*fp32", "sign": "fp32"},
        {"BLOCK": 16, "PAIRS": 32}, {"num_warps": 4, "enable_fp_fusion": False},
    ),
    **{
        f"mla_partial{name}": ("decode", "mla_partial_kernel", _DECODED | types, _DECODING | constants, {})
        for name, types, constants in (
            ("", {"latents": "*x", "scales": "*x"}, {"FORMAT": "", "TILE": 1}),
            (", fp8", {"latents": "*u8", "scales": "*fp32"}, {"FORMAT": "fp8", "TILE": 128}),
            (", int8", {"latents": "*i8", "scales": "*fp32"}, {"FORMAT": "int8", "TILE": 128}),
        )
    },
    "mla_combine": (
        "decode", "mla_combine_kernel",
        {"sums": "*fp32", "log_sums": "*fp32", "out": "*x"},
        {"SHARES": plan.MAX_SHARES, "AT_ONCE": 16, "COLUMNS": 128}, {"num_warps": 4},
    ),
    "grouped_product": (
        "experts", "grouped_product_kernel",
        {"rows": "*x", "weights": "*x", "group_ends": "*i32", "order": "*i32", "out": "*x"},
        {"GROUPS": 256, "weight_input": 1, "TOP_K": 0}, {"num_stages": 3},
    ),
    "sort": (
        "moe", "sort_kernel",
        {"choices": "*i64", "order": "*i32", "group_ends": "*i32", "places": "*i32"}, {"BLOCK": 64}, {"num_warps": 4},
    ),
    "swiglu": (
        "moe", "swiglu_kernel", {"both": "*x", "out": "*x"}, {"COLUMNS": 1024}, {"num_warps": 4}
    ),
    "combine": (
        "moe", "combine_kernel",
        {"sorted_out": "*x", "places": "*i32", "weights": "*fp32", "out": "*x"},
        {"TOP_K": 6, "COLUMNS": 1024}, {"num_warps": 4},
    ),
    **{
        f"dense, {kind}": (
            "quantized", "dense_kernel", {"codes": codes, "scales": scales, "out": "*x"},
            {"KIND": kind, "SCALE_OUTPUTS": 128 if kind == "fp8" else 1}, {"num_warps": 4},
        )
        for kind, codes, scales in (("int8", "*i8", "*x"), ("int4", "*u8", "*x"), ("fp8", "*u8", "*fp32"))
    },
    **{
        f"quantized_product, {kind}": (
            "quantized", "quantized_product_kernel",
            {"rows": "*x", "codes": codes, "scales": scales, "group_ends": "*i32", "order": "*i32", "out": "*x"},
            {"KIND": kind, "GROUPED": True, "SCALE_OUTPUTS": 128 if kind == "fp8" else 1, "GROUPS": 256}
            | {"TOP_K": 0}, {},
        )
        for kind, codes, scales in (("int8", "*i8", "*x"), ("int4", "*u8", "*x"), ("fp8", "*u8", "*fp32"))
    },
    **{
        f"{name}{', ' * bool(kind)}{kind}": (
            "few_rows", f"{name}_kernel",
            {"x": "*x", "rows": "*x", "codes": codes, "scales": scales, "choices": "*i64", "weights": "*fp32", "out": "*x"},
            {"KIND": kind, "SHARED": {"int4": 64, "fp8": 128}.get(kind, 0), "TOP_K": 6}, {},
        )
        for name in ("rows", "gate_up", "down")
        for kind, codes, scales in (
            ("", "*x", "*x"), ("int8", "*i8", "*x"), ("int4", "*u8", "*x"), ("fp8", "*u8", "*fp32")
        )
    },
}  # fmt: skip

HALF_ONLY = ("mla_partial, fp8", "mla_partial, int8")
"""Kernels that are launched in half precision alone: in float32 they would spill."""

MOST_SPILLED = 96
"""Bytes that a thread may spill: blocks that read records spill as many on sm_90, and were faster on an H100 than smaller
ones that spill none."""

KERNELS = tuple(_KERNELS)
"""Names that `resources` knows; sizes are those of DeepSeek-V2 (D up to 8192, C = 512, R = 64, up to 256 experts)."""


def launched_with(
    kernel: str, itemsize: int, capability: int = 90, heads: int = 128
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of a kernel as it is launched at the sizes of DeepSeek-V2, for elements of ``itemsize``
    bytes on a GPU of that generation; the decoding kernel for one query of so many heads."""
    place, function, _, fixed, options = _KERNELS[kernel]
    module = importlib.import_module(f"dsv2_ref.fast.triton.{place}")
    fixed, options = dict(fixed), dict(options)
    if kernel.startswith("mla_partial"):
        gpu = plan.Gpu(1, SHARED_BYTES[capability] + RESERVED, capability // 10)
        tile = plan.decode_tile(heads, 576, itemsize, gpu, bool(fixed["FORMAT"]))
        fixed |= {"ROWS": tile.rows, "KEYS": tile.keys}
        options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    if kernel == "grouped_product":
        fixed |= zip(("ROWS", "COLUMNS", "INPUTS"), module.tile_sizes(2**20, 1, itemsize), strict=True)
        options["num_warps"] = module.warps(fixed["ROWS"])
    if kernel.startswith("quantized_product"):
        shared = {"int8": 5120, "int4": 64, "fp8": 128}[fixed["KIND"]]
        tile, fixed["SHARED"] = module.tile_of(fixed["KIND"], 2**20, 1, itemsize, shared)
        fixed |= {"ROWS": tile.rows, "COLUMNS": tile.columns, "INPUTS": tile.inputs, "STAGES": tile.stages}
        options["num_warps"] = tile.warps
    if kernel.startswith("dense"):
        fixed |= module.DENSE_TILE
    if place == "few_rows":
        tile = module.TILES[fixed["KIND"]]
        fixed |= {"COLUMNS": tile.columns, "INPUTS": tile.inputs, "STAGES": tile.stages}
        options["num_warps"] = tile.warps
        if function == "rows_kernel":
            del fixed["TOP_K"]
    return fixed, options


def resources(kernel: str, capability: int, dtype: str = "bf16", heads: int = 128, **constants: int) -> Resources:
    """Compile a kernel to machine code and read what the compiler says of it.

    Args:
        kernel: one of `KERNELS`.
        capability: 80, 89, 90 or 100.
        dtype: fp16, bf16 or fp32.
        heads: of the decoding kernel, by which its tile is chosen.
        **constants: block sizes, ``num_warps`` and ``num_stages`` in place of the shipped ones.

    Raises:
        ValueError: for a kernel, capability, dtype or constant that is not known.
        ImportError: without Triton.
    """
    require(kernel in _KERNELS, "kernel", kernel, "one of {}", KERNELS)
    require(capability in SHARED_BYTES, "capability", capability, "one of {}", tuple(SHARED_BYTES))
    require(dtype in DTYPES, "dtype", dtype, "one of {}", DTYPES)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    place, function, types, *_ = _KERNELS[kernel]
    module = importlib.import_module(f"dsv2_ref.fast.triton.{place}")
    fixed, options = launched_with(kernel, 4 if dtype == "fp32" else 2, capability, heads)
    options |= {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    jitted = getattr(module, function)
    for name in constants:
        require(
            name in jitted.arg_names, "a constant", name, "one of {}", (*jitted.arg_names, "num_warps", "num_stages")
        )
    fixed |= constants
    types = types | ({"sums": "*x"} if fixed.get("ONE_SHARE") else {})  # then the output itself
    signature = {
        name: "constexpr" if name in fixed else types.get(name, "i32").replace("*x", f"*{dtype}")
        for name in jitted.arg_names
    }
    # As at a launch: a stride of 1 is a constant, and pointers and most sizes are multiples of 16, from which follows
    # how wide loads can be.
    unaligned = {"shares", "seq", "kv_seq", "p_batch", "weight_input"}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(jitted.arg_names)
        if (signature[name] == "i32" and name not in unaligned) or signature[name].startswith("*")
    }
    source = ASTSource(jitted, signature, fixed, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout)
    require(found is not None, "report", report.stdout, "registers and stack of a kernel", error=RuntimeError)
    assert found is not None
    return Resources(
        kernel, capability, dtype, int(found[1]), compiled.metadata.shared, int(found[2]), options["num_warps"]
    )


def _constant(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    return name, int(size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of `resources`, and return 0, or 1 if anything does not fit or spills more than `MOST_SPILLED`."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_report", description=main.__doc__)
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", metavar="NAME", help="some kernels instead of all")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--set", type=_constant, action="append", default=[], metavar="NAME=SIZE", help="a block size, or num_warps"
    )
    parser.add_argument("--heads", type=int, default=128, help="of the decoding kernel, by which its tile is chosen")
    chosen = parser.parse_args(arguments)
    if chosen.set and len(chosen.kernel or ()) != 1:
        parser.error("--set is for one kernel: say which with --kernel")
    print(f"{chosen.dtype:26}{'registers':>10}{'spilled':>9}{'shared':>9}{'warps':>7}{'at once':>9}")
    good = True
    some = [kernel for kernel in KERNELS if chosen.dtype != "fp32" or kernel not in HALF_ONLY]
    for kernel in chosen.kernel or some:
        for capability in SHARED_BYTES:
            found = resources(kernel, capability, chosen.dtype, chosen.heads, **dict(chosen.set))
            good = good and found.fits and found.stack <= MOST_SPILLED
            at_once = found.at_once if found.fits else "none"
            place = f"sm_{capability}"
            row = f"{kernel if capability == min(SHARED_BYTES) else '':24} {place:6}"
            print(f"{row}{found.registers:5}{found.stack:9}{found.shared:9,}{found.warps:7}{at_once:>9}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
