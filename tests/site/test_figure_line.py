"""The line walker shows what the trained model does."""

import itertools

import pytest
from playwright.sync_api import Browser, expect

from experiments.trained import LINE
from tests.site.test_figures import opened
from tools.figures.line import shown, stored, walked

WALK = """(states) => states.map((state) => {
    for (const [name, value] of Object.entries(state)) document.getElementById(`line-${name}`).value = value;
    document.getElementById("line-token").dispatchEvent(new Event("input", { bubbles: true }));
    return [...document.querySelectorAll("[data-figure=line] table tr")].map(row => [row.cells[0].textContent, row.cells[1].textContent]);
})"""
HALF = 0.005 + 1e-6
"""The figure stores and shows hundredths, each rounded once."""


def test_every_state_is_the_models(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "overview")
    tab.wait_for_selector("#line-token")
    found = {name: values.tolist() for name, values in walked().items()}
    states = list(itertools.product(range(len(LINE)), range(4), range(4)))
    pages = tab.evaluate(WALK, [dict(zip(("token", "layer", "head"), state, strict=True)) for state in states])
    for (token, layer, head), rows in zip(states, pages, strict=True):
        names, texts = zip(*rows, strict=True)
        experts = found["experts"][layer - 1][token] if layer else []
        assert names == (
            *(f"weight of {shown(character)} at {at}" for at, character in enumerate(LINE)),
            *(f"expert {expert}" for expert in experts),
            *(f"next {shown(chr(byte))}" for byte in found["next"][token]),
        )
        numbers = found["attention"][layer][head][token][: token + 1]
        assert texts[token + 1 : len(LINE)] == ("masked",) * (len(LINE) - 1 - token)
        numbers += (found["weights"][layer - 1][token] if layer else []) + found["probabilities"][token]
        for text, number in zip((*texts[: token + 1], *texts[len(LINE) :]), numbers, strict=True):
            assert float(text) == pytest.approx(number, abs=HALF)
    tab.context.close()


def test_python_reads_what_the_script_reads() -> None:
    data, found = stored(), walked()
    assert data["text"] == LINE
    assert data["experts"] == found["experts"].tolist()
    assert data["attention"][2][3][13][9] == 87
    assert data["probabilities"][13] == [56, 21, 20]


def test_its_state_is_in_the_address_and_is_said(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "overview")
    said = tab.locator("[data-figure=line] [aria-live]")
    expect(said).to_contain_text("“=” at position 13 reads “4” at 9 most, with weight 0.87")
    tab.focus("#line-token")
    tab.keyboard.press("ArrowLeft")
    expect(said).to_contain_text("“8” at position 12")
    assert "line-token=12" in tab.url
    tab.reload()
    expect(tab.locator("#line-token")).to_have_value("12")
    tab.goto(tab.url.replace("line-token=12", "line-token=99"))
    expect(tab.locator("#line-token")).to_have_value("13")
    tab.context.close()
