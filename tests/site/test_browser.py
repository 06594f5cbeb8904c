"""What a reader sees: every page in a browser, light and dark, on a desk and on a phone."""

import gzip
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, ViewportSize, expect

from tests.examples import thorough
from tests.site.conftest import CHAPTERS, SITE
from tests.site.test_pages import loaded
from tools import release

PHONE, DESK = ViewportSize(width=390, height=844), ViewportSize(width=1280, height=900)
NARROW = ViewportSize(width=320, height=640)  # a page enlarged to 400 %
SCREENS = (("light", DESK), ("dark", DESK), ("dark", NARROW), ("dark", PHONE))
# Made alike, from docstrings and from source code: of each, one page is enough.
MADE_ALIKE = [page for page in CHAPTERS if page.startswith("book/reference_")]
ONE_MADE = "book/reference_bits.html"
KINDS_OF_PAGE = [
    *(page for page in CHAPTERS if page not in MADE_ALIKE),
    ONE_MADE,
    "search.html",
    "genindex.html",
    "py-modindex.html",
    "_modules/index.html",
    "_modules/dsv2_ref/rmsnorm.html",
]
FIRST_VISIT, NEXT_PAGE = 1.5e6, 0.3e6  # bytes, compressed
BEHIND_STYLES = {"_static/basic.css", "_static/vendor/fontawesome/webfonts/fa-solid-900.woff2"}

DRAWN = """async () => {
    await window.MathJax?.startup.promise;
    await new Promise(done => setTimeout(done));
    await document.fonts.ready;
}"""
UNFOLD = """() => {
    document.querySelectorAll(".toggle-hidden .toggle-button").forEach(button => button.click());
    document.querySelectorAll("article details").forEach(folded => { folded.open = true; });
}"""
TWO_FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
TOO_WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
UNREAD = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
BESIDE_FORMULAS = """() => {
    const article = (document.querySelector("article") ?? document.body).cloneNode(true);
    article.querySelectorAll("pre, code, script, mjx-container").forEach(element => element.remove());
    return article.textContent;
}"""
OUT_OF_REACH = """() => [...document.querySelectorAll("article pre, article mjx-container[display]")]
    .filter(box => box.checkVisibility() && box.scrollWidth > box.clientWidth && box.tabIndex < 0)
    .map(box => box.textContent.slice(0, 60))"""
# A heading whose sign for its address stands on a line of its own.
EMPTY_LINES = """() => [...document.querySelectorAll("article :is(h1, h2, h3)")].filter(heading => {
    const before = heading.clientHeight;
    heading.querySelector(".headerlink")?.remove();
    return heading.clientHeight < before;
}).map(heading => heading.textContent)"""
CUT_FORMULAS = """() => [...document.querySelectorAll("article mjx-container")].filter(formula => {
    if (!formula.checkVisibility()) return false;
    if (formula.hasAttribute("display")) return formula.scrollWidth > formula.clientWidth;
    const line = formula.closest("p, li, td, th, dd, figcaption") ?? formula.parentElement;
    return formula.firstElementChild.getBoundingClientRect().width > line.getBoundingClientRect().width + 1;
}).map(formula => formula.textContent)"""
CUT_TABLES = """() => [...document.querySelectorAll("article .pst-scrollable-table-container")].filter(box =>
    box.checkVisibility() && box.scrollWidth > box.clientWidth
).map(box => box.textContent.slice(0, 60))"""
# The first screen of a chapter shows its question and its picture, before any list and any code.
NO_PICTURE_FIRST = """() => {
    if (!document.querySelector("article h1 .section-number")) return [];
    const picture = document.querySelector("article figure img").getBoundingClientRect();
    const shown = Math.min(innerHeight, picture.bottom) - picture.top;
    const later = [...document.querySelectorAll("article :is(ul, ol, pre, details, .admonition)")]
        .every(each => !each.checkVisibility() || each.getBoundingClientRect().top > picture.bottom);
    return shown > 0.6 * picture.height && later ? [] : [[picture.top, picture.bottom, innerHeight]];
}"""
# Code that a reader on a desk sees without unfolding anything.
CUT_CODE = """() => [...document.querySelectorAll("article pre")].filter(code =>
    code.checkVisibility() && code.scrollWidth > code.clientWidth
).map(code => code.textContent.slice(0, 60))"""
# Words other than code; letters in formulas and in drawings have sizes of their own.
SMALL_PRINT = """() => [...document.querySelectorAll(
    "article :is(p, li, th, td, dt, dd, label, legend, figcaption, caption)"
)].filter(text => text.checkVisibility() && text.textContent.trim() && parseFloat(getComputedStyle(text).fontSize) < 14
).map(text => text.textContent.slice(0, 60))"""
# A finger needs 24 px; beside a box to tick, its label takes the finger too.
SMALL_TARGETS = """() => [...document.querySelectorAll("article :is(button, select, summary, label:has(> input), .genindex-jumpbox a)")]
    .map(target => [target, target.getBoundingClientRect()])
    .filter(([target, box]) => target.checkVisibility() && (box.width < 24 || box.height < 24))
    .map(([target, box]) => `${target.outerHTML.slice(0, 60)} ${box.width} x ${box.height}`)"""
