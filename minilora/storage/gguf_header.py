"""GGUF's header, walked once by its own counts, before the `gguf` library believes them.

    magic "GGUF", version            4 + 4 bytes
    number of tensors, number of keys          8 + 8
    each key      name, type (4), value: a number, a string, or an array as type (4), count (8), items
    each tensor   name, number of dimensions (4), each dimension (8), type (4), offset (8)

A string is its length (8) and its bytes. The library counts to whatever number stands there: one flipped bit in the
count of an array makes it collect nothing for ever. So each count is held against the bytes that are left.
"""

import mmap
import struct
from pathlib import Path

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a number -> bytes
STRING, ARRAY = 8, 9
DIMENSIONS = 4  # of a tensor, at most


def check_header(path: Path):
    """Raises ValueError, without the file's name, where the header's counts do not fit the file."""
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("the file is too short for a header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).check()


class _Walk:
    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 8

    def number(self, letter: str) -> int:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.skip(struct.calcsize(letter)))
        return value

    def skip(self, size: int) -> int:
        """Goes on by so many bytes; returns where they began."""
        began, self.place = self.place, self.place + size
        if self.place > len(self.data):
            raise ValueError(f"a count at byte {began} leads beyond the end of the file")
        return began

    def string(self) -> str:
        size = self.number("Q")
        began = self.skip(size)
        return self.data[began : began + size].decode()  # a UnicodeDecodeError is a ValueError

    def value(self, kind: int):
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item in SIZES:
                self.skip(SIZES[item] * count)
            elif item == STRING:
                for _ in range(count):  # each takes 8 bytes at least, so this ends at the end of the file
                    self.string()
            else:
                raise ValueError(f"an array holds items of type {item}, which cannot be read")
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise ValueError(f"a value has type {kind}, which GGUF does not have")

    def check(self):
        if self.data[:4] != b"GGUF" or self.data[4:6] == b"\0\0":  # a big-endian file has its version in bytes 6 and 7
            raise ValueError("it does not begin as a GGUF file of this byte order does")
        tensors, keys = self.number("Q"), self.number("Q")
        for _ in range(keys):
            self.string()
            self.value(self.number("I"))
        for _ in range(tensors):
            self.string()
            dimensions = self.number("I")
            if dimensions > DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions, where at most {DIMENSIONS} are possible")
            self.skip(8 * dimensions + 4 + 8)
