"""The process in which a student's code runs: `python -m minilora.exercises.child`, started by `runner.py` alone.

It reads a job from standard input, JSON, and answers on standard output, a line of JSON for each thing that happens,
so that what is known is known even if the code kills the process. What the code itself prints goes to standard error.
"""

import json
import os
import runpy
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from minilora.exercises.attempts import attempted, read_sources
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.checking import Exercise, explain, run_property
from minilora.exercises.graft import grafted
from minilora.exercises.source import is_released

MEMORY = 4 * 2**30  # bytes that a student's code may take beyond what torch has
OUTPUT = 16 * 2**20  # bytes that it may print or write into one file


class TooLong(BaseException):
    """A property has computed for longer than it may. No `except Exception` of a student catches it."""


def limit_resources():
    """Where the system has such limits, too much memory and too long files become errors in the code that asks."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # Windows and macOS: the time limit alone
        return
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def set_clock(seconds: float):
    """Raises TooLong after so many seconds of computing, and then every second; 0 stops the clock.

    It counts the processor's time, so a busy machine does not make code slow. Windows has no such clock: there, as for
    code that waits or stays inside one call, the process is ended from outside.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds, 1)


def check(exercise: Exercise, properties: dict[str, Callable], folder: Path, seeds: list[int], limit: float, say):
    """Says how each property of one exercise fares, for the first of the seeds that refutes it."""
    names: dict[str, str] = {}
    try:
        sources = read_sources(exercise, folder)
        names = {path: Path(path).name for _, path in sources.values()}
        if not attempted(exercise, sources):
            say(attempted=False)
            return
        say(attempted=True)
        with ExitStack() as stack:
            if is_released():
                graft_others(exercise, folder, stack)
            set_clock(limit)
            stack.enter_context(grafted(exercise, sources))
            set_clock(0)
            for statement, function in properties.items():
                say(property=statement)
                say(outcome=first_fault(statement, function, seeds, names, limit))
    except SyntaxError as error:
        text = (error.text or "").strip()
        where = f"line {error.lineno} of {Path(error.filename or '').name}"
        say(property="the file is Python", outcome={"message": f"{error.msg}, in {where}: {text}"})
    except (Exception, SystemExit, TooLong) as error:
        say(property="the file can be used", outcome={"message": explain(error, names)})
    finally:
        set_clock(0)


def first_fault(statement: str, function: Callable, seeds: list[int], names: dict[str, str], limit: float) -> dict:
    for seed in seeds:
        try:
            set_clock(limit)
            fault = run_property(statement, function, seed, names)
        except TooLong as error:
            fault = {"message": explain(error, names)}
        finally:
            set_clock(0)
        if fault:
            return {**fault, "seed": seed}
    return {}


def graft_others(exercise: Exercise, folder: Path, stack: ExitStack):
    """In a hand-out the package is blank: what the student wrote for the other exercises stands in, if it can."""
    for other in EXERCISES.values():
        try:
            sources = read_sources(other, folder)
            if other is not exercise and attempted(other, sources):
                stack.enter_context(grafted(other, sources))
        except Exception as error:
            print(f"{other.name} is left out: {type(error).__name__}: {error}")


def main():
    job, parent = json.loads(sys.stdin.readline()), sys.stdin
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdin = open(os.devnull, encoding="utf-8")

    def end_with_parent():
        parent.read()  # until the parent closes it, or is no more
        os._exit(1)

    def too_long(number, frame):
        raise TooLong(f"after {job['limit']:g} seconds of computing: a loop without an end, or far too slow")

    threading.Thread(target=end_with_parent, daemon=True).start()
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, too_long)

    def say(**line):
        print(json.dumps(line), file=channel, flush=True)

    torch.set_num_threads(1)  # sums do not depend on the machine's cores
    warnings.simplefilter("ignore")
    private = runpy.run_path(job["private"]).get("PROPERTIES", {}) if job["private"] else {}
    limit_resources()
    for place, number in enumerate(job["exercises"]):
        if place:  # one exercise's output is not the next one's
            sys.stdout.flush()
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
        properties = {**EXERCISES[number].properties, **private.get(number, {})}
        left = {name: function for name, function in properties.items() if name not in job["done"]}
        say(begin=number, statements=list(properties))
        check(EXERCISES[number], left, Path(job["folder"]), job["seeds"], job["limit"], say)
        say(end=number)


if __name__ == "__main__":
    main()
