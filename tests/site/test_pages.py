"""What can be seen without a browser: links lead somewhere, nothing is fetched from elsewhere, pictures are described."""

import base64
import re
from functools import cache
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from dsv2_ref import __date__, __version__
from tests.site.conftest import CHAPTERS, PAGES, ROOT, SITE

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "embed": "src", "object": "data"}
VENDORED = SITE / "_static" / "vendor" / "mathjax"


@cache
def parsed(page: str) -> BeautifulSoup:
    return BeautifulSoup((SITE / page).read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(page: str) -> frozenset[str]:
    return frozenset(tag[key] for key in ("id", "name") for tag in parsed(page).find_all(attrs={key: True}))


def loaded(page: str) -> list[str]:
    """Addresses that a browser fetches when it shows the page."""
    addresses = [tag[key] for name, key in LOADING.items() for tag in parsed(page).find_all(name, attrs={key: True})]
    links = [tag for tag in parsed(page).find_all("link", href=True) if not {"canonical"} & set(tag["rel"])]
    return addresses + [tag["href"] for tag in links]


def is_local(address: str) -> bool:
    parts = urlsplit(address)
    return not parts.scheme and not parts.netloc


def problem(page: str, address: str) -> str | None:
    """Why a local address leads nowhere, or None."""
    path, fragment = urldefrag(urljoin(page, address))
    path = unquote(urlsplit(path).path)
    if not (SITE / path).is_file():
        return f"{page}: {address} does not exist"
    if fragment and path in PAGES and unquote(fragment) not in anchors(path):
        return f"{page}: {address} has no such anchor"
    return None


def test_every_page_of_the_table_of_contents_is_built() -> None:
    assert set(CHAPTERS) <= set(PAGES)


def test_the_folder_opens_at_the_first_page() -> None:
    refresh = parsed("index.html").find("meta", attrs={"http-equiv": "refresh"})["content"]
    assert refresh == "0; url=book/index.html"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = [tag["href"] for tag in parsed(page).find_all("a", href=True)]
    local = [address for address in links + loaded(page) if is_local(address) and address != "#"]
    assert [found for address in local if (found := problem(page, address))] == []


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert [address for address in loaded(page) if not is_local(address) and not address.startswith("data:")] == []


def test_styles_load_nothing_from_elsewhere() -> None:
    for style in SITE.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import\s*)[\s\"']*((?:https?:)?//[^)\"']+)", style.read_text(encoding="utf-8"))
        assert found == [], style.name


@pytest.mark.parametrize("page", PAGES)
def test_pictures_are_described(page: str) -> None:
    for picture in parsed(page).find_all("img"):
        assert picture.get("alt", "").strip(), picture
        assert not re.search(r"\.(png|svg|jpe?g|gif)\b|_images|_build", picture["alt"]), picture


@pytest.mark.parametrize("page", CHAPTERS)
def test_pages_say_what_they_are(page: str) -> None:
    html = parsed(page).html
    assert html["lang"] == "en"
    assert len(html.find_all("h1")) == 1 + bool(html.find(id="jb-print-docs-body"))
    told = {tag.get("property") or tag["name"]: tag["content"] for tag in html.find_all("meta", content=True)
            if tag.get("property") or tag.get("name")}  # fmt: skip
    assert told["og:title"]
    assert told["og:site_name"] == yaml.safe_load((ROOT / "_config.yml").read_text())["title"]
    assert told["description"] == told["og:description"]
    assert re.fullmatch(r"[A-Z].{20,200}[.?!]", told["description"])
    assert not re.search(r"[\\\[$]", told["description"])
    assert "localhost" not in str(html.head)


@pytest.mark.parametrize("page", [page for page in CHAPTERS if (ROOT / page).with_suffix(".ipynb").exists()])
def test_notebooks_can_be_downloaded(page: str) -> None:
    button = parsed(page).find("a", class_="btn-download-source-button")
    path = SITE / urljoin(page, button["href"])
    assert nbformat.read(path, as_version=4) == nbformat.read((ROOT / page).with_suffix(".ipynb"), as_version=4)


# Whoever opens the folder, or a page by the name that it once had, is led on at once.
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("index.html", "book/traps.html")])
def test_every_page_says_its_version(page: str) -> None:
    foot = parsed(page).find(class_="version")
    assert f"Version {__version__}, {__date__}." in " ".join(foot.get_text().split())


