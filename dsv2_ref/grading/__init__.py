"""Grade a submission: run it in a process of its own, compare it with the reference in
float64, and name the mistakes that are known.

    >>> from dsv2_ref.grading import PARTS, grade
    >>> report = grade("rmsnorm", "student.py")
    >>> report.points, report.of, [mistake.name for mistake in report.mistakes]
"""

from pathlib import Path

from dsv2_ref.checks import require
from dsv2_ref.grading.parts import PARTS
from dsv2_ref.grading.report import Report, judge
from dsv2_ref.grading.runner import MEGABYTES, SECONDS, check_limits, run

__all__ = ["PARTS", "Report", "grade"]


def grade(part: str, file: str | Path, seconds: int = SECONDS, megabytes: int = MEGABYTES) -> Report:
    """The report on a file that defines the class or the functions of a part.

    Args:
        part: a name of ``PARTS``.
        file: a Python file.
        seconds: after which it is ended.
        megabytes: of memory that it may take beyond those of torch.

    Raises:
        ValueError: for a part that is not known, a file that is none, and limits out of range.
    """
    require(part in PARTS, "part", part, f"one of {', '.join(PARTS)}")
    readable = Path(file).is_file() and Path(file).suffix != ".ipynb"
    wanted = "a Python file (Jupyter exports a notebook as one)"
    require(readable, "file", str(file), wanted)
    check_limits(seconds, megabytes)
    return judge(PARTS[part], str(file), run(PARTS[part], Path(file), seconds, megabytes))
