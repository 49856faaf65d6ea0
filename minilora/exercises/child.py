"""The process that judges: `python -m minilora.exercises.child`, started by `runner.py` alone.

It reads a job from standard input, JSON, and answers on standard output, a line of JSON for each thing that happens,
so that what is known is known even if the process is ended. The properties run here, and here their random numbers are
drawn and results are compared. The student's functions run elsewhere (`student.py`): in their place stand calls to that
process, so what the student's code replaces, reads or sends over there changes no verdict. The few properties that look
into the memory of the process that computes (`inside`) run over there too, and can be no surer than that.
"""

import json
import os
import runpy
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from minilora.exercises.attempts import attempted, read_sources
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.checking import Exercise, explain, run_property
from minilora.exercises.processes import Gone, adopt_orphans, end_descendants, keep_to_ourselves
from minilora.exercises.remote import Remote
from minilora.exercises.student import TooLong

ENDS = 2  # times that an exercise may end the student's process before the rest of it is given up


def check(exercise: Exercise, properties: dict[str, Callable], folder: Path, job: dict, say):
    """Says how each property of one exercise fares, for the first of the seeds that refutes it."""
    seeds, limit = job["seeds"], job["limit"]
    names: dict[str, str] = {}
    remote = Remote(exercise, folder, limit)
    try:
        sources = read_sources(exercise, folder)
        names = {path: Path(path).name for _, path in sources.values()}
        if not attempted(exercise, sources):
            say(attempted=False)
            return
        say(attempted=True)
        ends = 0
        for statement, function in properties.items():
            if remote.process is None and (refused := remote.start()):
                say(property=refused[0], outcome={"message": refused[1]})
                return
            say(property=statement)
            try:
                fault = first_fault(remote, statement, function, seeds, names)
            except Gone as gone:
                fault, ends = {"message": str(gone)}, ends + 1
                remote.late = remote.late or time.monotonic() >= remote.deadline
                remote.close()
            say(outcome=fault)
            if ends == ENDS or job["stop"] and remote.late:
                return
    except Gone as gone:
        say(property="the file can be used", outcome={"message": str(gone)})
    except (Exception, SystemExit) as error:
        say(property="the file can be used", outcome={"message": explain(error, names)})
    finally:
        remote.close()


def first_fault(remote: Remote, statement: str, function: Callable, seeds: list[int], names: dict[str, str]) -> dict:
    inside = statement in remote.exercise.inside
    for seed in seeds:
        remote.begin(seed)
        try:
            fault = remote.inside(statement, seed) if inside else run_property(statement, function, seed, names)
        except TooLong as error:
            fault, remote.late = {"message": explain(error, names)}, True
        if remote.changed and not inside:  # then neither what is expected nor what fits can be relied on
            slip = "its arguments belong to the caller: make new tensors"
            fault = {"message": f"{remote.changed} changed what it was given", "case": "", "slip": slip}
        if fault:
            return {**fault, "seed": seed}
    return {}


def main():
    """Also called in a fork, whose standard input, output and error are what a new process would have."""
    job, parent = json.loads(sys.stdin.readline()), sys.stdin
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")  # half characters become question marks
    os.dup2(2, 1)
    sys.stdin = open(os.devnull, encoding="utf-8")
    keep_to_ourselves()
    adopt_orphans()

    def end_with_parent():
        parent.read()  # until the parent closes it, or is no more
        end_descendants()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    def say(**line):
        print(json.dumps(line, ensure_ascii=False), file=channel, flush=True)

    torch.set_num_threads(1)  # sums do not depend on the machine's cores
    warnings.simplefilter("ignore")
    private = runpy.run_path(job["private"]).get("PROPERTIES", {}) if job["private"] else {}
    for place, number in enumerate(job["exercises"]):
        if place:  # one exercise's output is not the next one's
            sys.stdout.flush()
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
        properties = {**EXERCISES[number].properties, **private.get(number, {})}
        left = {name: function for name, function in properties.items() if name not in job["done"]}
        say(begin=number, statements=list(properties))
        check(EXERCISES[number], left, Path(job["folder"]), job, say)
        say(end=number)


if __name__ == "__main__":
    main()
