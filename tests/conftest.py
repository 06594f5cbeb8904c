"""Check the shapes in every signature of the package (jaxtyping), on small integers of threads, while tests run."""

import torch
from jaxtyping import install_import_hook

install_import_hook("dsv2_ref", "beartype.beartype")

torch.set_num_threads(1)
