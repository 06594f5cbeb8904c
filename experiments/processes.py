"""Run a function on several processes of this machine at once, joined by PyTorch's own engine, gloo.

Processes are forked from a server that has imported PyTorch once, so that eight of them start in a fraction of a second
(spawned, each would import PyTorch itself). Nothing but what is passed reaches them, and they use CPUs only.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def together(ranks: int, work: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """``work(*args)`` on so many processes, which know their rank; what each returned, by rank.

    Args:
        ranks: number of processes.
        work: a function of a module that can be imported; it returns tensors, numbers and containers of them.
        args: what it is given, without tensors.
        timeout: seconds that a process waits for the others in a collective call.

    Raises:
        torch.multiprocessing.ProcessException: if a process fails; the others are ended.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        _start_server(work.__module__)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_one, (ranks, folder, timeout, work, args), nprocs=ranks, start_method=method)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]


def _start_server(module: str) -> None:
    """Start it, unless it runs, with what it needs: the module, and the path by which it is found."""
    multiprocessing.set_forkserver_preload([module])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _one(rank: int, ranks: int, folder: str, timeout: float, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):  # so that nothing listens but on this machine's own address
            os.environ["GLOO_SOCKET_IFNAME"] = name
    meet: dict[str, Any] = {"init_method": f"file://{folder}/meet", "timeout": timedelta(seconds=timeout)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks, **meet)
    torch.save(work(*args), Path(folder) / f"{rank}.pt")
    dist.barrier()  # nobody leaves while others still send
    dist.destroy_process_group()
