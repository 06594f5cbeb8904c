"""The book on paper: the whole of it as one PDF, and a chapter as a reader prints it."""

import re
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pypdfium2
import pytest
from bs4 import BeautifulSoup, Tag
from filelock import FileLock
from playwright.sync_api import Browser
from pypdf import PageObject, PdfReader
from pypdf.generic import Destination

from dsv2_ref import __date__, __version__
from tests.site.conftest import ROOT, SITE
from tests.site.test_browser import show
from tests.site.test_pages import parsed
from tools import pdf

NAMES = [name for _, some in pdf.parts() for name in some]
MOST_BYTES = 25e6
FOOT = f"Version {__version__}, {__date__}"


@pytest.fixture(scope="session")
def book(browser: Browser) -> PdfReader:
    """The PDF of the built book, which one of the processes that test prints, where `make pdf` did not."""
    made_from = (
        SITE / "book" / "index.html",
        *(Path(pdf.__file__).with_suffix(kind) for kind in (".py", ".css", ".js")),
    )
    with FileLock(pdf.PDF.with_suffix(".lock")):
        if not pdf.PDF.exists() or pdf.PDF.stat().st_mtime < max(path.stat().st_mtime for path in made_from):
            # In a process of its own: the tests' browser is driven from this one.
            subprocess.run([sys.executable, "-m", "tools.pdf"], cwd=ROOT, check=True)
    return PdfReader(pdf.PDF)


def pages_of(book: PdfReader) -> dict[str, int]:
    """Where each place of the book is, by the index of the page."""
    return {
        str(name).removeprefix("/"): book.get_destination_page_number(at)
        for name, at in book.named_destinations.items()
    }  # type: ignore[misc]


def squeezed(text: str) -> str:
    """Without space, which a PDF has none of, without hyphens, which PDFium drops at the end of a line, and without
    ligatures."""
    return re.sub(r"[\s\xad-]+", "", text.replace("ﬁ", "fi").replace("ﬂ", "fl"))


def stands(line: str, text: str) -> bool:
    """Whether a line or a paragraph is in a text, in two parts where a page ends inside of it."""
    wanted = squeezed(line)
    first = next(end for end in range(len(wanted), -1, -1) if wanted[:end] in text)
    return wanted[first:] in text and first > 0


@cache
def texts(path: Path) -> list[str]:
    """What stands on each page, read by PDFium, which takes a second where pypdf takes a minute."""
    with pypdfium2.PdfDocument(path) as document:
        return [squeezed(page.get_textpage().get_text_bounded()) for page in document]


def missing_glyphs(page: PageObject) -> int:
    """How many times a page shows the box that fonts have for letters they lack: glyph 0."""
    fonts = page["/Resources"].get("/Font", {})  # type: ignore[attr-defined]
    wide, found = False, 0
    content = page.get_contents()
    assert content is not None
    for name, shown in re.findall(rb"/(F\d+) [\d.]+ Tf|<([0-9A-Fa-f]+)> Tj", content.get_data()):
        if name:
            wide = fonts[f"/{name.decode()}"]["/Subtype"] == "/Type0"  # two bytes per glyph, which are its number
        elif wide:
            found += shown.decode().count("0000") and sum(shown[i : i + 4] == b"0000" for i in range(0, len(shown), 4))
    return found


def outline(entries: list[Any]) -> list[tuple[str, list[str]]]:
    """The bookmarks of two levels."""
    found: list[tuple[str, list[str]]] = []
    for entry in entries:
        if isinstance(entry, Destination):
            found.append((" ".join(str(entry.title).split()), []))
        else:
            found[-1][1].extend(" ".join(str(inner.title).split()) for inner in entry if isinstance(inner, Destination))
    return found


def heading(tag: Tag) -> str:
    copied = BeautifulSoup(str(tag), "html.parser")
    for link in copied.select(".headerlink"):
        link.decompose()
    return " ".join(copied.get_text().split())


def title(name: str) -> str:
    return "About this book" if name == NAMES[0] else heading(parsed(f"book/{name}.html").article.h1)


def lines_of_code(name: str) -> list[str]:
    blocks = parsed(f"book/{name}.html").article.select("div[class*=highlight] pre")
    return [line for block in blocks for line in block.get_text().splitlines() if line.strip()]


