"""CUDA without a GPU: tensors that have a device, a dtype and a shape but no numbers, and what must not happen to them.

torch's fake tensors say where every result would lie. A CPU build of torch knows no CUDA device, so one that does nothing
is compiled with g++ and registered; nothing is computed either way. What this cannot see: numbers, the insides of custom
operators (theirs are checked apart), speed, and faults of the kernels themselves.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::DeviceType;
static c10::impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA>());
"""

READS_BY_HOST = {
    "aten::_local_scalar_dense": "the host reads a number",
    "aten::equal": "the host reads whether two tensors are equal",
    "aten::nonzero": "the host must learn how many are not zero",
    "aten::masked_select": "the host must learn how many are selected",
    "aten::bincount": "the host must learn the largest number",
    "aten::_unique2": "the host must learn how many differ",
    "aten::unique_consecutive": "the host must learn how many differ",
    "aten::unique_dim": "the host must learn how many differ",
    "aten::repeat_interleave.Tensor": "the host must learn the sum of the repeats",
}
"""Operators that make the host wait for the device."""


class DeviceFaultError(AssertionError):
    """Something a device-clean program does not do, and the line that did it."""


def _culprit() -> str:
    """The innermost line that belongs to this repository and not to this module, as file:line, and its text."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        inside = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        if inside and path not in (Path(__file__), ROOT / "tests" / "shapes.py"):
            lines = path.read_text().splitlines()
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}: {lines[frame.f_lineno - 1].strip()}"
        frame = frame.f_back
    return "outside the repository"


class Watch(TorchDispatchMode):
    """Raises at the first operator that leaves ``device``, takes part of its input from elsewhere, or lets the host wait.

    Raises:
        DeviceFaultError: naming the operator, what is wrong, and the file and line that called it.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seen = 0
        self.elsewhere = torch.device("cpu")

    def __enter__(self) -> Any:
        self.elsewhere.__enter__()  # where tensors come to be that nobody places
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.elsewhere.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen += 1
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = func.name()
        if name in READS_BY_HOST:
            self._fault(name, READS_BY_HOST[name])
        if name.startswith(("aten::index.Tensor", "aten::index_put", "aten::_index_put", "aten::_unsafe_index")):
            chosen = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
            if any(x.dtype in (torch.bool, torch.uint8) for x in chosen):
                self._fault(name, "the host must learn how many the mask selects")
        away = [x for x in given if x.device.type != self.device]
        if away:
            self._fault(name, f"a tensor {tuple(away[0].shape)} on {away[0].device.type} is used")
        if name == "aten::_assert_async.msg" and len(args[1].encode()) >= 255:
            self._fault(name, f"CUDA takes no message of {len(args[1].encode())} bytes")
        out = func(*args, **kwargs)
        away = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.device.type != self.device]
        if away:
            done = "a copy leaves the device for" if given else "a tensor is made on"
            self._fault(name, f"{done} {away[0].device.type}: {tuple(away[0].shape)}")
        return out

    def _fault(self, name: str, what: str) -> None:
        raise DeviceFaultError(f"{_culprit()}\n  {name}: {what}")


def register_cuda() -> None:
    """Let this process make fake CUDA tensors; skips the test where that takes a compiler and there is none."""
    if torch.cuda.is_available() or getattr(register_cuda, "done", False):
        return
    compiler = shutil.which("g++")
    if compiler is None:
        missing = "fake CUDA tensors need g++ (Debian: apt-get install g++), which is not here"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    name = hashlib.sha256((GUARD + torch.__version__ + sys.executable).encode()).hexdigest()[:16]
    library = ROOT / "_build" / f"fake_cuda_{name}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        home = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            source, made = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
            source.write_text(GUARD)
            flags = ["-std=c++20", "-fPIC", "-shared", f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"]
            abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
            subprocess.run([compiler, str(source), "-o", str(made), abi, *flags], check=True)
            made.replace(library)  # whole or not at all, as other processes may be here
    torch.ops.load_library(library)
    register_cuda.done = True  # type: ignore[attr-defined]


@contextmanager
def fake_cuda() -> Iterator[Watch]:
    """Inside, tensors are fake and made on CUDA unless said otherwise; the watch is not yet on: enter it."""
    register_cuda()
    with FakeTensorMode(), torch.device("cuda"):
        yield Watch("cuda")
