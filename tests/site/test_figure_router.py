"""The router shows what the package's gate and losses say."""

import itertools
import random
from typing import Any

import torch
from playwright.sync_api import Browser, Page, expect

from experiments.trained import LINE
from tests.site.test_figures import opened
from tools.figures.line import shown, walked
from tools.figures.router import LOGITS, NORMALISE, line_logits, routed, stored

SET = """(states) => states.map((state) => {
    for (const [name, value] of Object.entries(state)) document.getElementById(`router-${name}`).value = value;
    document.getElementById("router-k").dispatchEvent(new Event("input", { bubbles: true }));
    return Object.fromEntries([...document.querySelectorAll("[data-figure=router] table tr")].map(
        row => [row.cells[0].textContent, row.cells[1].textContent]));
})"""
PLACES = ("1st", "2nd", "3rd", "4th", "5th", "6th")


def same(text: str, number: float) -> bool:
    """Whether a text is the number, to 1e-6 before it is written with three decimals."""
    return text in {f"{number + off:.3f}" for off in (-1e-6, 0, 1e-6)}


def states_of(mode: str, some: random.Random) -> list[dict[str, Any]]:
    states = []
    for k, groups, normalise, scale in itertools.product(range(1, 7), range(1, 5), NORMALISE, ("1", "16")):
        state = {"mode": mode, "k": k, "groups": groups, "normalise": normalise, "scale": scale}
        if mode == "one token":
            drawn = some.sample(range(-40, 41), 8)  # no two alike
            state |= {f"logit{expert}": logit / 10 for expert, logit in enumerate(drawn)}
        states.append(state)
    return states


def of_python(state: dict[str, Any], logits: torch.Tensor) -> Any:
    return routed(logits, state["k"], state["groups"], state["normalise"], float(state["scale"]))


def at_the_router(browser: Browser, origin: str) -> Page:
    tab = opened(browser, origin, "experts")
    tab.wait_for_selector("#router-mode")
    return tab


def test_one_token_is_routed_as_by_the_gate(browser: Browser, origin: str) -> None:
    tab = at_the_router(browser, origin)
    states = states_of("one token", random.Random(0))
    assert len(states) >= 40
    for state, page in zip(states, tab.evaluate(SET, states), strict=True):
        logits = torch.tensor([[state[f"logit{expert}"] for expert in range(8)]], dtype=torch.float64)
        found = of_python(state, logits)
        chosen = found.experts[0].tolist()
        scores = {name.split(": ")[-1]: text for name, text in page.items() if name.startswith("Scores")}
        for expert, score in enumerate(found.scores[0].tolist()):
            number, _, place = scores[f"{expert}, group {expert // 2}"].partition(", ")
            assert same(number, score)
            assert place.replace("closed", "") == (PLACES[chosen.index(expert)] if expert in chosen else "")
        weights = [text for name, text in page.items() if name.startswith("Weights")]
        assert [name.split(": ")[-1] for name in page if name.startswith("Weights")] == [f"expert {e}" for e in chosen]
        assert all(same(text, weight) for text, weight in zip(weights, found.weights[0].tolist(), strict=True))
        closed = sum(text.endswith("closed") for text in scores.values())
        assert closed == 8 - 2 * state["groups"]
    tab.context.close()


def test_the_line_is_routed_and_balanced_as_by_the_package(browser: Browser, origin: str) -> None:
    tab = at_the_router(browser, origin)
    states = states_of("the line", random.Random(0))
    _, logits = stored()
    for state, page in zip(states, tab.evaluate(SET, states), strict=True):
        found = of_python(state, logits)
        for expert in range(16):
            assert same(page[f"f: choices over an even share: expert {expert}"], found.frequency[expert].item())
            assert same(page[f"P: mean score: expert {expert}"], found.mean_score[expert].item())
        for name, loss in found.losses.items():
            assert same(page[f"Losses Σ f P, with α = 1: {name}"], loss)
        for token, character in enumerate(LINE):
            choices = [choice.split(": ") for choice in page[f"token {token}, {shown(character)}"].split(", ")]
            assert [int(expert) for expert, _ in choices] == found.experts[token].tolist()
            weights = found.weights[token].tolist()
            assert all(same(text, weight) for (_, text), weight in zip(choices, weights, strict=True))
    tab.context.close()


def test_the_stored_logits_are_the_models() -> None:
    text, logits = stored()
    assert text == LINE
    assert (logits - line_logits()).abs().max() < 0.0011
    assert routed(logits, 3, 2).experts.equal(walked()["experts"][0])


def test_its_state_is_in_the_address_and_is_said(browser: Browser, origin: str) -> None:
    tab = at_the_router(browser, origin)
    fields = tab.locator("[data-figure=router] input[type=number]")
    assert [float(field.input_value()) for field in fields.all()] == list(LOGITS)
    said = tab.locator("[data-figure=router] [aria-live]")
    tab.focus("#router-groups")
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    expect(said).to_contain_text("The group limit costs expert 4 (0.163) and gives expert 1 (0.090) instead.")
    tab.fill("#router-logit4", "0.1")
    expect(said).not_to_contain_text("costs")
    assert "router-logit4=0.1" in tab.url
    tab.select_option("#router-scale", "16")
    tab.select_option("#router-normalise", NORMALISE[2])
    expect(said).to_contain_text("the weights sum to 1.000. Normalised, they ignore the scale 16.")
    tab.reload()
    expect(tab.locator("#router-logit4")).to_have_value("0.1")
    expect(tab.locator("#router-groups")).to_have_value("2")
    expect(tab.locator("#router-normalise")).to_have_value(NORMALISE[2])
    tab.select_option("#router-mode", "the line")
    expect(said).to_contain_text("17 tokens choose 3 of 16 experts each")
    expect(fields.first).to_be_hidden()
    tab.context.close()
