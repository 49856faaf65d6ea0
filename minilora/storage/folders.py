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
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minilora.storage.files import json_text, put_safetensors, sync, writing
from minilora.storage.locks import locked

STAGED, WRITTEN = ".staged", ".written"
OBSOLETE = ".obsolete.json"  # in WRITTEN: the names that go when the new files come
CONFIGS = "config.json", "adapter_config.json"
# What a folder can hold, by the files that tell.
KINDS = {
    "a model": ("config.json", "model*.safetensors", "model.safetensors.index.json", "pytorch_model*"),
    "an adapter": ("adapter_config.json", "adapter_model*"),
}
# What belongs to a model and is no weight: tokenizer, chat template, ends of an answer, licence.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)


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
    """Replaces weights and the config that explains them, and with `companions` all other files of the thing.

    Raises ValueError, before anything is changed, as `check_free` does, and where the folder cannot be written.
    """
    texts = {config_name: json_text(directory / config_name, settings).encode(), **(companions or {})}
    names = (weights_name, *texts)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; saving needs a folder")
    with writing(weights_name, directory):
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            settle(directory)
            obsolete = check_free(directory, names, overwrite)
            if companions:  # those of the model that was here
                obsolete += [name for name in _names(directory, COMPANIONS) if name not in names]
            staged = directory / STAGED
            shutil.rmtree(staged, ignore_errors=True)
            try:
                staged.mkdir()
                put_safetensors(staged / weights_name, tensors, metadata)
                for name, content in texts.items():
                    (staged / name).write_bytes(content)
                (staged / OBSOLETE).write_text(json.dumps(obsolete), encoding="utf-8")
                for path in staged.iterdir():
                    sync(path)
                os.replace(staged, directory / WRITTEN)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
            settle(directory)


def settle(directory: Path):
    """Moves to their places the files of a save that was cut short after it was written. Mostly there is none."""
    written = directory / WRITTEN
    if not written.is_dir():
        return
    with writing("what a save that was cut short left to move", directory), locked(directory):
        if not written.is_dir():
            return
        if (written / OBSOLETE).is_file():
            for name in json.loads((written / OBSOLETE).read_text(encoding="utf-8")):
                (directory / name).unlink(missing_ok=True)
            (written / OBSOLETE).unlink()
        waiting = sorted(path.name for path in written.iterdir())
        for name in waiting:
            if name in CONFIGS:
                (directory / name).unlink(missing_ok=True)
        for name in sorted(waiting, key=CONFIGS.__contains__):  # a config last
            os.replace(written / name, directory / name)
        written.rmdir()


def check_free(directory: Path, names: tuple[str, ...], overwrite: bool = False) -> list[str]:
    """The names that must go where files of these `names` are written: parts of another thing that the folder holds.

    ValueError where there are any, unless `overwrite`.
    """
    new = next(kind for kind, patterns in KINDS.items() if patterns[0] in names)
    for kind, patterns in KINDS.items():
        others = [name for name in _names(directory, patterns) if name not in names]
        if others and not overwrite:
            what = f"{kind} of other files" if kind == new else kind
            raise ValueError(
                f"{directory} holds {what} ({others[0]}), and a folder holds one thing: "
                f"write {new} to another folder, or overwrite what is there (--overwrite, overwrite=True)"
            )
    return [name for patterns in KINDS.values() for name in _names(directory, patterns) if name not in names]


def check_apart(out: Path, **sources: Path | None):
    """Raises ValueError where `out` is one of the folders that the work reads from."""
    for name, source in sources.items():
        if source and out.resolve() == source.resolve():
            raise ValueError(f"--out {out} is the {name} itself, which would be lost; write to another folder")


def companions_of(directory: Path) -> dict[str, bytes]:
    """By name, the content of everything in a model's folder that belongs to the model and is no weight."""
    return {name: (directory / name).read_bytes() for name in _names(directory, COMPANIONS)}


def _names(directory: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in directory.glob(pattern) if path.is_file()})
