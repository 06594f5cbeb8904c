"""How long a chapter takes to read: its words and its visible lines of code, exercises left out.

    python -m tools.budget        a table of all chapters

Counted are the text outside of formulas' brackets and directives' options, the code of cells that are not folded, and the
listings that cells print. 200 words take a minute, and so do six lines of code.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOOK = Path(__file__).resolve().parent.parent / "book"
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
WORDS_PER_MINUTE, LINES_PER_MINUTE = 200, 6


@dataclass(frozen=True)
class Budget:
    """What a chapter asks of its reader, without its exercises."""

    words: int
    lines: int

    @property
    def minutes(self) -> int:
        """Minutes to read it."""
        return round(self.words / WORDS_PER_MINUTE + self.lines / LINES_PER_MINUTE)


def words_in(text: str) -> int:
    """Words of prose; a formula counts as one, code blocks count as lines elsewhere."""
    text = re.sub(r"^```\{math\}.*?^```$", " formula ", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?:```|:::)[^\n]*$|^:[\w-]+:.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$|\$[^$]+\$", " formula ", text, flags=re.DOTALL)
    text = re.sub(r"\{[\w:.-]+\}(?=`)|\]\([^)]*\)", " ", text)
    return len(re.findall(r"[^\W_]+(?:['’.,-][^\W_]+)*", text))


def lines_in(code: str) -> int:
    """Lines that are not empty."""
    return sum(1 for line in code.splitlines() if line.strip())


def listed(cell: Any) -> int:
    """Lines of the listings that a cell prints as Markdown."""
    markdown = ["".join(output.get("data", {}).get("text/markdown", "")) for output in cell["outputs"]]
    return sum(lines_in(code) for text in markdown for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def budget_of(path: Path) -> Budget:
    """Count a notebook."""
    words = lines = 0
    in_exercises = folded = False
    for cell in json.loads(path.read_text())["cells"]:
        text, tags = "".join(cell["source"]), set(cell["metadata"].get("tags", []))
        if cell["cell_type"] == "markdown":
            for part in re.split(r"^(?=## )", text, flags=re.MULTILINE):
                if part.startswith("## "):
                    in_exercises = part.startswith("## Exercises")
                folded = part.rfind(":class: dropdown") > part.rfind("solution-end") if "solution" in part else folded
                if not in_exercises:
                    words += words_in(part)
        elif not in_exercises and not folded:
            lines += listed(cell) + (0 if tags & FOLDED else lines_in(text))
    return Budget(words, lines)


def chapters() -> list[Path]:
    """The notebooks that are chapters, as the table of contents orders them."""
    names = re.findall(r"file: book/(\w+)", (BOOK.parent / "_toc.yml").read_text().split("Look it up")[0])
    return [BOOK / f"{name}.ipynb" for name in names]


def main() -> None:
    """Print the table."""
    print(f"{'chapter':12}{'words':>8}{'lines':>8}{'minutes':>9}")
    for path in chapters():
        budget = budget_of(path)
        print(f"{path.stem:12}{budget.words:8}{budget.lines:8}{budget.minutes:9}")


if __name__ == "__main__":
    main()
