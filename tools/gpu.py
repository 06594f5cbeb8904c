"""Say in one line why this Python cannot run a command for NVIDIA GPUs, if it cannot.

    python -m tools.gpu COMMAND MODULE ...

``COMMAND`` is what the line names, as in ``make test-cuda``; the modules are those that it imports. The exit status is 1
where something is missing: a module, a new enough PyTorch, a GPU that it sees, code for this GPU, or what Triton compiles
with.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

OLDEST_TORCH = "2.11"
DRIVERS = {"12": 525, "13": 580}
"""The oldest driver for each major version of CUDA."""


def has_code(capability: tuple[int, int], architectures: Iterable[str]) -> bool:
    """Whether a GPU runs what was compiled for these, such as ``sm_80`` (machine code) and ``compute_120`` (to be translated)."""
    for architecture in architectures:
        kind, number = architecture.split("_")
        major, minor = divmod(int("".join(filter(str.isdigit, number))), 10)
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


def lacking(modules: Iterable[str]) -> str | None:
    """What this Python and this machine lack, in one line with what helps; None where nothing is lacking."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} cannot be imported here; {sys.executable} -m pip install '.[test-cuda]'"
    import torch  # not at the top, as it may be what is missing

    if torch.__version__ < f"{OLDEST_TORCH}.0a0":
        return f"torch {torch.__version__} is too old: torch {OLDEST_TORCH} or newer is needed"
    if not torch.cuda.is_available():
        said = f"torch sees no CUDA GPU here: torch {torch.__version__} was built"
        cuda = torch.version.cuda
        if cuda is None:
            return f"{said} without CUDA"
        driver = DRIVERS.get(cuda.split(".")[0])
        return f"{said} for CUDA {cuda}, which needs NVIDIA's driver{f' {driver} or newer' * bool(driver)} (see nvidia-smi)"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability()
    gpu = f"{torch.cuda.get_device_name()} (sm_{capability[0]}{capability[1]})"
    if not has_code(capability, torch.cuda.get_arch_list()):
        return (
            f"torch {torch.__version__} has no code for {gpu}; for a V100 install the build for CUDA 12.6: "
            "pip install torch --index-url https://download.pytorch.org/whl/cu126"
        )
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")  # where Triton looks, on Debian too
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if importlib.util.find_spec("triton") is not None and not (compiler and headers.exists()):
        return f"Triton needs a C compiler and {headers} (on Debian and Ubuntu: apt install gcc python3-dev)"
    return None


def main() -> None:
    """Exit with the line, or with status 0."""
    command, *modules = sys.argv[1:]
    if said := lacking(modules):
        sys.exit(f"{command}: {said}")


if __name__ == "__main__":
    main()
