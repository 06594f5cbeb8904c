"""The clocks: what they show is what `dsv2_ref.rope` computes, and everybody can use them."""

import itertools

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from tests.site.conftest import on_screens
from tests.site.test_figures import opened
from tools.figures.clocks import STATES, clocks

SET = """(state) => {
    for (const [name, value] of Object.entries(state)) {
        const field = document.getElementById(`clocks-${name}`);
        field.value = value;
        field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    const figure = document.querySelector("[data-figure=clocks]");
    const rows = [...figure.querySelectorAll("tbody tr")].map(row => [...row.cells].map(cell => cell.textContent));
    return [rows, [...figure.querySelectorAll(".clocks p")].map(caption => caption.textContent)];
}"""


def test_it_shows_what_the_package_computes(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "rope")
    tab.wait_for_selector("#clocks-kind")
    kinds = [("none", 4), *itertools.product(("linear", "dynamic", "YaRN"), (1, 4, 16))]
    states = list(itertools.product(kinds, (100, 10_000, 500_000), (0, 127, 320, 1024)))
    assert len(states) >= 40
    new = set()
    for (kind, stretch), base, distance in states:
        wanted = clocks(kind, base, stretch, distance)
        state = {"kind": kind, "stretch": stretch, "base": f"{base:,}", "distance": distance}
        rows, captions = tab.evaluate(SET, state)
        pairs = zip(wanted.steps, wanted.angles, wanted.seen, strict=True)
        assert rows == [
            *(
                [str(pair), f"{step:.6f}", f"{angle:.4f}", "yes" if seen else "new"]
                for pair, (step, angle, seen) in enumerate(pairs)
            ),
            ["temperature", "", f"{wanted.temperature:.4f}", ""],
            ["score", "", f"{wanted.score:.4f}".replace("-", "−"), ""],
        ], state
        assert ["new angle" in caption for caption in captions] == [not seen for seen in wanted.seen]
        new.add(tuple(wanted.seen))
    assert len(new) == 4  # pairs 2 and 3, seen or not
    tab.context.close()


def test_its_state_is_in_the_address_and_is_said(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "rope")
    tab.wait_for_selector("#clocks-kind")
    said = tab.locator("[data-figure=clocks] [aria-live]")
    expect(tab.locator("#clocks-stretch")).to_be_hidden()
    tab.evaluate(SET, {"distance": 320})
    expect(said).to_contain_text("pairs 2 and 3 show an angle never seen in training; the score is 1.69")
    tab.select_option("#clocks-kind", "linear")
    expect(said).to_contain_text("linear ×4, base 10,000: training showed the angles of all pairs")
    expect(said).to_contain_text("The fastest hand turns 0.250 radians")
    assert "clocks-distance=320" in tab.url
    tab.reload()
    expect(tab.locator("#clocks-kind")).to_have_value("linear")
    expect(tab.locator("#clocks-distance")).to_have_value("320")
    tab.context.close()


def test_without_scripts_there_is_a_table(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "rope", java_script_enabled=False)
    rows = tab.locator("[data-figure=clocks] tbody tr")
    expect(rows).to_have_count(len(STATES))
    expect(rows.nth(1)).to_contain_text("pair 2, pair 3")
    tab.context.close()


@on_screens
def test_it_fits_and_is_accessible(browser: Browser, origin: str, width: int, colours: str) -> None:
    tab = opened(browser, origin, "rope", viewport={"width": width, "height": 800}, color_scheme=colours)
    tab.wait_for_selector("#clocks-kind")
    tab.click("[data-figure=clocks] button")
    tab.evaluate(SET, {"distance": 320, "kind": "YaRN"})
    assert tab.evaluate("document.querySelector('[data-figure=clocks]').scrollWidth <= innerWidth")
    assert not Axe().run(tab, context="[data-figure=clocks]").response["violations"]
    heights = tab.locator("[data-figure=clocks] :is(input, select, button)").evaluate_all(
        "found => found.map(control => control.getBoundingClientRect().height)"
    )
    assert min(heights) >= 44
    tab.context.close()


def test_on_paper_there_are_the_picture_and_the_table(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "rope")
    tab.wait_for_selector("#clocks-kind")
    tab.emulate_media(media="print")
    expect(tab.locator("[data-figure=clocks] form")).to_be_hidden()
    expect(tab.locator("[data-figure=clocks] table")).to_be_visible()
    expect(tab.locator("[data-figure=clocks] svg").first).to_be_visible()
    tab.context.close()


@pytest.mark.parametrize(("width", "rows"), [(1280, 1), (390, 2)])
def test_the_clocks_stand_in_full_rows_below_the_controls(browser: Browser, origin: str, width: int, rows: int) -> None:
    tab = opened(browser, origin, "rope", viewport={"width": width, "height": 900})
    tab.wait_for_selector(".clocks .clock")
    tops = [box["y"] for clock in tab.locator(".clock").all() if (box := clock.bounding_box())]
    controls = tab.locator("[data-figure=clocks] .figure-controls").bounding_box()
    assert len(set(tops)) == rows
    assert controls
    assert min(tops) >= controls["y"] + controls["height"] + 8
    tab.context.close()
