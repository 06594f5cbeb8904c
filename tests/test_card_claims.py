"""The judgement of the card: every claim has the verdict that is expected, and a wrong one is seen."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from dsv2_ref import DeepseekV2DecoderLayer, plots
from tools import card_claims as cc

HOLD = {
    "layer-range", "frequency-default", "eps-default", "dense-layers", "moe-layers", "moe-parameters", "norm-parameters",
    "second-norm-parameters", "norms-parameters", "experts-active", "dense-width", "input-decode", "outputs-decode",
    "input-prefill", "cache-rope", "cache-latent", "cache-layer", "cache-16k", "cache-32k", "cache-ratio",
}  # fmt: skip
HOLD_IF = {
    "ocr-layers", "hidden-default", "experts-default", "dense-default", "norm-decode", "norm-prefill",
    "attention-memory-decode", "norm-count", "expert-ratio",
}  # fmt: skip
EXPERIMENTS = {"forty-deep", "deep", "warm-up"}
UNEXPLAINED = {"attention-memory-prefill"}


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_every_claim_has_the_verdict_that_is_expected() -> None:
    claims = cc.claims()
    by_verdict = {verdict: {c.id for c in claims if c.verdict == verdict} for verdict in ("holds", "holds if", "off")}
    assert by_verdict["holds"] == HOLD
    assert by_verdict["holds if"] == HOLD_IF
    assert {c.id for c in claims if c.verdict == "experiment"} == EXPERIMENTS
    assert by_verdict["off"] == {c.id for c in claims} - HOLD - HOLD_IF - EXPERIMENTS
    assert len(claims) == len({c.id for c in claims}) > 40


def test_every_miss_is_explained_by_a_slip_that_gives_its_number_or_says_that_none_was_found() -> None:
    for claim in cc.claims():
        if claim.verdict == "off":
            assert claim.explained == (claim.id not in UNEXPLAINED), claim.id
            assert claim.note, claim.id
            assert claim.explained or "No slip was found" in claim.note, claim.id
        assert bool(claim.assumption) == (claim.verdict == "holds if"), claim.id


def test_what_is_computed_is_what_built_layers_have() -> None:
    with torch.device("meta"):
        layers = [DeepseekV2DecoderLayer(cc.CARD, index) for index in (0, 1)]
    counts = {claim.id: claim.computed for claim in cc.claims()}
    for name, modules in {
        "attention-parameters": layers[0].self_attn,
        "dense-parameters": layers[0].mlp,
        "moe-parameters": layers[1].mlp,
        "dense-layer": layers[0],
        "moe-layer": layers[1],
    }.items():
        assert counts[name] == sum(p.numel() for p in modules.parameters()), name


@pytest.mark.parametrize(
    ("printed", "about", "allowed"),
    [
        ("61.4", False, 0.05),
        ("61.4", True, 0.614),
        ("40", False, 0.5),
        ("360", True, 5.0),
        ("10", True, 1.0),
        ("876", True, 8.76),
    ],
)
def test_tolerance_follows_from_the_digits_that_are_printed(printed: str, about: bool, allowed: float) -> None:
    assert cc.tolerance(printed, about) == pytest.approx(allowed)


def test_a_wrong_number_changes_the_verdict() -> None:
    (entry,) = (e for e in cc.entries() if e["id"] == "cache-layer")
    assert cc.judge(entry).verdict == "holds"
    assert cc.judge(entry | {"value": "9.54"}).verdict == "off"
    assert cc.judge(entry | {"computed": "cache_bytes(card, K, layers=2)"}).verdict == "off"
    assert cc.judge(entry | {"value": "18.87", "under": "2 * cache_bytes(card, K, layers=1)"}).verdict == "holds if"


def test_about_is_read_from_the_words_of_the_card() -> None:
    (entry,) = (e for e in cc.entries() if e["id"] == "moe-parameters")
    near = entry | {"value": "880"}
    assert cc.judge(near).verdict == "holds"
    assert cc.judge(near | {"quote": "MoE: 880M params"}).verdict == "off"


@pytest.mark.parametrize(
    ("computed", "verdict"),
    [("0.9e9", "holds"), ("1.5e9", "holds"), ("2.2e9", "holds"), ("0.8e9", "off"), ("2.3e9", "off")],
)
def test_a_range_holds_what_lies_in_it_and_about_its_ends(computed: str, verdict: str) -> None:
    (entry,) = (e for e in cc.entries() if e["id"] == "checkpointing")
    assert cc.judge(entry | {"computed": computed}).verdict == verdict


def test_checkpointed_training_keeps_what_is_computed_and_copies() -> None:
    """A live layer keeps the named tensors and some copies in float32 for its backward pass: more, but not twice as much."""
    few = replace(cc.CARD, n_routed_experts=4, mla_form="expanded")
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    torch.manual_seed(0)
    layer = DeepseekV2DecoderLayer(few, 1).bfloat16()
    for length in (128, 256):
        kept.clear()
        tokens = torch.randn(1, length, few.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(tokens)
        of_weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
        per_token = sum(s.nbytes() for place, s in kept.items() if place not in of_weights) / length
    measured = 8192 * (per_token + 39 * 2 * few.hidden_size)  # this layer's input is among what it keeps
    (claim,) = (c for c in cc.claims() if c.id == "checkpointing")
    assert claim.computed < measured < 2 * claim.computed


def test_numbers_in_a_note_are_computed() -> None:
    notes = {claim.id: claim.note for claim in cc.claims()}
    assert notes["cache-all"].endswith("377.5 MB.")
    assert "2.949 P" in notes["moe-prefill"]
    assert not any("{" in note for note in notes.values())


@pytest.mark.parametrize(
    ("number", "shown"), [(1e15, "1 P"), (46592, "46.59 k"), (5120, "5,120"), (9.539, "9.539"), (1e-6, "1e-06")]
)
def test_amounts_have_four_digits_and_a_unit(number: float, shown: str) -> None:
    assert cc.amount(number) == shown


def test_a_fault_in_the_accounting_turns_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = replace(cc.CARD, kv_lora_rank=256)
    monkeypatch.setitem(cc.NAMES, "card", smaller)
    assert {claim.id for claim in cc.claims() if claim.verdict == "holds"} != HOLD


def test_the_figure_marks_every_claim_by_its_verdict() -> None:
    axes = plots.claimed_over_computed([(1.0, "holds"), (0.5, "off"), (1.0, "holds if"), (100.0, "off")])
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()[:3]}
    assert drawn == {"holds": ([1], [1.0]), "holds if": ([3], [1.0]), "off": ([2, 4], [0.5, 100.0])}
    assert len({line.get_marker() for line in axes.get_lines()[:3]}) == 3
    assert axes.get_yscale() == "log"
    assert "claimed" in axes.get_ylabel()


def test_verdicts_are_counted_on_the_page() -> None:
    assert Counter(claim.verdict for claim in cc.claims()) == {"holds": 20, "holds if": 9, "off": 32, "experiment": 3}
