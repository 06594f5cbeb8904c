"""What bounds each part of a decode step on a machine, and how long the step takes."""

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2_ref import accounting as acc
from dsv2_ref.config import DeepseekV2Config

SCRIPTS = ("data",)
DATA = Path(__file__).resolve().parents[2] / "book" / "_static" / "figures" / "data.js"
MODELS = {"V2-Lite": DeepseekV2Config.deepseek_v2_lite(), "V2": DeepseekV2Config.deepseek_v2()}
# What the figure's bits of weights and of the cache are.
WEIGHTS = {16: None, 8: "int8", 4: "int4"}
CACHES = {16: None, 8: "fp8", 4: "int4"}
STATES = [("V2-Lite", "H100 (SXM)", 1, 8192, 16, 16), ("V2-Lite", "H100 (SXM)", 64, 8192, 16, 16)]
STATES += [("V2-Lite", "H100 (SXM)", 64, 8192, 4, 16), ("V2-Lite", "laptop CPU", 1, 8192, 4, 16)]
STATES += [("V2", "H200 (SXM)", 16, 8192, 4, 16)]


def machines() -> dict[str, dict[str, Any]]:
    """The machines of the book's menus by name, with peak, bandwidth, memory and source."""
    found = re.search(r"const MACHINES = (\[.*?\n\]);", DATA.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return {machine.pop("name"): machine for machine in json.loads(found[1])}


@dataclass(frozen=True)
class Part:
    """A part of a decode step in all layers: FLOPs per byte, seconds per token, and what bounds it."""

    intensity: float
    seconds: float
    bound: str


def parts(
    config: DeepseekV2Config, machine: dict[str, Any], batch: int, context: int, weight_bits: int, cache_bits: int
) -> dict[str, Part]:
    """Each part of a step in which ``batch`` sequences decode a token each: the longer of arithmetic and reading.

    Arithmetic stays at the machine's peak, whatever the bits.
    """
    call = acc.Call(batch=batch, kv=context, weights=WEIGHTS[weight_bits], cache=CACHES[cache_bits])
    flops: dict[str, float] = {}
    read: dict[str, float] = {}
    for layer, alike in acc.call.layers_alike(config):
        computed = acc.by_part(acc.products(config, layer, call))
        for part, size in acc.read_by_part(config, layer, call).items():
            flops[part] = flops.get(part, 0) + alike * computed[part]
            read[part] = read.get(part, 0) + alike * size
    head = 2 * config.hidden_size * config.vocab_size
    flops["head"], read["head"] = batch * head, head
    found = {}
    for part in flops:
        computing, reading = flops[part] / machine["peak"], read[part] / machine["bandwidth"]
        bound = "arithmetic" if computing >= reading else "memory"
        found[part] = Part(flops[part] / read[part], max(computing, reading) / batch, bound)
    return found


def needed(config: DeepseekV2Config, batch: int, context: int, weight_bits: int, cache_bits: int) -> float:
    """Bytes of all weights and of the cache."""
    weights = sum(acc.model_weight_bytes(config, acc.Call(weights=WEIGHTS[weight_bits])).values())
    return weights + acc.cache_bytes(config, batch * context, cache=CACHES[cache_bits])


def table() -> str:
    """Five states of the figure, in HTML."""
    head = "".join(f"<th scope='col'>{text}</th>" for text in ("µs per token", "tokens per second", "longest part"))
    rows = ""
    for model, name, batch, context, weight_bits, cache_bits in STATES:
        found = parts(MODELS[model], machines()[name], batch, context, weight_bits, cache_bits)
        seconds = sum(part.seconds for part in found.values())
        longest = max(found, key=lambda part: found[part].seconds)
        plural = "sequence" if batch == 1 else "sequences"
        said = f"{model} on {name}, {batch} {plural} of {context:,}, {weight_bits}-bit weights"
        cells = f"<td>{1e6 * seconds:,.0f}</td><td>{1 / seconds:,.0f}</td><td>{longest}, {found[longest].bound}</td>"
        rows += f"<tr><th scope='row'>{html.escape(said)}</th>{cells}</tr>"
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
