"""The book's line through the trained model: what heads read, which experts are chosen, which byte is expected next.

    python -m tools.figures.line        writes book/_static/figures/line-data.js

Weights and probabilities are stored in hundredths, one character each, because that is what the figure shows.
"""

import html
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DATA = Path(__file__).resolve().parents[2] / "book" / "_static" / "figures" / "line-data.js"
SCRIPTS = ("line-data",)
POLICIES, BUDGETS = ("window", "best, shared by heads", "best, per head"), ("4", "8", "16")
TOP = 3
STATES = [(13, 2, 3), (5, 2, 3), (5, 3, 0), (5, 3, 3), (5, 1, 2)]


def walked() -> dict[str, Tensor]:
    """Attention (layer, head, query, key), experts and weights (layer - 1, token, k), next bytes and probabilities."""
    from experiments.trained import ids, trained

    model, gates, attention = trained().double(), [], []
    layers: Any = model.model.layers
    for layer in layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda module, given, result: gates.append(result[:2]))
    x = model.model.embed_tokens(ids())
    for layer in layers:
        layer.self_attn.implementation = "eager"  # which can return weights
        x, weights = layer(x, output_attentions=True)
        attention.append(weights[0])
    following = model.lm_head(model.model.norm(x))[0].softmax(-1).topk(TOP)
    experts, expert_weights = zip(*gates, strict=True)
    return {
        "attention": torch.stack(attention),
        "experts": torch.stack(experts),
        "weights": torch.stack(expert_weights),
        "next": following.indices,
        "probabilities": following.values,
    }


def _packed(shares: Tensor) -> str:
    """Hundredths as characters from ``#`` on; the code of the few above 91 is larger, because 127 is no letter."""
    hundredths = (100 * shares).round().int().flatten().tolist()
    return "".join(chr(share + (35 if share < 92 else 72)) for share in hundredths)


def _unpacked(packed: str) -> list[int]:
    return [ord(character) - (35 if ord(character) < 127 else 72) for character in packed]


def script() -> str:
    """The data of the figure, as the script that assigns them."""
    from experiments.trained import LINE

    found = walked()
    keys = torch.ones(len(LINE), len(LINE)).tril().bool()
    data = {
        "text": LINE,
        "attention": _packed(found["attention"][..., keys]),
        "experts": "".join(f"{expert:x}" for expert in found["experts"].flatten().tolist()),
        "weights": _packed(found["weights"]),
        "next": bytes(found["next"].flatten().tolist()).decode("ascii"),
        "probabilities": _packed(found["probabilities"]),
        "lost": lost(),
    }
    written = json.dumps(data, indent=1, ensure_ascii=False)
    return (
        f'// Made by tools/figures/line.py; numbers are in hundredths.\n"use strict";\n\nconst lineData = {written};\n'
    )


def lost() -> dict[str, str]:
    """Bits per byte that each policy of the menu loses in all layers, for each number of tokens read."""
    from experiments.forgetting import stored as measured

    bits = measured()["bits"]
    return {
        name: " ".join(f"{bits[name][budget] - bits['everything']['128']:.2f}" for budget in BUDGETS)
        for name in POLICIES
    }


def kept(rows: list[list[int]], policy: str, budget: int, head: int) -> list[float]:
    """What a policy leaves of a query's weights in one head, in hundredths with sum 100, given those of all heads.

    Of equal weights the newer is kept. None is left where all kept weights round to 0.
    """
    size = len(rows[0])
    rank = {"window": range(size), "best, shared by heads": [sum(column) for column in zip(*rows, strict=True)]}
    order = sorted(range(size), key=lambda at: (-rank.get(policy, rows[head])[at], -at))[:budget]
    total = sum(rows[head][at] for at in order)
    return [100 * rows[head][at] / total if at in order and total else 0.0 for at in range(size)]


def stored() -> dict[str, Any]:
    """The stored data by name: the text, and nested lists in the order of `walked`, the attention of past keys only."""
    data = json.loads(DATA.read_text(encoding="utf-8").partition("lineData = ")[2].rstrip(";\n"))
    text, seen = data["text"], iter(_unpacked(data["attention"]))
    heads = len(data["attention"]) // (len(text) * (len(text) + 1) // 2) // 4
    attention = [
        [[[next(seen) for _ in range(t + 1)] for t in range(len(text))] for _ in range(heads)] for _ in range(4)
    ]

    def by_token(values: Any) -> list[list[Any]]:
        threes = [list(values[start : start + TOP]) for start in range(0, len(values), TOP)]
        return [threes[start : start + len(text)] for start in range(0, len(threes), len(text))]

    return {
        "text": text,
        "attention": attention,
        "experts": by_token([int(expert, 16) for expert in data["experts"]]),
        "weights": by_token(_unpacked(data["weights"])),
        "next": by_token(data["next"])[0],
        "probabilities": by_token(_unpacked(data["probabilities"]))[0],
    }


def shown(character: str) -> str:
    """A character as the figure writes it."""
    return {"\n": "⏎", " ": "␣"}.get(character, character)


def table() -> str:
    """Five states of the figure, in HTML."""
    found, rows = stored(), ""
    for token, layer, head in STATES:
        seen = found["attention"][layer][head][token]
        most = sorted(range(token + 1), key=lambda key: -seen[key])[:TOP]
        reads = ", ".join(f"{shown(found['text'][key])} at {key}: {seen[key] / 100:.2f}" for key in most)
        experts = "none, an MLP"
        if layer:
            chosen = zip(found["experts"][layer - 1][token], found["weights"][layer - 1][token], strict=True)
            experts = ", ".join(f"{expert}: {weight / 100:.2f}" for expert, weight in chosen)
        after = zip(found["next"][token], found["probabilities"][token], strict=True)
        following = ", ".join(f"{shown(character)}: {share / 100:.2f}" for character, share in after)
        name = f"{shown(found['text'][token])} at {token}, layer {layer}, head {head}"
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (reads, experts, following))
        rows += f"<tr><th scope='row'>{html.escape(name)}</th>{cells}</tr>"
    head_row = "".join(f"<th scope='col'>{name}</th>" for name in ("reads most", "experts", "expects next"))
    return f"<table><thead><tr><td></td>{head_row}</tr></thead><tbody>{rows}</tbody></table>"


if __name__ == "__main__":
    DATA.write_text(script(), encoding="utf-8")
