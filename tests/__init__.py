"""Tests; side by side on few processors, so that each keeps to one thread."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read once, when NumPy is first imported