# Code and signatures are thousands of words that only a class tells apart. Of those with the same classes and colours,
# around them too, the first stays an element and the others become text, so that each look is judged once: also those of
# one letter, whose contrast axe-core leaves open.
KEEP_ONE_OF_EACH = """() => {
    const paths = new Map([[null, ""]]);
    function path(at) {
        if (!paths.has(at)) {
            const style = getComputedStyle(at);
            const look = [at.tagName, at.className, style.color, style.backgroundColor, style.opacity, style.fontSize, style.fontWeight];
            paths.set(at, `${path(at.parentElement)} ${look}`);
        }
        return paths.get(at);
    }
    const plain = word => !word.children.length && word.textContent.trim() && word.checkVisibility()
        && [...word.attributes].every(each => each.name === "class");
    const kept = new Map();
    for (let changed = true; changed;) {
        const words = [...document.querySelectorAll("article :is(span, em, strong, code):not(mjx-container *)")].filter(plain);
        for (const word of words)
            if (word.textContent.trim().length > 1 && !kept.has(path(word))) kept.set(path(word), word);
        const others = words.filter(word => kept.get(path(word)) !== word);
        for (const word of others) word.replaceWith(word.textContent);
        changed = others.length > 0;
    }
    document.querySelector("article")?.normalize();
}"""


@dataclass
class Record:
    """What a page complained about and asked for."""

    complaints: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    fetched: set[str] = field(default_factory=set)

    def listen(self, page: Page, origin: str) -> None:
        def console(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                self.complaints.append(f"{page.url}: {message.text}")

        def request(request: Request) -> None:
            if not request.url.startswith(("data:", "blob:")):
                self.fetched.add(unquote(request.url.partition("?")[0].partition("#")[0]))
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
    page.evaluate(DRAWN)


def colour(page: Page, theme: str) -> None:
    """Have the reader's machine change to light or dark, and the page with it."""
    page.emulate_media(color_scheme=theme)
    expect(page.locator("html")).to_have_attribute(
        "data-theme", theme, timeout=30_000
    )  # the longest page takes a while


OF_THE_LOOK = ["color-contrast", "link-in-text-block", "scrollable-region-focusable", "target-size"]
"""Rules of axe-core whose answer depends on colours or sizes; the others ask what the page says."""


SIBLINGS = "dl.py ~ dl.py"
"""Names of the reference that stand beside another: of their colours, one in each list tells."""


def violations(page: Page, *exclude: str, **options: Any) -> list[tuple[str, str]]:
    """What axe-core has against a page. All formulas are made alike, by MathJax: it need not look into each."""
    page.evaluate(KEEP_ONE_OF_EACH)
    options |= {"resultTypes": ["violations"]}
    found = (
        Axe()
        .run(page, context={"exclude": [["mjx-container > *"], *([each] for each in exclude)]}, options=options)
        .response["violations"]
    )
    return [(violation["id"], node["html"]) for violation in found for node in violation["nodes"]]


def shut_solutions(page: Page) -> list[str]:
    """Unfold every solution; those that were open before or are shut after."""
    wrong = []
    for solution in page.locator("div.solution.dropdown").all():
        content = solution.locator("section > *").last
        open_before = content.is_visible()
        solution.locator("button").first.click()
        if open_before or not content.is_visible():
            wrong.append(solution.inner_text()[:60])
    return wrong


def expect_nothing(name: str, found: dict[str, list[Any]]) -> None:
    """Fail with all that was found on a page, by check."""
    wrong = [f"{name}: {check}: {str(each)[:300]}" for check, complaints in found.items() for each in complaints]
    assert not wrong, "\n".join(wrong)


def path_of(address: str) -> str:
    """The file that the first page means."""
    return urlsplit(urljoin("book/index.html", address)).path


@cache
def weight(path: str) -> int:
    """Bytes of a file of the book, compressed."""
    return len(gzip.compress((SITE / path).read_bytes()))


@cache
def shared_by_pages() -> set[str]:
    """What every page fetches: a browser has it after any other."""
    found = map(path_of, loaded("book/index.html"))
    return {path for path in found if path.endswith((".css", ".js"))} | BEHIND_STYLES


def too_heavy(files: set[str]) -> dict[str, list[Any]]:
    """What of a page's files weighs more than it may."""
    first, more = (sum(map(weight, some)) for some in (files, files - shared_by_pages()))
    return {
        "bytes of a first visit, compressed": [first] if first > FIRST_VISIT else [],
        "bytes after any other page, compressed": [more] if more > NEXT_PAGE else [],
    }


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport=DESK, reduced_motion="reduce")
    yield context.new_page()
    context.close()


