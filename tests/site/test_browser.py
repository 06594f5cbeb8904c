"""What a reader sees: every page in a browser, light and dark, on a desk and on a phone."""

import gzip
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, ViewportSize, expect

from tests.site.conftest import CHAPTERS, PAGES, SITE

PHONE, DESK = ViewportSize(width=390, height=844), ViewportSize(width=1280, height=900)
NARROW = ViewportSize(width=320, height=640)  # a page enlarged to 400 %
# Source code is shown alike everywhere: one page of it is enough for the checks that take long.
OTHER_PAGES = [
    "search.html",
    "genindex.html",
    "py-modindex.html",
    "_modules/index.html",
    "_modules/dsv2_ref/rmsnorm.html",
]
KINDS_OF_PAGE = [*CHAPTERS, *OTHER_PAGES]
FIRST_VISIT, NEXT_PAGE = 1.5e6, 0.3e6  # bytes, compressed

UNFOLD = """() => {
    document.querySelectorAll(".toggle-hidden .toggle-button").forEach(button => button.click());
    document.querySelectorAll("article details").forEach(folded => { folded.open = true; });
    return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
}"""
TOO_WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


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
    """Open a page and wait until its formulas are drawn and the book's own script is done."""
    page.goto(address)
    page.evaluate("() => window.MathJax?.startup.promise.then(() => new Promise(done => setTimeout(done)))")


def violations(page: Page) -> list[tuple[str, str]]:
    """What axe-core has against a page. All formulas are made alike, by MathJax: it need not look into each."""
    options = {"resultTypes": ["violations"]}
    found = Axe().run(page, context={"exclude": [["mjx-container > *"]]}, options=options).response["violations"]
    return [(violation["id"], node["html"]) for violation in found for node in violation["nodes"]]


@pytest.fixture(scope="module", params=["light", "dark"])
def theme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[DESK, PHONE], ids=["desk", "phone"])
def screen(request: pytest.FixtureRequest) -> ViewportSize:
    return request.param


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport=DESK, reduced_motion="reduce")
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def unfolded(request: pytest.FixtureRequest, browser: Browser, origin: str) -> Iterator[Page]:
    """A page in dark on a phone, with everything open that can be unfolded."""
    page = browser.new_page(color_scheme="dark", viewport=PHONE, reduced_motion="reduce")
    show(page, f"{origin}/{request.param}")
    page.evaluate(UNFOLD)
    yield page
    page.close()


def test_pages_show_without_complaint_or_request_elsewhere(
    browser: Browser, theme: str, screen: ViewportSize, origin: str
) -> None:
    context = browser.new_context(color_scheme=theme, viewport=screen, reduced_motion="reduce")
    record, page = Record(), context.new_page()
    record.listen(page, origin)
    too_wide, unread = [], []
    # Whoever opens the folder is led on at once. Colours are those of the style sheets, so light and dark need not both
    # see all pages.
    every = PAGES if (theme == "light") == (screen is DESK) else KINDS_OF_PAGE
    for name in (name for name in every if name != "index.html"):
        show(page, f"{origin}/{name}")
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        too_wide += [name] * page.evaluate(TOO_WIDE)
        if screen is PHONE and theme == "dark":
            page.set_viewport_size(NARROW)
            too_wide += [f"{name} at 320"] * page.evaluate(TOO_WIDE)
            page.set_viewport_size(PHONE)
        unread += page.evaluate("[...document.images].filter(image => !image.naturalWidth).map(image => image.src)")
    context.close()
    assert record.complaints == []
    assert record.elsewhere == []
    assert too_wide == []
    assert unread == []


@pytest.mark.parametrize("name", KINDS_OF_PAGE)
def test_pages_are_accessible_and_their_formulas_drawn(page: Page, origin: str, name: str) -> None:
    """As they open, light and on a desk."""
    show(page, f"{origin}/{name}")
    assert page.locator("article mjx-container").count() == page.locator("article .math").count()
    assert page.locator("mjx-merror").count() == 0
    prose = page.evaluate(
        """() => {
            const article = (document.querySelector("article") ?? document.body).cloneNode(true);
            article.querySelectorAll("pre, code, script, mjx-container").forEach(element => element.remove());
            return article.textContent;
        }"""
    )
    assert re.findall(r"\$[^$]+\$|\\[(\[]|\\begin", prose) == []
    assert violations(page) == []


@pytest.mark.parametrize("unfolded", KINDS_OF_PAGE, indirect=True)
def test_unfolded_pages_are_accessible(unfolded: Page) -> None:
    assert violations(unfolded) == []


@pytest.mark.parametrize("unfolded", CHAPTERS, indirect=True)
def test_what_is_wide_scrolls_by_keyboard(unfolded: Page) -> None:
    unreachable = unfolded.evaluate(
        """() => [...document.querySelectorAll("article pre, article mjx-container[display]")]
            .filter(box => box.checkVisibility() && box.scrollWidth > box.clientWidth && box.tabIndex < 0)
            .map(box => box.textContent.slice(0, 60))"""
    )
    assert unreachable == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_solutions_unfold(page: Page, origin: str, name: str) -> None:
    page.goto(f"{origin}/{name}")
    solutions = page.locator("div.solution.dropdown")
    assert page.locator("div.exercise").count() == solutions.count()
    for solution in solutions.all():
        content = solution.locator("section > *").last
        expect(content).to_be_hidden()
        solution.locator("button").first.click()
        expect(content).to_be_visible()


