"""The process in which a student's code runs. It knows nothing of what the answers should be.

The process that judges (`child.py`) sends calls of the student's functions, and this one computes and answers. What the
code prints goes to the file that standard error is. On Linux the process is a fork of the one that judges, elsewhere it
is started as `python -m minilora.exercises.student`.
"""

import os
import random
import signal
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from minilora.exercises.attempts import attempted, read_sources, to_be_used
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.checking import Exercise, explain, run_property
from minilora.exercises.graft import Graft, grafted, owner_of
from minilora.exercises.pipe import read_message, send
from minilora.exercises.source import is_released
from minilora.exercises.wire import FOREIGN, Wire

MEMORY = 4 * 2**30  # bytes that a student's code may take beyond what torch has
OUTPUT = 16 * 2**20  # bytes that it may print or write into one file


class TooLong(BaseException):
    """A property has computed for longer than it may. No `except Exception` of a student catches it."""


def limit_resources():
    """Where the system has such limits, too much memory and too long files become errors in the code that asks.

    A limit that whoever started us has set already stays, if it is lower.
    """
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # Windows and macOS: the time limit alone
        return
    limits = {"AS": pages * resource.getpagesize() + MEMORY, "FSIZE": OUTPUT, "CORE": 0}
    for name, wanted in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        most = [limit for limit in resource.getrlimit(kind) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(kind, (min([wanted, *most]),) * 2)


class Clock:
    """Raises TooLong in the student's code after so many seconds of computing, and then every second.

    It counts the processor's time, so a busy machine does not make code slow. Windows has no such clock: there, as for
    code that waits or stays inside one call, the process is ended from outside.
    """

    def __init__(self):
        self.limit = self.left = 0.0
        if hasattr(signal, "SIGPROF"):
            signal.signal(signal.SIGPROF, self.too_long)

    def too_long(self, number, frame):
        raise TooLong(f"after {self.limit:g} seconds of computing: a loop without an end, or far too slow")

    def set(self, limit: float):
        self.limit = self.left = limit

    def __enter__(self):
        self.started = time.process_time()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, max(self.left, 0.01), 1)

    def __exit__(self, *_):
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.left -= time.process_time() - self.started


