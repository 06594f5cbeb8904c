"""The line walker shows what the trained model does."""

import itertools

import pytest
from playwright.sync_api import Browser, expect

from experiments.trained import LINE
from tests.site.test_figures import opened
from tools.figures.line import BUDGETS, POLICIES, kept, lost, shown, stored, walked

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


def test_every_row_after_a_policy_is_that_of_python(browser: Browser, origin: str) -> None:
    """From the same hundredths, so that both round alike but for halves."""
    tab = opened(browser, origin, "sparse")
    tab.wait_for_selector("#line-policy")
    found, names = stored(), ("token", "layer", "head", "policy", "budget")
    states = list(itertools.product(range(len(LINE)), range(4), range(4), POLICIES, BUDGETS[:2]))[::7]
    pages = tab.evaluate(WALK, [dict(zip(names, state, strict=True)) for state in states])
    for (token, layer, head, policy, budget), rows in zip(states, pages, strict=True):
        left = kept([found["attention"][layer][each][token] for each in range(4)], policy, int(budget), head)
        assert len(rows) == len(LINE)
        shares = [text for _, text in rows if text not in ("hidden", "masked")]
        assert [text for _, text in rows[token + 1 :]] == ["masked"] * (len(LINE) - 1 - token)
        assert len(shares) == min(int(budget), token + 1)
        for share, (_, text) in zip(left, rows, strict=False):
            assert (share if text == "hidden" else share / 100 - float(text)) == pytest.approx(0, abs=HALF)
    said = tab.locator("[data-figure=line] [aria-live]")
    expect(said).to_contain_text(f"it costs {lost()[POLICIES[-1]].split()[1]} bits per byte")
    tab.context.close()


def test_a_policy_acts_on_the_pages_that_ask_for_one(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "overview")
    tab.wait_for_selector("#line-token")
    assert tab.locator("#line-policy").count() == 0
    tab.context.close()
    tab = opened(browser, origin, "sparse")
    expect(tab.locator("#line-policy")).to_have_value("window")
    tab.select_option("#line-policy", "everything")
    expect(tab.locator("[data-figure=line] [aria-live]")).to_contain_text("The model expects “5” next")
    tab.context.close()


def test_what_a_policy_leaves_is_close_to_what_it_leaves_of_the_model() -> None:
    """Hundredths are off by half of one each, so the sum of n by n / 200, and a chosen set may lose 2 n / 200 to the best."""
    found, data = walked()["attention"], stored()["attention"]
    for layer, token, policy, budget in itertools.product(range(4), range(len(LINE)), POLICIES, (4, 8)):
        for head in range(4):
            true = found[layer, :, token, : token + 1]
            left = kept([data[layer][each][token] for each in range(4)], policy, budget, head)
            order = [at for at, share in enumerate(left) if share]
            wanted = {"window": None, "best, shared by heads": true.sum(0)}.get(policy, true[head])
            if wanted is not None and len(order) == min(budget, token + 1):
                heads = 4 if policy == "best, shared by heads" else 1
                most = float(wanted.topk(min(budget, token + 1)).values.sum())
                assert float(wanted[order].sum()) >= most - 2 * heads * budget * HALF
            elif wanted is None:
                assert set(order) <= set(range(max(0, token + 1 - budget), token + 1))
            if order:
                sum_ = float(true[head, order].sum())
                for at in order:
                    error = HALF * (1 + len(order) * left[at] / 100)
                    assert left[at] / 100 == pytest.approx(
                        float(true[head, at]) / sum_, abs=error / (sum_ - len(order) * HALF)
                    )


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
