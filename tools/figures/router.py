"""How a gate routes: one token to 8 experts by logits of the reader's, or the book's line in layer 1 of the trained model.

    python -m tools.figures.router      writes book/_static/figures/router-data.js

The stored logits have three decimals, so that the figure and Python start from the same numbers.
"""

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_ref import DeepseekV2Config, MoEGate
from dsv2_ref.balance import communication_balance_loss, device_balance_loss, expert_balance_loss

DATA = Path(__file__).resolve().parents[2] / "book" / "_static" / "figures" / "router-data.js"
SCRIPTS = ("router-data",)
GROUPS = 4
LOGITS = (2.0, 0.6, 1.5, -0.5, 1.2, 0.0, 0.3, -1.0)
"""The figure's first token."""

NORMALISE = ("no", "yes, then scale", "yes, in place of the scale")
"""The last is V2's published code, which leaves the scale out where it normalises."""


@dataclass(frozen=True)
class Routed:
    """What the package makes of logits (tokens, E): scores, choices and weights, f and P of the experts, three losses."""

    scores: Tensor
    experts: Tensor
    weights: Tensor
    frequency: Tensor
    mean_score: Tensor
    losses: dict[str, float]


def routed(logits: Tensor, k: int, open_groups: int, normalise: str = "no", scale: float = 1.0) -> Routed:
    """Route tokens by `MoEGate`; all losses with α = 1. No more experts are chosen than the open groups have."""
    size = logits.shape[-1]
    k = min(k, open_groups * size // GROUPS)
    if normalise == NORMALISE[2] and k > 1:
        scale = 1.0
    config = DeepseekV2Config(
        hidden_size=size, n_routed_experts=size, num_experts_per_tok=k, topk_method="group_limited_greedy",
        n_group=GROUPS, topk_group=open_groups, norm_topk_prob=normalise != "no", routed_scaling_factor=scale,
    )  # fmt: skip
    gate = MoEGate(config).eval().to(logits.dtype).requires_grad_(False)
    gate.weight.copy_(torch.eye(size))
    experts, weights, _ = gate(logits[None])
    scores = logits.softmax(-1)
    batch = scores[None], experts[None]
    losses = {
        "experts": expert_balance_loss(*batch, alpha=1.0),
        "devices": device_balance_loss(*batch, alpha=1.0, devices=GROUPS),
        "communication": communication_balance_loss(*batch, alpha=1.0, devices=GROUPS, topk_devices=open_groups),
    }
    return Routed(
        scores,
        experts,
        weights,
        experts.flatten().bincount(minlength=size) * size / experts.numel(),
        scores.mean(0),
        {name: loss.item() for name, loss in losses.items()},
    )


def line_logits() -> Tensor:
    """The logits of the book's line in layer 1 of the trained model: (17, 16), three decimals."""
    from experiments.trained import ids, trained

    model, logits = trained().double(), []
    layer: Any = model.model.layers[1]
    layer.mlp.gate.register_forward_pre_hook(lambda module, given: logits.append(given[0][0] @ module.weight.T))
    model(ids())
    return logits[0].mul(1000).round() / 1000


def stored() -> tuple[str, Tensor]:
    """The stored line and its logits."""
    data = json.loads(DATA.read_text().partition("routerData = ")[2].rstrip(";\n"))
    return data["text"], torch.tensor(data["logits"], dtype=torch.float64) / 1000


def script() -> str:
    """The data of the figure, as the script that assigns them."""
    from experiments.trained import LINE

    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in line_logits().mul(1000).round().int().tolist())
    data = f'{{\n"text": {json.dumps(LINE)},\n"logits": [\n{rows}]\n}}'
    return (
        f'// Made by tools/figures/router.py; logits are in thousandths.\n"use strict";\n\nconst routerData = {data};\n'
    )


def table() -> str:
    """Five states of the figure, in HTML."""
    logits = torch.tensor(LOGITS, dtype=torch.float64)[None]
    states = {
        "one token, k = 3, all 4 groups open": routed(logits, 3, 4),
        "2 of 4 groups open": routed(logits, 3, 2),
        "normalised": routed(logits, 3, 2, NORMALISE[1]),
        "normalised, then scaled by 16": routed(logits, 3, 2, NORMALISE[1], 16.0),
    }
    rows = ""
    for name, found in states.items():
        chosen = zip(found.experts[0].tolist(), found.weights[0].tolist(), strict=True)
        cells = ", ".join(f"expert {expert}: {weight:.3f}" for expert, weight in chosen)
        rows += f"<tr><th scope='row'>{name}</th><td>{cells}; sum {found.weights.sum():.3f}</td></tr>"
    text, line = stored()
    found = routed(line, 3, 2)
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in found.losses.items())
    rows += f"<tr><th scope='row'>the line, {len(text)} tokens, 16 experts, k = 3, 2 of 4 groups open</th>"
    rows += f"<td>f from {found.frequency.min():.3f} to {found.frequency.max():.3f}; losses with α = 1: {html.escape(losses)}</td></tr>"
    head = "<th scope='col'>chosen experts and weights</th>"
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"


if __name__ == "__main__":
    DATA.write_text(script())
