"""``python -m dsv2_ref grade``: one submission, or a folder of them."""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from dsv2_ref.checks import require
from dsv2_ref.grading import PARTS, Report, grade
from dsv2_ref.grading.formats import as_csv, as_gradescope, as_json, as_junit, as_text, plain
from dsv2_ref.grading.runner import MEGABYTES, SECONDS, check_limits


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("part", nargs="?", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("file", nargs="?", metavar="FILE", help="what a student wrote")
    option = parser.add_argument
    option("--all", metavar="FOLDER", help="every file below it that a part's name ends")
    option("--csv", action="store_true", help="with --all: print a line per submission")
    option("--json", action="store_true", help="print JSON")
    option("--junit", metavar="FILE", help="also write JUnit's XML")
    option("--gradescope", metavar="FILE", help="also write Gradescope's results.json")
    option("--seconds", type=int, default=SECONDS, help=f"for each submission ({SECONDS})")
    option("--megabytes", type=int, default=MEGABYTES, help=f"of memory for each ({MEGABYTES})")


def run(args: argparse.Namespace) -> tuple[str, int]:
    """What to print, and the exit status: 0 if all passed, else 1."""
    if args.part is not None and args.part not in PARTS:
        require(False, "PART", args.part, f"one of {', '.join(PARTS)}")
    require(not (args.csv and args.json), "--csv", args.csv, "that or --json")
    if args.all is None:
        given = args.part is not None and args.file is not None
        require(given, "the command", "without PART and FILE", "both, or --all FOLDER")
        require(not args.csv, "--csv", args.csv, "--all FOLDER beside it")
        rows = [("", args.part, Path(args.file))]
    else:
        require(args.file is None, "FILE", args.file, "none with --all FOLDER")
        require(bool(args.all), "--all", args.all, "a folder")  # Path("") would be the one where this runs
        require(args.gradescope is None, "--gradescope", args.gradescope, "one FILE")
        rows = list(submissions(Path(args.all), args.part))
        wanted = "a folder with files such as NAME/rmsnorm.py or NAME_rmsnorm.py"
        require(bool(rows), "--all", args.all, wanted)
        for path in sorted(left_out(Path(args.all), {path for _, _, path in rows})):
            print(f"not graded, as it is no Python file named after a part: {plain(str(path))}", file=sys.stderr)
    check_limits(args.seconds, args.megabytes)
    written = [name for name in (args.junit, args.gradescope) if name is not None]
    for name in written:  # before anything is graded: what cannot be written must not cost the grades
        Path(name).open("a").close()

    torch.set_num_threads(1)  # all sizes are small
    # One file that cannot be read must not cost the others their grades, nor a student on Gradescope the report.
    alone = args.all is None and args.gradescope is None
    reports = [graded(part, path, args.seconds, args.megabytes, alone) for _, part, path in rows]
    students = [student for student, _, _ in rows]
    if args.junit is not None:
        Path(args.junit).write_text(as_junit(reports), encoding="utf-8")
    if args.gradescope is not None:
        Path(args.gradescope).write_text(as_gradescope(reports[0]), encoding="utf-8")
    if args.json:
        text = as_json(reports[0] if args.all is None else reports)
    elif args.csv:
        text = as_csv(list(zip(students, reports, strict=True))).rstrip("\n")
    else:
        text = "\n\n".join(as_text(report) for report in reports)
    return text, 0 if all(report.passed for report in reports) else 1


def graded(part: str, path: Path, seconds: int, megabytes: int, alone: bool) -> Report:
    """The report on a file, also on one that cannot be read; alone, such a one is an error of who calls."""
    try:
        return grade(part, path, seconds, megabytes)
    except (ValueError, OSError) as error:
        if alone:
            raise
        return Report(part, str(path), PARTS[part].points, problem=" ".join(str(error).split()))


def submissions(folder: Path, part: str | None) -> Iterator[tuple[str, str, Path]]:
    """Student, part and file of each submission below a folder.

    A part's name ends the name of its file: ``alice/rmsnorm.py``, or ``alice_123_rmsnorm-1.py`` as course systems name
    what they download, with a number where a file was handed in again. With a part given, all Python files are of it.
    """
    for path in files_below(folder):
        if path.suffix.lower() != ".py" or path.is_dir():
            continue
        ending = re.search(rf"(?:^|[_\W])({'|'.join(PARTS)})(?:[-_ ]*\(?\d+\)?)?$", path.stem, re.IGNORECASE)
        found = part or (ending[1].lower() if ending else None)
        if found is None:
            continue
        own = ending is not None and ending[1].lower() == found
        begin = path.stem[: ending.start(1)].rstrip("_- .") if ending and own else path.stem
        parent = path.parent.relative_to(folder).as_posix()
        student = "/".join(name for name in (parent, begin) if name not in ("", "."))
        yield student or path.stem, found, path


def files_below(folder: Path) -> Iterator[Path]:
    """Files below a folder, and links to folders, but for hidden ones and those that Python made or that belong to
    installed packages."""
    require(folder.is_dir(), "--all", str(folder), "a folder")
    for path in sorted(folder.rglob("*")):
        names = path.relative_to(folder).parts
        if (path.is_symlink() or not path.is_dir()) and not any(
            name.startswith(".") or name in ("site-packages", "__pycache__") for name in names
        ):
            yield path


def left_out(folder: Path, taken: set[Path]) -> Iterator[Path]:
    """Files that may be meant as submissions: Python's, others that are named after a part, and links to folders, which
    may lead anywhere and are not followed."""
    for path in files_below(folder):
        named = any(part in path.stem.lower() for part in PARTS)
        kind = path.suffix.lower()  # pages of the assignments, which some hand in too, are no submissions
        if path not in taken and (path.is_dir() or kind == ".py" or (named and kind != ".md")):
            yield path
