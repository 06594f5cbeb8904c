"""Run submissions on the cases of their parts: the program of the process that
`dsv2_ref.grading.runner` starts. It writes what a submission returned, judges nothing,
and knows no right answer.

It reads jobs from its input, a line of JSON each, and writes a line with the exit status
of each. Every job runs in a process of its own: a fork of this one, which has imported
torch already. Where a system has no fork, this process runs one job and ends.
"""

import errno
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dsv2_ref import ops
from dsv2_ref.grading.answers import Values, WrongError, unusable
from dsv2_ref.grading.guard import CLOSED, BorrowedError, ReadingError, guard, keep_closed, restore, settings, sources
from dsv2_ref.grading.part import Case, Part, absent
from dsv2_ref.grading.parts import PARTS

if sys.platform != "win32":
    import resource

LONGEST = 500
"""Characters of an error message that are kept."""
LARGEST_FILE = 2**26
"""Bytes that a submission may print, or write in one file."""
GRACE = 60
"""Seconds beyond its limit after which a process that has not ended itself is ended from outside."""


def limit(seconds: int, megabytes: int) -> None:
    """End this process after so many seconds, and let it take so much more memory."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)
    if sys.platform == "win32":
        return
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + seconds + 1, int(used) + seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    status = Path("/proc/self/statm")
    if status.exists():  # elsewhere nobody says what this process has taken already
        taken = int(status.read_text().split()[0]) * resource.getpagesize()
        most = taken + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def imported(part: Part, path: Path) -> ModuleType:
    """The submission's module, with the names that the part asks for."""
    sys.path.append(str(path.parent))  # last, so that no file there hides a module
    loader = SourceFileLoader("submission", str(path))
    spec = importlib.util.spec_from_loader("submission", loader)
    if spec is None:
        raise WrongError("it cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules["submission"] = module
    loader.exec_module(module)
    for name in part.defines:
        made = getattr(module, name, None)
        if made is None:
            raise WrongError(f"it defines no {name}")
        if part.is_class and not isinstance(made, type):
            raise WrongError(f"{name} is a {type(made).__name__}; wanted a class")
        if not callable(made):
            raise WrongError(f"{name} is a {type(made).__name__}; wanted a function")
        home = str(getattr(made, "__module__", ""))
        if home.split(".")[0] == "dsv2_ref":
            raise BorrowedError(f"{name} is that of {home}; wanted code of your own")
    return module


def told(error: BaseException, path: Path) -> dict[str, str]:
    """An error in one line, and where in the submission it arose."""
    try:
        text = in_a_line(error)
    except Exception:
        text = "(its message cannot be printed)"
    said = ": ".join(filter(None, (in_a_line(type(error).__name__), text)))
    frames = [
        f"line {frame.lineno}, in {in_a_line(frame.name)}: {in_a_line(frame.line or '')}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    where = "\n".join(frames[-3:])
    if isinstance(error, WrongError | ReadingError):
        return {"error": text, "where": where}
    if isinstance(error, NotImplementedError):
        return {"error": f"not written yet: {text}" if text else "not written yet", "where": ""}
    if isinstance(error, SystemExit):
        return {"error": f"it calls sys.exit({text})", "where": where}
    if isinstance(error, SyntaxError) and error.filename == str(path):
        said = ": ".join((type(error).__name__, in_a_line(error.msg)))
        line = f"line {error.lineno}: {in_a_line(error.text)}" if error.text else ""
        return {"error": said, "where": line}
    if isinstance(error, MemoryError):
        return {"error": f"it takes more memory than it may ({said})", "where": where}
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        most = f"it prints or writes more than {LARGEST_FILE >> 20} MB"
        return {"error": most, "where": "\n".join(frames[-1:])}
    return {"error": said, "where": where}


def in_a_line(text: object) -> str:
    """The beginning of a text without line ends, and with nothing that a report cannot hold."""
    return " ".join(str(text).split())[:LONGEST].encode("utf-8", "replace").decode()


def usable(name: str, value: Values) -> Values:
    """A result as a plain tensor of its own."""
    if why := unusable(value):
        raise WrongError(f"{name} is {why}")
    return value.detach().as_subclass(torch.Tensor).to("cpu").clone()


def answer(part: Part, made: Any, case: Case, given: tuple[Any, Any, Any]) -> dict[str, Any]:
    """What a submission returns in one case; given are the weights and the inputs, twice.

    Raises:
        WrongError: for what cannot be graded, and whatever the submission raises.
    """
    state, inputs, untouched = given
    torch.manual_seed(0)
    subject = part.subject(made, case, state)
    missing = absent(subject, state) if part.is_class else ""
    with torch.no_grad(), ops.plain():
        answers = part.answer(subject, inputs)
    for name, value in untouched.items():
        if isinstance(value, torch.Tensor) and not value.equal(inputs[name]):
            raise WrongError(f"it changes {name} in place; wanted it untouched")
    return {"absent": missing, "answers": {name: usable(name, value) for name, value in answers.items()}}


def work(job: dict[str, Any]) -> None:
    """Write ``import.pt`` and, if that went well, ``0.pt``, ``1.pt``, …, and end."""
    part, path, folder = PARTS[job["part"]], Path(job["file"]), Path(job["folder"])
    save, rename, leave, whoami, own = torch.save, os.replace, os._exit, os.getpid, os.getpid()
    cases = part.cases
    given = [(part.state(case), case.inputs(), case.inputs()) for case in cases]
    usual = settings()
    guard(part)
    sys.addaudithook(keep_closed)
    # So that tables that a submission makes without naming a dtype are in float64.
    torch.set_default_dtype(torch.float64)
    limit(job["seconds"], job["megabytes"])
    before, notes, closed = settings(), set(), sources(part) - {os.path.realpath(path)}

    def attempt(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a run gives or why it does not, in a file that is there only when it is whole."""
        try:
            CLOSED.update(closed)
            try:
                found = run()
            finally:
                CLOSED.clear()
                if changed := restore(before, usual):
                    notes.add(changed)
        except BaseException as error:
            found = told(error, path)
        if whoami() != own:
            leave(0)  # a fork that the submission has made
        shown = {key: value for key, value in found.items() if key != "module"}
        save({**shown, "notes": sorted(notes)}, folder / "unfinished")
        rename(folder / "unfinished", folder / name)
        return found

    loaded = attempt("import.pt", lambda: {"error": "", "module": imported(part, path)})
    for number, case in enumerate(cases if not loaded["error"] else ()):
        attempt(f"{number}.pt", partial(answer, part, loaded["module"], case, given[number]))
    with suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    leave(0)


def alone(job: dict[str, Any]) -> None:
    """Work with nothing to read, what is printed in a file, and in a folder to spoil."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(Path(job["folder"]) / "printed", os.O_CREAT | os.O_WRONLY, 0o600)
    for descriptor, place in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(descriptor, place)
    room = Path(job["folder"]) / "room"
    room.mkdir()
    os.chdir(room)
    work(job)


def in_a_fork(job: dict[str, Any]) -> int:
    """The exit status of a process that works; a negative one is that of a signal."""
    process = os.fork()
    if process == 0:
        os.setsid()
        try:
            alone(job)
        finally:
            os._exit(70)
    deadline = time.monotonic() + job["seconds"] + GRACE
    while (ended := os.waitpid(process, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
        time.sleep(0.005)
    with suppress(OSError):
        os.killpg(process, signal.SIGKILL)  # what it has started
    return os.waitstatus_to_exitcode(ended[1])


def main() -> None:
    """Do jobs until there are no more."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        if not hasattr(os, "fork"):
            alone(job)
        if any(case.at_most for case in PARTS[job["part"]].cases):
            import_module("torch._dynamo")  # as each fork would, to count operations
        print(in_a_fork(job), flush=True)


if __name__ == "__main__":
    main()
