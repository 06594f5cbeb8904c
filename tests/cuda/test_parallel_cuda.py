"""Experts on several GPUs, through NCCL: what `tests/test_parallel.py` does on CPUs, as torchrun starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda.place import GPU_FOUND

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "options", [["--balance", "all"], ["--balance", "pooled", "--dropping"], ["--balance", "bias"]]
)
def test_torchrun_trains_the_router_as_one_process_does(options: list[str], tmp_path: Path) -> None:
    """In float64, where three steps of Adam, which divides by small gradients, enlarge differences of some 1e-16."""
    if not GPU_FOUND or torch.cuda.device_count() < 2:
        pytest.skip("for two GPUs or more")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "experiments.parallel", "--steps", "3", "--out", str(tmp_path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "through nccl" in done.stdout
    log = json.loads((tmp_path / "parallel_log.json").read_text())
    assert log["bits"] == pytest.approx(log["alone"], abs=1e-11)
