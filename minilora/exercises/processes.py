"""The student's process as the one that judges sees it: started, asked, and ended with all that it has started."""

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import IO

from minilora.exercises.pipe import Broken, read_message, send

LINUX = sys.platform == "linux"
DEATH_SIGNAL, DUMPABLE, SECURE_BITS, SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 28, 36, 38  # of Linux's prctl
CAPABILITIES_3, READ_ALL = 0x20080522, 2  # of Linux's capset: its version, and root's right to read any file


class Gone(BaseException):
    """The student's process gives no answer any more. Not an Exception: no checker takes it for a student's error."""


def prctl(option: int, value: int):
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def keep_to_ourselves():
    """On Linux no other process of the same user may look into this one or open its pipes from now on."""
    if LINUX:
        prctl(DUMPABLE, 0)


def give_up_rights():
    """On Linux a process of root's is no more than another user's from now on, but for reading files."""
    if not LINUX:
        return
    prctl(SECURE_BITS, 3)  # a program that it starts does not get root's rights back
    prctl(NO_NEW_PRIVILEGES, 1)
    header, rights = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).capget(header, rights)
        effective, permitted = rights[0] & READ_ALL, rights[1] & READ_ALL
        ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)(effective, permitted, 0, 0, 0, 0))


def adopt_orphans():
    """On Linux: what a student's code leaves running becomes a child of this process, which can end it."""
    if LINUX:
        prctl(SUBREAPER, 1)


def end_descendants(but: Set[int] = frozenset()):
    """On Linux: ends the children of this process, and theirs, which become our own when they are left alone."""
    while LINUX and (children := find_children() - but):
        for pid in children:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def find_children() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


def can_fork() -> bool:
    """On Linux, where no other thread of Python's could be in the middle of something."""
    return LINUX and threading.active_count() == 1


class Forked:
    """The process that judges, as a fork of this one: torch is loaded already. To its caller what a Popen is."""

    def __init__(self, output: IO[str]):
        asked, self.asking = os.pipe()
        self.answers, answered = os.pipe()
        sys.stdout.flush(), sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's threads wait, and stay behind
            self.pid = os.fork()
        if self.pid == 0:
            judge(asked, answered, output.fileno())
        for end in (asked, answered):
            os.close(end)
        self.stdin, self.stdout = os.fdopen(self.asking, "wb"), os.fdopen(self.answers, "rb")

    def wait(self, timeout: float = float("inf")):
        """Raises subprocess.TimeoutExpired, as Popen does."""
        deadline = time.monotonic() + timeout
        while not os.waitpid(self.pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("the fork", timeout)
            time.sleep(0.005)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


def judge(asked: int, answered: int, output: int):
    """What the fork does instead of going on."""
    from minilora.exercises.child import main

    try:
        os.setsid()
        for number, end in enumerate((asked, answered, output)):
            os.dup2(end, number)
        os.closerange(3, 4096)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode, 1, encoding="utf-8", errors="backslashreplace", closefd=False)
            for number, mode in enumerate(("r", "w", "w"))
        )
        main()
        sys.stdout.flush(), sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


class StudentProcess:
    """One process with a student's code, and two pipes to it."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.others = find_children() if LINUX else set()
        if LINUX:  # a fork is there at once, where a new process would load torch first
            questions, self.questions = os.pipe()
            self.answers, answers = os.pipe()
            sys.stdout.flush(), sys.stderr.flush()
            if os.fork() == 0:
                live(questions, answers)
            os.close(questions), os.close(answers)
        else:
            command = [sys.executable, "-m", "minilora.exercises.student"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self.process.stdin is not None and self.process.stdout is not None
            self.questions, self.answers = os.dup(self.process.stdin.fileno()), os.dup(self.process.stdout.fileno())
            self.process.stdin.close(), self.process.stdout.close()
        self.stream = os.fdopen(self.questions, "wb")
        self.deadline = 0.0

    def ask(self, message: dict, blob: bytes, deadline: float) -> tuple[dict, bytes]:
        """Sends a message and gives the answer. Raises Gone where none comes in time, or none that can be read."""
        self.deadline, begun = deadline, time.monotonic()
        timer = threading.Timer(max(deadline - begun, 0), self.process.kill) if self.process else None
        if timer:
            timer.start()
        try:
            send(self.stream, message, blob)
            return read_message(self.read)
        except TimeoutError:
            raise Gone("stopped, for it waits, or is far too slow") from None
        except (EOFError, OSError):
            late = time.monotonic() >= deadline
            fault = "stopped, for it waits, or is far too slow"
            raise Gone(
                fault if late else "your code ended the process: it exited, crashed, or took too much memory"
            ) from None
        except Broken:
            raise Gone("your code wrote into the checker's pipe") from None
        finally:
            if timer:
                timer.cancel()

    def read(self, count: int) -> bytes:
        content = bytearray()
        while len(content) < count:
            if LINUX and not select.select([self.answers], [], [], max(self.deadline - time.monotonic(), 0))[0]:
                raise TimeoutError
            chunk = os.read(self.answers, min(count - len(content), 2**20))
            if not chunk:
                raise EOFError
            content += chunk
        return bytes(content)

    def end(self):
        """Ends the process, and on Linux whatever it has started."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        end_descendants(self.others)
        with suppress(OSError):
            self.stream.close()
        os.close(self.answers)


def live(questions: int, answers: int):
    """What the fork does instead of going on: it keeps the ends of its two pipes and its output, and serves."""
    from minilora.exercises.student import serve

    try:
        os.setsid()
        prctl(DEATH_SIGNAL, signal.SIGKILL)
        give_up_rights()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        low, high = sorted((questions, answers))
        for first, end in ((3, low), (low + 1, high), (high + 1, 4096)):
            os.closerange(first, end)
        serve(questions, answers)
    finally:
        os._exit(0)
