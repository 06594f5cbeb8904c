"""Pack the assignments for a course: an archive for students, and one for instructors.

    python -m tools.assignments [FOLDER]       into _build/ unless a folder is named

Students get the pages, the files to complete, and the notebooks of all chapters without the solutions of their
exercises. Instructors get the same, the assignments' solutions, the notebooks as they are, and the page for instructors.
"""

import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import yaml
from nbformat import NotebookNode

from tools import repository
from tools.budget import BOOK, chapters

ROOT = BOOK.parent
ASSIGNMENTS = ROOT / "assignments"
WRITTEN = (2026, 1, 1, 0, 0, 0)
"""The date of every file in an archive, so that the same files make the same bytes."""
LEFT_OUT = "*The solution is not part of this copy.*"


def without_solutions(notebook: NotebookNode) -> NotebookNode:
    """A notebook in which a line stands for each solution, text and cells."""
    kept, inside = [], False
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            kept += [] if inside else [cell]
            continue
        pieces = []
        for piece in re.split(r"^(?=```\{solution-(?:start|end)\})", cell.source, flags=re.MULTILINE):
            if piece.startswith("```{solution-start}"):
                inside = True
                pieces.append(f"{LEFT_OUT}\n\n")
            elif piece.startswith("```{solution-end}"):
                inside = False
                pieces.append(piece.split("```", 2)[2].lstrip("\n"))
            elif not inside:
                pieces.append(piece)
        if source := "".join(pieces).strip():
            kept.append(cell | {"source": source})
    return nbformat.from_dict(notebook | {"cells": kept})


def stripped() -> Iterator[tuple[str, bytes]]:
    """Every chapter without solutions, by its name."""
    for path in chapters():
        notebook = without_solutions(nbformat.read(path, as_version=4))
        yield path.name, (nbformat.writes(notebook) + "\n").encode()


def for_students() -> Iterator[tuple[str, bytes]]:
    """Names and contents of the students' files."""
    for path in sorted((*ASSIGNMENTS.glob("*.md"), *ASSIGNMENTS.glob("*.py"))):
        yield path.name, path.read_bytes()
    for name, content in stripped():
        yield f"chapters/{name}", content
    for name in ("LICENSE", "LICENSE-text"):
        yield name, (ROOT / name).read_bytes()


def page_for_instructors() -> str:
    """The book's page as one to be read alone: what is filled in there is filled in, and links lead to the chapters."""
    configured = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
    told = repository.commands(repository.find(ROOT, configured["url"]), configured["branch"])
    text = (BOOK / "instructors.md").read_text(encoding="utf-8")
    text = re.sub(r"\{\{ (\w+) \}\}", lambda found: told[found[1]], text)
    packed = {path.name for path in chapters()}

    def link(found: re.Match[str]) -> str:
        title = nbformat.read(BOOK / found[1], as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")
        return f"[{title}](chapters/{found[1]})" if found[1] in packed else title

    return re.sub(r"\[\]\((\w+\.ipynb)\)", link, text)


def for_instructors() -> Iterator[tuple[str, bytes]]:
    """Names and contents of the instructors' files."""
    for name, content in for_students():
        yield f"students/{name}", content
    for path in sorted((ASSIGNMENTS / "solutions").glob("*.py")):
        yield f"solutions/{path.name}", path.read_bytes()
    for path in chapters():
        yield f"chapters/{path.name}", path.read_bytes()
    yield "instructors.md", page_for_instructors().encode()


def write(path: Path, files: Iterator[tuple[str, bytes]]) -> Path:
    """An archive whose files lie in a folder of its own name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            entry = zipfile.ZipInfo(f"{path.stem}/{name}", WRITTEN)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, content)
    return path


def build(folder: Path) -> list[Path]:
    """Both archives."""
    return [
        write(folder / "assignments-students.zip", for_students()),
        write(folder / "assignments-instructors.zip", for_instructors()),
    ]


def main() -> None:
    """Write them, and say where they are and how large."""
    for path in build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_build"):
        with zipfile.ZipFile(path) as archive:
            print(f"{path}: {len(archive.namelist())} files, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
