"""What the book says that forgetting and choosing cost: the script measures it again, and its indexer is trained again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsv2_ref.forget import window
from experiments import forgetting
from tests.test_experiments import texts_of_the_log

pytestmark = pytest.mark.slow

BITS = forgetting.stored()["bits"]
HALF = 0.0001
"""Results are stored to four digits, and computed in float64, where processors differ in the fifteenth."""


def test_everything_is_read_as_if_there_were_no_policy() -> None:
    model, tokens = forgetting.model_with_weights(), forgetting.texts()
    assert forgetting.bits(model, tokens) == pytest.approx(BITS["everything"]["128"], abs=HALF)
    assert BITS["everything"]["128"] == pytest.approx(2.7703, abs=HALF)
    assert forgetting.bits(model, tokens[:3], forgetting.best(128)) == forgetting.bits(model, tokens[:3])


@pytest.mark.parametrize(
    ("name", "choose"),
    [
        ("window", forgetting.in_window(8)),
        ("4 first and window", forgetting.in_window(8, sinks=4)),
        ("best, shared by heads", forgetting.best(8)),
        ("newest half, best half", forgetting.best(8, newest=4)),
        ("best, per head", forgetting.best_per_head(8)),
        ("indexer", forgetting.indexed(forgetting.load(), 8)),
    ],
)
def test_the_stored_bits_are_measured_again(name: str, choose: forgetting.Choose) -> None:
    found = forgetting.bits(forgetting.model_with_weights(), forgetting.texts(), choose)
    assert found == pytest.approx(BITS[name]["8"], abs=HALF)


def test_the_best_rows_cost_most_in_layer_0() -> None:
    stored = forgetting.stored()["one_layer_alone"]
    found = forgetting.bits(
        forgetting.model_with_weights(), forgetting.texts(), forgetting.in_layer(0, forgetting.best(8))
    )
    assert found == pytest.approx(stored["best, shared by heads"]["0"], abs=HALF)
    assert found - BITS["everything"]["128"] > 0.8 * (BITS["best, shared by heads"]["8"] - BITS["everything"]["128"])
    assert all(stored["best, shared by heads"][layer] < stored["window"][layer] for layer in "12")


@pytest.mark.parametrize(("name", "recent"), [("heavy hitters", 4), ("heavy hitters, one newest", 1)])
def test_the_stored_bits_of_heavy_hitters_are_measured_again(name: str, recent: int) -> None:
    model, policies = forgetting.model_with_weights(), forgetting.heavy_hitters(8, recent)
    assert forgetting.decoded_bits(model, forgetting.texts(), policies) == pytest.approx(BITS[name]["8"], abs=HALF)


def test_a_window_costs_the_same_decoded_token_by_token() -> None:
    """The two ways of measuring: a mask in one pass, and a cache that loses rows. In float64, to nine digits."""
    model, tokens = forgetting.model_with_weights(), forgetting.texts()[::16, :40]
    masked = forgetting.bits(model, tokens, forgetting.in_window(8, sinks=2))
    decoded = forgetting.decoded_bits(model, tokens, [lambda cache, weights: window(cache, 2, 5)] * 4)
    assert decoded == pytest.approx(masked, rel=1e-9)
    assert masked > 1.0001 * forgetting.bits(model, tokens)


def test_every_policy_has_every_budget_and_more_rows_cost_fewer_bits() -> None:
    for name, by_budget in BITS.items():
        least = {"everything": 128, "4 first and window": 8}.get(name, 4)
        assert list(by_budget) == [
            str(b) for b in (*forgetting.BUDGETS, 128) if b >= least and (b < 128 or least == 128)
        ]
        if name != "heavy hitters, one newest":  # which keep the first tokens for good, however many
            assert sorted(by_budget.values(), reverse=True) == list(by_budget.values())


def test_the_surprises_of_the_chapter() -> None:
    """A set shared by all heads loses to the newest tokens, and a set per head reads as much as a longer window."""
    for budget in map(str, forgetting.BUDGETS):
        assert BITS["best, shared by heads"][budget] > BITS["window"][budget]
        assert BITS["indexer"][budget] >= BITS["best, shared by heads"][budget]
    assert BITS["best, per head"]["8"] > BITS["window"]["16"]
    model, tokens = forgetting.model_with_weights(), forgetting.texts()
    rows = forgetting.stored()["rows_read_per_head"]["8"]
    assert forgetting.rows_read_per_head(model, tokens, 8) == pytest.approx(rows, abs=0.01)
    assert rows > 16


def test_the_divergence_by_hand() -> None:
    """Two queries: one sees itself alone; the other should halve, and gives ¾ and ¼."""
    scores = torch.tensor([[[0.0, -torch.inf], [3.0, 1.0]]]).double()
    scores[0, 1] = scores[0, 1].log()
    target = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]).double()
    by_hand = 0.5 * torch.tensor(0.5 / 0.75).log() + 0.5 * torch.tensor(0.5 / 0.25).log()
    assert float(forgetting.divergence(scores, target)) == pytest.approx(float(by_hand) / 2, abs=1e-6)
    assert float(forgetting.divergence(target.log(), target)) == 0


def test_the_target_is_what_all_heads_attend_to() -> None:
    model, tokens = forgetting.model_with_weights(), forgetting.texts()[:2, :20]
    for u, target in forgetting.lessons(model, tokens):
        assert u.shape == (2, 20, 64)
        assert torch.allclose(target.sum(-1), torch.ones_like(target[..., 0]))
        assert not target.triu(1).any()


@pytest.mark.thorough
def test_the_stored_log_of_the_indexer_begins_as_the_script_does() -> None:
    """25 steps. Other vector instructions round otherwise, which moves the third digit of a loss that falls fourfold."""
    texts_of_the_log()
    _, log = forgetting.train(forgetting.EVERY)
    stored = forgetting.stored()["indexer"]
    assert stored["step"][-1] == forgetting.STEPS
    assert log["step"] == stored["step"][:1]
    assert log["loss"] == pytest.approx(stored["loss"][:1], rel=0.02)
    assert stored["loss"] == sorted(stored["loss"], reverse=True) or min(stored["loss"]) < 0.06 * stored["loss"][0]


def test_the_script_writes_what_the_page_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = forgetting.texts()[::16, :40]
    monkeypatch.setattr(forgetting, "texts", lambda: few)
    monkeypatch.setattr(forgetting, "BUDGETS", (6,))
    forgetting.main(["--steps", "2", "--out", str(tmp_path)])
    written = json.loads((tmp_path / forgetting.FILE).read_text())
    assert written.keys() == forgetting.stored().keys()
    assert written["bits"].keys() == BITS.keys()
    assert written["indexer"]["step"] == [2]
    here, there = (load_file(folder / forgetting.WEIGHTS) for folder in (tmp_path, forgetting.router.DATA))
    assert {name: weight.shape for name, weight in here.items()} == {name: w.shape for name, w in there.items()}
    assert any(not torch.equal(here[name], there[name]) for name in here)
