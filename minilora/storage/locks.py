"""One writer at a time: a lock on a file or a folder, which ends with its holder, however the holder ends.

Two runs that write the same folder would each be whole, and what stays would be a mixture. So who writes holds a lock
of the operating system on a small file, and the system takes the lock back from a program that is killed. The file says
who holds it. It goes when the lock does, but for one that a killed program leaves, which locks nobody out.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 10.0  # seconds to wait for another writer; a save takes less
_held: set[tuple[Path, int, int]] = set()  # lock files, each with the process and the thread that hold it

if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> bool:
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # beyond the note, which others are to read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _take(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True


@contextmanager
def locked(path: str | Path, patience: float = PATIENCE) -> Iterator[None]:
    """Holds the lock of a folder that exists, or else of a file, whose folder is made. Inside, the same thread may take
    it again.

    Raises ValueError, with what is known of the other run, where the lock is held for longer than `patience` seconds,
    and OSError where the folder cannot be written.
    """
    path = Path(path)
    file = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    key = file.resolve(), os.getpid(), threading.get_ident()
    if key in _held:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _wait(file, path, patience)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        if sys.platform == "win32":  # removes no file that is open
            os.close(descriptor)
            _remove(file)
        else:
            _remove(file)
            os.close(descriptor)


def _wait(file: Path, path: Path, patience: float) -> int:
    """The open lock file, locked."""
    end = time.monotonic() + patience
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        if _take(descriptor):
            if _is(file, descriptor):
                _sign(file, descriptor)
                return descriptor
        elif time.monotonic() >= end:
            os.close(descriptor)
            holder = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "its process is unknown"
            raise ValueError(f"{path} is being written by another run ({holder}); wait for it, or write elsewhere")
        else:
            time.sleep(0.01)
        os.close(descriptor)


def _sign(file: Path, descriptor: int):
    """Says in the file who holds it, and lets other users lock it once it is free. On a full disk it says nothing."""
    with suppress(OSError):
        os.chmod(file, 0o666)
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"process {os.getpid()}: {' '.join(sys.argv[1:])}".encode(errors="replace")[:200])


def _is(file: Path, descriptor: int) -> bool:
    """Whether the open file still has the name: its last holder may have removed it in the meantime."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(file: Path):
    with suppress(OSError):
        file.unlink()
