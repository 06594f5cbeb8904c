"""While tests run, every call of the package is checked against the shapes in its signature."""

import torch
from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  the checker is found by name, so its module must be there

install_import_hook("dsv2_ref", "tests.shapes.checked")

torch.set_num_threads(1)
