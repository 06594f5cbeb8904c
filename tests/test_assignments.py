"""The assignments: their pages, what students are to complete, and the archives for a course."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from dsv2_ref import __version__
from dsv2_ref.grading import PARTS, grade
from dsv2_ref.grading.formats import as_text
from tests.planted_in_solutions import PLANTED
from tools import assignments, release
from tools.budget import chapters

pytestmark = pytest.mark.slow

FOLDER = assignments.ASSIGNMENTS
NAMES = list(PLANTED)


def page(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text()


def test_there_are_eight_with_page_file_and_solution() -> None:
    assert len(NAMES) == 8
    assert {path.stem for path in FOLDER.glob("*.md")} == {*NAMES, "README"}
    assert {path.stem for path in FOLDER.glob("*.py")} == set(NAMES)
    assert {path.stem for path in (FOLDER / "solutions").glob("*.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_not_written_fails_and_says_what_to_do(name: str) -> None:
    report = grade(name, FOLDER / f"{name}.py")
    assert (report.points, report.mistakes) == (0, [])
    assert report.problem == ""
    for check in report.checks:
        assert re.match(r"not written yet: .{20,}", check.message), as_text(report)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_to_complete_defines_what_the_solution_does(name: str) -> None:
    """No other name is needed to complete it, and it holds none of the solution's lines of work."""
    stub, solution = ((FOLDER / folder / f"{name}.py").read_text() for folder in ("", "solutions"))
    defined = {node.name for node in ast.parse(stub).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert set(PARTS[name].defines) <= defined
    raising = re.findall(r"raise NotImplementedError\(\"[^\"]+\"\)", stub)
    assert raising
    last = [line.strip() for line in solution.splitlines() if line.strip().startswith("return ")]
    assert last[-1] not in stub


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_goal_time_points_hints_and_rubric(name: str) -> None:
    text, part = page(name), PARTS[name]
    number = NAMES.index(name) + 1
    assert text.startswith(f"# Assignment {number}: ")
    assert re.search(r"^\*\*Goal\.\*\* .{40,}$", text, flags=re.MULTILINE)
    assert re.search(r"^\*\*Time\.\*\* \d+ minutes", text, flags=re.MULTILINE)
    assert f"**Points.** {part.points}\n" in text
    assert text.count("<details>") == text.count("</details>") == 3
    rubric = re.findall(r"^\| (.+) \| (\d+) \|$", text, flags=re.MULTILINE)
    assert rubric == [(case.name, str(case.points)) for case in part.cases]
    assert f"python -m dsv2_ref grade {name} {name}.py" in text
    for chapter in re.findall(r"`book/(\w+)\.ipynb`", text):
        assert (assignments.BOOK / f"{chapter}.ipynb").is_file()
    assert all(function in text for function in part.defines)


def test_the_instructors_page_agrees_with_the_assignments() -> None:
    text = (assignments.BOOK / "instructors.md").read_text()
    rows = re.findall(r"^\| (\d)\. `(\w+)` \| (.+?) \| (\d+) \| (\d+) \|", text, flags=re.MULTILINE)
    assert [row[1] for row in rows] == NAMES
    total = 0
    for number, name, read, minutes, points in rows:
        assert f"# Assignment {number}: " in page(name)
        assert f"**Time.** {minutes} minutes" in page(name)
        assert int(points) == PARTS[name].points
        assert re.findall(r"\]\((\w+)\.ipynb\)", read) == re.findall(r"`book/(\w+)\.ipynb`", page(name))
        total += int(minutes)
    assert f"take about {({9: 'nine'})[round(total / 60)]} hours" in text
    assert f"have {sum(PARTS[name].points for name in NAMES)} points" in text
    for extra in PARTS.keys() - set(NAMES):
        assert f"`{extra}`" in text


def needed(path: Path) -> list[str]:
    """The chapters that the box at the top of a chapter links to."""
    cells = nbformat.read(path, as_version=4).cells[:3]
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    (box,) = re.findall(r"You need, in five lines.*?^:::", text, flags=re.DOTALL | re.MULTILINE)
    linked = set(re.findall(r"\]\((\w+)\.ipynb\)", box))
    return [chapter.stem for chapter in chapters() if chapter.stem in linked]


def test_the_instructors_page_says_which_chapter_needs_which() -> None:
    """And what a syllabus of six weeks reads, it reads after what that needs, or in the same week."""
    text = (assignments.BOOK / "instructors.md").read_text()
    table = text.split("| chapter | builds on |\n", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    told = [re.findall(r"\]\((\w+)\.ipynb\)", row) for row in table]
    needs = {path.stem: needed(path) for path in chapters()}
    assert {chapter: builds_on for chapter, *builds_on in told} == needs
    weeks = text.split("## Six weeks", 1)[1].split("## Two weeks", 1)[0]
    read: set[str] = set()
    for week in re.findall(r"^\| \d \| (.+?) \|", weeks, flags=re.MULTILINE):
        now = re.findall(r"\]\((\w+)\.ipynb\)", week)
        read |= set(now)
        assert [name for chapter in now for name in needs.get(chapter, []) if name not in read] == []


def test_the_list_of_assignments_is_complete() -> None:
    listed = re.findall(r"\((\w+)\.md\) \| `(\w+)\.py`", (FOLDER / "README.md").read_text())
    assert listed == [(name, name) for name in NAMES]


# Archives


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[zipfile.ZipFile]:
    return [zipfile.ZipFile(path) for path in assignments.build(tmp_path_factory.mktemp("archives"))]


def names(archive: zipfile.ZipFile) -> set[str]:
    return {name.split("/", 1)[1] for name in archive.namelist()}


def test_the_students_archive_holds_no_solution(archives: list[zipfile.ZipFile]) -> None:
    students, instructors = archives
    expected = {f"{name}.{kind}" for name in [*NAMES, "README"] for kind in ("md", "py")} - {"README.py"}
    expected |= {f"chapters/{path.name}" for path in chapters()} | {"LICENSE", "LICENSE-text"}
    assert names(students) == expected
    content = b"".join(students.read(name) for name in students.namelist() if name.endswith(".py"))
    for name in NAMES:
        solution = (FOLDER / "solutions" / f"{name}.py").read_bytes()
        assert solution not in content
        assert instructors.read(f"assignments-instructors/solutions/{name}.py") == solution


def test_a_chapter_of_the_archive_runs_where_its_page_says(archives: list[zipfile.ZipFile], tmp_path: Path) -> None:
    """In a copy of the repository: `pip install .` does not bring all that chapters import."""
    students = archives[0]
    assert "unpack the archive in a copy of the repository" in students.read("assignments-students/README.md").decode()
    for name in ("dsv2_ref", "experiments", "tools", "book"):
        (tmp_path / name).symlink_to(assignments.ROOT / name)
    students.extractall(tmp_path)
    folder = tmp_path / "assignments-students" / "chapters"
    cells = nbformat.read(folder / "rmsnorm.ipynb", as_version=4).cells
    imports = next(cell.source for cell in cells if cell.cell_type == "code")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", imports], cwd=folder, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_instructors_page_names_the_archives(archives: list[zipfile.ZipFile]) -> None:
    text = (assignments.BOOK / "instructors.md").read_text()
    assert all(f"`{Path(str(archive.filename)).name}`" in text for archive in archives)
    assert f"`{release.NAME.replace(__version__, 'VERSION')}-assignments.zip`" in text


def test_the_instructors_archive_holds_all(archives: list[zipfile.ZipFile]) -> None:
    students, instructors = archives
    assert {f"students/{name}" for name in names(students)} < names(instructors)
    page = instructors.read("assignments-instructors/instructors.md").decode()
    assert not re.search(r"\{\{|\[\]\(", page)
    linked = set(re.findall(r"\]\((chapters/\w+\.ipynb)\)", page))
    assert len(linked) > 10
    assert linked <= names(instructors)
    for path in chapters():
        assert instructors.read(f"assignments-instructors/chapters/{path.name}") == path.read_bytes()


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_a_chapter_without_solutions(path: Path, archives: list[zipfile.ZipFile]) -> None:
    """Exercises stay; nothing between the marks of a solution does."""
    whole = nbformat.read(path, as_version=4)
    kept = nbformat.reads(archives[0].read(f"assignments-students/chapters/{path.name}").decode(), as_version=4)
    nbformat.validate(kept)
    before, after = ("\n".join(cell.source for cell in book.cells) for book in (whole, kept))
    exercises = before.count("```{exercise-start}")
    assert exercises == before.count("```{solution-start}") == after.count(assignments.LEFT_OUT)
    assert after.count("```{exercise-start}") == exercises
    assert "{solution-" not in after
    solutions = re.findall(r"\{solution-start\}.*?\{solution-end\}", before, flags=re.DOTALL)
    lines = {line for text in solutions for line in text.splitlines() if len(line) > 50}
    elsewhere = re.sub(r"\{solution-start\}.*?\{solution-end\}", "", before, flags=re.DOTALL)
    assert lines
    for line in lines:
        assert line in elsewhere or line not in after
    # All that is outside of solutions is there, in its order.
    outside = [line for line in elsewhere.splitlines() if line.strip() and not line.startswith("```")]
    assert [line for line in outside if line not in after] == []


def test_the_same_files_make_the_same_archive(archives: list[zipfile.ZipFile], tmp_path: Path) -> None:
    again = assignments.build(tmp_path)
    for archive, path in zip(archives, again, strict=True):
        assert Path(str(archive.filename)).read_bytes() == path.read_bytes()
