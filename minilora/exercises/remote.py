"""A student's functions as they are called from the process that judges: computed elsewhere, gradients too."""

import builtins
import json
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from minilora.exercises import student
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.checking import Exercise, Wrong, brief
from minilora.exercises.graft import Graft, owner_of
from minilora.exercises.pipe import Broken
from minilora.exercises.processes import Gone, StudentProcess
from minilora.exercises.source import is_released
from minilora.exercises.wire import Wire

WALL = 5  # times as many seconds by the clock as of computing, for code that waits, and for machines that are busy
LOAD = 60  # seconds in which the student's file must be read


class Bridge(torch.autograd.Function):
    """What a student's function has computed of its arguments; the gradients are computed over there."""

    @staticmethod
    def forward(ctx, remote: "Remote", call: int, computed: dict[int, torch.Tensor], *leaves):
        ctx.remote, ctx.call, ctx.numbers = remote, call, [*computed]
        ctx.set_materialize_grads(False)
        return tuple(computed.values())

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        given = [(number, g) for number, g in zip(ctx.numbers, grads, strict=True) if g is not None]
        return None, None, None, None, *ctx.remote.backward(ctx.call, given)


class JudgesWire(Wire):
    """On this side a tensor with a history over there gets one that leads there."""

    def __init__(self, remote: "Remote", call: int):
        super().__init__(remote.kept, "judge")
        self.remote, self.call = remote, call
        self.arguments: set[int] = set()  # the numbers of all that the arguments lead to
        self.leaves: list[torch.Tensor] = []  # the tensors among it that want a gradient

    def connect(self, contents: dict):
        new = {n: of for n, (kind, of) in contents.items() if kind == "tensor" and of["history"] == "new"}
        if not new:
            return
        leaf = torch.zeros((), requires_grad=True)  # so that there is a history even if no argument has one
        with torch.enable_grad():
            computed = {n: self.placed(of) for n, of in new.items()}
            made = Bridge.apply(self.remote, self.call, computed, leaf, *self.leaves)
            for number, y in zip(new, made, strict=True):
                if number in self.arguments:
                    self.objects[number].copy_(y)
                else:
                    self.objects[number] = y


