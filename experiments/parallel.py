"""Train the small router model with its experts on several processes, beside the same training in one.

    torchrun --standalone --nproc-per-node 4 -m experiments.parallel
    torchrun --standalone --nproc-per-node 8 -m experiments.parallel --groups 2 --steps 20

Every process takes its own sequences of each batch, and they share the experts; with two groups each group holds all of
them. The first process also trains alone on the whole batch, step by step with the others, and says how far the two
curves are from each other. All is in float64, where sums in another order differ by some 1e-16 of their value.

On a machine with a GPU for each process it runs there, through NCCL; elsewhere on CPUs, through gloo. A process that dies
ends the others, each with one line: at once where its connection breaks, after ``--timeout`` seconds where it hangs.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv2_ref.capacity import TokenDropping
from dsv2_ref.loss_free import LossFreeBalancing
from dsv2_ref.parallel import average_gradients, parallelize_experts
from experiments import router
from experiments.corpus import KINDS, corpus, windows

PER_KIND = 8
"""Sequences of each kind in a batch: 24 together, which 2, 4 and 8 processes share evenly."""


class Training:
    """A model, its optimizer, and what balances it: on all processes together, or on one alone."""

    def __init__(self, run: str, steps: int, dropping: bool, device: str, groups: Sequence[Any] = ()) -> None:
        model = router.tiny_model(run).double().to(device).train()
        self.shared, self.steps = len(groups) > 0, steps
        self.model = parallelize_experts(model, *groups) if self.shared else model
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=router.RATE, betas=(0.9, 0.95), weight_decay=0.1)
        self.after: list[Any] = []
        if model.config.topk_method == "noaux_tc":
            self.after.append(LossFreeBalancing(model, router.SPEED))
        if dropping:
            self.after.append(TokenDropping(model, generator=torch.Generator().manual_seed(4)))

    def step(self, number: int, tokens: Tensor) -> Tensor:
        """Train on these sequences; bits per byte, of this process's own."""
        for group in self.optimiser.param_groups:
            group["lr"] = router.rate_at(number, self.steps)
        loss = router.loss_of(self.model, tokens)
        self.optimiser.zero_grad()
        loss.backward()
        weights = list(self.model.parameters())
        if self.shared:
            norm = average_gradients(self.model)
        else:
            norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        nn.utils.clip_grads_with_norm_(weights, router.CLIP, norm)
        self.optimiser.step()
        for one in self.after:
            one.step()
        return loss.detach()


def train(
    run: str, steps: int, groups: int, dropping: bool, device: str, texts: Mapping[str, Tensor], timeout: float = 60
) -> dict[str, list[float]]:
    """The curves of all processes together and of one alone, in bits per byte at each step; the second on the first
    process only."""
    rank, size = dist.get_rank(), dist.get_world_size()
    places, limit = torch.arange(size).view(groups, -1), timedelta(seconds=timeout)  # groups would wait half an hour
    both = [dist.new_subgroups_by_enumeration(each.tolist(), timeout=limit)[0] for each in (places, places.T)]
    ours, alone = Training(run, steps, dropping, device, both), Training(run, steps, dropping, device)
    generator = torch.Generator().manual_seed(1)
    log: dict[str, list[float]] = {"bits": [], "alone": []}
    for step in range(steps):
        tokens = torch.cat([windows(texts[kind], PER_KIND, router.SEQ + 1, generator) for kind in KINDS]).to(device)
        tokens = torch.cat([tokens[start::size] for start in range(size)])  # some of every kind for each process
        bits = ours.step(step, tokens.chunk(size)[rank])
        dist.all_reduce(bits)
        log["bits"].append(bits.item() / size)
        if rank == 0:
            log["alone"].append(alone.step(step, tokens).item())
    return log


def _said(log: Mapping[str, Sequence[float]], every: int = router.EVERY) -> str:
    lines = ["step  bits per byte  in one process  difference"]
    for step, (bits, alone) in enumerate(zip(log["bits"], log["alone"], strict=True)):
        if step % every == 0 or step + 1 == len(log["bits"]):
            lines.append(f"{step + 1:4}{bits:15.4f}{alone:16.4f}{abs(bits - alone):12.1e}")
    most = max(abs(bits - alone) for bits, alone in zip(log["bits"], log["alone"], strict=True))
    return "\n".join([*lines, f"largest difference of any step: {most:.1e} bits per byte"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run by torchrun, which tells each process its number."""
    parser = argparse.ArgumentParser(prog="torchrun -m experiments.parallel", description="Train on several processes.")
    parser.add_argument("--balance", choices=router.RUNS, default="all", help="what balances the experts")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--groups", type=int, default=1, help="groups of processes that hold all experts each")
    parser.add_argument(
        "--dropping",
        action="store_true",
        help="drop what exceeds a device's budget, for which each group counts its own tokens",
    )
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for another process")
    parser.add_argument("--out", type=Path, help="folder for parallel_log.json")
    args = parser.parse_args(arguments)
    for name in ("steps", "groups", "timeout"):
        if not getattr(args, name) >= 1:
            parser.error(f"argument --{name}: {getattr(args, name)}; wanted at least 1")
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    if not all(name in os.environ for name in names):
        parser.error("wanted torchrun, which starts the processes: torchrun --nproc-per-node 4 -m experiments.parallel")
    rank, size, local, number = (int(os.environ[name]) for name in names)
    torch.set_num_threads(1)
    on_gpus = torch.cuda.device_count() >= number
    device, backend = (f"cuda:{local}", "nccl") if on_gpus else ("cpu", "gloo")
    try:
        if size % args.groups or len(KINDS) * PER_KIND % size:
            raise ValueError(f"{size} processes; wanted a divisor of {len(KINDS) * PER_KIND}, in {args.groups} groups")
        if on_gpus:
            torch.cuda.set_device(local)
        dist.init_process_group(backend, timeout=timedelta(seconds=args.timeout))
        log = train(args.balance, args.steps, args.groups, args.dropping, device, corpus(), args.timeout)
        if rank == 0:
            print(f"{size} processes through {backend}", _said(log), sep="\n", flush=True)
        if rank == 0 and args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "parallel_log.json").write_text(json.dumps(log, separators=(",", ":")) + "\n")
        dist.barrier()
    except (RuntimeError, ValueError, OSError) as error:
        print(f"process {rank} of {size} ends: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for those that are gone
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
