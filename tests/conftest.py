"""While tests run, every call of the package is checked against the shapes in its signature.

Not in the suite for GPUs, which compiles: the compiler cannot see through the checks.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

from tests import shapes

if "DSV2_TEST_DEVICE" not in os.environ:
    install_import_hook("dsv2_ref", "tests.shapes.checked")

torch.set_num_threads(1)

# The same few examples on every machine: a failure is found again by whoever looks for it.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=50)
settings.load_profile("repeatable")


@pytest.fixture
def as_shipped() -> Iterator[None]:
    """Signatures are not checked in this test, so that the package's own errors are seen."""
    with shapes.unchecked():
        yield