@pytest.mark.parametrize("name", [*KINDS_OF_PAGE, *thorough(*(page for page in MADE_ALIKE if page != ONE_MADE))])
def test_a_page_is_in_order(page: Page, origin: str, name: str) -> None:
    """All that is looked at on a page, after one load: as it opens, in other colours and sizes, and unfolded."""
    record, found = Record(), dict[str, list[Any]]()
    record.listen(page, origin)
    show(page, f"{origin}/{name}")
    if name in CHAPTERS:
        found |= too_heavy({path.removeprefix(f"{origin}/") for path in record.fetched})
        found["code cut on a desk"] = page.evaluate(CUT_CODE)
    found["images that cannot be read"] = page.evaluate(UNREAD)
    formulas = page.locator("article mjx-container").count(), page.locator("article .math").count()
    found["formulas drawn, and formulas"] = [formulas] if formulas[0] != formulas[1] else []
    found["formulas with errors"] = page.locator("mjx-merror").all_text_contents()
    found["TeX in the text"] = re.findall(r"\$[^$]+\$|\\[(\[]|\\begin", page.evaluate(BESIDE_FORMULAS))
    for theme, screen in SCREENS:
        colour(page, theme)
        page.set_viewport_size(screen)
        found[f"wider than {screen['width']} px in {theme}"] = page.evaluate(f"{TOO_WIDE} ? [document.title] : []")
        if screen != NARROW:
            found[f"no picture first on {screen['width']} px"] = page.evaluate(NO_PICTURE_FIRST)
    exercises, solutions = page.locator("div.exercise").count(), page.locator("div.solution.dropdown").count()
    found["exercises, and solutions"] = [(exercises, solutions)] if exercises != solutions else []
    found["solutions that do not unfold"] = shut_solutions(page)
    page.evaluate(UNFOLD)
    page.evaluate(TWO_FRAMES)
    if name in CHAPTERS:
        found["formulas cut on a phone"] = page.evaluate(CUT_FORMULAS)
        found["tables cut on a phone"] = page.evaluate(CUT_TABLES)
        found["headings with an empty line"] = page.evaluate(EMPTY_LINES)
    found["words too small on a phone"] = page.evaluate(SMALL_PRINT)
    found["too small for a finger"] = page.evaluate(SMALL_TARGETS)
    found["wider than a phone once unfolded"] = page.evaluate(f"{TOO_WIDE} ? [document.title] : []")
    found["wide and out of a keyboard's reach"] = page.evaluate(OUT_OF_REACH)
    # Before axe-core fetches styles, and complains where it cannot.
    found |= {"complaints": [*record.complaints], "requests elsewhere": [*record.elsewhere]}
    found["not accessible, unfolded, dark, on a phone"] = violations(page, SIBLINGS)
    expect_nothing(name, found)


ONE_OF_EACH_KIND = ("genindex.html", "book/index.html", "book/mla.html", "book/calculator.html", ONE_MADE)


def mostly_thorough(names: Iterable[str], always: Iterable[str] = ONE_OF_EACH_KIND) -> list[Any]:
    """All of these pages; the others than some with what is thorough."""
    return [*always, *thorough(*(name for name in names if name not in always))]


@pytest.mark.parametrize("name", mostly_thorough([*KINDS_OF_PAGE, *MADE_ALIKE]))
def test_a_page_can_be_read_in_light(page: Page, origin: str, name: str) -> None:
    """Unfolded and on a desk: colours and sizes. All else is looked at in dark."""
    show(page, f"{origin}/{name}")
    page.evaluate(UNFOLD)
    page.evaluate(TWO_FRAMES)
    assert violations(page, SIBLINGS, runOnly=OF_THE_LOOK) == []


