"""The roofline: what it shows is what the accounting counts, and everybody can use it."""

import itertools
import math

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from tests.site.conftest import on_screens
from tests.site.test_figures import amount, opened
from tools.figures.roofline import MODELS, STATES, machines, needed, parts

SET = """(state) => {
    for (const [name, value] of Object.entries(state)) {
        const field = document.getElementById(`roofline-${name}`);
        field.value = value;
        field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    return [...document.querySelectorAll("[data-figure=roofline] tbody tr")].map(
        row => [...row.cells].map(cell => cell.textContent));
}"""


def digits(x: float) -> str:
    """Three digits."""
    rounded = float(f"{x:.2e}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(rounded)))}f}"


def intensity(x: float) -> str:
    return digits(x) if x < 99.95 else f"{x:,.0f}"


def seconds(x: float) -> str:
    rounded = float(f"{x:.2e}")
    size, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")) if rounded >= s), (1e-9, "ns"))
    return f"{digits(rounded / size)} {unit}"


def test_it_shows_what_the_accounting_counts(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "rooflines")
    tab.wait_for_selector("#roofline-model")
    names = [*machines()]
    states = list(itertools.product(MODELS, (0, 6, 13), (8, 13, 17), ((16, 16), (4, 16), (8, 4))))
    assert len(states) >= 40
    bounds = set()
    for number, (model, batch, context, (weights, cache)) in enumerate(states):
        name = names[number % len(names)]
        config, size = MODELS[model], (2**batch, 2**context, weights, cache)
        found = parts(config, machines()[name], *size)
        state = {
            "model": model,
            "machine": name,
            "batch": batch,
            "context": context,
            "weights": weights,
            "cache": cache,
        }
        rows = tab.evaluate(SET, state)
        shown = {part: cells for part, *cells in rows}
        per_token = sum(part.seconds for part in found.values())
        expected = {
            name: [intensity(part.intensity), f"{seconds(part.seconds)}, {part.bound}"] for name, part in found.items()
        }
        all_parts = shown.pop("all")
        assert all_parts[1] == seconds(per_token), state
        assert shown == expected | {
            "tokens per second": ["", f"{math.floor(1 / per_token + 0.5):,}"],
            "weights and cache": ["", amount(needed(config, *size), "B")],
        }, state
        bounds |= {part.bound for part in found.values()}
    assert bounds == {"memory", "arithmetic"}
    tab.context.close()


def test_its_state_is_in_the_address_and_is_said(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "rooflines")
    tab.wait_for_selector("#roofline-model")
    said = tab.locator("[data-figure=roofline] [aria-live]")
    expect(said).to_contain_text("at least 1.54 ms per token, at most 650 tokens per second. Memory bounds every part")
    tab.focus("#roofline-batch")
    tab.keyboard.press("End")
    expect(said).to_contain_text("Arithmetic bounds projections")
    expect(said).to_contain_text("does not fit")
    assert "roofline-batch=13" in tab.url
    tab.select_option("#roofline-machine", "laptop CPU")
    tab.reload()
    expect(tab.locator("#roofline-machine")).to_have_value("laptop CPU")
    expect(tab.locator("#roofline-batch")).to_have_value("13")
    tab.context.close()


def test_one_menu_of_machines_each_with_a_source(browser: Browser, origin: str) -> None:
    assert {name: (m["peak"], m["bandwidth"]) for name, m in machines().items()}.items() >= {
        "H100 (SXM)": (989e12, 3.35e12),
        "A100 (80 GB SXM)": (312e12, 2.039e12),
        "laptop CPU": (8 * 3.3e9 * 32, 2 * 8 * 5600e6),
    }.items()
    assert all(m["source"] and m["url"].startswith("https://") and m["memory"] for m in machines().values())
    menus = []
    for page, menu in (("rooflines", "#roofline-machine"), ("calculator", "#calculator-machine")):
        tab = opened(browser, origin, page)
        menus.append(tab.locator(f"{menu} option").all_text_contents())
        tab.context.close()
    assert menus == [[*machines()]] * 2


def test_without_scripts_there_is_a_table(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "rooflines", java_script_enabled=False)
    rows = tab.locator("[data-figure=roofline] tbody tr")
    expect(rows).to_have_count(len(STATES))
    expect(rows.first).to_contain_text("1,540")
    tab.context.close()


@on_screens
def test_it_fits_and_is_accessible(browser: Browser, origin: str, width: int, colours: str) -> None:
    tab = opened(browser, origin, "rooflines", viewport={"width": width, "height": 800}, color_scheme=colours)
    tab.wait_for_selector("#roofline-model")
    tab.click("[data-figure=roofline] button")
    for batch in (0, 6, 13):
        tab.evaluate(SET, {"batch": batch, "weights": 4})
        assert tab.evaluate("document.querySelector('[data-figure=roofline]').scrollWidth <= innerWidth")
        outside = """[...document.querySelectorAll("[data-figure=roofline] svg *")].filter(each => {
            const [inner, outer] = [each, each.ownerSVGElement].map(box => box.getBoundingClientRect());
            return inner.top < outer.top || inner.right > outer.right + 1 || inner.bottom > outer.bottom;
        }).length"""
        assert tab.evaluate(outside) == 0
    assert not Axe().run(tab, context="[data-figure=roofline]").response["violations"]
    heights = tab.locator("[data-figure=roofline] :is(input, select, button)").evaluate_all(
        "found => found.map(control => control.getBoundingClientRect().height)"
    )
    assert min(heights) >= 44
    tab.context.close()


def test_on_paper_there_are_the_picture_and_the_table(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "rooflines")
    tab.wait_for_selector("#roofline-model")
    tab.emulate_media(media="print")
    expect(tab.locator("[data-figure=roofline] form")).to_be_hidden()
    expect(tab.locator("[data-figure=roofline] table")).to_be_visible()
    expect(tab.locator("[data-figure=roofline] svg")).to_be_visible()
    tab.context.close()
