"""One training step of the small trained model with its experts on several processes, and what they sent.

    python -c "from experiments.processes import together; from experiments import parallel_demo as demo; \\
        print(together(4, demo.step, 'all')[0]['loss'])"
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dsv2_ref.parallel import Ranks, average_gradients, parallelize_experts
from experiments import router


def batch() -> Tensor:
    """24 of the stored sequences of 128 bytes: six of code, of prose, of sums, and two more of each."""
    kinds = router.sample().values()
    return torch.cat([kind[:6] for kind in kinds] + [kind[6:8] for kind in kinds])


def step(run: str, groups: int = 1) -> dict[str, Any]:
    """The step of this rank: forward, backward, and the mean of the gradients."""
    shape, names = (groups, dist.get_world_size() // groups), ("replicas", "experts")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = router.load(run).double().train()  # the same on all ranks
    parallelize_experts(model, mesh["experts"], mesh["replicas"])

    own = batch().chunk(dist.get_world_size())[dist.get_rank()]  # this rank's tokens
    with noted() as sent:
        loss = router.loss_of(model, own)
    loss.backward()
    average_gradients(model)
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return {"loss": loss.detach(), "gradients": gradients, "sent": sent}


@contextmanager
def noted() -> Iterator[list[tuple[int, list[int]]]]:
    """Notes what this rank sends by its all-to-alls: for each call the bytes of a row, and the rows for each rank."""
    notes: list[tuple[int, list[int]]] = []
    exchange = Ranks.exchange

    def noting(ranks: Ranks, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        notes.append((rows[:1].numel() * rows.element_size() if len(rows) else 0, sent))
        return exchange(ranks, rows, received, sent)

    with patch.object(Ranks, "exchange", noting):
        yield notes
