"""Functions that run on several processes of this machine: results by rank, and an end when one of them fails."""

import os

import pytest
import torch
import torch.distributed as dist

from experiments import parallel_demo, router
from experiments.processes import together


def whom(offset: int) -> torch.Tensor:
    """What each rank gets where everyone sends its own number."""
    got = torch.empty(dist.get_world_size(), dtype=torch.long)
    dist.all_to_all_single(got, torch.full_like(got, dist.get_rank() + offset))
    return got


def lonely() -> None:
    """The last rank fails while the others wait for it."""
    if dist.get_rank() == dist.get_world_size() - 1:
        raise RuntimeError("this rank is done for")
    dist.barrier()


def test_results_come_by_rank_and_the_path_is_left_as_it_was() -> None:
    before = os.environ.get("PYTHONPATH")
    assert [got.tolist() for got in together(3, whom, 10)] == [[10, 11, 12]] * 3
    assert os.environ.get("PYTHONPATH") == before


def test_a_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(Exception, match=r"this rank is done for|Connection"):
        together(2, lonely, timeout=30)


@pytest.mark.slow
def test_the_step_of_the_chapter_is_that_of_one_process() -> None:
    model = router.load("expert").double().train()
    loss = router.loss_of(model, parallel_demo.batch())
    loss.backward()
    ranks = together(2, parallel_demo.step, "expert")
    mean = torch.stack([rank["loss"] for rank in ranks]).mean()
    assert torch.allclose(mean, loss, rtol=1e-12, atol=0)  # sums of float64 in another order
    for number, rank in enumerate(ranks):
        for name, weight in model.named_parameters():
            found = rank["gradients"][name]
            wanted = weight.grad if found.shape == weight.shape else weight.grad.chunk(2)[number]
            assert (found - wanted).norm() <= 1e-12 * wanted.norm(), name
        rows = [sent for _, sent in rank["sent"]][1::5]
        assert len(rows) == 3, "layers with experts"
        assert all(1 <= sum(sent) / (12 * 127) <= 2 for sent in rows), "a token goes to one rank or to two"
