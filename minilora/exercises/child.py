"""The process in which a student's code runs: `python -m minilora.exercises.child`, started by `runner.py` alone.

It reads a job from standard input, JSON, and answers on standard output, a line of JSON for each thing that happens,
so that what is known is known even if the code kills the process. What the code itself prints goes to standard error.
"""

import json
import os
import runpy
import sys
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


def check(exercise: Exercise, properties: dict[str, Callable], folder: Path, seeds: list[int], say):
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
            if is_released():  # the package is as blank as the student's files: all that they wrote stands in
                for other in EXERCISES.values():
                    theirs = read_sources(other, folder)
                    if other is not exercise and attempted(other, theirs):
                        stack.enter_context(grafted(other, theirs))
            stack.enter_context(grafted(exercise, sources))
            for statement, function in properties.items():
                say(property=statement)
                outcomes = (run_property(function, seed, names) | {"seed": seed} for seed in seeds)
                say(outcome=next((outcome for outcome in outcomes if "message" in outcome), {}))
    except SyntaxError as error:
        text = (error.text or "").strip()
        where = f"line {error.lineno} of {Path(error.filename or '').name}"
        say(property="the file is Python", outcome={"message": f"{error.msg}, in {where}: {text}"})
    except (Exception, SystemExit) as error:
        say(property="the file can be used", outcome={"message": explain(error, names)})


def main():
    job = json.loads(sys.stdin.read())
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdin = open(os.devnull, encoding="utf-8")

    def say(**line):
        print(json.dumps(line), file=channel, flush=True)

    torch.set_num_threads(1)  # sums do not depend on the machine's cores
    warnings.simplefilter("ignore")
    private = runpy.run_path(job["private"]).get("PROPERTIES", {}) if job["private"] else {}
    limit_resources()
    for number in job["exercises"]:
        properties = {**EXERCISES[number].properties, **private.get(number, {})}
        say(begin=number, statements=list(properties))
        check(EXERCISES[number], properties, Path(job["folder"]), job["seeds"], say)
        say(end=number)


if __name__ == "__main__":
    main()
