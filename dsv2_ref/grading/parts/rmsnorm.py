"""The part RMSNorm: its cases and known mistakes."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from dsv2_ref.grading.answers import Values, output, tokens
from dsv2_ref.grading.part import Case, Mistake, Part, Plant


def computes(formula: Callable[[Values, Values, float], Values]) -> Plant:
    """A norm that computes something else of its input, weight and epsilon."""

    def plant(norm: Any) -> None:
        norm.forward = lambda x: formula(x, norm.weight, norm.variance_epsilon)

    return plant


def mean_square(x: Values) -> Values:
    """Of each token."""
    return x.square().mean(-1, keepdim=True)


INSIDE = "Why ε, and why inside the root?"
WEIGHT = "What is the weight for?"
RMSNORM = Part(
    name="rmsnorm",
    module="rmsnorm",
    defines=("DeepseekV2RMSNorm",),
    takes=("hidden_size", "eps"),
    answer=output,
    cases=(
        Case("tokens", 2, tokens(2, 5, 48, seed=1, mean=0.5), (48, 1e-6)),
        Case("small tokens", 3, tokens(2, 3, 48, seed=2, size=1e-3), (48, 1e-6)),
        Case("another epsilon", 2, tokens(7, 32, seed=3, size=0.3), (32, 0.1)),
        Case("a token of zeros", 1, tokens(1, 1, 16, seed=4, size=0.0), (16, 1e-6)),
    ),
    mistakes=(
        Mistake(
            "epsilon outside the root",
            "rmsnorm",
            INSIDE,
            computes(lambda x, w, eps: w * x / (mean_square(x).sqrt() + eps)),
        ),
        Mistake("epsilon left out", "rmsnorm", INSIDE, computes(lambda x, w, eps: w * x / mean_square(x).sqrt())),
        Mistake(
            "epsilon only against a division by zero, as in torch's normalize, or its rms_norm without eps",
            "rmsnorm",
            INSIDE,
            computes(lambda x, w, eps: w * F.normalize(x, dim=-1, eps=eps) * x.shape[-1] ** 0.5),
        ),
        Mistake(
            "a fixed epsilon of 1e-6, whatever the constructor was given",
            "rmsnorm",
            INSIDE,
            computes(lambda x, w, eps: w * x / (mean_square(x) + 1e-6).sqrt()),
        ),
        Mistake(
            "the mean subtracted, as in LayerNorm",
            "rmsnorm",
            "LayerNorm or RMSNorm?",
            computes(lambda x, w, eps: F.layer_norm(x, w.shape, w, None, eps)),
        ),
        Mistake(
            "the weight not applied", "rmsnorm", WEIGHT, computes(lambda x, w, eps: x / (mean_square(x) + eps).sqrt())
        ),
        Mistake(
            "multiplied by 1 + weight, as in Gemma",
            "rmsnorm",
            WEIGHT,
            computes(lambda x, w, eps: (1 + w) * x / (mean_square(x) + eps).sqrt()),
        ),
        Mistake(
            "the sum of the squares, not their mean",
            "rmsnorm",
            "By hand",
            computes(lambda x, w, eps: w * x / (mean_square(x) * x.shape[-1] + eps).sqrt()),
        ),
        Mistake(
            "no root: divided by the mean square",
            "rmsnorm",
            "By hand",
            computes(lambda x, w, eps: w * x / (mean_square(x) + eps)),
        ),
        Mistake(
            "one mean over all tokens",
            "rmsnorm",
            "By hand",
            computes(lambda x, w, eps: w * x / (x.square().mean() + eps).sqrt()),
        ),
    ),
)