def test_the_entry_to_cite_has_the_version() -> None:
    (entry,) = (code.get_text() for code in parsed("book/index.html").find_all("pre") if "@misc" in code.get_text())
    assert f"{{Version {__version__}, {__date__}}}" in entry
    assert entry.count("{") == entry.count("}")


def test_every_chapter_is_described_by_its_question() -> None:
    for page in (page for page in CHAPTERS if parsed(page).find("span", class_="section-number")):
        asked = parsed(page).find("article").find("h1").find_next("p").find("em", recursive=False)
        told = parsed(page).find("meta", attrs={"name": "description"})["content"]
        assert told == " ".join(asked.get_text().split()), page


def test_the_first_page_shows_the_figure_and_the_questions_as_the_chapters_have_them() -> None:
    first, overview = parsed("book/index.html"), parsed("book/overview.html")
    shown = first.find(class_="stored-figure").find("img")
    assert shown["alt"] in {picture["alt"] for picture in overview.find_all("img")}
    cells = nbformat.read(ROOT / "book" / "overview.ipynb", as_version=4).cells
    (cell,) = (cell for cell in cells if cell.metadata.get("mystnb", {}).get("image", {}).get("alt") == shown["alt"])
    stored = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    assert (SITE / "book" / shown["src"]).read_bytes() == base64.b64decode(stored)
    items = [item for part in first.find_all(class_="chapters") for item in part.find_all("li")]
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    numbered = [chapter["file"] + ".html" for part in toc if part.get("numbered") for chapter in part["chapters"]]
    assert [urljoin("book/index.html", item.find("a")["href"]) for item in items] == numbered
    for number, (item, page) in enumerate(zip(items, numbered, strict=True), start=1):
        html = parsed(page)
        assert html.find("span", class_="section-number").get_text().strip() == f"{number}."
        assert html.find("meta", attrs={"name": "description"})["content"] in " ".join(item.get_text().split())
    cards = [card.get_text().strip() for card in first.find_all(class_="sd-card-title")]
    assert cards == [part["caption"] for part in toc if part.get("numbered")]


@pytest.mark.parametrize("page", CHAPTERS)
def test_a_number_stays_with_its_sign_and_its_unit(page: str) -> None:
    # Titles of solutions and the tables of interactive figures are made apart from the text.
    paragraphs = parsed(page).find("article").select("p:not(.admonition-title)")
    words = [text for each in paragraphs for text in each.find_all(string=True) if not text.find_parent("code")]
    assert [found for text in words for found in re.findall(r"\d+ (?:%|×|[kMG]B\b)|× \d+", text)] == []


def test_the_folder_says_what_the_book_is() -> None:
    root, first = parsed("index.html"), parsed("book/index.html")
    described = [page.find("meta", attrs={"name": "description"})["content"] for page in (root, first)]
    assert described[0] == described[1]
    assert (
        root.title.get_text() == first.title.get_text() == yaml.safe_load((ROOT / "_config.yml").read_text())["title"]
    )
    assert (SITE / root.find("link", rel="icon")["href"]).is_file()


def test_formulas_are_drawn_by_the_vendored_mathjax() -> None:
    readme = (VENDORED / "README.md").read_text()
    version = re.search(r"MathJax (\d+\.\d+\.\d+)", readme).group(1)
    assert f'"{version}"' in (VENDORED / "tex-chtml.js").read_text(encoding="utf-8")
    assert "Apache License" in (VENDORED / "LICENSE").read_text()
    assert list((VENDORED / "output/chtml/fonts/woff-v2").glob("*.woff"))


def test_the_reference_documents_every_module_and_public_name() -> None:
    import dsv2_ref

    described = {anchor for page in CHAPTERS if page.startswith("book/reference") for anchor in anchors(page)}
    modules = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "dsv2_ref").rglob("*.py")}
    names = {".".join(path.parts).removesuffix(".__init__") for path in modules} - {"dsv2_ref"}
    assert {f"module-{name}" for name in names} <= described
    assert set(dsv2_ref.__all__) <= {
        anchor.rsplit(".", 1)[-1] for anchor in described if anchor.startswith("dsv2_ref.")
    }
