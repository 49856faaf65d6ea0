"""Files that are whole or not there: safetensors and JSON, written beside the target and renamed into place.

A program can be killed at any moment, also in the middle of a write. So a new file is first written in full under a
temporary name in the same folder, pushed to the disk (fsync), and only then renamed over the old one. The rename is
one atomic operation of the file system: whoever looks finds the old file or the new one, never a part of either. The
price is room for both files while the new one is written.

safetensors holds named tensors and a small dictionary of strings, and nothing that could run: unlike a pickle, a
file from a stranger can do no more than be wrong. Reading checks for that and says which file it was.
"""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minilora.storage.locks import locked

LARGEST = 3.4028234663852886e38  # of float32
DIGITS = 100  # of a number in JSON: more than any setting has, fewer than a float can hold


def make_folder(path: str | Path):
    """Makes the folder and its parents, before any long work begins. ValueError if nothing can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the output folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write into the output folder {path}: permission denied")


@contextmanager
def writing(name: str, folder: str | Path) -> Iterator[None]:
    """Turns what goes wrong in a write into a ValueError that says of which file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write {name} in the folder {folder}: {reason}") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path to write a new file to; on leaving, the file written there becomes `path`.

    Missing folders are made. The temporary file lies in a folder of its own beside `path`, which is removed at the
    end. After an error the old file is as it was. One program writes the file at a time (`locks`), and the leftovers of
    a killed one go with the next write. Raises ValueError where the file cannot be written.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.tmp")  # in the same folder: a rename across file systems is a copy
    with writing(path.name, path.parent):
        with locked(path):
            try:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                yield folder / path.name
                sync(folder / path.name)
                os.replace(folder / path.name, path)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def sync(file: Path):
    """Pushes a file to the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def put_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None):
    """Writes a file in place; equal contents are equal bytes. For a file that must be whole: `write_safetensors`."""
    path.touch()
    mode = path.stat().st_mode  # the user's own default; safetensors would leave the file private
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)
    if not metadata:
        return
    with path.open("rb+") as file:  # the library writes the strings in an order that changes from run to run
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length, "the same header in another order has another length"
        file.seek(8)
        file.write(text)


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None):
    """Writes named tensors of any shape and device, and strings beside them. ValueError if the file cannot be written.

    Two names must not share one memory (tied weights): write such a tensor under one name only.
    """
    with replacing(path) as temporary:
        put_safetensors(temporary, tensors, metadata)


def json_text(path: str | Path, value: dict) -> str:
    """A dictionary as indented JSON, for the file at `path`. ValueError if it holds NaN or infinity, which JSON does
    not have."""
    with naming(f"cannot write {path} as JSON"):
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | Path, value: dict):
    """Writes a dictionary as indented UTF-8 JSON. ValueError as `json_text`, and if the file cannot be written."""
    text = json_text(path, value)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> dict:
    """Reads a JSON file that holds one object. FileNotFoundError if there is none, ValueError if it is not that."""
    check_file(path)
    with naming(f"{path} is not valid JSON"):
        value = parse_json(Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, where an object with named fields is expected")
    return value


def parse_json(text: str | bytes, constants: bool = False) -> Any:
    """The value of a JSON text. constants: take NaN and Infinity too, which Python writes and JSON does not have.

    Raises ValueError also for what Python alone would take, or stumble over with another error: a field twice in one
    object, numbers that no float can hold, brackets nested too deeply.
    """

    def whole(digits: str) -> int:
        if len(digits) > DIGITS:
            raise ValueError(f"a number of {len(digits)} digits is larger than any that can be meant")
        return int(digits)

    def decimal(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError(f"the number {shown(digits)} is larger than any that a float can hold")
        return value

    def constant(name: str) -> float:
        if not constants:
            raise ValueError(f"{name} is no number in JSON")
        return float(name)

    def fields(pairs: list[tuple[str, Any]]) -> dict:
        if len(value := dict(pairs)) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"{shown(twice)} stands twice in one object")
        return value

    hooks: Any = dict(parse_int=whole, parse_float=decimal, parse_constant=constant, object_pairs_hook=fields)
    try:
        value = json.loads(text, **hooks)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a string in it holds half a character (a lone surrogate), which no text has") from None
    return value


def shown(value: Any) -> str:
    """A value of a file for a message, cut where it is long: nobody reads a thousand characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}... ({len(text)} characters)"


def open_safetensors(path: str | Path) -> safe_open:
    """Opens a file for reading, `with open_safetensors(path) as file`: `file.keys()`, `file.metadata()` (a dictionary
    or None), `file.get_slice(name).get_shape()` (reads no data) and `file.get_tensor(name)` (on the CPU).

    Raises FileNotFoundError if there is none, and ValueError if the file is truncated or its header does not fit it.
    """
    check_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); write or download it again") from error


def check_finite(tensor: Tensor, name: str, path: str | Path):
    """Raises ValueError, naming tensor and file, for a NaN, an infinity, or a number that is infinite in float32.

    The least and the largest value tell, since NaN counts as both: one pass over the numbers and nothing allocated,
    where `isfinite().all()` takes as long as the reading itself.
    """
    if not tensor.numel():
        return
    least, largest = (end.item() for end in tensor.detach().aminmax())
    if not (-LARGEST <= least and largest <= LARGEST):  # a comparison with NaN is False
        found = largest if -LARGEST <= least else least
        raise ValueError(
            f"tensor {name} in {path} holds {found}, where finite numbers are expected; the file is damaged"
        )


@contextmanager
def naming(what: str | Path) -> Iterator[None]:
    """Puts what a ValueError is about, such as a file, in front of its message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def check_file(path: str | Path):
    path = Path(path)
    if not path.is_file():
        advice = pickle_advice(path.parent) if path.suffix == ".safetensors" else ""
        raise FileNotFoundError(f"there is no file {path}{advice}")


def pickle_advice(folder: Path) -> str:
    """What to do where a folder holds its weights as a pickle."""
    found = next((path.name for path in sorted(folder.glob("*.bin"))), None)
    if found is None:
        return ""
    way = "read it with transformers or PEFT, whose save_pretrained writes safetensors"
    return f"; its {found} is a pickle, which can run code and is not opened here: {way}"


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tensors(where: str | Path, expected: Mapping[str, tuple], found: Mapping[str, tuple]):
    """Raises ValueError unless both hold the same names with the same shapes. The differences are named, of each kind
    the first three: an adapter of another model differs in hundreds."""
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in found]
    extra = [f"{name} {shape}" for name, shape in found.items() if name not in expected]
    both = sorted(expected.keys() & found.keys())
    wrong = [f"{key}: expected {expected[key]}, found {found[key]}" for key in both if expected[key] != found[key]]
    faults = {"missing": missing, "not expected": extra, "of the wrong shape": wrong}
    listed = {fault: names[:3] + [f"and {len(names) - 3} more"] * (len(names) > 3) for fault, names in faults.items()}
    problems = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in listed.items() if names)
    if problems:
        raise ValueError(f"{where} does not hold the tensors that it should: {problems}")
