"""While tests run, every call of the package is checked against the shapes in its signature.

Not with ``--as-shipped``, and not in the suite for GPUs, which compiles: the compiler cannot see through the checks.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

from tests import shapes

SUITE_FOR_GPUS = Path(__file__).parent / "cuda"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-shipped", action="store_true", help="do not check calls against the shapes in signatures")


def pytest_configure(config: pytest.Config) -> None:
    """Before the package is imported."""
    asked_for = [Path(config.invocation_params.dir, argument.split("::")[0]) for argument in config.args]
    alone = all(path.resolve().is_relative_to(SUITE_FOR_GPUS) for path in asked_for)
    if "DSV2_TEST_DEVICE" not in os.environ and not alone and not config.getoption("--as-shipped"):
        install_import_hook("dsv2_ref", "tests.shapes.checked")


SHARED = ("test_parallel.py", "site/test_repository.py", "site/test_pdf.py")
"""Files whose tests share what takes long to make: one process runs them, where several run the others."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where pytest-xdist is there. Its own groups are lost with pytest 9.2, which has no ``_nodeid``."""
    from xdist.scheduler import LoadScopeScheduling

    class OneProcessForSome(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if file.endswith(SHARED) else nodeid

    return OneProcessForSome(config, log)


torch.set_num_threads(1)

# The same few examples on every machine: a failure is found again by whoever looks for it.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=25)
settings.register_profile("thorough", settings.get_profile("repeatable"), max_examples=200)
settings.load_profile("repeatable")


@pytest.fixture
def as_shipped() -> Iterator[None]:
    """Signatures are not checked in this test, so that the package's own errors are seen."""
    with shapes.unchecked():
        yield
