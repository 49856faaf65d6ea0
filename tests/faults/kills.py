"""A writer that is killed before each of its steps in the file system, one step after the other.

`python tests/faults/kills.py` runs every writer and prints the number of kills. After each, the folder must hold the
old thing or the new one, byte for byte; no moment may pair the weights of one with the config of the other; and the
next write must go through and leave no litter. The kill is `os._exit` in a forked process, so nothing is cleaned up.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch

from minilora import (
    GPT,
    GPTConfig,
    LoRAConfig,
    PrefixTuning,
    apply_lora,
    load_adapter,
    load_model,
    lora_layers,
    save_adapter,
    save_model,
)
from minilora.storage.files import read_json, replacing, write_json, write_safetensors
from minilora.storage.locks import locked
from minilora.storage.prompts import load_prompt, save_prompt

# Events of Python's audit hook that change a folder; each comes before the change.
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}
PAIRS = ("config.json", "model.safetensors"), ("adapter_config.json", "adapter_model.safetensors")
CONFIG = GPTConfig(16, 8, 12, 1, 2, 1, max_position_embeddings=16)


@dataclass
class Writer:
    """old: puts the folder into the state before; new: what is killed; read: raises where nothing whole is there."""

    old: Callable[[Path], object]
    new: Callable[[Path], object]
    read: Callable[[Path], object]


def model(seed: int) -> GPT:
    """Of one shape and different settings, so that weights under another's config would load without a word."""
    torch.manual_seed(seed)
    return GPT(replace(CONFIG, rope_theta=100.0 * (seed + 1)))


def adapted(seed: int) -> GPT:
    changed = apply_lora(model(0), LoRAConfig(seed, 2 * seed, target_modules=["q_proj"]))
    for _, layer in lora_layers(changed):
        layer.lora_B.data.fill_(seed)
    return changed


def prefix(seed: int) -> PrefixTuning:
    torch.manual_seed(seed)
    return PrefixTuning(model(0), seed)


def shards(folder: Path):
    """An older model in two files, and a tokenizer that the new model does not have."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, names = dict(model(1).named_parameters()), {}
    for number, name in enumerate(tensors):
        names[name] = f"model-0000{1 + number % 2}-of-00002.safetensors"
    for file in set(names.values()):
        write_safetensors(folder / file, {name: tensors[name] for name in names if names[name] == file})
    write_json(folder / "model.safetensors.index.json", {"weight_map": names})
    save_model(model(1), folder.parent / "one")
    shutil.copyfile(folder.parent / "one" / "config.json", folder / "config.json")
    (folder / "tokenizer.json").write_text("{}")


def figure(seed: int, path: Path):
    drawn, axes = plt.subplots(figsize=(1, 1))
    axes.plot([0, seed])
    with replacing(path) as temporary:
        drawn.savefig(temporary, dpi=20, metadata={"Software": None})
    plt.close(drawn)


def add(folder: Path, name: str):
    """As learning rates and a student's progress are stored: read, changed and written under one lock."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "store.json"
    with locked(path):
        write_json(path, (read_json(path) if path.is_file() else {}) | {name: 1})


def adapter(folder: Path) -> GPT:
    return load_adapter(model(0), folder)


def either(folder: Path) -> GPT:
    try:
        return load_model(folder)
    except FileNotFoundError:
        return adapter(folder)


def nothing(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)


