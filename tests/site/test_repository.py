"""A small book, built with this book's settings: its buttons and commands lead to the repository, or are not there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urljoin
from xml.etree import ElementTree

import pytest
from bs4 import BeautifulSoup

from tests.site.conftest import ROOT
from tools import repository

GITHUB = "https://github.com/someone/fork"
ADDRESS = "https://someone.github.io/fork/"
PAGES = ("running.md", "notation.ipynb")


def build(folder: Path, address: str, site: str) -> dict[str, BeautifulSoup]:
    """The pages of a book of two, built where there is no Git repository."""
    (folder / "book").mkdir(parents=True)
    shutil.copy(ROOT / "_config.yml", folder)
    for part in ("tools", "dsv2_ref", "experiments", "book/_static", "book/_templates", "book/data"):
        shutil.copytree(ROOT / part, folder / part)
    for file in ("references.bib", "overview.ipynb", *PAGES):
        shutil.copy(ROOT / "book" / file, folder / "book")
    figure = "```{stored-figure} overview.ipynb flow-figure\n```\n"
    (folder / "book" / "index.md").write_text(f"# A small book\n\n*What is in it?*\n\n{figure}")
    chapters = "".join(f"  - file: book/{Path(page).stem}\n" for page in PAGES)
    (folder / "_toc.yml").write_text(f"format: jb-book\nroot: book/index\nchapters:\n{chapters}")
    environment = {**os.environ, "BOOK_REPOSITORY": address, "BOOK_BRANCH": "trunk", "BOOK_URL": site}
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "--all"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = folder / "_build" / "html"
    files = {page: (built / "book" / page).with_suffix(".html") for page in ("index.md", *PAGES)}
    pages = {name: BeautifulSoup(path.read_text(), "html.parser") for name, path in files.items()}
    if (built / "sitemap.xml").exists():
        locations = [node.text for node in ElementTree.parse(built / "sitemap.xml").iter() if node.tag.endswith("}loc")]
        pages["sitemap.xml"] = BeautifulSoup("\n".join(locations), "html.parser")
    return pages


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BeautifulSoup]:
    return build(tmp_path_factory.mktemp("published") / "book", GITHUB, ADDRESS.rstrip("/"))


@pytest.fixture(scope="module")
def unpublished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BeautifulSoup]:
    return build(tmp_path_factory.mktemp("unpublished") / "book", "", "")


def links(page: BeautifulSoup) -> set[str]:
    return {tag["href"] for tag in page.find_all("a", href=True)}


def test_a_chapter_opens_in_colab(published: dict[str, BeautifulSoup]) -> None:
    place = "/github/someone/fork/blob/trunk/book/notation.ipynb"
    assert f"https://colab.research.google.com{place}" in links(published["notation.ipynb"])
    assert not any(repository.COLAB in link for link in links(published["running.md"]))  # it is no notebook


def test_a_chapter_opens_in_binder(published: dict[str, BeautifulSoup]) -> None:
    place = "/v2/gh/someone/fork/trunk?urlpath=lab/tree/book/notation.ipynb"
    assert f"{repository.BINDER}{place}" in links(published["notation.ipynb"])
    assert not any(repository.BINDER in link for link in links(published["running.md"]))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_leads_to_its_source(published: dict[str, BeautifulSoup], page: str) -> None:
    found = links(published[page])
    assert {GITHUB, f"{GITHUB}/blob/trunk/book/{page}?plain=1", f"{GITHUB}/edit/trunk/book/{page}"} <= found
    report = repository.report(GITHUB, f"book/{Path(page).stem}.html")
    header, foot = (published[page].find(class_=name) for name in ("article-header-buttons", "version"))
    for place in (header, foot):
        assert {report, f"{GITHUB}/edit/trunk/book/{page}"} <= links(place)
    assert "Report a mistake on this page, or edit it." in " ".join(foot.get_text().split())


def test_the_commands_can_be_copied_as_they_are(published: dict[str, BeautifulSoup]) -> None:
    shown = [block.get_text() for block in published["running.md"].find_all("pre")]
    assert f"git clone {GITHUB}\ncd fork\n" in shown
    colab = f'!git clone --quiet --depth 1 --branch trunk {GITHUB}\n!pip install --quiet "./fork[notebooks]"\n'
    assert colab in shown


def test_pictures_of_buttons_are_described(published: dict[str, BeautifulSoup]) -> None:
    for picture in published["notation.ipynb"].find_all("img"):
        assert picture.get("alt", "").strip(), picture


@pytest.mark.parametrize("page", PAGES)
def test_without_an_address_no_button_leads_nowhere(unpublished: dict[str, BeautifulSoup], page: str) -> None:
    header = unpublished[page].find(class_="article-header-buttons")
    assert header.find(class_="dropdown-download-buttons")
    assert not header.find(class_="dropdown-launch-buttons")
    assert not header.find(class_="dropdown-source-buttons")
    assert not any("github.com" in link for link in links(header))
    assert links(unpublished[page].find(class_="version")) == set()


@pytest.mark.parametrize("page", PAGES)
def test_without_an_address_nothing_is_left_to_fill_in(unpublished: dict[str, BeautifulSoup], page: str) -> None:
    text = unpublished[page].find("article").get_text()
    assert not re.search(r"ADDRESS|FOLDER|git clone|\{\{", text)
    if page == "running.md":
        assert "without a public address" in text
        assert "rocket" not in text


def addresses(page: BeautifulSoup) -> list[str]:
    """What a page says of where it is."""
    tags = [page.find("link", rel="canonical"), page.find("meta", attrs={"property": "og:url"})]
    return [tag.get("href") or tag["content"] for tag in tags if tag]


@pytest.mark.parametrize("page", PAGES)
def test_a_published_page_says_its_address(published: dict[str, BeautifulSoup], page: str) -> None:
    assert addresses(published[page]) == [f"{ADDRESS}book/{Path(page).stem}.html"] * 2


def test_the_sitemap_lists_published_pages(
    published: dict[str, BeautifulSoup], unpublished: dict[str, BeautifulSoup]
) -> None:
    locations = published["sitemap.xml"].get_text().split()
    assert sorted(locations) == [f"{ADDRESS}book/{name}.html" for name in ("index", "notation", "running")]
    assert "sitemap.xml" not in unpublished


def test_a_published_page_has_its_first_figure_as_its_picture(
    published: dict[str, BeautifulSoup], unpublished: dict[str, BeautifulSoup]
) -> None:
    shown = published["index.md"].find(class_="stored-figure").find("img")
    picture = published["index.md"].find("meta", attrs={"property": "og:image"})["content"]
    assert picture == urljoin(f"{ADDRESS}book/index.html", shown["src"])
    assert not unpublished["index.md"].find("meta", attrs={"property": "og:image"})


@pytest.mark.parametrize("page", PAGES)
def test_an_unpublished_page_says_none(unpublished: dict[str, BeautifulSoup], page: str) -> None:
    assert addresses(unpublished[page]) == []
