"""A folder that holds one thing, a model or an adapter, and holds it whole: at every moment the old one or the new.

A model is several files that mean something together only, and a file system replaces one name at a time. So all new
files are written and pushed to the disk in a folder of their own inside (`.staged`). One rename, to `.written`, is the
moment from which the new thing counts; moving its files to their places can be finished by whoever comes next
(`settle`), however often it is cut short. While they move, the folder has no config, so that no other program pairs the
weights of one thing with the config of another.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from minilora.storage.files import json_text, put_safetensors, read_json, sync, writing
from minilora.storage.locks import PATIENCE, locked

STAGED, WRITTEN = ".staged", ".written"
OBSOLETE = ".obsolete.json"  # in WRITTEN: the names that go when the new files come
CONFIGS = "config.json", "adapter_config.json"
# What a folder can hold, by the files that tell.
KINDS = {
    "a model": ("config.json", "model*.safetensors", "model.safetensors.index.json", "pytorch_model*"),
    "an adapter": ("adapter_config.json", "adapter_model*"),
}
# What belongs to a model and is no weight: its tokenizer, its chat template, the ends of its answers, and its licence.
TOKENIZER = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
LICENCE = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


def write_pair(
    directory: Path,
    weights_name: str,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    config_name: str,
    settings: dict,
    companions: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
):
    """Replaces weights and the config that explains them.

    companions: the other files of a model. Where a model was here, its own go; with a model without any, they stay.
    Raises ValueError, before anything is changed, as `check_free` does, and where the folder cannot be written.
    """
    texts = {config_name: json_text(directory / config_name, settings).encode(), **(companions or {})}
    names = (weights_name, *texts)
    if unknown := [name for name in companions or () if name not in (*TOKENIZER, *LICENCE)]:
        raise ValueError(f"{unknown[0]} is no file that belongs to a model; known: {', '.join((*TOKENIZER, *LICENCE))}")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; saving needs a folder")
    with writing(weights_name, directory):
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            obsolete = check_free(directory, names, overwrite)
            if (companions or config_name != CONFIGS[0]) and (directory / CONFIGS[0]).is_file():
                obsolete += [name for name in _names(directory, TOKENIZER) if name not in names]
            staged = directory / STAGED
            shutil.rmtree(staged, ignore_errors=True)
            try:
                staged.mkdir()
                put_safetensors(staged / weights_name, tensors, metadata)
                for name, content in texts.items():
                    (staged / name).write_bytes(content)
                (staged / OBSOLETE).write_text(json.dumps({"names": obsolete}), encoding="utf-8")
                for path in staged.iterdir():
                    sync(path)
                os.replace(staged, directory / WRITTEN)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
            settle(directory)


def settle(directory: Path):
    """Moves to their places the files of a save that was cut short after it was written. Mostly there is none.

    Raises ValueError where they cannot be moved, and where what lies there is not what a save leaves: a folder may come
    from a stranger, and no file outside of it is touched.
    """
    written = directory / WRITTEN
    if not os.path.lexists(written):
        return
    _wait_for_writers(directory)
    with writing("what a save that was cut short left to move", directory), locked(directory):
        if not os.path.lexists(written):
            return
        obsolete = _checked_leftovers(written)
        for name in obsolete:
            (directory / name).unlink(missing_ok=True)
        (written / OBSOLETE).unlink(missing_ok=True)
        waiting = sorted(path.name for path in written.iterdir())
        for name in waiting:
            if name in CONFIGS:
                (directory / name).unlink(missing_ok=True)
        for name in sorted(waiting, key=CONFIGS.__contains__):  # a config last
            os.replace(written / name, directory / name)
        written.rmdir()


def _wait_for_writers(directory: Path):
    """Who may not write the folder, and so cannot take its lock, waits for the one who is writing it."""
    end = time.monotonic() + PATIENCE
    while not os.access(directory, os.W_OK) and os.path.lexists(directory / WRITTEN) and time.monotonic() < end:
        time.sleep(0.01)


def _checked_leftovers(written: Path) -> list[str]:
    """The names that a save which was cut short wanted to remove. ValueError for what no save leaves."""
    patterns = [pattern for patterns in (*KINDS.values(), TOKENIZER, LICENCE) for pattern in patterns]

    def is_ours(name) -> bool:
        plain = isinstance(name, str) and Path(name).name == name
        return plain and any(fnmatchcase(name, pattern) for pattern in patterns)

    if written.is_dir() and not written.is_symlink():
        waiting = [path for path in written.iterdir() if path.name != OBSOLETE]
        obsolete = read_json(written / OBSOLETE).get("names") if (written / OBSOLETE).is_file() else []
        files = all(is_ours(path.name) and path.is_file() and not path.is_symlink() for path in waiting)
        if files and isinstance(obsolete, list) and all(map(is_ours, obsolete)):
            return obsolete
    raise ValueError(f"{written} is not what a save that was cut short leaves; if you did not put it there, remove it")


def check_free(directory: Path, names: tuple[str, ...], overwrite: bool = False) -> list[str]:
    """The names that must go where files of these `names` are written: parts of another thing that the folder holds.

    ValueError where there are any, and where files of these names belong to no model or adapter here, unless
    `overwrite`; and where a folder has one of the names.
    """
    settle(directory)
    for name in names:
        if (directory / name).is_dir():
            raise ValueError(f"{directory / name} is a folder, where a file is to be written")
    new = next(kind for kind, patterns in KINDS.items() if patterns[0] in names)
    found = {kind: _names(directory, patterns) for kind, patterns in KINDS.items()}
    ways = f"write {new} to another folder, or overwrite what is there (--overwrite, overwrite=True)"
    for kind, present in found.items():
        others = [name for name in present if name not in names]
        if others and not overwrite:
            what = f"{kind} of other files" if kind == new else kind
            raise ValueError(f"{directory} holds {what} ({others[0]}), and a folder holds one thing: {ways}")
    strangers = [] if any(found.values()) else [name for name in names if (directory / name).exists()]
    if strangers and not overwrite:
        raise ValueError(f"{directory} has a file {strangers[0]} that is of no model or adapter: {ways}")
    return [name for present in found.values() for name in present if name not in names]


Read = TypeVar("Read")


def read_whole(directory: Path, read: Callable[[], Read]) -> Read:
    """What `read` gives, read from one state of the folder: again, where a writer changed it in the meantime.

    Raises what `read` raises, and ValueError where the folder is written again and again.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        before = _state(directory)
        try:
            found = read()
        except (FileNotFoundError, ValueError):
            if _state(directory) == before:
                raise
        else:
            if _state(directory) == before:
                return found
    raise ValueError(f"{directory} is being written all the time; read it when that is over")


def _state(directory: Path) -> dict[str, tuple[int, int, int]]:
    """A mark of each file that tells, and of a save under way: other files have other marks."""
    names = [name for patterns in KINDS.values() for name in _names(directory, patterns)]
    state = {}
    for name in (*names, WRITTEN):
        with suppress(FileNotFoundError, NotADirectoryError):
            about = (directory / name).lstat()
            state[name] = about.st_ino, about.st_mtime_ns, about.st_size
    return state


def check_apart(out: Path, **sources: Path | None):
    """Raises ValueError where `out`, a folder to write, is one of the folders that the work reads from."""
    for name, source in sources.items():
        if source and out.resolve() == source.resolve():
            raise ValueError(f"{out} is the {name} itself, which would be lost; write to another folder (--out)")


def companions_of(directory: Path) -> dict[str, bytes]:
    """By name, the content of everything in a model's folder that belongs to the model and is no weight."""
    return {name: (directory / name).read_bytes() for name in _names(directory, (*TOKENIZER, *LICENCE))}


def _names(directory: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in directory.glob(pattern) if path.is_file()})
