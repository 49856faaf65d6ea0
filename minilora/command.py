"""How a command line is read, and how it ends: bad input with one sentence and exit status 2, an interrupt with 130."""

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from minilora.ranges import Range

FULL = ("can't allocate memory", "out of memory")  # how torch says it, on a CPU and on other devices


class Parser(argparse.ArgumentParser):
    """Refuses in one line, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        message = message if len(message) <= 500 else f"{message[:497]}..."
        first = int(os.environ.get("RANK", 0)) == 0  # of torchrun's processes, which all read the same line
        self.exit(2, f"error: {message} (options: {self.prog} --help)\n" if first else None)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults, but not those of options that are off until they are given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        off = action.default is None or action.default is False
        return action.help if off else super()._get_help_string(action)


class Within:
    """Reads a number of a range: the `type` of an option, as argparse calls what turns a word into a value."""

    def __init__(self, allowed: Range):
        self.allowed = allowed

    def __call__(self, word: str) -> float:
        try:
            value = int(word) if self.allowed.whole else float(word)
        except ValueError:
            value = math.nan
        if not self.allowed.holds(value):
            raise argparse.ArgumentTypeError(f"{shown(word)} is not {self.allowed}")
        return value


def number(allowed: Range, help: str = "", **words) -> dict[str, Any]:
    """An option that takes a number of this range, which its help names."""
    return dict(type=Within(allowed), help=f"{help}: {allowed}" if help else str(allowed), **words)


def a_text(word: str) -> str:
    try:
        word.encode()
    except UnicodeEncodeError:  # Python's way to hand on bytes that are no UTF-8
        raise argparse.ArgumentTypeError(f"{shown(word)} is not UTF-8 text") from None
    return word


def a_name(word: str) -> str:
    if not word.strip() or "\0" in word:
        raise argparse.ArgumentTypeError(f"{shown(word)} names nothing")
    return a_text(word)


def a_path(word: str) -> Path:
    return Path(a_name(word))


def unescape(word: str) -> str:
    """A newline for a backslash and an n, a tab for one and a t, one backslash for two."""
    meanings = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda escape: meanings[escape[1]], word)


def shown(word: str) -> str:
    return ascii(word if len(word) <= 60 else f"{word[:57]}...")


def end_at_once(*_):
    """On an interrupt while nothing is under way: one line, where Python would print a traceback."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def interrupt_quietly():
    """For a program that begins: until `run_command` runs its verb, and after that, an interrupt ends it at once."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Parses the arguments and calls `options.run(options)`; returns the exit status, 0 where `run` returns None."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Greek letters is no reason to fail
    at_once = signal.getsignal(signal.SIGINT) is end_at_once
    options = parser.parse_args(arguments)
    try:
        if at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there are files to tidy up
        status = options.run(options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of the output, `head` perhaps, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in FULL):
            raise
        smaller = "smaller batches, shorter sequences or a lower rank need less"
        print(f"error: the memory does not suffice; {smaller}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        if at_once:
            signal.signal(signal.SIGINT, end_at_once)
