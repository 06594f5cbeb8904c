"""Weights in groups that share a scale: what rounding leaves of them.

The figure's weights are in its table, with three decimals, so that it and Python start from the same numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2_ref.codes import from_codes, to_codes
from experiments.trained import trained

OUTLIER = 20
"""Which weight the reader enlarges."""

STATES = [("int4", 64, 1), ("int4", 64, 20), ("int4", 16, 20), ("int3", 16, 1), ("fp8", 64, 20)]


def weights() -> Tensor:
    """The first row of ``o_proj`` of layer 1, in thousandths: 64 weights."""
    row = trained().get_parameter("model.layers.1.self_attn.o_proj.weight")[0].double()
    return (1000 * row).round() / 1000


@dataclass(frozen=True)
class Rounded:
    """Codes and scales of each group, relative error of each and of all, and bytes of codes and of scales."""

    codes: Tensor
    scales: Tensor
    errors: list[float]
    error: float
    code_bytes: int
    scale_bytes: int


def rounded(kind: str, group: int, factor: int) -> Rounded:
    """The figure's weights, one of them ``factor`` times as large, in a kind of `to_codes`; scales take two bytes."""
    given = weights()
    given[OUTLIER] *= factor
    codes, scales = to_codes(given, kind, group, torch.float64)
    off = (from_codes(codes, scales) - given).unflatten(0, (-1, group)).norm(dim=-1)
    whole = given.unflatten(0, (-1, group)).norm(dim=-1)
    bits = 8 if kind == "fp8" else int(kind.removeprefix("int"))
    return Rounded(
        codes.unflatten(0, (-1, group)),
        scales,
        (off / whole).tolist(),
        float(off.norm() / whole.norm()),
        len(given) * bits // 8,
        2 * len(scales),
    )


def table() -> str:
    """Five states of the figure, in HTML."""
    head = "".join(f"<th scope='col'>{text}</th>" for text in ("error", "of the others", "bytes"))
    rows = ""
    for kind, group, factor in STATES:
        found = rounded(kind, group, factor)
        said = f"{'e4m3' if kind == 'fp8' else kind} in groups of {group}, weight no. {OUTLIER} enlarged {factor} times"
        cells = f"<td>{found.error:.1%}</td><td>{others(kind, group, factor):.1%}</td>"
        rows += f"<tr><th scope='row'>{said}</th>{cells}<td>{found.code_bytes + found.scale_bytes}</td></tr>"
    numbers = " ".join(f"{x:g}" for x in weights().tolist())
    return f"<table data-weights='{numbers}'><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"


def others(kind: str, group: int, factor: int) -> float:
    """Relative error of the 63 weights that the reader leaves as they are."""
    given = weights()
    given[OUTLIER] *= factor
    off = from_codes(*to_codes(given, kind, group, torch.float64)) - given
    keep = torch.arange(len(given)) != OUTLIER
    return float(off[keep].norm() / given[keep].norm())
