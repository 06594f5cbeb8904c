"""The part of codes of few bits: its cases and known mistakes."""

from collections.abc import Callable
from typing import Any

import torch

from dsv2_ref import codes
from dsv2_ref.grading.answers import Answers, Values, call, normal, pair
from dsv2_ref.grading.part import Case, Mistake, Part, Plant, has

QUANTIZE_ONE, SHARED = "By hand: whole numbers and a scale", "What breaks?"


def coded(functions: Any, inputs: dict[str, Any]) -> Answers:
    """Codes, and the scales that their groups share."""
    made, scales = pair(call(functions.to_codes, inputs), "to_codes", "codes and scales")
    return {"codes": made.double(), "scales": scales.double()}


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
    cases=(Case("int4 in groups", 4, values(8)), Case("int8, one group per row", 2, values(24, "int8"))),
    mistakes=(
        Mistake("one scale for a whole row", "bits", SHARED, coding(of_row)),
        Mistake(
            "the scale is the largest value over 8, not over the largest code",
            "bits",
            QUANTIZE_ONE,
            coding(lambda x, top: rounded(x, x.abs().amax(-1) / (top + 1), top)),
        ),
        Mistake("rounded towards zero", "bits", QUANTIZE_ONE, coding(cut)),
        Mistake("the sign not dropped before the largest value is taken", "bits", QUANTIZE_ONE, coding(of_signed)),
    ),
)