def paragraphs(name: str) -> list[str]:
    """Those without formulas, links that paper lacks and what only the site's first page says."""
    article = parsed(f"book/{name}.html").article
    found = [paragraph for paragraph in article.select("section > p") if not paragraph.select(".math, .sd-btn, .sizes")]
    return [paragraph.get_text() for paragraph in found]


@pytest.mark.thorough
def test_it_is_whole_and_says_its_version(book: PdfReader) -> None:
    assert pdf.PDF.stat().st_size < MOST_BYTES
    assert __version__ in pdf.PDF.name
    first = texts(pdf.PDF)[0]
    assert squeezed(parsed("book/index.html").title.get_text()) in first
    assert squeezed(FOOT) in first
    assert book.trailer["/Root"]["/Lang"] == "en"  # type: ignore[index]
    assert book.trailer["/Root"]["/MarkInfo"]["/Marked"]  # type: ignore[index]


@pytest.mark.thorough
def test_every_chapter_is_in_it_with_its_code_and_no_letter_is_missing(book: PdfReader) -> None:
    """Every line of code and every paragraph without formulas stands on the pages of its chapter, or in the solutions."""
    starts = [*(pages_of(book)[name] for name in NAMES), pages_of(book)["solutions"], len(book.pages)]
    assert starts == sorted(starts)
    foot = squeezed(f"{parsed('book/index.html').title.get_text()}. {FOOT}")
    found, wrong = {}, []
    for name, (start, end) in zip([*NAMES, "solutions"], pairwise(starts), strict=True):
        head = squeezed(title(name)) if name in NAMES else "Solutions"
        margins = [f"{head}{foot}{number + 1}" for number in range(start, end)]
        shown = texts(pdf.PDF)[start:end]
        wrong += [
            f"head and foot: {text[:90]}" for margin, text in zip(margins, shown, strict=True) if margin not in text
        ]
        found[name] = "".join(text.replace(margin, "", 1) for margin, text in zip(margins, shown, strict=True))
    for name in NAMES[1:]:
        text = found[name] + found["solutions"]
        lines = {"code": lines_of_code(name), "text": paragraphs(name)}
        wrong += [f"{name}: {kind}: {line}" for kind in lines for line in lines[kind] if not stands(line, text)]
    wrong += [f"page {number} lacks glyphs" for number, page in enumerate(book.pages, 1) if missing_glyphs(page)]
    wrong += [f"page {number}: \ufffd" for number, text in enumerate(texts(pdf.PDF), 1) if "\ufffd" in text]
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:40])


@pytest.mark.thorough
def test_bookmarks_are_the_headings(book: PdfReader) -> None:
    found = outline(book.outline)
    wanted = [title(name) for name in NAMES]
    assert [squeezed(name) for name, _ in found[1:]] == [squeezed(name) for name in ("Contents", *wanted, "Solutions")]
    inner = {squeezed(name): [squeezed(each) for each in within] for name, within in found}
    for name in NAMES[1:]:
        headings = [heading(tag) for tag in parsed(f"book/{name}.html").article.select("h2") if not tag.select(".math")]
        assert {squeezed(each) for each in headings} <= set(inner[squeezed(title(name))]), name


def test_a_bookmark_keeps_the_spaces_at_which_its_heading_was_broken(browser: Browser, tmp_path: Path) -> None:
    style = (pdf.ROOT / "tools" / "pdf.css").read_text()
    page = browser.new_page()
    page.set_content(f'<style>{style}</style><h1 style="width: 5em">10. Counting parameters, FLOPs and bytes</h1>')
    page.pdf(path=tmp_path / "a.pdf", tagged=True, outline=True)
    page.close()
    assert [name for name, _ in outline(PdfReader(tmp_path / "a.pdf").outline)] == [
        "10. Counting parameters, FLOPs and bytes"
    ]


def links(book: PdfReader, pages: range) -> list[Any]:
    found = [annotation.get_object() for number in pages for annotation in book.pages[number].get("/Annots", [])]
    return [annotation for annotation in found if annotation["/Subtype"] == "/Link"]


