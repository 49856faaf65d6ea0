"""What an exercise is, and the words its checker is written in.

An exercise names functions of the package that a student writes again, and lists properties that they must have. A
property is a function of a `Draw`, from which it takes random numbers and shapes, small ones first, so that what it
reports is a small case. It returns if all is well, and otherwise raises `Wrong`, mostly by way of `expect`:

    @EXERCISE.property("y = W x + b + s·B(A x)")
    def formula(draw):
        for most in SIZES:
            x = draw.normal(draw.integer(1, most), 3)
            expect(f(x), wanted(x), case={"x": x}, slips={"a mistake in one sentence": what_it_would_give(x)})

A slip is a known mistake together with the result it leads to. So the checker recognises it by what came out, however
the student came to it.
"""

import math
import random
import re
import tempfile
import traceback
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

SIZES = (2, 4, 12)  # the largest dimension of a case: the first that fails is the smallest
OR = " -- or: "  # between two slips that both fit
SHOWN = 12  # numbers of a tensor that are printed one by one
DIGITS = (0, 9, 17)  # that are tried until two numbers differ in print


class Wrong(Exception):
    """A property does not hold. `message` says what was expected and what came; `case` on what; `slip` why, perhaps."""

    def __init__(self, message: str, case: Mapping[str, Any] | None = None, slip: str = ""):
        super().__init__(message)
        self.message, self.case, self.slip = message, describe(case or {}), slip


@dataclass(frozen=True)
class Exercise:
    """One exercise. `targets` are "module:function" or "module:Class.method", modules named from minilora on."""

    number: int
    slug: str  # of its file: work/ex02_<slug>.py
    title: str
    targets: tuple[str, ...]
    difficulty: int  # 1 easy, 2 medium, 3 hard
    minutes: int
    notebook: str  # file name without .ipynb
    section: str  # the heading there that explains it
    explanation: str  # stands alone, in Markdown
    hints: tuple[str, str, str]
    question: str  # to be answered in words
    answer: str  # one in words, in Markdown
    # Beginnings of lines in notebooks and tests that give the answer away in other words than the package's.
    spoilers: tuple[str, ...] = ()
    properties: dict[str, Callable] = field(default_factory=dict)
    again: int | None = None  # the exercise whose function this one writes again, with more to it
    also: tuple[str, ...] = ()  # other functions that do what the solution does, blank in a hand-out too
    changes: tuple[str, ...] = ()  # those targets that change tensors, layers or lists that they are given
    beneath: dict[str, Callable] = field(default_factory=dict)  # by target of another exercise, what stands in for it
    inside: set[str] = field(default_factory=set)  # properties that must run in the process of the student's code

    @property
    def name(self) -> str:
        return f"ex{self.number:02d}_{self.slug}"

    @property
    def modules(self) -> dict[str, list[str]]:
        """By module, the names that are to be written there."""
        found: dict[str, list[str]] = {}
        for target in self.targets:
            module, name = target.split(":")
            found.setdefault(module, []).append(name)
        return found

    @property
    def files(self) -> dict[str, str]:
        """By module, the name of the student's file. Most exercises are of one module and have one file."""
        single = len(self.modules) == 1
        return {m: f"{self.name}.py" if single else f"{self.name}_{m.rpartition('.')[2]}.py" for m in self.modules}

    def property(self, statement: str, inside: bool = False) -> Callable:
        """inside: it looks into memory or autograd's graph, or replaces functions that the student's code calls, and
        so must run in the student's own process, where that code could meddle with it."""

        def add(function: Callable) -> Callable:
            assert statement not in self.properties, f"{self.name} has the property {statement!r} already"
            self.properties[statement] = function
            self.inside.update([statement] if inside else [])
            return function

        return add


