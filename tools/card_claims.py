"""The card's numeric claims, computed and judged: `book/data/card_claims.toml` says what was claimed, this says whether it holds.

The number printed in a claim decides how exactly it must be met (`tolerance`). What is computed is an expression over the names in
`NAMES`, most of them functions of `dsv2_ref.accounting`.
"""

import math
import re
import tomllib
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dsv2_ref import accounting
from dsv2_ref.accounting import Call
from dsv2_ref.accounting.activations import LiveBytes, as_run, layer_and_cache, without_memory
from dsv2_ref.accounting.operations import form_of
from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.published import known

CLAIMS = Path(__file__).resolve().parent.parent / "book" / "data" / "card_claims.toml"
UNITS = {"µ": 1e-6, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
ABOUT, LOOSE = 0.01, 0.1  # of a number given as "about": what it may always miss, and at most
CARD, OCR = DeepseekV2Config.card(), DeepseekV2Config.deepseek_ocr()
DECODE = Call(seq=1, kv=8192)
PREFILL = Call(seq=8192, kv=8192)
VERDICTS = ("holds", "holds if", "off", "experiment")
FUSED = "flash_attention_2"  # what the card names beside eager; as many bytes as sdpa


def attention(call: Call, form: str) -> int:
    """FLOPs of the products of one attention."""
    counts = accounting.products(CARD, 0, replace(call, form=form))
    return sum(n for name, n in counts.items() if name.startswith("self_attn"))


def feed_forward(layer_idx: int, call: Call) -> int:
    """FLOPs of the products of a dense network (layer 0) or of a mixture of experts."""
    return sum(n for name, n in accounting.products(CARD, layer_idx, call).items() if name.startswith("mlp"))


def weights(layer_idx: int, part: str = "") -> int:
    """Parameters of the card's layer, or of a part of it."""
    return sum(n for name, n in accounting.parameters(CARD, layer_idx).items() if name.startswith(part))


def layer(layer_idx: int, call: Call, form: str = "auto") -> int:
    """FLOPs of all products of a layer."""
    return sum(accounting.products(CARD, layer_idx, replace(call, form=form)).values())


def published(field: str) -> Any:
    """What the published configuration class assumes for a field that a file leaves out."""
    ours = {f.name: f.default for f in fields(DeepseekV2Config)}
    return (ours | known()["kinds"]["deepseek_v2"]["defaults"])[field]


def dense_layers(config: DeepseekV2Config) -> int:
    """Layers without experts."""
    return sum(not config.is_moe_layer(i) for i in range(config.num_hidden_layers))


def norms(layer_idx: int) -> int:
    """RMSNorms of the card's layer, those inside its attention included."""
    return sum("layernorm" in name for name in accounting.parameters(CARD, layer_idx))


@cache
def peak(
    call: Call,
    layer_idx: int | None,
    training: bool = False,
    checkpointing: bool = False,
    implementation: str = FUSED,
) -> int:
    """The most bytes of activations that are alive together in a layer of the card, or in a model of such layers (None)."""
    config = replace(CARD, _attn_implementation=implementation)
    return accounting.activation_peak(config, call, layer_idx, training, checkpointing)


def part_peak(part: str, call: Call) -> int:
    """The same in the ``attention`` or the ``mixture`` of experts alone, whose input is not counted."""
    config = replace(CARD, _attn_implementation=FUSED)
    call = replace(call, form=form_of(config, call))
    with without_memory(call):
        layer, cache = layer_and_cache(as_run(config, call), call, 1)
        x = torch.zeros(call.batch, call.seq, CARD.hidden_size)
        with LiveBytes() as live:
            if part == "attention":
                layer.self_attn(x, past_key_value=cache)
            else:
                layer.mlp(x)
    return max(live.totals)


NAMES: dict[str, Any] = {
    "card": CARD,
    "ocr": OCR,
    "decode": DECODE,
    "prefill": PREFILL,
    "attention": attention,
    "feed_forward": feed_forward,
    "weights": weights,
    "layer": layer,
    "published": published,
    "norms": norms,
    "peak": peak,
    "part_peak": part_peak,
    "cache_bytes": accounting.cache_bytes,
    "cache_numbers": accounting.cache_numbers,
    "active": lambda layer_idx: sum(accounting.parameters(CARD, layer_idx, active=True).values()),
    "dense_layers": dense_layers,
    "moe_layers": CARD.num_hidden_layers - dense_layers(CARD),
    "D": CARD.hidden_size,
    "H": CARD.num_attention_heads,
    "C": CARD.kv_lora_rank,
    "R": CARD.qk_rope_head_dim,
    "N": CARD.qk_nope_head_dim,
    "V": CARD.v_head_dim,
    "width": CARD.moe_intermediate_size,
    "shared": CARD.n_shared_experts,
    "E": CARD.n_routed_experts,
    "k": CARD.num_experts_per_tok,
    "K": 8192,
}


@dataclass(frozen=True)
class Claim:
    """One claim, judged.

    Attributes:
        section: heading of the card. quote: its words, the number that is judged in bold. value: that number, of a range
        the nearest to what is computed. computed: what it is, if one assumes (``assumes``). supposed: what it is under a
        further assumption, or None.
        verdict: ``holds``, ``holds if`` (``assumes`` is then what must be assumed), ``off`` or ``experiment`` (see ``note``).
        explained: whether a mistake is known that gives the card's number; ``note`` then says which.
        inherits: whether all that is wrong is a number that it was computed from.
    """

    id: str
    section: str
    quote: str
    value: float
    computed: float
    supposed: float | None
    verdict: str
    assumes: str
    explained: bool
    inherits: bool
    note: str

    @property
    def factor(self) -> float:
        """Claimed over computed; infinite where nothing is computed as 0."""
        return self.value / self.computed if self.computed else math.inf

    @property
    def printed(self) -> str:
        """The number as the card has it, without a sign for "about"."""
        found = re.search(r"\*\*[~≈ ]*(.+?)\*\*", self.quote)
        return found[1] if found else ""


def compute(expression: str) -> float:
    """The value of an expression of the data file."""
    return float(eval(expression, {"__builtins__": {"round": round, "max": max}}, NAMES))


def amount(number: float) -> str:
    """A number with four digits and a unit, as the page prints it."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.4g} {unit}"
    return f"{number:,.0f}" if number == round(number) else f"{number:.4g}"


def filled(text: str) -> str:
    """A text of the data file, what stands in braces computed."""
    return re.sub(r"\{(.+?)\}", lambda found: amount(compute(found[1])), text)


def tolerance(printed: str, about: bool) -> float:
    """By how much a printed number may miss: half a unit of its last digit.

    One that is given as "about" may miss by half a unit of its last digit
    that is not a trailing zero, or by 1 % if that is more, but never by more
    than 10 %.
    """
    if "." in printed:
        unit = 10.0 ** -len(printed.partition(".")[2])
    else:
        unit = 10.0 ** (len(printed) - len(printed.rstrip("0"))) if about else 1.0
    if not about:
        return unit / 2
    return min(max(unit / 2, ABOUT * float(printed)), LOOSE * float(printed))


def meets(entry: dict[str, Any], expression: str) -> bool:
    """Whether a computed number is what the card printed, or lies in the range that it printed."""
    scale, most = UNITS[entry.get("unit", "")], entry["value"]
    least = entry.get("from", most)
    about = "**~" in entry["quote"] or "**≈" in entry["quote"]
    below, above = (tolerance(end, about) * (1 + 1e-9) for end in (least, most))
    return float(least) - below <= compute(expression) / scale <= float(most) + above


def judge(entry: dict[str, Any]) -> str:
    """The verdict on a claim."""
    if "experiment" in entry:
        return "experiment"
    if meets(entry, entry["computed"]):
        return "holds"
    if "under" in entry and meets(entry, entry["under"]):
        return "holds if"
    return "off"


def claim(entry: dict[str, Any]) -> Claim:
    """A claim of the data file, judged."""
    verdict, arithmetic, value, computed = judge(entry), "experiment" not in entry, math.nan, math.nan
    if arithmetic:
        computed, scale = compute(entry["computed"]), UNITS[entry.get("unit", "")]
        least, most = (float(entry.get(end, entry["value"])) * scale for end in ("from", "value"))
        value = min(max(computed, least), most)
    return Claim(
        id=entry["id"],
        section=entry["section"],
        quote=entry["quote"],
        value=value,
        computed=computed,
        supposed=compute(entry["under"]) if "under" in entry else None,
        verdict=verdict,
        assumes=filled(entry["assumption"] if verdict == "holds if" else entry.get("assumes", "")),
        explained="mistake" in entry and meets(entry, entry["mistake"]),
        inherits=entry.get("inherits", False),
        note=filled(entry.get("experiment", entry.get("note", ""))),
    )


def entries() -> list[dict[str, Any]]:
    """What the data file says, in the card's order."""
    return list(tomllib.loads(CLAIMS.read_text(encoding="utf-8"))["claim"])


def claims() -> list[Claim]:
    """All claims, judged, in the card's order."""
    return [claim(entry) for entry in entries()]