@pytest.mark.thorough
def test_links_lead_into_the_book_or_out_of_it(book: PdfReader) -> None:
    places = pages_of(book)
    found = links(book, range(len(book.pages)))
    inside = [str(link["/Dest"]).removeprefix("/") for link in found if "/Dest" in link]
    outside = {str(link["/A"]["/URI"]) for link in found if "/A" in link}
    assert set(map(unquote, inside)) <= set(map(unquote, places))
    assert not [address for address in outside if not re.match("https?://", address) or "book.invalid" in address]
    # Each solution is linked from its exercise and links back.
    exercises = {tag["id"] for name in NAMES for tag in parsed(f"book/{name}.html").select(".exercise[id]")}
    solutions = [tag["id"] for name in NAMES for tag in parsed(f"book/{name}.html").select(".solution")]
    assert len(exercises) == len(solutions) > 0
    ends = {name.split("--", 1)[1] for name in map(unquote, inside) if "--" in name}
    assert exercises | set(solutions) <= ends
    assert all(places[name] >= places["solutions"] for name in places if name.split("--", 1)[-1] in solutions)


@pytest.mark.thorough
def test_the_contents_say_on_which_page(book: PdfReader) -> None:
    places = pages_of(book)
    contents = range(1, places[NAMES[0]])
    told = "".join(texts(pdf.PDF)[number] for number in contents)
    for name in (*NAMES, "solutions"):
        words = squeezed(title(name) if name in NAMES else "Solutions")
        assert f"{words}{places[name] + 1}" in told
        assert words in texts(pdf.PDF)[places[name]]
    targets = {unquote(str(link["/Dest"]).removeprefix("/")) for link in links(book, contents)}
    assert {*NAMES, "solutions"} <= targets


@pytest.mark.thorough
def test_figures_and_formulas_are_described(book: PdfReader) -> None:
    """Objects of the structure are not compressed: of eighty thousand only those of figures are parsed."""
    numbers = re.findall(rb"\n(\d+) 0 obj\s*<<\s*/Type\s*/StructElem\s*/S\s*/Figure\b", pdf.PDF.read_bytes())
    figures = [book.get_object(int(number)) for number in numbers]
    described = {" ".join(str(figure.get("/Alt", "")).split()) for figure in figures}  # type: ignore[union-attr]
    assert "" not in described
    pictures = {
        " ".join(picture["alt"].split())
        for name in NAMES
        for picture in parsed(f"book/{name}.html").article.select("img")
        if not picture.find_parent(class_="sd-btn")
    }
    assert len(pictures) > 20
    assert pictures <= described
    formulas = {
        " ".join(re.sub(r"(?<!\\)\\[()\[\]]", "", formula.get_text()).split())
        for name in NAMES[1:]
        for formula in parsed(f"book/{name}.html").article.select("span.math")
    }
    assert len(formulas) > 200
    assert formulas <= described


def test_a_chapter_prints_well(browser: Browser, origin: str, tmp_path: Path) -> None:
    """With its number, its version, all its code and its solutions, on numbered pages."""
    page = browser.new_page(color_scheme="dark")
    show(page, f"{origin}/book/rope.html")
    page.pdf(path=tmp_path / "rope.pdf", format="A4", print_background=True)
    page.close()
    sheets = texts(tmp_path / "rope.pdf")
    assert squeezed(title("rope")) in sheets[0]
    assert squeezed(FOOT) in sheets[-1]
    assert all(text.startswith(str(number)) for number, text in enumerate(sheets, 1))
    whole = "".join(text.removeprefix(str(number)) for number, text in enumerate(sheets, 1))
    assert [line for line in lines_of_code("rope") if squeezed(line) not in whole] == []


BROKEN = """() => [...document.querySelectorAll("article th")].flatMap(cell => {
    const nodes = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    const broken = [];
    while (nodes.nextNode())
        for (const word of nodes.currentNode.data.matchAll(/[a-z]+/gi)) {
            const range = document.createRange();
            range.setStart(nodes.currentNode, word.index);
            range.setEnd(nodes.currentNode, word.index + word[0].length);
            if (range.getClientRects().length > 1) broken.push(word[0]);
        }
    return broken;
})"""
"""Words in the headings of tables that go on in a second line."""


@pytest.mark.parametrize("name", ["instructors", "mla", "sparse", "training"])
def test_no_word_in_the_heading_of_a_table_is_cut(name: str, browser: Browser, origin: str) -> None:
    page = browser.new_page(viewport={"width": 658, "height": 971})
    page.emulate_media(media="print")
    show(page, f"{origin}/book/{name}.html")
    broken, wide = page.evaluate(BROKEN), page.evaluate("document.documentElement.scrollWidth > innerWidth")
    page.close()
    assert (broken, wide) == ([], False)
