"""Messages between two processes: a dictionary as JSON, and bytes behind it. Either side bounds what it reads."""

import json
import struct
from collections.abc import Callable
from typing import BinaryIO

MOST = 2**23, 2**28  # bytes of one message: of its JSON, and behind it
HEAD = struct.Struct(">QQ")  # how many there are


class Broken(Exception):
    """What came through the pipe is no message."""


def send(stream: BinaryIO, message: dict, blob: bytes = b""):
    """Writes one message. OverflowError for one that is too large."""
    text = json.dumps(message).encode("ascii")
    if len(text) > MOST[0] or len(blob) > MOST[1]:
        raise OverflowError(f"{(len(text) + len(blob)) / 2**20:.0f} MB are too much to carry over to the checker")
    stream.write(HEAD.pack(len(text), len(blob)))
    stream.write(text)
    stream.write(blob)
    stream.flush()


def read_message(read: Callable[[int], bytes]) -> tuple[dict, bytes]:
    """One message, by `read(count)`, which gives so many bytes. Broken for what is none."""
    sizes = HEAD.unpack(read(HEAD.size))
    if sizes[0] > MOST[0] or sizes[1] > MOST[1]:
        raise Broken(f"{sum(sizes)} bytes announced")
    try:
        message = json.loads(read(sizes[0]))
    except (ValueError, RecursionError) as error:
        raise Broken(str(error)) from error
    if not isinstance(message, dict):
        raise Broken("not a dictionary")
    return message, read(sizes[1])
