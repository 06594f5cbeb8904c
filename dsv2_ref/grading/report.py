"""Judge what a submission returned, and name its mistakes."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dsv2_ref.grading.answers import Answers
from dsv2_ref.grading.part import Part
from dsv2_ref.grading.parts import PARTS
from dsv2_ref.grading.runner import Ran

ROUNDING = 2.0**-32
"""Relative error up to which results are equal in float64. Each rounding is off by 2**-53
at most; sums here have fewer than 2**10 terms, a layer some 2**4 steps one after another,
and a softmax multiplies the error of its scores, which are below 2**6: 2**-33."""

ROUNDING_OF_FLOAT32 = 2.0**-17
"""The same where some step is computed in float32 (2**-24), whose sums are shorter and
whose softmax is flat: it passes too, as published code does so. Every known mistake is
more than 100 times as large in some case."""

LARGEST = 1e300
"""The largest relative error that is told, as JSON has no infinity."""

CHAPTERS = {
    "overview": "The layer at a glance",
    "rmsnorm": "RMSNorm",
    "rope": "Rotary positions",
    "mla": "MLA: what must a layer cache?",
    "decoding": "Decoding from the latent",
    "experts": "Experts and routing",
    "balance": "Keeping experts busy",
    "prenorm": "The pre-norm layer",
    "bits": "Fewer bits",
    "sparse": "Forgetting and choosing",
    "symptoms": "Symptoms",
}
"""Titles of the pages that explain mistakes."""


@dataclass
class Named:
    """A mistake that was recognised: what and how large it is, and where it is explained.

    ``effect`` is the relative error of the result, or for a cost how many times too large
    it is.
    """

    name: str
    effect: float
    case: str
    cost: str
    chapter: str
    section: str
    page: str
    address: str


@dataclass
class Check:
    """One case of the part: its points, and what was wrong."""

    name: str
    points: int
    of: int
    passed: bool
    error: float | None = None
    message: str = ""
    where: str = ""


@dataclass
class Report:
    """How one submission did."""

    part: str
    file: str
    of: int
    checks: list[Check] = field(default_factory=list)
    mistakes: list[Named] = field(default_factory=list)
    problem: str = ""
    where: str = ""
    notes: list[str] = field(default_factory=list)
    printed: str = ""

    @property
    def points(self) -> int:
        """Points of the checks that passed."""
        return sum(check.points for check in self.checks)

    @property
    def passed(self) -> bool:
        """Whether all checks did."""
        return not self.problem and self.points == self.of

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self) | {"points": self.points, "passed": self.passed}


@cache
def expected(part: str, case: int, mistakes: tuple[int, ...] = ()) -> Answers | None:
    """What the reference returns in a case, with mistakes planted; None where they do not
    fit the case or one another."""
    known = PARTS[part]
    planted = [known.mistakes[number] for number in mistakes]
    try:
        return known.reference_answers(known.cases[case], *planted)
    except (RuntimeError, ValueError, AttributeError, TypeError):
        if not mistakes:
            raise
        return None


def distance(made: Answers, right: Answers) -> float:
    """The largest relative error; infinite for other shapes.

    It is that of the elements that are finite in both, if the others are the same ones, or half of all at most: a softmax
    over nothing is NaN to one, 0 to another, and a mean of what was hidden by a large number to a third. Else it is
    infinite.
    """
    found = 0.0
    for name, wanted in right.items():
        one = made.get(name)
        if one is None or one.shape != wanted.shape or one.is_complex():
            return torch.inf
        one, usable = one.to(wanted.dtype), one.isfinite() & wanted.isfinite()
        if not one.isfinite().equal(wanted.isfinite()) and 2 * usable.sum() < usable.numel():
            return torch.inf
        size = wanted[usable].norm().item()
        difference = (one - wanted)[usable].norm().item()
        found = max(found, difference / size if size else difference)
    return found


def misfit(made: object, right: Answers) -> str:
    """Why answers cannot be compared, or an empty string."""
    if not isinstance(made, dict):
        return "it returned nothing that can be compared"
    for name, wanted in right.items():
        one = made.get(name)
        if not isinstance(one, Tensor):
            return f"{name} is missing"
        if one.shape != wanted.shape:
            return f"{name} is {tuple(one.shape)}; wanted {tuple(wanted.shape)}"
        if one.dtype != wanted.dtype:
            return f"{name} is {one.dtype}; wanted {wanted.dtype}, as the input"
        if bad := int((~one.isfinite()).sum()):
            return f"{bad} of {one.numel()} elements of {name} are NaN or infinite"
    return ""


def cost_of(answers: Answers) -> tuple[str, float]:
    """What was measured, and how much of it."""
    ((name, value),) = answers.items()
    return name, value.item()


def judge_case(part: Part, number: int, found: dict[str, Any]) -> Check:
    """One check."""
    case = part.cases[number]
    check = Check(case.name, 0, case.points, False)
    if found.get("error"):
        check.message, check.where = found["error"], found.get("where", "")
        return check
    made, right = found.get("answers"), expected(part.name, number)
    assert right is not None
    if misfitting := misfit(made, right):
        check.message = misfitting
        return check
    assert made is not None
    if case.at_most:
        (name, value), wanted = cost_of(made), cost_of(right)[1]
        check.error = min(value / wanted, LARGEST)
        check.passed = check.error <= case.at_most
        most = f"at most {case.at_most:g} times the reference's {wanted:,.0f}"
        check.message = f"{value:,.0f} {name}; wanted {most}" * (not check.passed)
    else:
        check.error = min(distance(made, right), LARGEST)
        check.passed = check.error <= ROUNDING_OF_FLOAT32
        apart = {name: distance(made, {name: right[name]}) for name in right}
        off = ", ".join(n for n in apart if apart[n] > ROUNDING_OF_FLOAT32)
        check.message = f"{off} {percent(check.error)} off" * (not check.passed)
    check.points = case.points * check.passed
    return check


def percent(error: float) -> str:
    """A relative error in a few digits."""
    return f"{error:.0%}" if 0.1 <= error < 100 else f"{100 * error:.2g}%"


def equals(part: Part, number: int, found: dict[str, Any], mistakes: tuple[int, ...]) -> bool:
    """Whether a submission returned in a case what the reference with mistakes does.

    FLOPs equal those of a mistake from which they differ by a fifth at most: the same
    idea may be written with a few products more. What is kept is told apart from a
    twentieth on, as other things may be kept that are nearly as large.
    """
    made, wrong = found.get("answers"), expected(part.name, number, mistakes)
    if wrong is None or made is None:
        return False
    if part.cases[number].at_most:
        right = expected(part.name, number)
        assert right is not None
        value, known, most = (cost_of(answers)[1] for answers in (made, wrong, right))
        harmless = part.cases[number].at_most * most
        if known <= harmless:
            return value <= harmless
        return abs(value / known - 1) < (0.2 if "FLOPs" in made else 0.05)
    return distance(made, wrong) <= ROUNDING_OF_FLOAT32


def tells(part: Part, number: int, found: dict[str, Any]) -> bool:
    """Whether a case that failed tells of a mistake."""
    made = found.get("answers", {})
    return any(value.isfinite().any() for value in made.values()) and not equals(part, number, found, ())


def recognise(part: Part, ran: Ran, checks: Sequence[Check]) -> Iterator[tuple[int, ...]]:
    """The known mistake, or two of them, that return in every case what the submission did.

    Where there are none, those that do in a case that failed and in all that passed; of those that do in the same cases,
    the first, which claims least. A case says nothing that ended with an error, whose answers have no finite element, or
    whose values are right and have another dtype.
    """
    passed = [n for n, check in enumerate(checks) if check.passed]
    failed = [n for n, check in enumerate(checks) if not check.passed and tells(part, n, ran.cases[n])]
    quick = [n for n in passed if not part.cases[n].at_most]
    every = sorted((*failed, *passed), key=lambda n: part.cases[n].at_most > 0)  # what takes longest, last

    def fit(mistakes: tuple[int, ...], cases: Sequence[int]) -> bool:
        return all(equals(part, n, ran.cases[n], mistakes) for n in cases)

    if not failed:
        return
    possible = [(m,) for m in range(len(part.mistakes)) if fit((m,), quick)]
    pairs = ((*one, *other) for one, other in combinations(possible, 2))
    for mistakes in (*possible, *pairs):
        if fit(mistakes, every):
            yield mistakes
            return
    told: set[tuple[int, ...]] = {()}
    for one in possible:
        alike = tuple(n for n in failed if fit(one, [n]))
        if alike not in told and fit(one, passed):
            told.add(alike)
            yield one


def named(part: Part, number: int, ran: Ran, checks: Sequence[Check]) -> Named:
    """A mistake, with the failed check in which it is largest."""
    mistake = part.mistakes[number]
    failed = [n for n, check in enumerate(checks) if not check.passed]
    alone = [n for n in failed if equals(part, n, ran.cases[n], (number,))]
    worst = max(alone or failed, key=lambda n: checks[n].error or 0.0)
    right, wrong = expected(part.name, worst), expected(part.name, worst, (number,))
    assert right is not None
    cost = cost_of(right)[0] if part.cases[worst].at_most else ""
    effect = checks[worst].error
    if effect is None:  # nothing to compare: as large as where the reference makes it
        effect = torch.inf if wrong is None else distance(wrong, right)
    site = os.environ.get("BOOK_URL", "").rstrip("/")
    address = f"{site}/book/{mistake.chapter}.html" if site else ""
    return Named(
        name=mistake.name,
        effect=min(effect, LARGEST),
        case=checks[worst].name,
        cost=cost,
        chapter=CHAPTERS[mistake.chapter],
        section=mistake.section,
        page=f"book/{mistake.chapter}.ipynb",
        address=address,
    )


def judge(part: Part, file: str, ran: Ran) -> Report:
    """The report on a run."""
    report = Report(part.name, file, part.points, notes=ran.notes, printed=ran.printed)
    if ran.problem:
        report.problem, report.where = ran.problem, ran.where
        return report
    report.checks = [judge_case(part, number, found) for number, found in enumerate(ran.cases)]
    if report.points < report.of:
        known = {number for found in recognise(part, ran, report.checks) for number in found}
        report.mistakes += [named(part, n, ran, report.checks) for n in sorted(known)]
    for missing in sorted({str(case.get("absent") or "") for case in ran.cases} - {""}):
        report.notes.append(f"it has no weights with the names {missing}")
    results = [check for case, check in zip(part.cases, report.checks, strict=True) if not case.at_most]
    if report.passed and any((check.error or 0) > ROUNDING for check in results):
        report.notes.append("some step is computed in float32, though its input is float64")
    return report
