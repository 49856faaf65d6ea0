"""The house itself: which names lead where, and how long its front rooms are."""

import importlib
import os
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__file__).parent
FRONT = ("lora", "model", "quant", "train", "memory")


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_name_hides_a_module():
    for found in pkgutil.walk_packages(minilora.__path__, "minilora."):
        if found.name.endswith("__main__") or (found.name == "minilora.serving.app" and not find_spec("starlette")):
            continue
        module = importlib.import_module(found.name)
        parent, _, leaf = found.name.rpartition(".")
        named = getattr(importlib.import_module(parent), leaf)
        assert named is module, f"{found.name} is a module, and {leaf} in {parent} is {named!r}"


def test_every_exported_name_is_there():
    assert minilora.__all__ == sorted(minilora.__all__, key=lambda name: (not name[0].isupper(), name))
    missing = [name for name in minilora.__all__ if not hasattr(minilora, name)]
    assert not missing, f"minilora exports {missing}, which it does not have"


def test_the_front_files_are_read_in_one_sitting_each():
    lengths = {name: lines_of(PACKAGE / f"{name}.py") for name in FRONT}
    assert sum(lengths.values()) < 1000, f"the five front files have {sum(lengths.values())} lines: {lengths}"
    assert lengths["lora"] < 110, f"lora.py has {lengths['lora']} lines; under 110 is the layer and nothing else"


def test_no_file_is_two_rooms():
    long = {str(path.relative_to(PACKAGE)): lines_of(path) for path in PACKAGE.rglob("*.py")}
    long = {name: length for name, length in long.items() if length > 300 and "catalog" not in name}
    assert not long, f"files of over 300 lines: {long}"


@pytest.mark.parametrize(
    "argument, policy, expected",
    [("-m", {}, "10000"), ("-c", {}, "None"), ("-m", {"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_only_the_command_line_shortens_the_spinning_of_waiting_threads(argument, policy, expected):
    code = f"import os, sys; sys.argv[0] = {argument!r}; import minilora; print(os.environ.get('GOMP_SPINCOUNT'))"
    theirs = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], env=theirs | policy, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected, f"GOMP_SPINCOUNT is {done.stdout.strip()}, expected {expected}"
