"""The part of a window's mask: its cases and known mistakes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv2_ref.grading.answers import Answers, Values, WrongError, call, given
from dsv2_ref.grading.part import Case, Mistake, Part, Plant, has


def mask(functions: Any, inputs: dict[str, Any]) -> Answers:
    """Which keys the queries see."""
    made = call(functions.window_mask, inputs)
    if not isinstance(made, Tensor) or made.dtype != torch.bool:
        said = getattr(made, "dtype", type(made).__name__)
        raise WrongError(f"window_mask returned {said}; wanted a tensor of bools")
    return {"mask": made.double()}


def sizes(seq: int, kv_seq: int, sinks: int, last: int) -> Callable[[], dict[str, Any]]:
    """The arguments of `window_mask`."""
    return given(seq=lambda: seq, kv_seq=lambda: kv_seq, sinks=lambda: sinks, last=lambda: last)


def sees(keep: Callable[[Values, Values, int, int], Values]) -> Plant:
    """A mask of keys, queries' own rows, sinks and last."""

    def wrong(seq: int, kv_seq: int, sinks: int, last: int) -> Values:
        own, keys = torch.arange(kv_seq - seq, kv_seq)[:, None], torch.arange(kv_seq)
        return keep(keys, own, sinks, last)[None, None]

    return has("window_mask", wrong)


A_WINDOW = "A window"
WINDOW = Part(
    name="window",
    module="forget",
    defines=("window_mask",),
    answer=mask,
    yours=("forget.chosen_mask",),
    cases=(Case("a prompt", 2, sizes(9, 9, 2, 3)), Case("tokens after a cache", 2, sizes(2, 12, 1, 4))),
    mistakes=(
        Mistake("the first tokens dropped", "sparse", A_WINDOW, sees(lambda k, own, s, n: (k <= own) & (k > own - n))),
        Mistake(
            "the window one token too wide",
            "sparse",
            A_WINDOW,
            sees(lambda k, own, s, n: (k <= own) & ((k < s) | (k >= own - n))),
        ),
        Mistake(
            "the window one token too narrow",
            "sparse",
            A_WINDOW,
            sees(lambda k, own, s, n: (k <= own) & ((k < s) | (k > own - n + 1))),
        ),
        Mistake("later tokens seen", "sparse", A_WINDOW, sees(lambda k, own, s, n: (k < s) | (k > own - n))),
        Mistake(
            "queries counted from the first key, not from the end of the cache",
            "sparse",
            A_WINDOW,
            sees(lambda k, own, s, n: (k <= own - own[0]) & ((k < s) | (k > own - own[0] - n))),
        ),
    ),
)
