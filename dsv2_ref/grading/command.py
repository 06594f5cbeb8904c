"""``python -m dsv2_ref grade``: one submission, or a folder of them."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from dsv2_ref.checks import require
from dsv2_ref.grading import PARTS, grade
from dsv2_ref.grading.formats import as_csv, as_gradescope, as_json, as_junit, as_text


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("part", nargs="?", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("file", nargs="?", metavar="FILE", help="what a student wrote")
    option = parser.add_argument
    option(
        "--all", metavar="FOLDER", help="every file below it that a part's name ends"
    )
    option("--csv", action="store_true", help="with --all: print a line per submission")
    option("--json", action="store_true", help="print JSON")
    option("--junit", metavar="FILE", help="also write JUnit's XML")
    option("--gradescope", metavar="FILE", help="also write Gradescope's results.json")
    option("--seconds", type=int, default=60, help="for each submission (60)")
    option("--megabytes", type=int, default=2048, help="of memory for each (2048)")


def run(args: argparse.Namespace) -> tuple[str, int]:
    """What to print, and the exit status: 0 if all passed, else 1."""
    if args.part is not None and args.part not in PARTS:
        require(False, "PART", args.part, f"one of {', '.join(PARTS)}")
    if args.all is None:
        given = args.part is not None and args.file is not None
        require(given, "the command", "without PART and FILE", "both, or --all FOLDER")
        require(not args.csv, "--csv", args.csv, "--all FOLDER beside it")
        rows = [("", args.part, Path(args.file))]
    else:
        require(args.file is None, "FILE", args.file, "none with --all FOLDER")
        require(args.gradescope is None, "--gradescope", args.gradescope, "one FILE")
        rows = list(submissions(Path(args.all), args.part))
        wanted = "a folder with files such as NAME/rmsnorm.py or NAME_rmsnorm.py"
        require(bool(rows), "--all", args.all, wanted)

    limits = args.seconds, args.megabytes
    reports = [grade(part, path, *limits) for _, part, path in rows]
    students = [student for student, _, _ in rows]
    if args.junit is not None:
        Path(args.junit).write_text(as_junit(reports), encoding="utf-8")
    if args.gradescope is not None:
        Path(args.gradescope).write_text(as_gradescope(reports[0]), encoding="utf-8")
    if args.json:
        text = as_json(reports)
    elif args.csv:
        text = as_csv(list(zip(students, reports, strict=True))).rstrip("\n")
    else:
        text = "\n\n".join(as_text(report) for report in reports)
    return text, 0 if all(report.passed for report in reports) else 1


def submissions(folder: Path, part: str | None) -> Iterator[tuple[str, str, Path]]:
    """Student, part and file of each submission below a folder.

    A part's name ends the name of its file: ``alice/rmsnorm.py``, or
    ``alice_123_rmsnorm.py`` as course systems name what they download. With a part
    given, all Python files are of it.
    """
    require(folder.is_dir(), "--all", str(folder), "a folder")
    for path in sorted(folder.rglob("*.py")):
        ending = re.search(rf"(?:^|[_\W])({'|'.join(PARTS)})$", path.stem)
        found = part or (ending[1] if ending else None)
        if found is None or any(name.startswith(".") for name in path.parts[-3:]):
            continue
        begin = path.stem.removesuffix(found).rstrip("_- .")
        parent = path.parent.relative_to(folder).as_posix()
        student = "/".join(name for name in (parent, begin) if name not in ("", "."))
        yield student or path.stem, found, path