class Draw:
    """Random numbers and shapes for one property: the same seed and name draw the same."""

    def __init__(self, seed: int, name: str = ""):
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))

    def integer(self, low: int, high: int) -> int:
        """low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options):
        return options[self.integer(0, len(options) - 1)]

    def normal(self, *shape: int, dtype=torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def number(self, low: float, high: float) -> float:
        """Uniform from low to high, with two digits, so that it reads well."""
        return round(low + (high - low) * float(torch.rand((), generator=self.generator)), 2)


def expect(
    found,
    expected,
    case: Mapping[str, Any] | None = None,
    slips: Mapping[str, Any] | None = None,
    what: str = "the result",
    tolerance: float = 1e-9,
):
    """Raises Wrong unless `found` is `expected`: tensors in shape and, relative to the largest, in value; others by ==.

    slips: by sentence, what that mistake leads to: a value, or a function that gives it. All that fit are named.
    tolerance: 0 asks for the same bits.
    """
    fault = difference(found, expected, tolerance)
    if not fault:
        return
    likely = []
    for sentence, wrong in (slips or {}).items():
        wrong = wrong() if callable(wrong) else wrong
        if not difference(found, wrong, max(tolerance, 1e-9)) and difference(wrong, expected, tolerance):
            likely.append(sentence)
    raise Wrong(f"{what}: {fault}", case, OR.join(likely))  # in a small case two mistakes can come to the same


def difference(found, expected, tolerance: float) -> str:
    """In words how `found` is not `expected`; "" if it is."""
    if not isinstance(expected, Tensor):
        if isinstance(expected, float) and isinstance(found, (int, float)):
            same = math.isclose(found, expected, rel_tol=tolerance, abs_tol=1e-12)
        else:
            same = type(found) is type(expected) and found == expected
        return "" if same else apart(found, expected)
    if not isinstance(found, Tensor):
        return f"expected a tensor of shape {tuple(expected.shape)}, got {type(found).__name__} {brief(repr(found))}"
    if found.shape != expected.shape:
        return f"expected shape {tuple(expected.shape)}, got {tuple(found.shape)}"
    if expected.is_floating_point() != found.is_floating_point():
        return f"expected numbers of type {expected.dtype}, got {found.dtype}"
    wide, wanted = found.detach().double(), expected.detach().double()
    if torch.equal(wide, wanted):
        return ""
    if not wide.isfinite().all() and wanted.isfinite().all():
        return f"expected finite numbers, got {show(found)} with NaN or infinity in it"
    off = (wide - wanted).abs()
    largest, scale = off.max().item() if off.numel() else 0.0, wanted.abs().max().item() if off.numel() else 0.0
    if largest <= tolerance * max(scale, 1e-30) if tolerance else torch.equal(wide, wanted):
        return ""
    if expected.numel() <= SHOWN:
        other = found.dtype != expected.dtype and show(found) == show(expected)
        digits = f"expected {show(expected)} in the digits of {expected.dtype}, got those of {found.dtype}"
        return f"{digits if other else apart(found, expected)}: off by up to {largest:.3g}"
    wrong = (off > tolerance * scale).double().mean().item() if math.isfinite(largest) else 1.0
    return (
        f"off by up to {largest:.3g} where the largest is {scale:.3g}; {wrong:.0%} of {off.numel()} numbers are wrong"
    )


def apart(found, expected) -> str:
    """ "expected ..., got ...", with as many digits as it takes to tell the two apart."""
    pairs = [(show(found, digits), show(expected, digits)) for digits in DIGITS]
    one, other = next(((one, other) for one, other in pairs if one != other), pairs[0])
    if one == other and isinstance(expected, (list, tuple)) and type(found) is type(expected):  # too long to be shown
        for place, (a, b) in enumerate(zip(found, expected, strict=False)):
            if a != b:
                return f"at place {place} of {len(expected)}: {apart(a, b)}"
        return f"expected {len(expected)} entries, got {len(found)}"
    kind = "" if type(found) is type(expected) else f"{type(found).__name__} "
    numbers = (one, other) != pairs[0] and isinstance(found, (int, float)) and isinstance(expected, float)
    return f"expected {other}, got {kind}{one}" + (f": off by {abs(found - expected):.3g}" if numbers else "")


def require(condition: bool, message: str, case: Mapping[str, Any] | None = None, slip: str = ""):
    """Raises Wrong with this message unless the condition holds."""
    if not condition:
        raise Wrong(message, case, slip)


def expect_error(function: Callable, names: tuple[str, ...] = (), case: Mapping | None = None, slip: str = ""):
    """Raises Wrong unless calling `function` raises ValueError with a message in which all of `names` occur."""
    try:
        function()
    except ValueError as error:
        absent = [name for name in names if name not in str(error)]
        if absent:
            message = f"the message of the ValueError should name {', '.join(absent)}; it is {brief(str(error))!r}"
            raise Wrong(message, case, slip) from None
        return
    raise Wrong("expected a ValueError, got no error", case, slip)


def show(value, digits: int = 0) -> str:
    """A value in few characters: small tensors as nested lists, others by their shape. digits: 0 is 6, in tensors 4."""
    if not isinstance(value, Tensor):
        return f"{value:.{digits or 6}g}" if isinstance(value, float) else brief(repr(value))
    if value.numel() > SHOWN:
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"

    def rounded(x):
        return (
            [rounded(y) for y in x]
            if isinstance(x, list)
            else float(f"{x:.{digits or 4}g}")
            if isinstance(x, float)
            else x
        )

    return str(rounded(value.detach().tolist()))


def describe(case: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {show(value)}" for name, value in case.items())


def brief(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def run_property(statement: str, function: Callable, seed: int, files: Mapping[str, str]) -> dict:
    """Runs one property: {} if it holds, else {"message", "case", "slip"}.

    files: by the name under which the student's code was compiled, what to call it.
    """
    for set_seed in (torch.manual_seed, random.seed, lambda seed: numpy.random.seed(seed % 2**32)):
        set_seed(seed)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    try:
        function(Draw(seed, statement))
        return {}
    except Wrong as wrong:
        fault = wrong.message, wrong.case, wrong.slip
    except (SystemExit, KeyboardInterrupt) as stop:
        fault = f"your code ended the program ({type(stop).__name__})", "", ""
    except NotImplementedError as error:
        ours = str(error).startswith("exercise ")  # torch has such errors too
        fault = (f"not written yet: {error}", "", "") if ours else blamed(error, files)
    except Exception as error:
        fault = blamed(error, files)
    return dict(zip(("message", "case", "slip"), map(tidy, fault), strict=True))


def tidy(text: str) -> str:
    """Without what differs from run to run: addresses of objects, and the names of temporary folders."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    return re.sub(re.escape(tempfile.gettempdir()) + r"[/\\]tmp\w+", "<temporary folder>", text)


