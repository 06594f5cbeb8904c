"""Run a submission in a process of its own, within limits of time and memory, and read
what it returned.

That is protection against accidents, not against attacks: the process has the rights of
who grades. Grade strangers' code in a container.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsv2_ref.checks import require
from dsv2_ref.grading.answers import unusable
from dsv2_ref.grading.part import Part

SECONDS, MEGABYTES = 60, 2048
"""What a submission may take, unless somebody asks for more."""
PRINTED = 2000
"""Characters of a submission's output that are kept."""


@dataclass
class Ran:
    """What is left of a run.

    Attributes:
        problem: why the file could not be run at all; empty if it could.
        where: lines of the submission in which that arose.
        cases: for each case its answers, or an error.
        printed: what the submission printed, cut.
        notes: what it changed that stays changed for other code.
    """

    problem: str = ""
    where: str = ""
    cases: list[dict[str, Any]] = field(default_factory=list)
    printed: str = ""
    notes: list[str] = field(default_factory=list)


_lock = threading.Lock()
_server: "subprocess.Popen[str] | None" = None


def serve() -> "subprocess.Popen[str]":
    """The process that runs submissions, started where there is none."""
    global _server
    if _server is None or _server.poll() is not None:
        stop()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONIOENCODING": "utf-8:backslashreplace",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        _server = subprocess.Popen(
            [sys.executable, "-P", "-m", "dsv2_ref.grading.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
    return _server


@atexit.register
def stop() -> None:
    """End the process that runs submissions, if there is one; the next run starts another."""
    if _server is not None:
        for stream in (_server.stdin, _server.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        _server.wait()


def check_limits(seconds: int, megabytes: int) -> None:
    """Reject limits out of range."""
    require(1 <= seconds <= 86400, "seconds", seconds, "1 or more, and at most those of a day")
    require(1 <= megabytes <= 2**20, "megabytes", megabytes, "1 or more, and at most a terabyte's 1048576")


def hand_over(job: str) -> Any:
    """The process that has got a job: another one where what ran before has ended the first."""
    for _ in range(2):
        server: Any = serve()
        with suppress(BrokenPipeError):
            server.stdin.write(f"{job}\n")
            server.stdin.flush()
            break
        server.wait()
    return server


def run(part: Part, path: Path, seconds: int = SECONDS, megabytes: int = MEGABYTES) -> Ran:
    """Run the file on all cases of a part."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _lock:
        limits = {"seconds": seconds, "megabytes": megabytes}
        job = {"part": part.name, "file": str(path.resolve()), "folder": folder}
        server = hand_over(json.dumps(job | limits))
        status = server.stdout.readline()  # nothing where it had to end with its job
        ended = how_it_ended(int(status) if status else server.wait(), seconds)
        printed = head(Path(folder) / "printed")
        loaded = read(Path(folder) / "import.pt") or {"error": ended, "where": ""}
        if loaded.get("error"):
            return Ran(loaded["error"], loaded.get("where", ""), [], printed)
        cases = [read(Path(folder) / f"{n}.pt") for n in range(len(part.cases))]
        notes = sorted({note for found in (loaded, *cases) for note in (found or {}).get("notes", ())})
        return Ran(cases=[case or {"error": ended} for case in cases], printed=printed, notes=notes)


def head(path: Path) -> str:
    """The first of what was printed."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        text = file.read(PRINTED).decode(errors="replace").strip()
    more = path.stat().st_size - PRINTED
    return f"{text}\n... and {more:,} bytes more" if more > 0 else text


def how_it_ended(code: int, seconds: int) -> str:
    """Why there is no answer, from the exit status of the process."""
    known = {int(one): one.name for one in signal.Signals}
    name = known.get(-code, f"signal {-code}") if code < 0 else ""
    if name in ("SIGALRM", "SIGXCPU"):
        return f"it was ended after the limit of {seconds} seconds"
    if name == "SIGKILL":
        return "it was killed: it took too long, or more memory than there is"
    if name:
        return f"it crashed: its process ended with {name}"
    return f"its process ended with exit status {code} before it had answered"


def read(path: Path) -> dict[str, Any] | None:
    """What the process wrote; None where it did not, or not to the end, or where the submission wrote something else."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        found = torch.load(path, weights_only=True)
    except Exception:
        return None
    return found if is_whole(found) else None


def is_whole(found: Any) -> bool:
    """Whether that is what the process writes: texts, and tensors that can be compared."""
    if not isinstance(found, dict) or not ("error" in found or "answers" in found):
        return False
    notes, answers = found.get("notes", []), found.get("answers", {})
    if not isinstance(notes, list) or not isinstance(answers, dict):
        return False
    texts = [*(found.get(name, "") for name in ("error", "where", "absent")), *notes, *answers]
    return all(isinstance(text, str) for text in texts) and all(
        isinstance(one, torch.Tensor) and one.device.type == "cpu" and not unusable(one) for one in answers.values()
    )
