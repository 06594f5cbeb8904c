"""The whole book as one PDF, printed by Chromium from one page that is put together from the built ones.

    python -m tools.pdf    after `make book`; `make pdf` does both

The page (``pdf.js``) has a cover, the contents, every page of the table of contents in its order, and the solutions. It is
printed twice: the first time tells on which page each heading stands, the second has these numbers in the contents.
Nothing is fetched from a network.
"""

import mimetypes
import shutil
import sys
from itertools import count
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from playwright.sync_api import Error, Page, Route, sync_playwright
from pypdf import PdfReader

from dsv2_ref import __date__, __version__

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
PDF = ROOT / "_build" / f"dsv2-layer-book-{__version__}.pdf"
HOST = "http://book.invalid"  # never asked for: the browser gets all files from the built book
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""The first has no windows, and takes a third of the time to open a page."""
FLAGS = [
    "--no-sandbox",  # who prints or tests may be root in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCRIPTS = ("documentation_options.js", "tex-chtml.js", "book.js", "figures/")
"""Scripts of the pages that draw something. The others fold, copy and search."""
READY = """async () => {
    await window.MathJax?.startup.promise;
    await document.fonts.ready;
    await Promise.all([...document.images].map(image => image.decode()));
    await new Promise(done => setTimeout(done, 200));
}"""
LIGHTEN = """() => {
    // A span for each word of code would be half of the file: only those stay that a colour or a weight sets apart.
    const font = ({ color, fontWeight, fontStyle }) => [color, fontWeight, fontStyle].join();
    const plain = [...document.querySelectorAll(":is(pre, code, .sig) span:not([id])")].filter(word => {
        const style = getComputedStyle(word);
        return style.display === "inline" && style.backgroundColor === "rgba(0, 0, 0, 0)" && style.borderTopWidth === "0px" &&
            font(style) === font(getComputedStyle(word.parentElement));
    });
    for (const word of plain) word.replaceWith(...word.childNodes);
    for (const link of [...document.links])  // those that a figure made
        if (link.host === location.host && link.pathname !== location.pathname) link.replaceWith(...link.childNodes);
    document.body.normalize();
}"""


def parts() -> list[tuple[str, list[str]]]:
    """Captions of the table of contents and the names of their pages, the first page first, without a caption."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [("", [{"file": toc["root"]}]), *((part["caption"], part["chapters"]) for part in toc["parts"])]
    return [
        (caption, [Path(page["file"]).name for chapter in chapters for page in (chapter, *chapter.get("sections", ()))])
        for caption, chapters in listed
    ]


def browser() -> str | None:
    """The browser of this machine that prints, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def open_book(page: Page) -> None:
    """Put the one page together, show it with the files of the built book around it, and wait until all is drawn.

    Raises:
        RuntimeError: for an error in a script, and for a file that the built book has not.
    """
    wrong: list[str] = []
    whole = SITE / "book" / "whole.html"  # a page that is nowhere
    texts = {whole: ""}

    def answer(route: Route) -> None:
        path = SITE / unquote(urlsplit(route.request.url).path).lstrip("/")
        if path in texts:
            route.fulfill(body=texts[path], content_type="text/html; charset=utf-8")
        elif route.request.url.startswith(HOST) and path.is_file():
            route.fulfill(body=path.read_bytes(), content_type=mimetypes.guess_type(path.name)[0])
        else:
            wrong.append(f"{route.request.url} is not in the built book")
            route.abort()

    page.route("**/*", answer)
    page.goto(f"{HOST}/book/whole.html")
    style, script = ((ROOT / "tools" / f"pdf.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    version = f"Version {__version__}, {__date__}"
    given = {"parts": parts(), "version": version, "style": style, "scripts": SCRIPTS}
    texts[whole] = page.evaluate(script, given)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.emulate_media(media="print")
    page.goto(f"{HOST}/book/whole.html")
    page.evaluate(READY)
    page.evaluate(LIGHTEN)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    if wrong:
        raise RuntimeError("; ".join(wrong))


def print_book(path: Path) -> int:
    """Write the PDF to ``path``; the number of its pages.

    Raises:
        RuntimeError: where there is no browser, or the numbers in the contents never come to rest.
    """
    found = browser()
    if found is None:
        raise RuntimeError(
            "no Chromium or Chrome is installed, which prints the book (Debian: apt install chromium-headless-shell)"
        )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=FLAGS)
        page = chromium.new_page(viewport={"width": 658, "height": 971})  # the room on a page, in pixels of CSS
        page.set_default_timeout(0)  # a slow machine is no fault
        open_book(page)
        told: dict[str, int] = {}
        for attempt in count():
            whole = attempt > 0  # at first without tags, which take as long again
            page.pdf(path=path, prefer_css_page_size=True, print_background=True, tagged=whole, outline=whole)
            reader = PdfReader(path)
            pages = {str(name): reader.get_destination_page_number(at) + 1  # type: ignore[operator]
                     for name, at in reader.named_destinations.items()}  # fmt: skip
            if pages == told:
                break
            if attempt == 3:
                raise RuntimeError("the numbers in the contents move what they count")
            told = pages
            page.evaluate(
                """pages => document.querySelectorAll("[data-place]").forEach(
                    place => { place.textContent = pages[place.dataset.place]; })""",
                {name.removeprefix("/"): number for name, number in pages.items()},
            )
        chromium.close()
    return len(reader.pages)


def main() -> int:
    """Print the book; 1, and a line that says why, where that cannot be done."""
    if not (SITE / "book" / "index.html").is_file():
        print("the book is not built: run make book first", file=sys.stderr)
        return 1
    try:
        pages = print_book(PDF)
    except (RuntimeError, Error) as error:
        print(f"make pdf: {error}", file=sys.stderr)
        return 1
    print(f"{PDF.relative_to(ROOT)}: {pages} pages, {PDF.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