class Server:
    """Answers one message after the other; each has a "do", the name of a method here."""

    def __init__(self, questions: BinaryIO, answers: BinaryIO):
        self.questions, self.answers, self.clock = questions, answers, Clock()
        self.kept: dict[int, Any] = {}
        self.graphs: dict[int, tuple[list, dict]] = {}  # by call: the leaves, and by number what was computed of them
        self.stack, self.beneath = ExitStack(), Graft()
        self.names: dict[str, str] = {}

    def serve(self):
        """Until the other side closes its end."""
        while True:
            try:
                message, blob = read_message(self.read)
            except EOFError:
                return
            try:
                answer = getattr(self, message["do"])(message, blob)
                send(self.answers, *(answer if isinstance(answer, tuple) else (answer,)))
            except BrokenPipeError:
                return
            except BaseException as error:
                send(self.answers, {"error": self.told(error)})

    def read(self, count: int) -> bytes:
        content = self.questions.read(count)
        if len(content) < count:
            raise EOFError
        return content

    def told(self, error: BaseException) -> dict:
        """An exception in words: its classes, the most special first, its arguments, and where it came from."""
        kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
        arguments = [*error.args, error.filename] if isinstance(error, OSError) and error.filename else error.args
        if not all(type(argument) in (str, int) for argument in arguments):
            arguments = [str(error)]
        return {"kinds": kinds, "arguments": [*arguments], "explained": explain(error, self.names)}

    def load(self, message: dict, _) -> dict:
        """The student's file in place of the package's functions. Says which functions are the student's now."""
        exercise, folder = EXERCISES[message["exercise"]], Path(message["folder"])
        sources = read_sources(exercise, folder)
        self.names = {path: Path(path).name for _, path in sources.values()}
        loaded: list[str] = []
        if is_released():
            for other in to_be_used(folder):
                if other is not exercise:
                    self.load_other(other, folder, loaded)
        self.clock.set(message["limit"])
        for target, function in exercise.beneath.items():
            self.beneath.put(*owner_of(target), function)
        try:
            with self.clock:
                self.take(exercise, sources)
        except SyntaxError as error:
            text = (error.text or "").strip()
            where = f"line {error.lineno} of {Path(error.filename or '').name}"
            return {"refused": ["the file is Python", f"{error.msg}, in {where}: {text}"]}
        except BaseException as error:
            return {"refused": ["the file can be used", explain(error, self.names)]}
        return {"loaded": [*loaded, *exercise.targets]}

    def load_other(self, other: Exercise, folder: Path, loaded: list[str]):
        """In a hand-out the package is blank: what the student wrote for the other exercises stands in, if it can."""
        try:
            sources = read_sources(other, folder)
            if attempted(other, sources):
                self.take(other, sources)
                loaded += other.targets
        except Exception as error:
            print(f"{other.name} is left out: {type(error).__name__}: {error}")

    def take(self, exercise: Exercise, sources: dict):
        graft = self.stack.enter_context(grafted(exercise, sources))
        made = (vars(owner).get(name) for owner, name, _ in graft.before)
        FOREIGN.update(value for value in made if isinstance(value, type))

    def begin(self, message: dict, _) -> dict:
        """A property begins: its time, and the seeds of generators other than torch's, whose state comes with calls."""
        self.clock.set(message["limit"])
        self.graphs.clear()
        random.seed(message["seed"]), numpy.random.seed(message["seed"] % 2**32)
        return {}

    def inside(self, message: dict, _) -> dict:
        """A whole property, of those that look into the memory of the process that computes."""
        function = EXERCISES[message["exercise"]].properties[message["statement"]]
        self.clock.set(message["limit"])
        with self.clock:
            return {"fault": run_property(message["statement"], function, message["seed"], self.names)}

    def call(self, message: dict, blob: bytes) -> tuple[dict, bytes]:
        wire = Wire(self.kept, "student")
        arguments, keywords, state = wire.decode(message, blob)
        tensors = [(number, value) for number, value in wire.objects.items() if isinstance(value, torch.Tensor)]
        leaves = [wire.roots[n][0] if n in wire.roots else t for n, t in tensors if n in wire.roots or t.requires_grad]
        owner, name = owner_of(message["target"])
        torch.set_rng_state(state)
        modes = message["modes"]
        torch.set_default_dtype(getattr(torch, modes["default"]))
        autocast = torch.autocast("cpu", getattr(torch, modes["half"]), modes["autocast"])
        with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(modes["grad"]), autocast:
            warnings.simplefilter("always")
            try:
                with self.clock:
                    result, error = getattr(owner, name)(*arguments, **keywords), None
            except BaseException as raised:
                result, error = None, self.told(raised)
        warned = [[w.category.__name__, str(w.message)] for w in caught]
        answer, blob = wire.encode((result, torch.get_rng_state()))
        new = [int(n) for n, (kind, of) in answer["contents"].items() if kind == "tensor" and of["history"] == "new"]
        self.graphs[message["number"]] = leaves, {number: wire.objects[number] for number in new}
        return {**answer, "error": error, "warned": warned}, blob

    def backward(self, message: dict, blob: bytes) -> tuple[dict, bytes]:
        """The gradients of a call's leaves, given those of what it computed."""
        leaves, computed = self.graphs[message["number"]]
        given = Wire(self.kept, "student").decode(message, blob)
        with self.clock, torch.enable_grad():
            # Its gradient with respect to y is g. To hand g over makes torch load sympy, which takes a second.
            total = sum((computed[number] * g).sum() for number, g in given)
            found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        return Wire(self.kept, "student").encode([None if g is None else g.detach() for g in found])


def serve(questions: int, answers: int):
    """The life of the process, between two ends of pipes."""
    limit_resources()
    torch.set_num_threads(1)  # sums do not depend on the machine's cores
    warnings.simplefilter("ignore")
    Server(os.fdopen(questions, "rb"), os.fdopen(answers, "wb")).serve()


def main():
    answers = os.dup(1)
    os.dup2(2, 1)
    questions = os.dup(0)
    sys.stdin = open(os.devnull, encoding="utf-8")
    serve(questions, answers)


if __name__ == "__main__":
    main()
