"""How much memory a prefill takes at its peak, measured in a process of its own."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from bench.work import CONFIG
from dsv2_ref import DeepseekV2Attention


def status(field: str) -> int:
    """Bytes that Linux tells of this process under a name, such as ``VmHWM``, the peak of its memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _peak(seq: int) -> tuple[int, int]:
    torch.set_num_threads(2)
    attention = DeepseekV2Attention(CONFIG, 0).to(torch.bfloat16).eval()
    with torch.inference_mode():
        attention(torch.randn(1, 64, CONFIG.hidden_size, dtype=torch.bfloat16))
        x = torch.randn(1, seq, CONFIG.hidden_size, dtype=torch.bfloat16)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
        _, _, cache = attention(x, use_cache=True)
        return status("VmHWM") - before, cache.nbytes


def attention_prefill_peak(seq: int) -> tuple[int, int]:
    """Bytes beyond weights and input at the peak of a bfloat16 prefill of ``seq`` tokens, and bytes of its cache.

    Raises:
        OSError: where the kernel does not say (anywhere but on Linux).
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # which says so if it is killed
        return pool.submit(_peak, seq).result()
