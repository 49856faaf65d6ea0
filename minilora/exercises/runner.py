"""Has students' code checked, with limits on time, memory and output, and hears what becomes of it.

    this process          child.py                    student.py
    starts, waits   <-    draws, calls, compares  ->  computes with the student's functions, and answers

Whatever the code does, there is an answer: an endless loop is stopped, a process that ends early is noticed, and what
was still to come goes on in a new one. What holds is judged in the middle, where no code of the student's runs. So
these earn nothing: other functions in the place of `expect`, `torch.equal` or anything else; looking for the checker
among frames and objects; writing verdicts into pipes; ending the process; leaving processes behind; making arguments
into what results would fit.

It is no prison. The code runs with the rights of who starts it: it can read the package, solutions included (in a hand-
out there are none), and write over any file that you can, this package's too. The few properties that measure memory or
multiplications (`inside`, seven, in exercises 02, 11, 14 and 18) run in the student's own process and can be faked
there. And outside of Linux a process may open its neighbours' pipes. Grade strangers' code in a container.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from minilora.exercises.processes import Forked, can_fork, keep_to_ourselves

START = 120  # seconds that Python and torch may take to load
LIMIT = 5  # seconds of computing for one property
WALL = 5  # times as many seconds by the clock, for code that waits, and for machines that are busy
ENDS = 2  # times that an exercise may end the process before the rest of it is given up
LINE = 2**22  # bytes of one line of the process that checks
ASKED = 5  # seconds in which it must end when it is asked to
PRINTED = 2000  # characters of its output that are kept


@dataclass
class Result:
    """How one exercise went. statements: all its properties. outcomes: {} for one that holds, else what is wrong
    ("message", "case", "slip", "seed"); what went wrong before any property ran is there under a name of its own."""

    number: int
    statements: list[str]
    attempted: bool = True
    outcomes: dict[str, dict] = field(default_factory=dict)

    @property
    def passed(self) -> int:
        return sum(self.outcomes.get(statement) == {} for statement in self.statements)

    @property
    def right(self) -> bool:
        return self.passed == len(self.statements)


def run(
    folder: Path,
    numbers: list[int],
    seeds: list[int],
    private: Path | None = None,
    limit: float = LIMIT,
    stop: bool = False,
    fork: bool = False,
) -> tuple[dict[int, Result], str]:
    """Checks the exercises of one folder in order: results by number, and what the code printed, in short.

    limit: seconds of computing for each property and seed. stop: code that takes longer ends the check of its exercise.
    fork: the process that judges may be a fork of this one, which spares it the start of torch; for a caller whose
    package is as it was imported. Raises OSError if no process can be started.
    """
    results: dict[int, Result] = {}
    ends: list[int] = []  # the exercises that ended a process, as often as they did
    printed = ""
    left = list(numbers)
    while left:
        job = {"folder": str(folder.resolve()), "exercises": left, "seeds": seeds, "limit": limit}
        job |= {"private": str(private.resolve()) if private else None, "done": [], "stop": stop}
        if left[0] in results:  # it ended the last process; its other properties are still to come
            job["done"] = list(results[left[0]].outcomes)
        ended, text = run_process(job, results, fork)
        printed += text
        if ended is None:
            break
        if ended not in results:
            raise OSError(too_small() or f"the process that checks {folder} ended before it began:\n{text[-PRINTED:]}")
        ends.append(ended)
        left = left[left.index(ended) :]
        before_any = not results[ended].outcomes.keys() & set(results[ended].statements)
        if before_any or ends.count(ended) == ENDS or len(results[ended].outcomes) == len(results[ended].statements):
            left = left[1:]
    return results, printed[:PRINTED]


def too_small() -> str:
    """A sentence on the limit on memory under which we were started; "" where there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    unlimited = limit == resource.RLIM_INFINITY
    return "" if unlimited else f"the limit on memory (ulimit -v), {limit // 2**20} MB, is too small to check anything"


def run_process(job: dict, results: dict[int, Result], fork: bool) -> tuple[int | None, str]:
    """One process. Fills `results`; returns the exercise that ended it, if one did, and what was printed."""
    keep_to_ourselves()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = Forked(output) if fork and can_fork() else start_python(output)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it could not even begin; what it printed says why
                process.stdin.write(
                    json.dumps(job).encode() + b"\n"
                )  # stays open: so the child knows that we are alive
                process.stdin.flush()
            ended = follow(process, job, results)
        finally:
            stop_process(process)
        output.seek(0)
        return ended, output.read(PRINTED)


def start_python(output: IO[str]) -> subprocess.Popen:
    # Python finds the package where this one was found, whatever folder the user stands in.
    here = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONHASHSEED": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "minilora.exercises.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=output,
        env=environment,
        start_new_session=os.name == "posix",
    )


def follow(process: subprocess.Popen | Forked, job: dict, results: dict[int, Result]) -> int | None:
    """Hears the process out, until it has done all, ends, or is silent for too long: the exercise at which it did."""
    lines: queue.Queue = queue.Queue(100)

    def listen():
        while line := process.stdout.readline(LINE):
            lines.put(line)
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    number, statement, patience = job["exercises"][0], "the file can be used", START
    while True:
        try:
            said = read_line(lines.get(timeout=patience))
            fault = "the process that checks your code came to an end"
        except queue.Empty:
            said, fault = None, f"stopped after {patience:g} seconds: it waits, or is far too slow"
        if said is None:
            if number in results:
                results[number].outcomes[statement] = {"message": fault}
            return number
        patience = START + WALL * job["limit"] * len(job["seeds"])
        if "begin" in said:
            number, statement = said["begin"], "the file can be used"
            results.setdefault(number, Result(number, said["statements"]))
        if "attempted" in said:
            results[number].attempted = said["attempted"]
        statement = said.get("property", statement)
        if "outcome" in said:
            results[number].outcomes[statement] = said["outcome"]
        if said.get("end") == job["exercises"][-1]:
            return None


def read_line(line: bytes | None) -> dict | None:
    """What the process said; None at its end, and for what it cannot have said."""
    try:
        said = json.loads(line or b"null")
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def stop_process(process: subprocess.Popen | Forked):
    """Ends the process and whatever the student's code has started: it is asked first, for it knows them."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(ASKED)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
        process.wait()
    process.stdout.close()
