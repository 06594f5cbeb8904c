"""The rounding figure: what it shows is what the package makes of its weights, and everybody can use it."""

import itertools

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from tests.site.conftest import on_screens
from tests.site.test_figures import opened
from tools.figures.rounding import OUTLIER, STATES, rounded, weights

SET = """(state) => {
    for (const [name, value] of Object.entries(state)) {
        const field = document.getElementById(`rounding-${name}`);
        field.value = value;
        field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    return [...document.querySelectorAll("[data-figure=rounding] tbody tr")].map(
        row => [...row.cells].map(cell => cell.textContent));
}"""


def number(x: float) -> str:
    return f"{x:g}".replace("-", "−") if x else "0"


def test_it_shows_what_the_package_makes_of_the_weights(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "bits")
    tab.wait_for_selector("#rounding-format")
    kinds = [f"int{bits}" for bits in range(2, 9)] + ["fp8"]
    states = list(itertools.product(kinds, (8, 16, 64), (1, 7, 40)))
    assert len(states) >= 40
    for kind, group, factor in states:
        found = rounded(kind, group, factor)
        state = {"format": "e4m3" if kind == "fp8" else "whole numbers", "group": group, "factor": factor}
        if kind != "fp8":
            state["bits"] = int(kind.removeprefix("int"))
        *groups, whole = tab.evaluate(SET, state)
        for place, (name, error, scale, codes) in enumerate(groups):
            wanted = [str(place), f"{found.scales[place]:.6f}"]
            assert [name, scale] == wanted, state
            assert float(error.removesuffix(" %")) == pytest.approx(100 * found.errors[place], abs=0.05001), state
            assert codes == " ".join(number(code) for code in found.codes[place].tolist()), state
        assert len(groups) == 64 // group
        assert float(whole[1].removesuffix(" %")) == pytest.approx(100 * found.error, abs=0.05001), state
        assert whole[2:] == [f"{found.scale_bytes} bytes", f"{found.code_bytes} bytes"]
    tab.context.close()


def test_the_weights_are_the_models_and_the_bytes_are_those_of_their_codes() -> None:
    assert weights().shape == (64,)
    assert 0.1 < weights().abs().max() < 0.2
    assert abs(weights()[OUTLIER]) < weights().abs().max() / 5  # enlarged 40 times it is the largest
    assert (rounded("int4", 16, 1).code_bytes, rounded("int4", 16, 1).scale_bytes) == (32, 8)
    alone, ruined = (rounded("int4", 16, factor).errors for factor in (1, 40))
    assert [a == b for a, b in zip(alone, ruined, strict=True)] == [True, False, True, True]


def test_its_state_is_in_the_address_and_is_said(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "bits")
    tab.wait_for_selector("#rounding-format")
    said = tab.locator("[data-figure=rounding] [aria-live]")
    expect(said).to_contain_text("int4 in groups of 64, weight 20 at −0.02: the rounded weights are 8.0 % off")
    tab.focus("#rounding-factor")
    tab.keyboard.press("End")
    expect(said).to_contain_text("at −0.72")
    assert "rounding-factor=40" in tab.url
    tab.select_option("#rounding-format", "e4m3")
    expect(tab.locator("#rounding-bits")).to_be_hidden()
    tab.reload()
    expect(tab.locator("#rounding-format")).to_have_value("e4m3")
    expect(tab.locator("#rounding-factor")).to_have_value("40")
    tab.context.close()


def test_without_scripts_there_is_a_table(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "bits", java_script_enabled=False)
    rows = tab.locator("[data-figure=rounding] tbody tr")
    expect(rows).to_have_count(len(STATES))
    expect(rows.first).to_contain_text("8.0%")
    tab.context.close()


@on_screens
def test_it_fits_and_is_accessible(browser: Browser, origin: str, width: int, colours: str) -> None:
    tab = opened(browser, origin, "bits", viewport={"width": width, "height": 800}, color_scheme=colours)
    tab.wait_for_selector("#rounding-format")
    tab.click("[data-figure=rounding] button")
    tab.evaluate(SET, {"group": 8, "factor": 40, "bits": 8})
    assert tab.evaluate("document.querySelector('[data-figure=rounding]').scrollWidth <= innerWidth")
    assert not Axe().run(tab, context="[data-figure=rounding]").response["violations"]
    heights = tab.locator("[data-figure=rounding] :is(input, select, button)").evaluate_all(
        "found => found.map(control => control.getBoundingClientRect().height)"
    )
    assert min(heights) >= 44
    tab.context.close()


def test_on_paper_there_are_the_picture_and_the_table(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "bits")
    tab.wait_for_selector("#rounding-format")
    tab.emulate_media(media="print")
    expect(tab.locator("[data-figure=rounding] form")).to_be_hidden()
    expect(tab.locator("[data-figure=rounding] table")).to_be_visible()
    expect(tab.locator("[data-figure=rounding] svg")).to_be_visible()
    tab.context.close()
