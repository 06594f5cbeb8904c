"""The bugs of the symptom table: what each costs, and that undoing leaves nothing behind."""

import re

import pytest
import torch

from experiments import planted
from tools.budget import BOOK

EXPECTED = {  # bits per byte and P(5): planted once more by other means, in the chapters and for the book's plan
    "exchanged": (6.85, 0.00),
    "half-split": (6.17, 0.00),
    "middle": (5.61, 0.00),
    "scaled by 16": (5.40, 0.05),
    "all positions 0": (5.26, 0.28),
    "rope part": (5.14, 0.05),
    "residual": (5.00, 0.00),
    "window of 16": (4.94, 0.56),  # the prompt of the 5 fits in the window
    "sorted order": (4.79, 0.39),
    "silent": (3.71, 0.06),
    "shared output": (3.42, 0.04),
    "overwrites": (3.19, 0.18),
    "final norm": (3.02, 0.17),
    "shared expert": (2.99, 0.01),
    "norm on the latent": (2.96, 0.16),
    "weights 1": (2.91, 0.08),
    "normalised": (2.91, 0.57),
    "LayerNorm": (2.79, 0.54),
    "bfloat16": (2.771, 0.56),
    "none": (2.770, 0.56),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", planted.BUGS, ids=lambda bug: bug.name)
def test_what_a_bug_costs(bug: planted.Bug) -> None:
    with torch.no_grad():
        bits, five = planted.measure(bug)
    for name, (expected, chance) in EXPECTED.items():
        if re.search(rf"\b{re.escape(name)}\b", bug.name):
            assert bits == pytest.approx(expected, abs=0.01)
            assert five == pytest.approx(chance, abs=0.01)
            break
    else:
        assert bits > (2.84 if bug.decoding else 2.78)
    assert (BOOK / f"{bug.chapter}.ipynb").is_file()


@pytest.mark.thorough
def test_bugs_are_listed_by_size() -> None:
    with torch.no_grad():
        costs = [planted.measure(bug)[0] for bug in planted.BUGS]
    assert costs == sorted(costs, reverse=True)
    assert planted.BUGS[-1].name == "none"
