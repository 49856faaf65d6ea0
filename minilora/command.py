"""How a command line ends: bad input with one sentence and exit status 2, an interrupt with status 130."""

import argparse
import os
import sys
from collections.abc import Sequence


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Parses the arguments and calls `options.run(options)`; returns the exit status, 0 where `run` returns None."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Greek letters is no reason to fail
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except BrokenPipeError:  # the reader of the output, `head` perhaps, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
