"""The interactive figures: what they show is what Python counts, and everybody can use them."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from dsv2_ref.config import DeepseekV2Config
from tests.site.conftest import ROOT, on_screens
from tools.figures.cache import WAYS, three_ways

PAGES = {  # what the first of the five states says
    ("decoding", "cache"): "289 MFLOP, 13.6 MB",
    ("mla", "cache"): "289 MFLOP, 13.6 MB",
    ("overview", "line"): "4 at 9: 0.87",
    ("experts", "router"): "expert 0: 0.363",
}
FIGURES = {figure: page for page, figure in PAGES}
PRESETS = {
    "DeepSeek-V2-Lite": DeepseekV2Config.deepseek_v2_lite(),
    "DeepSeek-V2": DeepseekV2Config.deepseek_v2(),
}
SET = """(state) => {
    for (const [name, value] of Object.entries(state)) {
        const field = document.getElementById(`cache-${name}`);
        field.value = value;
        field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    return Object.fromEntries([...document.querySelectorAll("[data-figure=cache] table tr")].map(
        row => [row.cells[0].textContent, row.cells[1].textContent]));
}"""


def amount(x: float, unit: str) -> str:
    size, prefix = next(
        ((size, prefix) for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if x >= size), (1, "")
    )
    digits = 0 if size == 1 else max(0, 2 - math.floor(math.log10(x / size)))
    return f"{x / size:.{digits}f} {prefix}{unit}"


def opened(browser: Browser, origin: str, page: str, **settings: Any) -> Page:
    """A page whose formulas are left as they are written: drawing them takes longer than all else here."""
    context = browser.new_context(**settings)
    context.route("**/tex-chtml.js*", lambda route: route.abort())
    tab = context.new_page()
    tab.goto(f"{origin}/book/{page}.html")
    return tab


@pytest.mark.parametrize(("page", "figure"), PAGES)
def test_the_text_after_a_figure_keeps_a_distance(browser: Browser, origin: str, page: str, figure: str) -> None:
    tab = opened(browser, origin, page)
    tab.wait_for_selector(f"[data-figure={figure}] button")
    gap = tab.evaluate(
        """figure => {
            const after = document.createElement("p"), root = document.querySelector(`[data-figure=${figure}]`);
            root.after(after);
            return after.getBoundingClientRect().top - root.lastElementChild.previousElementSibling.getBoundingClientRect().bottom;
        }""",
        figure,
    )
    assert gap >= 16
    tab.context.close()


def test_the_cache_figure_shows_what_python_counts(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "decoding")
    tab.wait_for_selector("#cache-model")
    states = list(itertools.product(PRESETS, (0, 4, 7), (4, 10, 13, 17), (1, 160)))[::1]
    assert len(states) >= 40
    for model, heads, cached, fresh in states:
        config = replace(PRESETS[model], num_attention_heads=2**heads)
        kv_seq = 2**cached
        counted = three_ways(config, min(fresh, kv_seq), kv_seq)
        shown = tab.evaluate(SET, {"model": model, "heads": heads, "cached": cached, "fresh": fresh})
        for way in WAYS:
            assert shown[f"FLOPs of attention in one layer: {way}"] == amount(counted["flops"][way], "FLOP")
            assert shown[f"Bytes read and made in one layer: {way}"] == amount(counted["bytes"][way], "B")
        width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        title = "Elements cached per token and layer"
        assert shown[f"{title}: keys and values"] == f"{2**heads * width:,}"
        assert shown[f"{title}: latent and rope key"] == "576"
    tab.context.close()


def test_its_state_is_in_the_address_and_is_said(browser: Browser, origin: str) -> None:
    tab = opened(browser, origin, "decoding")
    tab.wait_for_selector("#cache-model")
    tab.focus("#cache-cached")
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("[data-figure=cache] [aria-live]")).to_contain_text("1 new of 16,384 tokens")
    assert "cache-cached=14" in tab.url
    tab.select_option("#cache-model", "DeepSeek-V2")
    expect(tab.locator("#cache-heads")).to_have_value("7")  # the model's own 128
    tab.reload()
    expect(tab.locator("#cache-cached")).to_have_value("14")
    tab.context.close()


@pytest.mark.parametrize(("page", "figure"), PAGES)
def test_without_scripts_there_is_a_table(browser: Browser, origin: str, page: str, figure: str) -> None:
    tab = opened(browser, origin, page, java_script_enabled=False)
    rows = tab.locator(f"[data-figure={figure}] tbody tr")
    expect(rows).to_have_count(5)
    expect(rows.first).to_contain_text(PAGES[page, figure])
    tab.context.close()


@on_screens
@pytest.mark.parametrize("figure", FIGURES)
def test_it_fits_and_is_accessible(browser: Browser, origin: str, figure: str, width: int, colours: Any) -> None:
    size = {"width": width, "height": 800}
    tab = opened(browser, origin, FIGURES[figure], viewport=size, color_scheme=colours)
    tab.wait_for_selector(f"[data-figure={figure}] form")
    tab.get_by_role("button", name="Show as a table").click()
    assert tab.evaluate("document.querySelector('[data-figure]').scrollWidth <= innerWidth")
    heights = "nodes => nodes.filter(node => node.checkVisibility()).map(node => node.getBoundingClientRect().height)"
    assert min(tab.eval_on_selector_all("[data-figure] :is(input, select, button)", heights)) >= 44
    found = Axe().run(tab, context="[data-figure]").response["violations"]
    assert not found
    tab.context.close()


@pytest.mark.parametrize("figure", FIGURES)
def test_print_keeps_the_picture_and_the_table(browser: Browser, origin: str, figure: str) -> None:
    tab = opened(browser, origin, FIGURES[figure])
    tab.wait_for_selector(f"[data-figure={figure}] form")
    tab.emulate_media(media="print")
    for part, visible in {"form": False, "button": False, ".figure-bars": True, "table": True}.items():
        expect(tab.locator(f"[data-figure={figure}] > {part}")).to_be_visible(visible=visible)
    tab.context.close()


def test_all_figures_are_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "book/_static/figures").iterdir()) < 60_000
