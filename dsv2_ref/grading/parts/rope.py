"""The part of rotary positions: its cases and known mistakes."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from dsv2_ref import rope
from dsv2_ref.config import RopeScaling
from dsv2_ref.grading.answers import Answers, Values, WrongError, call, given, normal, pair, returned
from dsv2_ref.grading.part import Case, Mistake, Part, Plant, has

YARN = RopeScaling(
    type="yarn", factor=8, original_max_position_embeddings=64, beta_fast=8, mscale=0.707, mscale_all_dim=1.0
)
PAIRS, ANGLES = "Which features form a pair?", "Turn pairs of features"
LONGER = "Longer than it was trained for"
MSCALES = "What are mscale and mscale_all_dim?"


def positions() -> Values:
    """Of two sequences, which do not begin at 0; so small that angles in float32 pass."""
    return torch.tensor([[3, 4, 5, 6, 7, 8], [90, 91, 95, 200, 399, 400]])


def tables(functions: Any, inputs: dict[str, Any]) -> Answers:
    """Everything a case of rotary positions asks for."""
    if "q_pe" in inputs:
        turned = pair(call(functions.apply_rotary, inputs), "apply_rotary", "the queries and the keys")
        return {"queries": turned[0], "keys": turned[1]}
    if "position_ids" in inputs:
        made = call(functions.rotary_tables, inputs | {"dtype": torch.float64})
        cosines, sines = pair(made, "rotary_tables", "cosines and sines")
        if cosines.dtype != torch.float64:
            raise WrongError(f"cosines are {cosines.dtype}; wanted the argument dtype, torch.float64")
        return {"cosines": cosines, "sines": sines}
    value = call(functions.softmax_temperature, inputs)
    if not isinstance(value, Real) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
        raise WrongError(f"{returned(value, 'softmax_temperature')}; wanted a number")
    return {"temperature": torch.tensor(float(value), dtype=torch.float64)}


def rotation() -> dict[str, Any]:
    """What `apply_rotary` takes, with tables of the reference."""
    cos, sin = rope.rotary_tables(positions(), 8, 10000.0, dtype=torch.float64)
    q_pe, k_pe = normal(2, 3, 6, 8, seed=5), normal(2, 6, 8, seed=6)
    return {"q_pe": q_pe, "k_pe": k_pe, "cos": cos, "sin": sin}


def angles(dim: int, scaling: RopeScaling | None = None, theta: float = 10000.0) -> Callable[[], dict[str, Any]]:
    """What `rotary_tables` takes."""
    fields = {"dim": dim, "theta": theta, "scaling": scaling}
    return lambda: {"position_ids": positions(), **fields}


def rotates(turn: Callable[[Values, Values, Values], Values], queries: bool = True, keys: bool = True) -> Plant:
    """Queries and keys rotated in another way, or one of them not at all."""

    def apply_rotary(q_pe: Any, k_pe: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        turned = turn(q_pe, cos[:, None], sin[:, None]) if queries else q_pe
        return turned, turn(k_pe, cos, sin) if keys else k_pe

    return has("apply_rotary", apply_rotary)


def evens_first(x: Values, cos: Values, sin: Values) -> Values:
    """The right pairs, all their first features before all their second ones."""
    return rope.rotate_interleaved(x, cos, sin).unflatten(-1, (-1, 2)).mT.flatten(-2)


def tabled(change: Callable[..., tuple[Values, Values]]) -> Plant:
    """``change`` makes cosines and sines of position_ids, dim, theta, scaling and dtype."""
    return has("rotary_tables", change)


def of_frequencies(frequencies: Callable[[int, float, Any], Values]) -> Plant:
    """Tables of other frequencies, each from dim, theta and scaling; no magnitude is
    changed but YaRN's."""

    def make(position_ids: Any, dim: Any, theta: Any, scaling: Any = None, **_: Any) -> Any:
        size = magnitude(scaling)
        turned = position_ids[..., None].double() * frequencies(dim, theta, scaling)
        return turned.cos() * size, turned.sin() * size

    return tabled(make)


