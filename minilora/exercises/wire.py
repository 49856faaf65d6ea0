"""Arguments and results of a call between two processes: whole object graphs, as JSON and the bytes of tensors.

A student's function gets layers, models and tensors, may change them, and its caller looks at what became of them. So
a call carries over all that its arguments lead to, and the answer carries the same objects back, as they are now, with
whatever is new. On either side an object has a number; what comes back under a known number is written into the object
that was sent. Tensors that share memory, or are views, do so on the other side too.

Nothing that could run crosses: values, tensors, containers, and objects of classes of torch.nn and of this package,
made without calling them. Any other object stays where it is, and a handle (`Opaque`) crosses in its place.
"""

import pathlib
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, ItemsView, KeysView, ValuesView
from types import GeneratorType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from minilora.exercises.pipe import Broken

ITEMS = 100_000  # values in one message
PLAIN = (bool, int, float, str, type(None))
CONTAINERS = {"list": list, "dict": dict, "OrderedDict": OrderedDict, "set": set}
LAZY = (map, filter, zip, GeneratorType, KeysView, ValuesView, ItemsView)
FOREIGN: set[type] = set()  # classes of the student's own, which the other process does not have


class Opaque:
    """Stands for an object of the other process that cannot cross."""

    def __init__(self, kind: str, number: int):
        self.__dict__.update(kind=kind, number=number)

    def __repr__(self) -> str:
        return f"an object of the class {self.kind}"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(f"an object of the class {self.kind}, which the checker cannot look into")


def class_name(kind: type) -> str | None:
    """The name under which the other process finds the class, or None."""
    name = f"{kind.__module__}:{kind.__qualname__}"
    return name if find_class(name) is kind and kind not in FOREIGN else None


def find_class(name: str) -> type | None:
    """A class of torch.nn, of this package or of a catalog file. A student's code may have sent the name: nothing is
    imported for it."""
    module, _, path = name.partition(":")
    inner = module.startswith("minilora.exercises.") and not module.startswith("minilora.exercises.catalog.")
    if inner or not module.startswith(("torch.nn.", "minilora.")):
        return None
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found if isinstance(found, type) and not issubclass(found, BaseException) else None


