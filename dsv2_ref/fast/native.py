"""Functions in C++, which torch's compiler of graphs builds at the first use, and the products of one row among them
(``rows.cpp``).

torch's own products read a matrix for one row at half of what memory gives, and so do sums that its compiler writes. These
read it once, as it lies, and only the matrices that are chosen of a stack.
"""

import ctypes
import sysconfig
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from dsv2_ref import ops
from dsv2_ref.fast.products import as_operator


def find_compiler() -> None:
    """Raise RuntimeError where torch finds no C++ compiler, no headers of Python, or no folder for what it compiles."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "compiled is True; wanted a C++ compiler that torch can call, such as g++, for it"
        ) from error
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise RuntimeError(
            f"compiled is True; wanted Python's headers for it (Debian: python3-dev); {header} is missing"
        )
    try:
        with tempfile.TemporaryFile(dir=cache_dir()):
            pass
    except OSError as error:
        wanted = "wanted a folder to write to, in TORCHINDUCTOR_CACHE_DIR"
        raise RuntimeError(f"compiled is True; {wanted}: {error}") from error


@cache
def _missing() -> str:
    try:
        find_compiler()
    except RuntimeError:
        return "no C++ compiler, no headers of Python, or no folder for what is compiled"
    return ""


@ops.once_when_compiling
def cannot_build() -> str:
    """Why nothing can be built here; an empty string if it can. Found out once."""
    return _missing()


FLAGS = "-ftree-loop-vectorize", "-ffp-contract=fast"
"""Beside those of torch, which leave loops to its own code."""


POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64
BEFORE, AFTER = [POINTER, POINTER, SIZE], [POINTER, SIZE, SIZE, SIZE, SIZE]
FUNCTIONS = {
    "rows.cpp": {
        "product_bf16": [*BEFORE, POINTER, SIZE, *AFTER],
        "product_int8": [*BEFORE, POINTER, SIZE, *AFTER],
        "product_int4": [*BEFORE, POINTER, POINTER, SIZE, SIZE, *AFTER],
    },
    "attend.cpp": {"attend_one": [POINTER, POINTER, ctypes.c_float, POINTER, *8 * [SIZE]]},
}
PRODUCTS = {torch.bfloat16: "product_bf16", torch.int8: "product_int8", torch.uint8: "product_int4"}


@cache
def functions(file: str) -> dict[str, Any]:
    """What was compiled of a file, by its name there."""
    from torch._inductor.codecache import CppCodeCache

    source = resources.files("dsv2_ref.fast").joinpath(file).read_text()
    library = CppCodeCache.load(source, extra_flags=FLAGS)
    found = {name: library[name] for name in FUNCTIONS[file]}
    for name, function in found.items():
        function.argtypes, function.restype = FUNCTIONS[file][name], None
    return found


@cache
def why_not_built(file: str) -> str:
    """Why a file cannot be compiled here; an empty string once it is. It is tried once."""
    if reason := cannot_build():
        return reason
    try:
        functions(file)
    except Exception as error:  # of the compiler, or of the folder for what it makes: other ways serve then
        return f"{file} cannot be built: {str(error).splitlines()[0]}"
    return ""


def _side_by_side(weight: Tensor) -> bool:
    return weight.stride()[-2:] == (weight.shape[-1], 1)


def _empty(rows: Tensor, weight: Tensor, chosen: Tensor | None = None, *_: Any) -> Tensor:
    return rows.new_empty(len(weight if chosen is None else chosen), weight.shape[1], dtype=torch.float32)


def _multiply(rows: Tensor, weight: Tensor, layout: list[int], chosen: Tensor | None) -> Tensor:
    wide = weight.shape[2] * (2 if weight.dtype == torch.uint8 else 1)
    if rows.dtype != torch.bfloat16 or rows.shape[1] != wide or not _side_by_side(weight):
        wanted = f"wanted torch.bfloat16 rows of {wide} features, and matrices whose rows lie one behind the other"
        raise RuntimeError(f"rows are {tuple(rows.shape)} {rows.dtype}, matrices {tuple(weight.shape)}; {wanted}")
    if chosen is not None and not all(0 <= index < len(weight) for index in chosen.tolist()):
        raise IndexError(f"chosen is {chosen.tolist()}; wanted indices from 0 to {len(weight) - 1}")
    rows, indices = rows.contiguous(), None if chosen is None else chosen.to(torch.int64).contiguous()
    out = _empty(rows, weight, chosen)
    step = rows.stride(0) if len(rows) > 1 else 0
    pointers = [None if x is None else x.data_ptr() for x in (out, rows, weight, indices)]
    sizes = *out.shape, rows.shape[1], torch.get_num_threads()
    functions("rows.cpp")[PRODUCTS[weight.dtype]](*pointers[:2], step, pointers[2], *layout, pointers[3], *sizes)
    return out


def no_gradients(*_: Any) -> None:
    """Of operators for inference."""
    raise NotImplementedError("what is computed of one row in C++ gives no gradients")


@as_operator(_empty, no_gradients)
def row_products(rows: Tensor, weight: Tensor, chosen: Tensor | None = None) -> Tensor:
    """``weight[chosen] @ rows`` in float32, where ``weight`` is a stack of matrices in bfloat16, or of int8 codes.

    Args:
        rows: (1 or choices, inputs) bfloat16: one row, or one for each choice. weight: (stack, outputs, inputs), see
            `takes`. chosen: (choices,) int64; None takes every matrix in its turn.

    Returns:
        (choices, outputs).
    """
    return _multiply(rows, weight, [weight.stride(0)], chosen)


@as_operator(_empty, no_gradients)
def row_products_of_int4(
    rows: Tensor, codes: Tensor, chosen: Tensor | None, scales_and_zeros: Tensor, group: int, block_rows: int
) -> Tensor:
    """`row_products` of four bits, as `dsv2_ref.fast.quantized.lay_out_codes` lays them out."""
    stack, outputs, half = codes.shape
    laid_out = codes.is_contiguous() and scales_and_zeros.is_contiguous() and scales_and_zeros.dtype == torch.bfloat16
    if not laid_out or scales_and_zeros.numel() != stack * outputs * (2 * half // group) * 2:
        raise RuntimeError(f"codes are {tuple(codes.shape)}; wanted them, and scales, as pack_weights lays them out")
    return _multiply(rows, codes, [scales_and_zeros.data_ptr(), group, block_rows], chosen)


def takes(weight: Shaped[Tensor, "... outputs inputs"]) -> bool:
    """Whether these are matrices in bfloat16, or of int8 codes, whose rows lie one behind the other."""
    return weight.dtype in (torch.bfloat16, torch.int8) and _side_by_side(weight)
