"""Operators of torch in C++, which are compiled at the first use on a machine, with torch's own settings, and the products of
one row among them (``rows.cpp``).

torch's own products read a matrix for one row at half of what memory gives, and so do sums that its compiler writes. These
read it once, as it lies, and only the matrices that are chosen of a stack.
"""

import functools
import sysconfig
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

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


FLAGS: tuple[str, ...] = ("-ffp-contract=fast",)
"""Beside those of torch."""


NAMESPACE = "dsv2_ref"


HEADERS = {
    "rows.cpp": ("operators.h", "products.h"),
    "layer.cpp": ("operators.h", "products.h", "attention.h"),
    "attend.cpp": ("operators.h", "attention.h"),
}


@cache
def build(file: str) -> None:
    """Compile a file and load it: its functions become those of the operators of these names for CPUs."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpp_builder import is_gcc

    vectorize = ("-ftree-loop-vectorize",) if is_gcc() else ()  # torch switches it off, where it has its own code
    folder = resources.files("dsv2_ref.fast")
    source = "".join(folder.joinpath(name).read_text() for name in (*HEADERS[file], file))
    CppCodeCache.load(source, extra_flags=(*vectorize, *FLAGS, f"-DNAMESPACE={NAMESPACE}"))


@cache
def why_not_built(file: str) -> str:
    """Why a file cannot be compiled here; an empty string once it is. It is tried once."""
    if reason := cannot_build():
        return reason
    try:
        build(file)
    except Exception as error:  # of the compiler, or of the folder for what it makes: other ways serve then
        lines = str(error).splitlines() or [type(error).__name__]
        line = next((line for line in lines if "error:" in line), lines[0])  # the compiler's own first word
        return f"{file} cannot be built: {line}"
    return ""


def is_watched() -> bool:
    """Whether something sees or changes the operations of torch, which one in C++ would hide from it."""
    if torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return True
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    return not all(isinstance(mode, DeviceContext) for mode in modes)  # of `torch.set_default_device`


def _no_gradients(*_: Any) -> None:
    raise NotImplementedError("what is computed of one row in C++ gives no gradients")


def in_cpp(
    file: str, fake: Callable[..., Any] | None = None, writes: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Make the decorated signature an operator of torch for CPUs, whose code is in a file. The first call builds it; ``fake``
    makes an empty output, for graphs, which then say that it gives no gradients; ``writes`` names the arguments that it
    changes."""

    def declare(signature: Callable[..., Any]) -> Any:
        @functools.wraps(signature)
        def build_first(*args: Any) -> Any:
            given = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
            tensors = [x for x in given if isinstance(x, Tensor)]
            for x in tensors:
                if x.device.type != "cpu" or x.layout is not torch.strided:
                    where = f"{x.device}" if x.device.type != "cpu" else f"{x.layout}"
                    raise NotImplementedError(f"{file} is for plain tensors on the CPU, and not for {where}")
            if not tensors:
                raise NotImplementedError(f"{file} needs a tensor on the CPU")
            build(file)
            return operator(*args)

        operator = as_operator(fake, _no_gradients if fake else None, writes=writes)(build_first)
        return operator

    return declare


def _empty(rows: Tensor, weight: Tensor, chosen: Tensor | None = None, *_: Any) -> Tensor:
    return rows.new_empty(len(weight if chosen is None else chosen), weight.shape[1], dtype=torch.float32)


@in_cpp("rows.cpp", _empty)
def row_products(rows: Tensor, weight: Tensor, chosen: Tensor | None = None) -> Tensor:  # type: ignore[empty-body]
    """``weight[chosen] @ rows`` in float32, where ``weight`` is a stack of matrices in bfloat16, float32, or of int8 codes.

    Args:
        rows: (1 or choices, inputs) bfloat16: one row, or one for each choice. weight: (stack, outputs, inputs), whose rows,
            or columns, lie one behind the other. chosen: (choices,) integers; None takes every matrix in its turn.

    Returns:
        (choices, outputs).
    """


@in_cpp("rows.cpp", _empty)
def row_products_of_int4(  # type: ignore[empty-body]
    rows: Tensor, codes: Tensor, chosen: Tensor | None, scales_and_zeros: Tensor, group: int, block_rows: int
) -> Tensor:
    """`row_products` of four bits, as `dsv2_ref.fast.quantized.lay_out_codes` lays them out."""


def takes(weight: Shaped[Tensor, "... outputs inputs"]) -> bool:
    """Whether these are matrices in bfloat16, or of int8 codes, whose rows lie one behind the other."""
    return weight.dtype in (torch.bfloat16, torch.int8) and weight.stride()[-2:] == (weight.shape[-1], 1)