def test_a_formula_stays_with_its_punctuation(page: Page, origin: str) -> None:
    show(page, f"{origin}/book/rmsnorm.html")
    apart = page.evaluate(
        """() => [...document.querySelectorAll("article span.math")]
            .filter(formula => /^[.,;:!?)]/.test(formula.nextSibling?.data ?? "") &&
                getComputedStyle(formula.parentElement).whiteSpace !== "nowrap").length"""
    )
    assert page.locator(".together").count() > 10
    assert apart == 0


def test_the_search_finds_a_chapter(page: Page, origin: str) -> None:
    page.goto(f"{origin}/book/index.html")
    page.keyboard.press("Control+k")
    field = page.locator("#pst-search-dialog input[name=q]")
    field.fill("bfloat16")
    icon, box = page.locator("#pst-search-dialog .fa-magnifying-glass").bounding_box(), field.bounding_box()
    assert icon["x"] + icon["width"] <= box["x"]
    page.keyboard.press("Enter")
    expect(page.locator("#search-results a", has_text="RMSNorm").first).to_be_visible()
    page.locator("#search-results a", has_text="RMSNorm").first.click()
    expect(page.locator("h1", has_text="RMSNorm").last).to_be_visible()


@pytest.mark.parametrize("words", ["angle", "latent rope key", "epsilon", "expert gate"])
def test_results_show_no_tex(page: Page, origin: str, words: str) -> None:
    page.goto(f"{origin}/search.html?q={words}")
    expect(page.locator("#search-results p.context").first).to_be_visible()
    page.wait_for_load_state("networkidle")
    shown = page.locator("#search-results").inner_text()
    assert re.findall(r"\\[()\[\]].{,20}|\\(?!n)[A-Za-z]{2,}", shown) == []  # strings in code have a \n


def test_the_search_works_from_files(page: Page) -> None:
    record = Record()
    record.listen(page, "file://")
    page.goto(f"{(SITE / 'search.html').as_uri()}?q=bfloat16")
    expect(page.locator("#search-results a", has_text="RMSNorm").first).to_be_visible()
    expect(page.locator("#search-results .search-summary")).to_contain_text("Search finished")
    assert record.complaints == []


def test_the_theme_can_be_chosen(page: Page, origin: str) -> None:
    show(page, f"{origin}/book/rmsnorm.html")
    seen = set()
    for _ in range(3):
        page.locator(".theme-switch-button:visible").first.click()
        seen.add(page.evaluate("document.documentElement.dataset.mode"))
    assert seen == {"auto", "light", "dark"}


def test_the_keyboard_shows_where_it_is(page: Page, origin: str) -> None:
    page.goto(f"{origin}/book/rmsnorm.html")
    page.locator(".logo").first.focus()
    seen = {}
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline, shadow = page.evaluate(
            """() => {
                const at = document.activeElement, style = getComputedStyle(at);
                const name = at.matches(".bd-header-article button") ? at.title || at.ariaLabel : "";
                return [name, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2, style.boxShadow !== "none"];
            }"""
        )
        if name:
            seen[name] = outline or shadow
    assert {"Toggle primary sidebar", "Download this page", "Color mode"} <= set(seen)
    assert all(seen.values()), seen


def test_nothing_moves_for_those_who_ask(page: Page, origin: str) -> None:
    page.goto(f"{origin}/book/rmsnorm.html")
    moving = page.evaluate(
        """() => [...document.querySelectorAll("*")].filter(element => {
            const style = getComputedStyle(element);
            return style.transitionDuration.split(",").some(time => parseFloat(time) > 0) || style.scrollBehavior === "smooth";
        }).map(element => element.className)"""
    )
    assert moving == []


def test_dark_pages_are_printed_in_light(browser: Browser, origin: str) -> None:
    page = browser.new_page(color_scheme="dark", viewport=DESK)
    show(page, f"{origin}/book/rmsnorm.html")
    page.emulate_media(media="print")
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("article details.hide > summary:visible").count() == 0
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".solution.toggle-hidden").count() == 0
    clipped = "[...document.querySelectorAll('article pre')].filter(code => code.scrollWidth > code.clientWidth).length"
    assert page.evaluate(clipped) == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.close()


def test_pages_open_from_files(page: Page) -> None:
    record = Record()
    record.listen(page, "file://")
    for name in [*CHAPTERS, "genindex.html"]:
        show(page, (SITE / name).as_uri())
    page.goto((SITE / "index.html").as_uri())
    page.wait_for_url("**/book/index.html")
    assert record.complaints == []
    assert record.elsewhere == []


def test_the_reference_lists_its_modules(page: Page, origin: str) -> None:
    page.goto(f"{origin}/book/reference.html")
    expect(page.locator(".bd-sidebar-secondary a", has_text="rmsnorm").first).to_be_visible()


def test_pages_are_light(browser: Browser, origin: str) -> None:
    weights: dict[str, int] = {}  # of what is fetched, once it is known
    fetched: dict[str, set[str]] = {}

    def weigh(response: Response) -> None:
        if response.url not in weights:
            weights[response.url] = len(gzip.compress(response.body()))

    for name in CHAPTERS:
        context = browser.new_context(viewport=DESK)
        page = context.new_page()
        page.on("response", weigh)
        to = fetched[name] = set()
        page.on("response", lambda response, to=to: to.add(response.url))
        show(page, f"{origin}/{name}")
        page.wait_for_load_state("networkidle")
        context.close()
        assert sum(weights[address] for address in fetched[name]) < FIRST_VISIT, name
    for before, name in itertools.product(CHAPTERS, CHAPTERS):
        more = sum(weights[address] for address in fetched[name] - fetched[before])
        assert more < NEXT_PAGE, f"{name} after {before}"