def magnitude(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies cosines and sines by."""
    if scaling is None:
        return 1.0
    up = rope.yarn_mscale(scaling.factor, scaling.mscale)
    return up / rope.yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def inverse(dim: int, theta: float, scaling: Any = None) -> Values:
    """The reference's frequencies in float64."""
    return rope.inverse_frequencies(dim, theta, scaling, dtype=torch.float64)


def without_magnitude(*args: Any, **kwargs: Any) -> tuple[Values, Values]:
    """Tables in which YaRN changes angles alone."""
    return unmagnified(rope.rotary_tables, *args, **kwargs)


def unmagnified(made: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Values, Values]:
    """Tables that something makes, without YaRN's magnitude."""
    cos, sin = made(*args, **kwargs)
    size = magnitude(kwargs.get("scaling", args[3] if len(args) > 3 else None))
    return cos / size, sin / size


def only_up(*args: Any, **kwargs: Any) -> tuple[Values, Values]:
    """Tables with m(mscale), not divided by m(mscale_all_dim)."""
    scaling = kwargs.get("scaling")
    cos, sin = without_magnitude(*args, **kwargs)
    up = 1.0 if scaling is None else rope.yarn_mscale(scaling.factor, scaling.mscale)
    return cos * up, sin * up


def from_zero(position_ids: Any, *args: Any, **kwargs: Any) -> tuple[Values, Values]:
    """Tables that only look at how many positions there are."""
    counted = torch.arange(position_ids.shape[-1]).expand(position_ids.shape)
    return rope.rotary_tables(counted, *args, **kwargs)


def root_of_temperature(scaling: RopeScaling | None) -> float:
    """m, not its square."""
    return rope.softmax_temperature(scaling) ** 0.5


ROPE = Part(
    name="rope",
    module="rope",
    defines=("rotary_tables", "apply_rotary", "softmax_temperature"),
    answer=tables,
    yours=(
        "rope.inverse_frequencies",
        "rope.yarn_frequencies",
        "rope.yarn_mscale",
        "rope.rotate_interleaved",
        "rope.rotate_half_split",
        "rope.position_tables",
        "fast.cpu.rotate",
    ),
    cases=(
        Case("cosines and sines", 3, angles(8, theta=50000.0)),
        Case("rotation", 3, rotation),
        Case("YaRN's cosines and sines", 4, angles(32, YARN)),
        Case("YaRN's temperature", 1, given(scaling=lambda: YARN)),
        Case("temperature without scaling", 1, given(scaling=lambda: None)),
    ),
    mistakes=(
        Mistake("pairs half-split", "rope", PAIRS, rotates(rope.rotate_half_split)),
        Mistake(
            "the right pairs, but left in half-split order, as in the published code",
            "rope",
            PAIRS,
            rotates(evens_first),
        ),
        Mistake(
            "rotated the other way", "rope", ANGLES, rotates(lambda x, cos, sin: rope.rotate_interleaved(x, cos, -sin))
        ),
        Mistake(
            "the key not rotated", "rope", "Only the distance counts", rotates(rope.rotate_interleaved, keys=False)
        ),
        Mistake(
            "the queries not rotated",
            "rope",
            "Only the distance counts",
            rotates(rope.rotate_interleaved, queries=False),
        ),
        Mistake("positions counted from 0, position_ids not read", "rope", "The code", tabled(from_zero)),
        Mistake(
            "the exponent is i / dim, not 2i / dim",
            "rope",
            ANGLES,
            of_frequencies(lambda dim, theta, s: inverse(dim, theta**0.5, s)),
        ),
        Mistake(
            "theta is 10000, whatever it was given",
            "rope",
            ANGLES,
            of_frequencies(lambda dim, _, s: inverse(dim, 10000.0, s)),
        ),
        Mistake("YaRN's angles left out", "rope", LONGER, of_frequencies(lambda dim, theta, s: inverse(dim, theta))),
        Mistake(
            "all angles divided by the factor, as in linear scaling",
            "rope",
            LONGER,
            of_frequencies(lambda dim, theta, s: inverse(dim, theta) / (s.factor if s else 1)),
        ),
        Mistake("YaRN's magnitude left out: m(mscale) / m(mscale_all_dim)", "rope", MSCALES, tabled(without_magnitude)),
        Mistake("the magnitude is m(mscale), not divided by m(mscale_all_dim)", "rope", MSCALES, tabled(only_up)),
        Mistake("temperature left out", "rope", MSCALES, has("softmax_temperature", lambda scaling: 1.0)),
        Mistake(
            "the temperature is m, not its square", "rope", MSCALES, has("softmax_temperature", root_of_temperature)
        ),
    ),
)
