"""The card's numeric claims, computed and judged: `book/data/card_claims.toml` says what was claimed, this says whether it holds.

A claim's text decides how exactly it must be met (`tolerance`). What is computed is an expression over the names in `NAMES`, most of them functions of `dsv2_ref.accounting`.
"""

import math
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsv2_ref import accounting
from dsv2_ref.accounting import Call
from dsv2_ref.config import PUBLISHED_DEFAULTS, DeepseekV2Config

CLAIMS = Path(__file__).resolve().parent.parent / "book" / "data" / "card_claims.toml"
UNITS = {"µ": 1e-6, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
ABOUT, LOOSE = 0.01, 0.1  # of a number given as "about": what it may always miss, and at most
CARD, OCR = DeepseekV2Config.card(), DeepseekV2Config.deepseek_ocr()
DECODE = Call(seq=1, kv=8192)
PREFILL = Call(seq=8192, kv=8192)


def attention(call: Call, form: str, causal: bool = True) -> int:
    """FLOPs of the products of one attention."""
    call = Call(batch=call.batch, seq=call.seq, kv=call.kv, form=form, causal=causal)
    return sum(n for name, n in accounting.products(CARD, 0, call).items() if name.startswith("self_attn"))


def feed_forward(layer_idx: int, call: Call) -> int:
    """FLOPs of the products of a dense network (layer 0) or of a mixture of experts."""
    return sum(n for name, n in accounting.products(CARD, layer_idx, call).items() if name.startswith("mlp"))


def weights(layer_idx: int, part: str = "") -> int:
    """Parameters of the card's layer, or of a part of it."""
    return sum(n for name, n in accounting.parameters(CARD, layer_idx).items() if name.startswith(part))


def layer(layer_idx: int, call: Call, form: str = "auto") -> int:
    """FLOPs of all products of a layer."""
    call = Call(batch=call.batch, seq=call.seq, kv=call.kv, form=form)
    return sum(accounting.products(CARD, layer_idx, call).values())


def published(field: str) -> Any:
    """What the published configuration class assumes for a field that a file leaves out."""
    return PUBLISHED_DEFAULTS.get(field, {f.name: f.default for f in fields(DeepseekV2Config)}[field])


def dense_layers(config: DeepseekV2Config) -> int:
    """Layers without experts."""
    return sum(not config.is_moe_layer(i) for i in range(config.num_hidden_layers))


def norms(layer_idx: int) -> int:
    """RMSNorms of the card's layer, those inside its attention included."""
    return sum("layernorm" in name for name in accounting.parameters(CARD, layer_idx))


def activations(implementation: str) -> int:
    """The most bytes of activations that the card's layer holds at once in a prefill of 8192 tokens."""
    config = replace(CARD, _attn_implementation=implementation)
    return accounting.activation_peak(config, Call(seq=8192, kv=8192, form="expanded"), 1)


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
    "activations": activations,
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
        section: of the card. quote: its words. value: the number claimed. computed: what it is.
        verdict: ``holds``, ``holds if`` (with ``assumption``), ``off`` or ``experiment`` (see ``note``).
        explained: whether a slip is known that gives the card's number; ``note`` then says which.
    """

    id: str
    section: str
    quote: str
    value: float
    computed: float
    verdict: str
    assumption: str
    explained: bool
    note: str

    @property
    def factor(self) -> float:
        """Claimed over computed; infinite where nothing is computed as 0."""
        return self.value / self.computed if self.computed else math.inf


def compute(expression: str) -> float:
    """The value of an expression of the data file."""
    return float(eval(expression, {"__builtins__": {"round": round, "max": max}}, NAMES))


def amount(number: float) -> str:
    """A number with four digits and a unit, as the page prints it."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.4g} {unit}"
    return f"{number:,.0f}" if number == round(number) else f"{number:.4g}"


def tolerance(printed: str, about: bool) -> float:
    """By how much a printed number may miss: half a unit of its last digit.

    Where it is given as "about", zeros at the end of a whole number are no digits: then it may miss by at least 1 % and at
    most 10 %.
    """
    if "." in printed:
        unit = 10.0 ** -len(printed.partition(".")[2])
    else:
        unit = 10.0 ** (len(printed) - len(printed.rstrip("0"))) if about else 1.0
    if not about:
        return unit / 2
    return min(max(unit / 2, ABOUT * float(printed)), LOOSE * float(printed))


def judge(entry: dict[str, Any]) -> Claim:
    """Compute a claim and compare."""
    scale = UNITS[entry.get("unit", "")]
    printed = entry["value"]
    about = "~" in entry["quote"] or "≈" in entry["quote"]
    value, least = float(printed) * scale, float(entry.get("from", printed)) * scale
    above, below = (tolerance(end, about) * scale * (1 + 1e-9) for end in (printed, entry.get("from", printed)))

    def meets(expression: str | None) -> bool:
        return expression is not None and least - below <= compute(expression) <= value + above

    explained = meets(entry.get("slip"))
    if "experiment" in entry:
        verdict = "experiment"
    elif meets(entry["computed"]):
        verdict = "holds"
    else:
        verdict = "holds if" if meets(entry.get("under")) else "off"
    return Claim(
        id=entry["id"],
        section=entry["section"],
        quote=entry["quote"],
        value=value,
        computed=compute(entry["computed"]),
        verdict=verdict,
        assumption=entry.get("assumption", "") if verdict == "holds if" else "",
        explained=explained,
        note=re.sub(
            r"\{(.+?)\}", lambda found: amount(compute(found[1])), entry.get("experiment", entry.get("note", ""))
        ),
    )


def entries() -> list[dict[str, Any]]:
    """What the data file says, in the card's order."""
    return list(tomllib.loads(CLAIMS.read_text(encoding="utf-8"))["claim"])


def claims() -> list[Claim]:
    """All claims, judged, in the card's order."""
    return [judge(entry) for entry in entries()]
