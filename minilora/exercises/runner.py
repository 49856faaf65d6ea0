"""Runs students' code in a process of its own, with limits on time, memory and output, and hears what becomes of it.

Whatever the code does, there is an answer: an endless loop is stopped, a process that ends early is noticed, and the
exercises that were still to come go on in a new one. It is a fence against accidents and not against malice: the code
runs with the rights of who starts it. Grade strangers' code in a container.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

START = 120  # seconds that Python and torch may take to load
LIMIT = 30  # seconds for all properties of one exercise
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
    folder: Path, numbers: list[int], seeds: list[int], private: Path | None = None, limit: float = LIMIT
) -> tuple[dict[int, Result], str]:
    """Checks the exercises of one folder in order: results by number, and what the code printed, in short."""
    results: dict[int, Result] = {}
    printed = ""
    while left := [number for number in numbers if number not in results]:
        results_before = len(results)
        printed += run_process(folder, left, seeds, private, limit, results)
        if len(results) == results_before:
            raise RuntimeError(f"the process that checks {folder} ended before it began:\n{printed[-PRINTED:]}")
    return results, printed[:PRINTED]


def run_process(folder, numbers, seeds, private, limit, results: dict[int, Result]) -> str:
    """One process, up to the first exercise that ends it. Fills `results`; returns what was printed."""
    job = {"folder": str(folder.resolve()), "exercises": numbers, "seeds": seeds}
    job["private"] = str(private.resolve()) if private else None
    # Python finds the package where this one was found, whatever folder the user stands in.
    here = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "minilora.exercises.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=environment,
            start_new_session=os.name == "posix",
            encoding="utf-8",
        )
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            follow(process, limit, results)
        finally:
            stop(process)
        output.seek(0)
        return output.read(PRINTED)


def follow(process: subprocess.Popen, limit: float, results: dict[int, Result]):
    """Hears the process out, until it ends or has been silent on one exercise for too long."""
    lines: queue.Queue = queue.Queue()

    def listen():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    current, statement, deadline = None, "the file can be used", time.monotonic() + START
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            fault = "" if line else "your code ended the process: it exited, crashed, or took too much memory"
        except queue.Empty:
            line, fault = None, f"stopped after {limit:g} seconds: a loop without an end, or far too slow"
        if line is None:
            if current is not None:
                current.outcomes[statement] = {"message": fault, "case": "", "slip": ""}
            return
        said = json.loads(line)
        if "begin" in said:
            current = results[said["begin"]] = Result(said["begin"], said["statements"])
            statement, deadline = "the file can be used", time.monotonic() + limit
        if "attempted" in said:
            current.attempted = said["attempted"]
        statement = said.get("property", statement)
        if "outcome" in said:
            current.outcomes[statement] = said["outcome"]
        if "end" in said:
            current = None


def stop(process: subprocess.Popen):
    """Ends the process, and on POSIX whatever it has started."""
    try:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    process.stdout.close()
