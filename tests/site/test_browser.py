"""What a reader sees: every page in a browser, light and dark, on a desk and on a phone."""

import gzip
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Response, ViewportSize, expect

from tests.site.conftest import CHAPTERS, PAGES, SITE

PHONE, DESK = ViewportSize(width=390, height=844), ViewportSize(width=1280, height=900)
# Source code and indices are all made alike: one of each is enough for the checks that take long.
KINDS_OF_PAGE = [*CHAPTERS, "search.html", "genindex.html", "py-modindex.html", "_modules/dsv2_ref/rmsnorm.html"]
FIRST_VISIT, NEXT_PAGE = 1.5e6, 0.3e6  # bytes, compressed


@dataclass
class Record:
    """What a page complained about and asked for."""

    complaints: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def listen(self, page: Page, origin: str) -> None:
        def console(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                self.complaints.append(f"{page.url}: {message.text}")

        def request(request: Request) -> None:
            if not request.url.startswith((origin, "data:", "blob:")):
                self.elsewhere.append(f"{page.url}: {request.url}")

        def response(response: Response) -> None:
            if response.status >= 400:
                self.complaints.append(f"{page.url}: {response.status} for {response.url}")

        def failed(request: Request) -> None:
            if request.failure != "net::ERR_ABORTED":  # what was still under way when the next page was opened
                self.complaints.append(f"{page.url}: {request.failure} for {request.url}")

        page.on("console", console)
        page.on("pageerror", lambda error: self.complaints.append(f"{page.url}: {error}"))
        page.on("requestfailed", failed)
        page.on("request", request)
        page.on("response", response)


def show(page: Page, address: str) -> None:
    """Open a page and wait until its formulas are drawn."""
    page.goto(address)
    page.evaluate("window.MathJax?.startup.promise")


@pytest.fixture(scope="module", params=["light", "dark"])
def theme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[DESK, PHONE], ids=["desk", "phone"])
def reader(request: pytest.FixtureRequest, browser: Browser, theme: str) -> Iterator[BrowserContext]:
    """Somebody with this colour scheme and this screen, on a first visit; nothing on the page moves."""
    context = browser.new_context(color_scheme=theme, viewport=request.param, reduced_motion="reduce")
    yield context
    context.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport=DESK, reduced_motion="reduce")
    yield context.new_page()
    context.close()


def test_pages_show_without_complaint_or_request_elsewhere(reader: BrowserContext, theme: str, origin: str) -> None:
    record, page = Record(), reader.new_page()
    record.listen(page, origin)
    too_wide, unread = [], []
    for name in PAGES:
        if name == "index.html":  # leads on at once
            continue
        show(page, f"{origin}/{name}")
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            too_wide.append(name)
        unread += page.evaluate("[...document.images].filter(image => !image.naturalWidth).map(image => image.src)")
    page.close()
    assert record.complaints == []
    assert record.elsewhere == []
    assert too_wide == []
    assert unread == []


def test_formulas_are_drawn(page: Page, origin: str) -> None:
    drawn = 0
    for name in CHAPTERS:
        show(page, f"{origin}/{name}")
        formulas = page.locator("article .math").count()
        assert page.locator("article mjx-container").count() == formulas, name
        assert page.locator("mjx-merror").count() == 0, name
        prose = page.evaluate(
            """() => {
                const article = document.querySelector("article").cloneNode(true);
                article.querySelectorAll("pre, code, mjx-container").forEach(element => element.remove());
                return article.textContent;
            }"""
        )
        assert re.findall(r"\$[^$]+\$|\\[(\[]|\\begin", prose) == [], name
        drawn += formulas
    assert drawn


@pytest.mark.parametrize(("colours", "screen"), [("light", DESK), ("dark", PHONE)], ids=["light desk", "dark phone"])
@pytest.mark.parametrize("name", KINDS_OF_PAGE)
def test_pages_are_accessible(browser: Browser, origin: str, name: str, colours: str, screen: ViewportSize) -> None:
    page = browser.new_page(color_scheme=colours, viewport=screen, reduced_motion="reduce")
    show(page, f"{origin}/{name}")
    violations = Axe().run(page).response["violations"]
    page.close()
    assert [(found["id"], node["html"]) for found in violations for node in found["nodes"]] == []


def test_wide_formulas_and_code_scroll_by_keyboard(browser: Browser, origin: str) -> None:
    page = browser.new_page(viewport=PHONE)
    show(page, f"{origin}/book/rmsnorm.html")
    page.wait_for_load_state("load")
    unreachable = page.evaluate(
        """() => [...document.querySelectorAll("article pre, mjx-container[display]")]
            .filter(box => box.checkVisibility() && box.scrollWidth > box.clientWidth && box.tabIndex < 0)
            .map(box => box.textContent.slice(0, 60))"""
    )
    page.close()
    assert unreachable == []


def test_the_search_finds_a_chapter(page: Page, origin: str) -> None:
    page.goto(f"{origin}/book/index.html")
    page.keyboard.press("Control+k")
    page.locator("#pst-search-dialog input[name=q]").fill("bfloat16")
    page.keyboard.press("Enter")
    expect(page.locator("#search-results a", has_text="RMSNorm").first).to_be_visible()
    page.locator("#search-results a", has_text="RMSNorm").first.click()
    expect(page.locator("h1", has_text="RMSNorm").last).to_be_visible()


def test_solutions_unfold(page: Page, origin: str) -> None:
    show(page, f"{origin}/book/rmsnorm.html")
    exercises, solutions = page.locator("div.exercise"), page.locator("div.solution.dropdown")
    assert exercises.count() == solutions.count() >= 4
    for number in range(solutions.count()):
        output = solutions.nth(number).locator(".cell_output").last
        expect(output).to_be_hidden()
        solutions.nth(number).locator("button").first.click()
        expect(output).to_be_visible()


def test_the_theme_can_be_chosen(page: Page, origin: str) -> None:
    show(page, f"{origin}/book/rmsnorm.html")
    seen = set()
    for _ in range(3):
        page.locator(".theme-switch-button:visible").first.click()
        seen.add(page.evaluate("document.documentElement.dataset.mode"))
    assert seen == {"auto", "light", "dark"}


def test_pages_open_from_files(page: Page) -> None:
    record = Record()
    record.listen(page, "file://")
    for name in [*CHAPTERS, "genindex.html"]:
        show(page, (SITE / name).as_uri())
    page.goto((SITE / "index.html").as_uri())
    page.wait_for_url("**/book/index.html")
    assert record.complaints == []
    assert record.elsewhere == []


def test_pages_are_light(browser: Browser, origin: str) -> None:
    fetched: dict[str, dict[str, int]] = {}
    for name in CHAPTERS:
        weights = fetched[name] = {}
        context = browser.new_context(viewport=DESK)
        page = context.new_page()
        page.on("response", lambda response, to=weights: to.update({response.url: len(gzip.compress(response.body()))}))
        show(page, f"{origin}/{name}")
        page.wait_for_load_state("networkidle")
        context.close()
        assert sum(weights.values()) < FIRST_VISIT, name
    # MathJax comes with the first page that has formulas, as the chapters and the page that opens the book do.
    with_formulas = [name for name in CHAPTERS if any("mathjax" in address for address in fetched[name])]
    assert "book/index.html" in with_formulas
    for before, name in itertools.product(with_formulas, CHAPTERS):
        more = sum(weight for address, weight in fetched[name].items() if address not in fetched[before])
        assert more < NEXT_PAGE, f"{name} after {before}"
