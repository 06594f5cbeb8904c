"""Parts of the later chapters, one function each: codes of few bits, and the mask of a
window; and the list of all parts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv2_ref import codes
from dsv2_ref.grading.attention import DECODING, MLA, RMSNORM, ROPE, Plant, given, has
from dsv2_ref.grading.experts import BALANCE, EXPERTS, GATE, LAYER
from dsv2_ref.grading.part import (
    Answers,
    Case,
    Mistake,
    Part,
    Values,
    WrongError,
    normal,
)

QUANTIZE_ONE, SHARED = "By hand: whole numbers and a scale", "What breaks?"


def coded(functions: Any, inputs: dict[str, Any]) -> Answers:
    """Codes, and the scales that their groups share."""
    pair = functions.to_codes(**inputs)
    if not isinstance(pair, tuple) or len(pair) != 2:
        said = f"to_codes returned a {type(pair).__name__}"
        raise WrongError(f"{said}; wanted codes and scales")
    if not all(isinstance(part, Tensor) for part in pair):
        raise WrongError("to_codes returned no tensors; wanted codes and scales")
    return {"codes": pair[0].double(), "scales": pair[1].double()}


def values(group: int, kind: str = "int4") -> Callable[[], dict[str, Any]]:
    """A few rows, one group of zeros among them, one value far from the others."""

    def make() -> dict[str, Any]:
        x = normal(3, 24, seed=60)
        x[0, 5], x[1, :8] = 9.0, 0.0
        return {"x": x, "kind": kind, "group": group, "scale_dtype": torch.float64}

    return make


Code = Callable[[Values, float], tuple[Values, Values]]


def coding(code: Code) -> Plant:
    """Codes and scales of groups (rows, groups, group), from the largest code."""

    def wrong(x: Any, kind: str, group: int, scale_dtype: Any) -> tuple[Values, Values]:
        groups = x.unflatten(-1, (-1, group))
        made, scales = code(groups, codes.largest_code(kind))
        return made.flatten(-2), scales

    return has("to_codes", wrong)


def rounded(groups: Values, scales: Values, largest: float) -> tuple[Values, Values]:
    """Codes of these scales, rounded to the nearest."""
    units = groups / scales.where(scales > 0, 1)[..., None]
    return units.round().clamp(-largest, largest), scales


def of_row(groups: Values, largest: float) -> tuple[Values, Values]:
    """One scale for all groups of a row."""
    most = groups.abs().amax((-1, -2))[..., None].expand(groups.shape[:-1])
    return rounded(groups, most / largest, largest)


def of_signed(groups: Values, largest: float) -> tuple[Values, Values]:
    """The scale of the largest value, negative ones not looked at."""
    return rounded(groups, groups.amax(-1).clamp(min=0) / largest, largest)


def cut(groups: Values, largest: float) -> tuple[Values, Values]:
    """Rounded towards zero."""
    scales = groups.abs().amax(-1) / largest
    return (groups / scales.where(scales > 0, 1)[..., None]).trunc(), scales


QUANTIZE = Part(
    name="quantize",
    module="codes",
    defines=("to_codes",),
    answer=coded,
    cases=(
        Case("int4 in groups", 4, values(8)),
        Case("int8, one group per row", 2, values(24, "int8")),
    ),
    mistakes=(
        Mistake("one scale for a whole row", "bits", SHARED, coding(of_row)),
        Mistake(
            "the scale is the largest value over 8, not over the largest code",
            "bits",
            QUANTIZE_ONE,
            coding(lambda x, top: rounded(x, x.abs().amax(-1) / (top + 1), top)),
        ),
        Mistake("rounded towards zero", "bits", QUANTIZE_ONE, coding(cut)),
        Mistake(
            "the sign not dropped before the largest value is taken",
            "bits",
            QUANTIZE_ONE,
            coding(of_signed),
        ),
    ),
)


def mask(functions: Any, inputs: dict[str, Any]) -> Answers:
    """Which keys the queries see."""
    made = functions.window_mask(**inputs)
    if not isinstance(made, Tensor) or made.dtype != torch.bool:
        said = getattr(made, "dtype", type(made).__name__)
        raise WrongError(f"window_mask returned {said}; wanted a tensor of bools")
    return {"mask": made.double()}


def sizes(seq: int, kv_seq: int, sinks: int, last: int) -> Callable[[], dict[str, Any]]:
    """The arguments of `window_mask`."""
    return given(
        seq=lambda: seq, kv_seq=lambda: kv_seq, sinks=lambda: sinks, last=lambda: last
    )


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
    cases=(
        Case("a prompt", 2, sizes(9, 9, 2, 3)),
        Case("tokens after a cache", 2, sizes(2, 12, 1, 4)),
    ),
    mistakes=(
        Mistake(
            "the first tokens dropped",
            "sparse",
            A_WINDOW,
            sees(lambda k, own, s, n: (k <= own) & (k > own - n)),
        ),
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
        Mistake(
            "later tokens seen",
            "sparse",
            A_WINDOW,
            sees(lambda k, own, s, n: (k < s) | (k > own - n)),
        ),
        Mistake(
            "queries counted from the first key, not from the end of the cache",
            "sparse",
            A_WINDOW,
            lambda functions: setattr(functions, "window_mask", top_left_window),
        ),
    ),
)


def top_left_window(seq: int, kv_seq: int, sinks: int, last: int) -> Any:
    """A window whose first query stands at the first key."""
    own, keys = torch.arange(seq)[:, None], torch.arange(kv_seq)
    return ((keys <= own) & ((keys < sinks) | (keys > own - last)))[None, None]


_ALL = (RMSNORM, ROPE, MLA, DECODING, GATE, EXPERTS, BALANCE, LAYER, QUANTIZE, WINDOW)
PARTS: dict[str, Part] = {part.name: part for part in _ALL}
"""Every part that can be graded, by its name."""