@pytest.mark.parametrize("name", mostly_thorough([*CHAPTERS, "genindex.html"]))
def test_a_page_opens_from_files_and_is_light(browser: Browser, name: str) -> None:
    """In dark and on a phone, as it opens; and what a browser fetches for it."""
    context = browser.new_context(color_scheme="dark", viewport=PHONE, reduced_motion="reduce")
    page, record = context.new_page(), Record()
    record.listen(page, "file://")
    show(page, (SITE / name).as_uri())
    found: dict[str, list[Any]] = {"images that cannot be read": page.evaluate(UNREAD)}
    found["wider than a phone"] = page.evaluate(f"{TOO_WIDE} ? [document.title] : []")
    theme = page.evaluate("document.documentElement.dataset.theme")
    found["not dark"] = [theme] if theme != "dark" else []
    files = {path.removeprefix(f"file://{SITE}/") for path in record.fetched}
    found["what every page fetches and this one does not"] = sorted(shared_by_pages() - files)
    found |= too_heavy(files)
    found |= {"complaints": [*record.complaints], "requests elsewhere": [*record.elsewhere]}
    context.close()
    expect_nothing(name, found)


@pytest.mark.parametrize("name", ["rmsnorm", "training"])
def test_a_formula_stays_with_its_punctuation(page: Page, origin: str, name: str) -> None:
    """Also a letter that tells its sizes."""
    show(page, f"{origin}/book/{name}.html")
    apart = page.evaluate(
        """() => [...document.querySelectorAll("article span.math")].map(math => math.closest(".sized") ?? math)
            .filter(formula => (/^[.,;:!?)]/.test(formula.nextSibling?.data ?? "") || /[(\\[]$/.test(formula.previousSibling?.data ?? ""))
                && getComputedStyle(formula.parentElement).whiteSpace !== "nowrap").length"""
    )
    assert page.locator(".together").count() > 3
    assert page.locator(".together > .sized").count() > 0
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


def test_the_site_as_one_file_opens_without_a_network(page: Page, tmp_path: Path) -> None:
    """Unpacked where nothing else of the book is: the first page, a chapter from there, and the search."""
    release.archive_site(SITE, tmp_path / "site.zip")
    shutil.unpack_archive(tmp_path / "site.zip", tmp_path)
    record = Record()
    record.listen(page, tmp_path.as_uri())
    page.goto((tmp_path / release.NAME / "index.html").as_uri())
    page.wait_for_url("**/book/index.html")
    page.locator(".chapters a").first.click()
    page.wait_for_url("**/book/overview.html")  # loaded, its scripts too
    page.evaluate(DRAWN)
    assert page.locator("article mjx-container").count() > 0
    assert page.evaluate(UNREAD) == []
    page.goto(f"{(tmp_path / release.NAME / 'search.html').as_uri()}?q=bfloat16")
    expect(page.locator("#search-results a", has_text="RMSNorm").first).to_be_visible()
    assert (record.complaints, record.elsewhere) == ([], [])


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


def test_a_reader_chooses_which_claims_are_shown(page: Page, origin: str) -> None:
    """At first the misses. Rows in sight keep their stripes, and on paper are all rows and no choice."""
    show(page, f"{origin}/book/card.html")
    rows, choice = page.locator(".claims tbody tr"), page.locator(".claims-filter")
    shown = rows.filter(visible=True)
    assert 0 < shown.count() < rows.count()
    assert all(verdict.startswith("off") for verdict in shown.locator("td:nth-child(4)").all_inner_texts())
    stripes = """() => [...document.querySelectorAll(".claims tbody")].every(body => [...body.rows].filter(row => !row.hidden)
        .map(row => getComputedStyle(row).backgroundColor).every((colour, at, all) => at === 0 || colour !== all[at - 1]))"""
    assert page.evaluate(stripes)
    for box in choice.locator("input").all():
        box.check()
    assert shown.count() == rows.count()
    page.reload()
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    expect(choice).to_be_hidden()
    assert shown.count() == rows.count()


def test_the_folder_opens_from_files(page: Page) -> None:
    record = Record()
    record.listen(page, "file://")
    page.goto((SITE / "index.html").as_uri())
    page.wait_for_url("**/book/index.html")
    assert record.complaints == []
    assert record.elsewhere == []


def test_the_reference_lists_its_modules(page: Page, origin: str) -> None:
    page.goto(f"{origin}/book/reference.html")
    page.locator("article a", has_text="rmsnorm").click()
    page.wait_for_url("**/reference_layer.html#module-dsv2_ref.rmsnorm")
    expect(page.locator(".bd-sidebar-secondary a", has_text="rmsnorm").first).to_be_visible()
