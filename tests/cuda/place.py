"""Where this suite runs: on the GPU, or with ``DSV2_TEST_DEVICE=cpu`` on the CPU, where only its own logic is tried."""

import os

import pytest
import torch

DEVICE = os.environ.get("DSV2_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"

device_needed = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no CUDA device")
gpu_only = pytest.mark.skipif(not (ON_GPU and torch.cuda.is_available()), reason="only a GPU can tell")