def writers() -> dict[str, Writer]:
    companions = {"tokenizer.model": b"pieces", "tokenizer_config.json": b"{}"}
    one, two, image = {"a": torch.ones(2)}, {"a": torch.zeros(3)}, "loss.png"
    return {
        "a model": Writer(lambda f: save_model(model(1), f), lambda f: save_model(model(2), f), load_model),
        "a model in an empty folder": Writer(nothing, lambda f: save_model(model(2), f), load_model),
        "a model with its tokenizer": Writer(
            lambda f: save_model(model(1), f, {"tokenizer.json": b"{}"}),
            lambda f: save_model(model(2), f, companions),
            load_model,
        ),
        "a model over shards": Writer(
            shards, lambda f: save_model(model(2), f, companions, overwrite=True), load_model
        ),
        "a model over an adapter": Writer(
            lambda f: save_adapter(adapted(1), f),
            lambda f: save_model(model(2), f, overwrite=True),
            either,
        ),
        "an adapter": Writer(lambda f: save_adapter(adapted(1), f), lambda f: save_adapter(adapted(2), f), adapter),
        "an adapter in an empty folder": Writer(nothing, lambda f: save_adapter(adapted(2), f), adapter),
        "an adapter over a model": Writer(
            lambda f: save_model(model(1), f),
            lambda f: save_adapter(adapted(2), f, overwrite=True),
            either,
        ),
        "a prefix": Writer(
            lambda f: save_prompt(prefix(1), f), lambda f: save_prompt(prefix(2), f), lambda f: load_prompt(model(0), f)
        ),
        "a state": Writer(
            lambda f: write_safetensors(f / "s", one, {"a": "b"}), lambda f: write_safetensors(f / "s", two), nothing
        ),
        "a store": Writer(lambda f: add(f, "a"), lambda f: add(f, "b"), lambda f: read_json(f / "store.json")),
        "a figure": Writer(
            lambda f: figure(1, f / image), lambda f: figure(2, f / image), lambda f: plt.imread(f / image)
        ),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def run_killed(action: Callable[[Path], object], folder: Path, step: int) -> bool:
    """Runs the action in a process that dies before its change number `step`; whether it was over before that."""
    process = os.fork()
    if process == 0:
        done = 0

        def kill(event: str, arguments: tuple):
            nonlocal done
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES or writes:
                done += 1
                if done == step:
                    os._exit(9)

        torch.set_num_threads(1)
        sys.addaudithook(kill)
        try:
            action(folder)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9), f"the writer failed by itself at step {step}, exit status {code}"
    return code == 0


def kill_everywhere(name: str, writer: Writer, scratch: Path) -> dict[str, int]:
    """Counts what the folder held after each kill. AssertionError, with the step, for neither and for a mixture."""
    counts, step = {"old": 0, "new": 0}, 1
    writer.old(scratch / "old")
    writer.old(scratch / "new")
    writer.new(scratch / "new")
    old, new = contents(scratch / "old"), contents(scratch / "new")
    assert old != new, f"{name}: the two states are to be told apart"
    while True:
        folder = scratch / f"step{step}"
        writer.old(folder)
        over = run_killed(writer.new, folder, step)
        raw = contents(folder)
        for pair in PAIRS:
            if all(part in raw for part in pair):
                known = [[state.get(part) for part in pair] for state in (old, new)]
                assert [raw[part] for part in pair] in known, f"{name}, step {step}: weights and config do not belong"
        unread = shutil.copytree(folder, scratch / f"unread{step}")  # and what the next write finds where nobody read
        try:
            writer.read(folder)
        except FileNotFoundError:
            assert not old, f"{name}, step {step}: nothing can be read"
        after = contents(folder)
        assert after in (old, new), f"{name}, step {step}: neither the old nor the new, but {sorted(after)}"
        counts["new" if after == new else "old"] += 1
        for place in (folder, unread):
            writer.new(place)
            assert contents(place) == new, f"{name}, step {step}: the next write did not give the new state"
            litter = [path.name for path in place.iterdir() if path.name not in new]
            assert not litter, f"{name}, step {step}: the next write left {litter}"
            shutil.rmtree(place)
        if over:
            return counts
        step += 1


def main():
    total = 0
    with TemporaryDirectory() as scratch:
        for number, (name, writer) in enumerate(writers().items()):
            counts = kill_everywhere(name, writer, Path(scratch) / str(number))
            total += sum(counts.values())
            print(f"{name:<30} {sum(counts.values()):3d} kills: {counts['old']:3d} old, {counts['new']:3d} new")
    print(f"{total} kills, 0 left with neither")


if __name__ == "__main__":
    main()
