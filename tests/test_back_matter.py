"""The pages to look things up in: the table of traps is current, snippets run, and the glossary is in order."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml

from tools import repository

BOOK = Path(__file__).parent.parent / "book"


def test_the_table_of_symptoms_is_what_the_last_cell_made() -> None:
    """nbval compares the last cell's output, and cannot see that it also fills in the first."""
    cells = nbformat.read(BOOK / "symptoms.ipynb", as_version=4).cells
    tables = {
        cell.id: cell.outputs[0].data["text/markdown"]
        for cell in cells
        if cell.id in ("symptoms-table", "symptoms-end-run")
    }
    assert tables["symptoms-table"] == tables["symptoms-end-run"]


def test_every_trap_has_a_row_and_every_row_a_trap() -> None:
    cells = nbformat.read(BOOK / "symptoms.ipynb", as_version=4).cells
    (table,) = (cell.outputs[0].data["text/markdown"] for cell in cells if cell.id == "symptoms-table")
    rows = re.findall(r"^\| \[[^]]+\]\(#(trap-[^)]+)\) \| [^|]+ \|", table, re.M)
    assert len(rows) > 20
    assert rows == [label for cell in cells for label in re.findall(r"^\((trap-.+)\)=$", cell.source, re.M)]


GLOSSARY = (BOOK / "glossary.md").read_text()
TERMS = re.findall(r"^(\S.*)\n    \S", GLOSSARY, re.M)


def test_the_glossary_is_sorted_and_says_everything_once() -> None:
    assert len(TERMS) > 60
    assert sorted(set(TERMS), key=str.lower) == TERMS


@pytest.mark.parametrize("page", sorted(BOOK.glob("*.ipynb")), ids=lambda page: page.stem)
def test_terms_that_chapters_link_to_are_in_the_glossary(page: Path) -> None:
    text = "\n".join(cell.source for cell in nbformat.read(page, as_version=4).cells)
    linked = [re.sub(r".*<(.*)>", r"\1", term) for term in re.findall(r"{term}`([^`]+)`", text)]
    assert set(linked) <= set(TERMS)


def test_the_citation_file_and_the_first_page_agree() -> None:
    assert "{{ citation }}" in (BOOK / "index.md").read_text()
    citation = yaml.safe_load((BOOK.parent / "CITATION.cff").read_text())
    config = yaml.safe_load((BOOK.parent / "_config.yml").read_text())
    page = repository.citation(config["title"], None, "")
    (title,) = re.findall(r"title *= \{(.*)\},", page)
    assert citation["preferred-citation"]["title"] == title.replace("{", "").replace("}", "")
    (year,) = re.findall(r"year *= \{(\d+)\}", page)
    assert citation["date-released"].year == int(year) == citation["preferred-citation"]["year"]
    (author,) = re.findall(r"author *= \{\{(.*)\}\}", page)
    assert author == citation["authors"][0]["name"] == citation["preferred-citation"]["authors"][0]["name"]
