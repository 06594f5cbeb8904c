"""The rotating pairs of the trained model's rope key as clocks: which angles a distance shows, and which were seen."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from dsv2_ref.config import RopeScaling
from dsv2_ref.rope import inverse_frequencies, rotary_tables, rotate_interleaved, softmax_temperature

WIDTH, TRAINED, BASE, CALL = 8, 128, 10_000, 1025
"""The model's rope width, the positions and the base it was trained with, and the tokens of the figure's call."""

STATES = [("none", BASE, 1, 127), ("none", BASE, 1, 320), ("linear", BASE, 4, 320), ("dynamic", BASE, 4, 320)]
STATES += [("YaRN", BASE, 4, 320)]


@dataclass(frozen=True)
class Clocks:
    """What the figure shows of a distance: for each pair radians per token and angle, whether training had the angle;
    the temperature; and the score of a query that equals its key, each pair (1, 0)."""

    steps: list[float]
    angles: list[float]
    seen: list[bool]
    temperature: float
    score: float


def scaling_of(kind: str, stretch: float) -> RopeScaling | None:
    """How the figure stretches; YaRN with the temperature of DeepSeek-V2."""
    if kind == "none":
        return None
    if kind == "YaRN":
        return RopeScaling(
            type="yarn", factor=stretch, original_max_position_embeddings=TRAINED, mscale=0.707, mscale_all_dim=0.707
        )
    return RopeScaling(type=kind, factor=stretch)


def clocks(kind: str, base: float, stretch: float, distance: int) -> Clocks:
    """The clocks at a distance, by the package's functions."""
    base, scaling = float(base), scaling_of(kind, float(stretch))
    limits: dict[str, Any] = {"max_position_embeddings": TRAINED, "kv_length": CALL}
    steps = inverse_frequencies(WIDTH, base, scaling, dtype=torch.float64, **limits)
    tables = rotary_tables(torch.tensor([[distance, 0]]), WIDTH, base, scaling, dtype=torch.float64, **limits)
    ones = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(WIDTH // 2)
    query, key = rotate_interleaved(ones.expand(1, 2, WIDTH), *tables)[0]
    angles = (distance * steps).tolist()
    reached = ((TRAINED - 1) * inverse_frequencies(WIDTH, float(BASE), dtype=torch.float64)).tolist()
    turn = 2 * math.pi
    seen = [most >= turn or angle % turn <= most + 1e-9 for angle, most in zip(angles, reached, strict=True)]
    temperature = softmax_temperature(scaling)
    return Clocks(steps.tolist(), angles, seen, temperature, temperature * float(query @ key))


def table() -> str:
    """Five states of the figure, in HTML."""
    head = "".join(f"<th scope='col'>{text}</th>" for text in ("radians per token", "new angles", "score"))
    rows = ""
    for kind, base, stretch, distance in STATES:
        shown = clocks(kind, base, stretch, distance)
        name = "not stretched" if kind == "none" else f"{kind} ×{stretch}"
        name += f" in a call of {CALL:,} tokens" if kind == "dynamic" else ""
        steps = ", ".join(f"{step:.6f}" for step in shown.steps)
        new = ", ".join(f"pair {pair}" for pair, seen in enumerate(shown.seen) if not seen) or "none"
        cells = f"<td>{steps}</td><td>{new}</td><td>{shown.score:.4f}</td>".replace(">-", ">−")
        rows += f"<tr><th scope='row'>{name}, distance {distance}</th>{cells}</tr>"
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
