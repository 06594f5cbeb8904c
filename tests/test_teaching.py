"""What a chapter asks of its reader, and the words in which it speaks."""

import inspect
import re
from pathlib import Path

import nbformat
import pytest

from dsv2_ref import DeepseekV2Attention
from experiments import cast, trained
from tools import budget

LINES_AT_MOST = 150
TAUGHT = budget.chapters()
PAGES = [*TAUGHT, budget.BOOK / "cast.ipynb"]

REFUSED = {  # words that the field does not use: what it says instead
    r"\bremember(?:s|ed|ing)?\b": "cached, the cache holds",
    r"\bslips?\b": "bug, mistake",
    r"\b(?:the )?way back\b": "backward pass",
    r"\bby lot\b": "by chance, random",
    r"\bborders?\b": "break-even point",
    r"\b(?:FLOPs?|bytes?|bits|numbers) (?:a|an) (?:token|layer|byte|head|step)\b": "… per token",
    r"\bmended?\b": "fixed, corrected",
    r"\brefuses?\b": "raises, rejects",
    r"\bunfold(?:s|ed)?\b|\bread out\b": "expanded, computed from the latent",
    r"\bawake\b|\bwoken?\b": "experts used or loaded",
    r"\bwhoever\b": "if you …, code that …",
    r"\bin small\b": "in miniature",
    r"\bthe card\b": "DeepSeek-V2-Lite, or leave out",
}
"""From the book's list of terms. A page that must name such a word, as in a quotation, writes it in code or italics."""


def prose(path: Path) -> str:
    """The text of a page without code, formulas, quotations in italics, and what directives name."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    text = re.sub(r"^```\{math\}.*?^```$|^ {4}.*$", "", "\n".join(cells), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\{[\w:-]+\}`[^`]*`|`[^`]*`|\$[^$]+\$|\]\([^)]*\)|^:\w+:.*$", " ", text, flags=re.MULTILINE)
    return " ".join(text.split())


@pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)
def test_visible_code_fits_the_budget(path: Path) -> None:
    assert budget.budget_of(path).lines <= LINES_AT_MOST


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_words_are_the_fields(path: Path) -> None:
    found = {
        f"{match[0]} (write: {instead})"
        for pattern, instead in REFUSED.items()
        for match in re.finditer(pattern, prose(path), flags=re.IGNORECASE)
    }
    assert not found


@pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)
def test_a_chapter_says_how_long_it_takes(path: Path) -> None:
    source = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    assert "{reading}`time`" in source
    titles = re.findall(r"^```\{exercise-start\} (.*)$", source, flags=re.MULTILINE)
    assert titles
    for title in titles:
        assert re.match(r"(By hand|Find the bug|Write it|Explore) ★{1,3} \d+ min: ", title), title


def test_what_the_text_names_of_the_forward_pass_stands_in_it() -> None:
    """The guide above its listing, and the four lines that another chapter quotes."""
    code = inspect.getsource(DeepseekV2Attention.forward)
    decoding = nbformat.read(budget.BOOK / "decoding.ipynb", as_version=4).cells
    (guide,) = (cell.source for cell in decoding if "Here is the whole forward pass" in cell.source)
    named = re.findall(r"`([^`]+)`(?!\()", re.sub(r"\{\w+\}`[^`]*`", "", guide))
    assert len(named) > 10
    assert [name for name in named if name not in code] == [
        "absorbed",
        "sdpa",
        "flash_attention_2",
    ]  # left for the else
    mla = nbformat.read(budget.BOOK / "mla.ipynb", as_version=4).cells
    quoted = [
        line for cell in mla for line in re.findall(r"^\|[^|\n]*\| `([^`]+ = [^`]+)` \|", cell.source, re.MULTILINE)
    ]
    assert len(quoted) == 4
    assert [line for line in quoted if line not in code] == []


def test_what_is_counted() -> None:
    text = "## Title\n\nTwo words and $x = 1$, {term}`one term`.\n\n```{math}\n:label: a\nx\n```\n"
    assert budget.words_in(text) == len(["Title", "Two", "words", "and", "formula", "one", "term", "formula"])
    assert budget.lines_in("a = 1\n\n\nb = 2\n") == 2


def test_the_cast_has_the_sizes_that_the_book_follows() -> None:
    assert cast.sizes_of("C") == {"toy": "3", "trained": "32", "V2-Lite": "512", "V2": "512"}
    assert cast.sizes_of("Q")["V2-Lite"] == cast.sizes_of("I")["toy"] == "–"
    assert "| 5 | 40 | 576 | 576 |" in cast.table()
    assert "| 10 | 160 | 5,120 | 40,960 |" in cast.table()
    assert sum(p.numel() for p in trained.trained().parameters()) == 442_048
    assert len(trained.LINE) == 17
    assert trained.LINE[trained.EQUALS + 1] == "5"