class Wire:
    """The objects of one call. `kept` holds, for as long as the process lives, the objects that handles stand for."""

    def __init__(self, kept: dict[int, Any], mine: str):
        self.kept, self.mine = kept, mine  # mine: which side this is
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}  # by id of the object
        self.storages: dict[int, Any] = {}
        self.storage_numbers: dict[int, int] = {}
        self.sent: dict[int, bytes] = {}  # of each storage, what the other side knows
        self.roots: dict[int, tuple[Tensor, Any]] = {}  # tensors with a history: their leaf here, and that history

    def name(self, value) -> int:
        if id(value) not in self.numbers:
            number = len(self.objects)
            self.numbers[id(value)], self.objects[number] = number, value
        return self.numbers[id(value)]

    # Encoding.

    def encode(self, value) -> tuple[dict, bytes]:
        self.items, self.queue = 0, [*self.objects]
        self.waiting = set(self.queue)
        encoded, contents, geometry = self.shallow(value), {}, {}
        for number in self.queue:  # grows on the way
            contents[number] = self.content(self.objects[number])
        blob = []
        for number, storage in self.storages.items():
            content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
            if self.sent.get(number) != content:
                geometry[number] = len(content)
                blob.append(content)
                self.sent[number] = content
        return {"value": encoded, "contents": contents, "storages": geometry}, b"".join(blob)

    def shallow(self, value):
        """A value inside a message; what may be changed or shared is a number, and its content is sent once."""
        kind, self.items = type(value), self.items + 1
        if self.items > ITEMS:
            raise OverflowError(f"more than {ITEMS:,} values are too much to carry over to the checker")
        if kind in PLAIN:
            return value
        if kind is tuple or kind is torch.Size:
            return [kind.__name__, [self.shallow(item) for item in value]]
        if isinstance(value, (torch.dtype, torch.device)):
            return [type(value).__name__, str(value).removeprefix("torch.")]
        if kind is bytes:
            return ["bytes", value.hex()]
        if kind in (slice, range):
            return [kind.__name__, [value.start, value.stop, value.step]]
        if isinstance(value, pathlib.PurePath):
            return ["path", str(value)]
        if isinstance(value, numpy.generic) and kind.__name__ != "object_":
            return ["numpy", [value.dtype.name, value.item()]]
        if isinstance(value, type) and class_name(value):
            return ["class", class_name(value)]
        if isinstance(value, Opaque):
            return ["mine", value.number]  # it comes home
        number = self.name(value)
        if number not in self.waiting:
            self.waiting.add(number)
            self.queue.append(number)
        return ["ref", number]

    def content(self, value) -> list:
        kind = type(value)
        if kind is Opaque:
            return ["opaque", [value.kind, value.number]]
        if isinstance(value, Tensor) and kind in (Tensor, nn.Parameter) and value.layout is torch.strided:
            return ["tensor", self.tensor(value)]
        if kind is defaultdict:
            kind = dict
        if kind in (dict, OrderedDict):
            return [kind.__name__, [[self.shallow(key), self.shallow(item)] for key, item in value.items()]]
        if kind in (list, set):
            return [kind.__name__, [self.shallow(item) for item in value]]
        if isinstance(value, LAZY):
            return ["list", [self.shallow(item) for item in value]]
        if hasattr(value, "__dict__") and not isinstance(value, type) and (name := class_name(kind)):
            return ["object", [name, [[key, self.shallow(item)] for key, item in vars(value).items()]]]
        self.kept[id(value)] = value
        return ["opaque", [kind.__qualname__, id(value)]]

    def tensor(self, t: Tensor) -> dict:
        about: dict[str, Any] = {
            "dtype": str(t.dtype).removeprefix("torch."),
            "size": list(t.shape),
            "stride": list(t.stride()),
        }
        about |= {"offset": t.storage_offset(), "grad": t.requires_grad, "parameter": isinstance(t, nn.Parameter)}
        history = self.roots.get(self.numbers[id(t)], (None, None))[1]
        about["history"] = None if t.grad_fn is None else "old" if t.grad_fn is history else "new"
        if t.device.type == "meta":
            return about | {"storage": None}
        storage = t.untyped_storage()
        number = self.storage_numbers.setdefault(storage._cdata, len(self.storages))
        self.storages.setdefault(number, storage)
        return about | {"storage": number}

    # Decoding.

    def decode(self, message: dict, blob: bytes):
        """The value. Objects that are known become what the other side made of them. Broken if it is no message."""
        try:
            self.take_storages(message["storages"], blob)
            contents = {int(number): content for number, content in message["contents"].items()}
            new = [number for number in contents if number not in self.objects]
            if new != list(range(len(self.objects), len(self.objects) + len(new))):
                raise Broken("objects without a number")
            for number, (kind, content) in contents.items():
                if number not in self.objects:
                    self.name(self.shell(kind, content, number))
                elif kind == "tensor":
                    self.update_tensor(number, content)
            self.connect(contents)
            for number, (kind, content) in contents.items():
                self.fill(self.objects[number], kind, content)
            return self.value(message["value"])
        except (LookupError, TypeError, AttributeError, RuntimeError, ValueError, OverflowError) as error:
            raise Broken(f"{type(error).__name__}: {error}") from error

    def connect(self, contents: dict):
        """For the side that has something to do about tensors with a history over there."""

    def take_storages(self, geometry: dict, blob: bytes):
        start = 0
        for number, size in ((int(number), size) for number, size in geometry.items()):
            content, start = blob[start : start + size], start + size
            if len(content) != size:
                raise Broken("fewer bytes than announced")
            if size:
                made = torch.frombuffer(bytearray(content), dtype=torch.uint8).clone()
            else:
                made = torch.empty(0, dtype=torch.uint8)
            if number in self.storages and self.storages[number].nbytes() == size:
                torch.empty(0, dtype=torch.uint8).set_(self.storages[number]).copy_(made)
            else:
                if number in self.storages:  # its address may be another's soon
                    del self.storage_numbers[self.storages[number]._cdata]
                self.storages[number] = made.untyped_storage()
                self.storage_numbers[self.storages[number]._cdata] = number
            self.sent[number] = content

    def value(self, encoded):
        if type(encoded) in PLAIN:
            return encoded
        kind, content = encoded
        if kind == "ref":
            return self.objects[content]
        if kind in ("tuple", "Size"):
            items = tuple(self.value(item) for item in content)
            return items if kind == "tuple" else torch.Size(items)
        simple: dict[str, Callable] = {
            "dtype": lambda: getattr(torch, content),
            "device": lambda: torch.device(content),
            "bytes": lambda: bytes.fromhex(content),
            "slice": lambda: slice(*content),
            "range": lambda: range(*content),
            "path": lambda: pathlib.Path(content),
            "numpy": lambda: numpy.dtype(content[0]).type(content[1]),
            "class": lambda: find_class(content),
            "mine": lambda: self.kept[content],
        }
        made = simple[kind]()
        if kind == "dtype" and not isinstance(made, torch.dtype):
            raise Broken("no dtype")
        return made

    def shell(self, kind: str, content, number: int):
        """A new object, still empty but for tensors."""
        if kind == "tensor":
            return self.new_tensor(content, number)
        if kind == "opaque":
            return Opaque(*content)
        if kind == "object":
            return object.__new__(find_class(content[0]) or Opaque)  # an Opaque is refused when it is filled
        return CONTAINERS[kind]()

    def fill(self, target, kind: str, content):
        if kind == "object":
            if type(target) is not find_class(content[0]):
                raise Broken("an object of another class")
            filled = {key: self.value(item) for key, item in content[1]}
            vars(target).clear()
            vars(target).update(filled)
        elif kind in CONTAINERS:
            if type(target) not in (CONTAINERS[kind], defaultdict, *LAZY):
                raise Broken("a container of another kind")
            if kind == "list":
                if isinstance(target, list):
                    target[:] = [self.value(item) for item in content]
            else:
                pair = kind != "set"
                items = [tuple(map(self.value, item)) if pair else self.value(item) for item in content]
                target.clear(), target.update(items)

    def placed(self, about: dict) -> Tensor:
        """The numbers of a tensor where they lie."""
        dtype, size, stride = getattr(torch, about["dtype"]), about["size"], about["stride"]
        if about["storage"] is None:
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        storage, offset = self.storages[about["storage"]], about["offset"]
        if min([*size, *stride, offset], default=0) < 0 or len(size) != len(stride):
            raise Broken("a tensor of negative size")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if 0 not in size else 0
        if last * dtype.itemsize > storage.nbytes():
            raise Broken("a tensor beyond its storage")
        return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)

    def new_tensor(self, about: dict, number: int) -> Tensor:
        made = self.placed(about)
        if about["parameter"]:
            made = nn.Parameter(made, about["grad"])
        elif about["history"] and self.mine == "student":
            leaf = made.clone().requires_grad_()
            made = leaf.clone()  # here it has a history as well, which begins at the leaf
            made.data = self.placed(about)
            self.roots[number] = leaf, made.grad_fn
        elif about["grad"] and not about["history"]:
            made.requires_grad_()
        return made

    def update_tensor(self, number: int, about: dict):
        known = self.objects[number]
        if not isinstance(known, Tensor):
            raise Broken("an object of another class")
        now = self.placed(about)
        alike = (known.dtype, known.shape, known.is_meta) == (now.dtype, now.shape, now.is_meta)
        if not alike or not (now.is_meta or known.is_set_to(now)):
            known.data = now
        if known.is_leaf and known.requires_grad != about["grad"] and not about["history"]:
            known.requires_grad_(about["grad"])
