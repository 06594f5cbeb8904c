"""The suite for owners of a GPU, run on the CPU: its logic holds, and it can fail. What a GPU does, it cannot tell here."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SLOW = "not 8191 and not 40000"  # long contexts, which a GPU reads in no time


def suite(before: str, *arguments: str, device: str = "cpu") -> subprocess.CompletedProcess[str]:
    """In a process of its own, after running ``before`` there."""
    program = f"{before}\nimport sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-p", "no:cacheprovider", "--color=no", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"DSV2_TEST_DEVICE": device}
    return subprocess.run(
        [sys.executable, "-c", program, *options], cwd=ROOT, capture_output=True, text=True, env=environment
    )


@pytest.mark.thorough
def test_the_suite_for_gpus_passes_on_the_cpu() -> None:
    done = suite("", "tests/cuda", "-k", SLOW)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


FAULTS = {
    "a softmax too flat": (
        "import torch.nn.functional as F\n"
        "right = F.scaled_dot_product_attention\n"
        "F.scaled_dot_product_attention = lambda q, *a, **k: right(0.9 * q, *a, **k)",
        "test_outputs and auto and sdpa and dense and whole and fp32",
    ),
    "a gradient lost": (
        "import torch, torch.nn.functional as F\n"
        "right = F.silu\n"
        "F.silu = lambda x: right(x.detach() if x.dtype == torch.float32 else x)",
        "test_gradients and auto and sdpa and fp32",
    ),
    "a byte more in the count": (
        "from dsv2_ref import accounting\n"
        "right = accounting.cache_bytes\n"
        "accounting.cache_bytes = lambda *a, **k: right(*a, **k) + 1",
        "test_the_cache_is",
    ),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.thorough if "byte" not in fault else ()) for fault in FAULTS]
)
def test_a_planted_fault_turns_it_red(fault: str) -> None:
    before, chosen = FAULTS[fault]
    done = suite(before, "tests/cuda/test_layer_cuda.py", "-k", chosen)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " failed" in done.stdout, done.stderr


FUSED = ("test_kernels_cuda", "kernels", "waits[experts", "replayed[experts")
"""Parts of the files and names of tests that call fused kernels, or need them."""

ALREADY_IMPORTED = "ignore:Module already imported so cannot be rewritten"


@pytest.mark.thorough
@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_an_old_gpu_is_spared_what_it_cannot_do(capability: tuple[int, int], tmp_path: Path) -> None:
    """On a GPU that is only pretended, and without running the bodies of the tests."""
    before = f"""
from tests import pretend_cuda
pretend_cuda.begin()
import torch
torch.cuda.get_device_capability = lambda *_: {capability}
from dsv2_ref.fast import triton
triton.available.cannot_compile = lambda: ""
"""
    report = tmp_path / "report.xml"
    done = suite(before, "tests/cuda", "--setup-only", "-W", ALREADY_IMPORTED, f"--junitxml={report}", device="cuda")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    cases = {
        f"{case.get('classname')}.{case.get('name')}": case.find("skipped") is not None
        for case in ElementTree.parse(report).iter("testcase")
    }
    assert len(cases) > 500
    old = capability < (8, 0)
    for name, skipped in cases.items():
        spared = old and ("bf16" in name or any(part in name for part in FUSED))
        assert skipped == spared, name


def test_without_a_gpu_it_is_skipped() -> None:
    environment = os.environ | {"DSV2_TEST_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    options = ["-q", "-p", "no:cacheprovider", "--color=no", "tests/cuda"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode in (0, 5), done.stdout
    assert "passed" not in done.stdout
