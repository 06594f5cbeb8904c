"""Notebooks run unchanged on CUDA and print what is stored: on a GPU that is only pretended (`tests.pretend_cuda`), by a
processor without vector instructions and in two threads, where sums are taken in another order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tools import notebooks

OTHER_ORDER = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "OMP_NUM_THREADS": "2",
}
BEGIN = (
    f"import sys\nsys.path.insert(0, {str(notebooks.ROOT)!r})\nfrom tests import pretend_cuda\n_ = pretend_cuda.begin()"
)


def run(notebook: nbformat.NotebookNode, path: Path) -> subprocess.CompletedProcess[str]:
    """nbval over a notebook, behind a cell that pretends a GPU."""
    notebook.cells.insert(0, new_code_cell(BEGIN, execution_count=0))
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--color=no", "--nbval"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command += ["--nbval-current-env", str(path)]
    return subprocess.run(command, cwd=path.parent, env=alone | OTHER_ORDER, capture_output=True, text=True)


QUICK = ("overview",)
"""What is run for every change; all others, in `make test-thorough`."""


# The chapter on kernels stays on the CPU, where it interprets them, whatever there is.
@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.thorough, id=path.stem)
        for path in notebooks.in_book()
        if path.stem != "kernels"
    ],
)
def test_a_notebook_prints_the_same_on_cuda(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/svg+xml", None)  # a drawing is no text to compare
    done = run(notebook, tmp_path / path.name)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


@pytest.mark.slow
def test_what_would_fail_or_differ_on_a_gpu_is_seen(tmp_path: Path) -> None:
    """The planted faults, and cells that are right."""
    cells = [
        "import torch\ndevice = 'cuda' if torch.cuda.is_available() else 'cpu'\nx = torch.arange(3.0).to(device)",
        "print((x * 2).sum().item(), x.cpu().numpy().sum())",
        "x + torch.ones(3)",
        "x.numpy()",
        "print(x)",
        "torch.randn(3, generator=torch.Generator(), device=device)",
        "print(torch.nn.Linear(3, 1).to(device).weight.is_cuda)",
        "torch.nn.Linear(3, 1)(x)",
    ]
    path = tmp_path / "faults.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in cells]), path)
    stored = nbformat.read(path, as_version=4)
    stored.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="6.0 3.0\n")]
    stored.cells[4].outputs = [nbformat.v4.new_output("stream", name="stdout", text="tensor([0., 1., 2.])\n")]
    stored.cells[6].outputs = [nbformat.v4.new_output("stream", name="stdout", text="True\n")]
    for number, cell in enumerate(stored.cells, start=1):
        cell.execution_count = number
    report = run(stored, path).stdout
    found = {int(cell): result for result, cell in re.findall(r"^(\w+) faults\.ipynb::Cell (\d+)", report, re.M)}
    right = {0, 1, 2, 7}
    assert found == {cell: "PASSED" if cell in right else "FAILED" for cell in range(9)}, report