def explain(error: BaseException, files: Mapping[str, str]) -> str:
    """An exception in one line, with the last line of the student's own code on its way."""
    if hasattr(error, "explained"):  # in the process in which it was raised
        return error.explained
    name, said = type(error).__name__, brief(" ".join(str(error).split()))
    text = f"stopped {said}" if name == "TooLong" else f"raised {name}: {said}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in files:
            return f"{text}, from line {frame.lineno} of {files[frame.filename]}: {brief(frame.line or '', 80)}"
    return text


# What torch says in the checker's own lines, when it goes on with what the student's code gave: whose fault that is.
LATE = {
    "not require grad": "something on the way is detached, or computed under no_grad",
    "been used in the graph": "something on the way is detached, or computed under no_grad",
    "returned an in": "backward returns one gradient for each argument of forward behind ctx, in that order, and each "
    "has the shape of its argument; None where there is none",
    "modified by an inplace operation": "a tensor that backward needs was changed in place: make a new one",
}


def blamed(error: Exception, files: Mapping[str, str]) -> tuple[str, str, str]:
    """message, case and slip of an exception. One raised beyond the student's code, by the checker's use of what that
    code gave back, says so: it is no fault of the checker's."""
    told, slip = explain(error, files), next((slip for text, slip in LATE.items() if text in str(error)), "")
    if hasattr(error, "explained") or ", from line " in told:
        return told, "", slip
    return f"what your code gave could not be used any further: {told.removeprefix('raised ')}", "", slip