class Remote:
    """The student's functions as they are called from here."""

    def __init__(self, exercise: Exercise, folder: Path, limit: float):
        self.exercise, self.folder, self.limit = exercise, folder, limit
        self.process: StudentProcess | None = None
        self.graft = Graft()
        self.kept: dict[int, Any] = {}
        self.calls, self.deadline, self.changed = 0, 0.0, ""
        self.late = False  # True once the code has taken too long

    def start(self) -> tuple[str, str] | None:
        """A process with the student's code loaded. Returns the statement and the message of a refusal."""
        self.close()
        self.process = StudentProcess()
        self.deadline = time.monotonic() + LOAD
        about = {"exercise": self.exercise.number, "folder": str(self.folder), "limit": self.limit}
        answer, _ = self.process.ask({"do": "load", **about}, b"", self.deadline)
        if "refused" in answer:
            statement, message = map(str, answer["refused"])
            return statement, brief(message, 1000)
        targets = [*self.exercise.targets]
        if is_released():  # what was written for other exercises is part of this hand-out's package
            targets += [
                target for other in EXERCISES.values() for target in other.targets if target in answer["loaded"]
            ]
        for target in {owner_of(target): target for target in reversed(targets)}.values():
            self.graft.proxy(target, self.proxy)
        return None

    def close(self):
        self.graft.undo()
        if self.process is not None:
            self.process.end()
        self.process = None

    def begin(self, seed: int):
        self.changed = ""  # a function that has changed its arguments and should not
        self.deadline = time.monotonic() + WALL * self.limit
        self.ask({"do": "begin", "limit": self.limit, "seed": seed})

    def ask(self, message: dict, blob: bytes = b"") -> tuple[dict, bytes]:
        if self.process is None:
            raise Gone("your code ended the process")
        return self.process.ask(message, blob, self.deadline)

    def inside(self, statement: str, seed: int) -> dict:
        about = {"exercise": self.exercise.number, "statement": statement, "seed": seed, "limit": self.limit}
        answer, _ = self.ask({"do": "inside", **about})
        if "error" in answer:
            self.late = self.late or any(str(kind).endswith(".TooLong") for kind in answer["error"]["kinds"])
            return {"message": brief(str(answer["error"]["explained"]), 1000)}
        fault = answer["fault"]
        return {key: brief(str(fault[key]), 4000) for key in ("message", "case", "slip")} if fault else {}

    def proxy(self, target: str) -> Callable:
        def function(*arguments, **keywords):
            return self.call(target, arguments, keywords)

        return function

    def call(self, target: str, arguments: tuple, keywords: dict):
        self.calls += 1
        wire = JudgesWire(self, self.calls)
        modes: dict[str, bool | str] = {"grad": torch.is_grad_enabled(), "autocast": torch.is_autocast_enabled("cpu")}
        modes |= {"half": name_of(torch.get_autocast_dtype("cpu")), "default": name_of(torch.get_default_dtype())}
        message, blob = wire.encode((arguments, keywords, torch.get_rng_state()))
        wire.arguments = set(wire.objects)
        wire.leaves = [t for t in wire.objects.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        given = set(map(str, wire.storages))
        before = {str(number): content for number, content in message["contents"].items()}
        about = {"do": "call", "target": target, "number": self.calls, "modes": modes}
        answer, blob = self.ask({**message, **about}, blob)
        if "value" not in answer:
            raise rebuilt(answer["error"])
        try:
            result, state = wire.decode(answer, blob)
        except Broken as broken:
            raise Wrong(f"what your code gave back cannot be carried over to the checker: {broken}") from None
        if target not in self.exercise.changes and (
            given & set(answer["storages"]) or differ(before, answer["contents"])
        ):
            self.changed = target.rpartition(":")[2]
        for name, text in answer["warned"]:
            kind = getattr(builtins, str(name), UserWarning)
            warnings.warn(str(text), kind if issubclass(kind, Warning) else UserWarning, stacklevel=3)
        torch.set_rng_state(state)
        if answer["error"]:
            raise rebuilt(answer["error"])
        return result

    def backward(self, call: int, given: list) -> list:
        answer, blob = self.ask(*merged(Wire(self.kept, "judge").encode(given), {"do": "backward", "number": call}))
        if "value" not in answer:
            raise rebuilt(answer["error"])
        return Wire(self.kept, "judge").decode(answer, blob)


def differ(before: dict, after: dict) -> bool:
    """True if tensors, or what objects and containers refer to, were exchanged. New attributes and plain values that
    are others are no exchange."""
    for number, (kind, content) in before.items():
        now = after[number][1]
        if kind == "tensor":
            if any(content[key] != now[key] for key in ("dtype", "size", "stride", "offset", "storage")):
                return True
        elif kind in ("list", "set"):
            if content != now:
                return True
        elif kind != "opaque":
            pairs, others = (content[1], now[1]) if kind == "object" else (content, now)
            later = {json.dumps(key): value for key, value in others}
            if any(isinstance(value, list) and later.get(json.dumps(key)) != value for key, value in pairs):
                return True
    return False


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def merged(encoded: tuple[dict, bytes], about: dict) -> tuple[dict, bytes]:
    return {**encoded[0], **about}, encoded[1]


def rebuilt(about: dict) -> BaseException:
    """An exception as it was raised over there, of the first of its classes that is known here."""
    endings = (SystemExit, KeyboardInterrupt, student.TooLong)  # beside Exceptions, what a property is prepared for
    here = [kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    known = {f"{kind.__module__}.{kind.__name__}": kind for kind in (*here, *endings, re.error)}
    known["__main__.TooLong"] = student.TooLong
    kind = next((known[name] for name in about["kinds"] if name in known), RuntimeError)
    try:
        error = kind(*about["arguments"])
    except Exception:
        error = RuntimeError(*about["arguments"])
    error.explained = brief(str(about["explained"]), 1000)
    return error
