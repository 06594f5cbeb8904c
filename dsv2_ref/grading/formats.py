"""Reports on submissions, written for people and for programs."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dsv2_ref.grading.report import LARGEST, Check, Named, Report, percent


def as_text(report: Report) -> str:
    """A short report."""
    done = "passed" if report.passed else "not passed"
    points = f"{report.points} of {report.of} points, {done}"
    lines = [f"{report.part}: {' '.join(report.file.splitlines())}: {points}"]
    if report.problem:
        lines += ["", *indented(report.problem), *indented(report.where, 4)]
    lines += [""] * bool(report.checks)
    before = ""
    for check in report.checks:
        mark = "ok  " if check.passed else "FAIL"
        same = check.message == before != ""
        said = ": the same" if same else f": {check.message}" * bool(check.message)
        lines.append(f"  {mark}  {check.points:2}/{check.of:<2} {check.name}{said}")
        lines += indented(check.where, 12) if not same else []
        before = check.message
    for mistake in report.mistakes:
        lines += ["", f"  Known mistake: {mistake.name}.", *indented(said_of(mistake), 4)]
    lines += [""] * bool(report.notes)
    lines += [f"  Note: {note}." for note in report.notes]
    if report.printed:
        lines += ["", "  It printed:", *indented(report.printed, 4)]
    return plain("\n".join(lines))


def said_of(mistake: Named) -> str:
    """Effect and place of a mistake."""
    size = f"{percent(mistake.effect)} off" if mistake.effect < LARGEST else "no result that could be used"
    size = f"{mistake.effect:.2g} times the {mistake.cost} of the reference" if mistake.cost else size
    where = mistake.address or mistake.page
    effect = f'Its effect here: {size} in "{mistake.case}".'
    return f'{effect}\nExplained in: {mistake.chapter}, "{mistake.section}" ({where})'


def indented(text: str, by: int = 2) -> list[str]:
    """The lines of a text, further to the right."""
    return [" " * by + line for line in text.splitlines()]


# For programs


def as_json(reports: Report | Sequence[Report]) -> str:
    """One report as an object, a sequence of them as an array."""
    found: Any = reports.to_dict() if isinstance(reports, Report) else [report.to_dict() for report in reports]
    return json.dumps(found, indent=2, allow_nan=False)


def as_junit(reports: Sequence[Report]) -> str:
    """JUnit's XML: a suite for each submission, a test case for each check; a failure for
    what is wrong, an error where nothing could be run."""
    root = ElementTree.Element("testsuites")
    for report in reports:
        checks = report.checks or [Check("import", 0, report.of, False)]
        failed = sum(not check.passed for check in report.checks)
        numbers = {"tests": len(checks), "failures": failed, "skipped": 0}
        numbers["errors"] = int(bool(report.problem))
        attributes = {name: str(count) for name, count in numbers.items()}
        name = f"{report.part}: {report.file}"
        suite = ElementTree.SubElement(root, "testsuite", {"name": plain(name), **attributes})
        for check in checks:
            about = {"classname": f"grade.{report.part}", "name": check.name}
            case = ElementTree.SubElement(suite, "testcase", about)
            if not check.passed:
                kind = "error" if report.problem else "failure"
                message = plain(report.problem or check.message)
                told = ElementTree.SubElement(case, kind, {"message": message})
                told.text = plain(as_text(report))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def plain(text: str) -> str:
    """Without characters that XML cannot hold, or that move a terminal's cursor."""
    return "".join(c if c.isprintable() or c in "\n\t\xa0" else "?" for c in text)


def as_gradescope(report: Report) -> str:
    """The ``results.json`` of an autograder on Gradescope.

    Source: Gradescope's autograder specifications, "Output format".
    """
    text = as_text(report)
    tests: list[dict[str, Any]] = [
        {
            "name": check.name,
            "score": check.points,
            "max_score": check.of,
            "status": "passed" if check.passed else "failed",
            "output": "\n".join(filter(None, [check.message, check.where])),
            "output_format": "text",
        }
        for check in report.checks
    ]
    case = {"name": report.part, "score": 0, "max_score": report.of, "status": "failed"}
    tests = tests or [
        case | {"output": "\n".join(filter(None, [report.problem, report.where])), "output_format": "text"}
    ]
    whole = {"score": report.points, "output": text, "output_format": "text"}
    return json.dumps({**whole, "visibility": "visible", "tests": tests}, indent=2)


def as_csv(rows: Sequence[tuple[str, Report]]) -> str:
    """A line for each submission of each student."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    names = ("student", "part", "file", "points", "of", "passed", "mistakes", "problem")
    writer.writerow(names)
    for student, report in rows:
        mistakes = "; ".join(mistake.name for mistake in report.mistakes)
        wrong = next((check.message for check in report.checks if not check.passed), "")
        points = report.points, report.of, "yes" if report.passed else "no"
        row = (student, report.part, Path(report.file).name, *points)
        cells = (*row, mistakes, report.problem or wrong)
        writer.writerow([cell_of(cell) for cell in cells])
    return written.getvalue()


def cell_of(value: Any) -> Any:
    """A cell in one line, that no spreadsheet takes for a formula.

    Source: OWASP, "CSV Injection".
    """
    if not isinstance(value, str):
        return value
    text = plain(" ".join(value.split()))
    return f"'{text}" if text[:1] in tuple("=+-@＝＋－＠") else text
