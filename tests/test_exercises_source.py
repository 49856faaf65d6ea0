"""Stubs from the source, and a student's functions in place of the package's: nothing else may change."""

import ast
import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import minilora.adapters.inject
import minilora.adapters.starts
import minilora.experiments.simulate
import minilora.lora
import minilora.quant
from minilora import LoRALinear, count_parameters
from minilora.adapters.dora import DoRALinear
from minilora.adapters.starts import STARTS_FROM_WEIGHT
from minilora.exercises import put_back, use
from minilora.exercises.attempts import ANSWER, instructions, stub
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.graft import Graft, grafted, package_sources
from minilora.exercises.source import blank, body_lines, definition, find, is_blank, read_module, solution, written
from minilora.fast import FastLoRALinear
from minilora.levels import LEVELS

ROOT = Path(__file__).parents[1]
TARGETS = [(exercise, *target.split(":")) for exercise in EXERCISES.values() for target in exercise.targets]
EXAMPLE = '''"""A module."""

def plain(x):  # a comment
    """Says what.

    And more.
    """
    # how
    y = x  \\
        + 1

    return y


class Thing:
    @property
    def size(
        self,
    ) -> int:
        # first a comment
        return 3  # the end

    def rest(self): return 1
'''


@pytest.fixture(autouse=True)
def own_code_afterwards():
    yield
    put_back()


def test_blank_changes_the_body_and_no_other_byte():
    expected = EXAMPLE.replace(
        "    # how\n    y = x  \\\n        + 1\n\n    return y\n", '    raise NotImplementedError("ex: plain")\n'
    ).replace(
        "        # first a comment\n        return 3  # the end\n",
        '        raise NotImplementedError("ex: Thing.size")\n',
    )
    assert blank(EXAMPLE, ["plain", "Thing.size"], "ex") == expected


@pytest.mark.parametrize("exercise, module, name", TARGETS, ids=[f"{m}:{n}" for _, m, n in TARGETS])
def test_stub_is_the_source_but_for_the_bodies(exercise, module, name):
    text = read_module(module)
    numbers, node = body_lines(text, name), find(ast.parse(text), name)
    assert not is_blank(node), f"{module}:{name} is blank in the package"
    stubbed = blank(text, [name], "exercise")
    before, after = text.splitlines(keepends=True), stubbed.splitlines(keepends=True)
    assert after[: numbers.start] == before[: numbers.start]
    assert after[numbers.start + 1 :] == before[numbers.stop :]
    assert is_blank(find(ast.parse(stubbed), name))
    assert ast.get_docstring(find(ast.parse(stubbed), name)) == ast.get_docstring(node)
    whole = stub(exercise, module, exercise.modules[module])
    assert not written(whole, exercise.modules[module]) and written(text, [name])
    assert not set(filter(str.strip, solution(text, name))) & set(definition(whole, name).splitlines())
    assert len(whole.splitlines()) <= 65 and max(map(len, whole.splitlines())) <= 120
    for other, its_module, its_name in TARGETS:
        if its_module == module:
            given = {line.strip() for line in solution(text, its_name) if len(line.strip()) > 25}
            assert not given & {line.strip() for line in whole.splitlines()}, (
                f"the stub tells of exercise {other.number}"
            )


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda exercise: exercise.name)
def test_exercise_is_complete(exercise):
    assert exercise.difficulty in (1, 2, 3) and 5 <= exercise.minutes <= 120 and len(exercise.title) <= 50
    book = json.loads((ROOT / "notebooks" / f"{exercise.notebook}.ipynb").read_text(encoding="utf-8"))
    cells = [
        (cell["cell_type"], line.strip()) for cell in book["cells"] for line in "".join(cell["source"]).splitlines()
    ]
    headings = {line.lstrip("# ") for kind, line in cells if kind == "markdown" and line.startswith("#")}
    assert exercise.section in headings, f"{exercise.notebook} has no section {exercise.section!r}"
    link, own = f"{exercise.number:02d} “{exercise.title}”", f"### Exercise {exercise.number:02d}: {exercise.title}"
    assert any(link in line or line == own for _, line in cells), f"{exercise.notebook} does not lead to {link}"
    assert len(set(exercise.hints)) == 3 and "?" in exercise.question and 50 <= len(exercise.answer.split()) <= 130
    assert 4 <= len(exercise.properties) <= 12
    books = [path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("*.ipynb")]
    for spoiler in exercise.spoilers:
        assert any(json.dumps(spoiler, ensure_ascii=False)[1:-1] in text for text in books), f"{spoiler!r} is nowhere"
    assert instructions(exercise).endswith(f"{ANSWER}\n\n")


def test_exercises_are_numbered_and_no_function_is_asked_for_twice():
    assert list(EXERCISES) == list(range(1, len(EXERCISES) + 1))
    targets = [target for exercise in EXERCISES.values() if exercise.again is None for target in exercise.targets]
    assert len(set(targets)) == len(targets)
    for exercise in EXERCISES.values():
        if exercise.again is not None:
            assert exercise.targets == EXERCISES[exercise.again].targets and exercise.again < exercise.number
    files = [name for exercise in EXERCISES.values() for name in exercise.files.values()]
    assert len(set(files)) == len(files)


def test_a_function_is_replaced_for_all_who_hold_it():
    model = nn.Linear(2, 2)
    held, before = [count_parameters], count_parameters(model)
    graft = Graft()
    graft.file(
        "adapters.inject", ["count_parameters"], "def count_parameters(model):\n    return 'mine', re", "mine.py"
    )
    for function in (
        count_parameters,
        held[0],
        minilora.count_parameters,
        minilora.experiments.simulate.count_parameters,
    ):
        assert function(model)[0] == "mine", "an importer still has the old function"
    assert count_parameters(model)[1] is minilora.adapters.inject.re, "the module's own names are not seen"
    graft.undo()
    assert count_parameters(model) == before


@pytest.mark.parametrize("decorator", ["@torch.no_grad()", "@functools.cache", "@functools.wraps(print)"])
def test_a_decorated_function_is_replaced_as_well(decorator):
    text = (
        f"import functools\nimport torch\nlayer = 1 / 0\n{decorator}\ndef count_parameters(model):\n    return 'mine'"
    )
    graft = Graft()
    graft.file("adapters.inject", ["count_parameters"], text, "mine.py")
    assert minilora.count_parameters(3) == "mine"
    graft.undo()
    assert count_parameters(nn.Linear(1, 1)) == (2, 2)


def test_helpers_of_two_files_do_not_meet_unless_they_differ():
    text = (
        "from itertools import {}\nx = 1\nx = x + {}\n"
        "class LoRALinear:\n    ONE = 1\n    def {}(self):\n        return chain, x"
    )
    files = text.format("chain, product", 1, "merge"), text.format("product, chain, repeat", 1, "unmerge")
    graft = Graft()
    graft.file("lora", ["LoRALinear.merge"], files[0], "first.py")
    graft.undo()
    graft.file("lora", ["LoRALinear.merge"], files[0], "first.py")
    graft.file("lora", ["LoRALinear.unmerge"], files[1], "second.py")
    assert LoRALinear.merge(None) == LoRALinear.unmerge(None) and LoRALinear.ONE == 1
    with pytest.raises(ValueError, match="second.py and first.py both define x"):
        graft.file("lora", ["LoRALinear.unmerge"], text.format("chain", 2, "unmerge"), "second.py")
    graft.undo()
    assert not hasattr(LoRALinear, "ONE") and not hasattr(minilora.lora, "x")


def test_tables_made_from_a_function_are_made_anew():
    before = LEVELS["int4"].clone()
    graft = Graft()
    graft.file("levels", ["int4_levels"], "def int4_levels():\n    return torch.arange(16) / 15", "mine.py")
    assert torch.equal(LEVELS["int4"], torch.arange(16) / 15)
    codes, one = torch.tensor([0xF0], dtype=torch.uint8), torch.ones(1)
    assert minilora.quant.dequantize_blocks(codes, one, "int4", 16, [2], torch.float32).tolist() == [1, 0]
    graft.undo()
    assert torch.equal(LEVELS["int4"], before)


def test_methods_helpers_imports_and_super():
    text = """
from __future__ import annotations
import math, statistics as numbers
from fractions import Fraction

TWO: int = 2
HALF = Fraction(1, TWO)
try:
    import no_such_package as fast
except ImportError:
    fast = None

def merge(self):
    return "a function of the same name, and not the method"

def helper(x: NoSuchName) -> int:
    return numbers.mean([x, x])

class LoRALinear:
    def merge(self) -> NoSuchName:
        return self.newly(3) * HALF

    def newly(self, x):
        return helper(x)

    def unmerge(self):
        raise NotImplementedError("the stub, and further down the answer")

    def unmerge(self):
        return super().__repr__()[:10], __class__, fast

    def extra_repr(self):
        return "not an exercise, and not taken"

print("not taken", 1 / 0)
"""
    layer = LoRALinear(nn.Linear(2, 2), 1, 1)
    names = set(vars(minilora.lora)), set(vars(LoRALinear))
    methods = LoRALinear.merge, LoRALinear.unmerge
    graft = Graft()
    graft.file("lora", ["LoRALinear.merge", "LoRALinear.unmerge"], text, "mine.py")
    assert layer.merge() == 1.5
    assert layer.unmerge() == ("LoRALinear", LoRALinear, None)
    assert layer.extra_repr().startswith("r=1")
    graft.undo()
    assert (LoRALinear.merge, LoRALinear.unmerge) == methods
    assert (set(vars(minilora.lora)), set(vars(LoRALinear))) == names, "something was left behind"


def test_init_with_super_works_on_a_subclass():
    text = """
class DoRALinear:
    def __init__(self, base_layer, r, lora_alpha, lora_dropout=0.0, use_rslora=False):
        super().__init__(base_layer, r, 2 * lora_alpha)
        self.mine = True
"""
    graft = Graft()
    graft.file("adapters.dora", ["DoRALinear.__init__"], text, "mine.py")
    layer = DoRALinear(nn.Linear(2, 2), 1, 3)
    assert layer.mine and layer.scaling == 6
    graft.undo()
    assert not hasattr(DoRALinear(nn.Linear(2, 2), 1, 3), "mine")


@pytest.mark.parametrize(
    "text, fault",
    [
        ("def other(): pass", "no function count_parameters"),
        ("def count_parameters(:", "invalid syntax"),
        ("x = 1 / 0\ndef count_parameters(model): return x", "division by zero"),
    ],
)
def test_a_file_that_cannot_be_used_says_why_and_changes_nothing(text, fault):
    exercise = EXERCISES[1]
    code = count_parameters.__code__
    with pytest.raises((ValueError, SyntaxError, ZeroDivisionError), match=fault):
        with grafted(exercise, {"adapters.inject": (text, "mine.py")}):
            pass
    assert count_parameters.__code__ is code


def test_the_package_on_its_own_source_is_the_package():
    for exercise in EXERCISES.values():
        with grafted(exercise, package_sources(exercise)):
            pass
    assert STARTS_FROM_WEIGHT["pissa"] is minilora.adapters.starts.pissa


def test_use_takes_what_is_written_and_put_back_undoes_it(tmp_path):
    merge, start = EXERCISES[5], EXERCISES[3]
    mine = stub(merge, "lora", merge.modules["lora"]).replace(
        'raise NotImplementedError("exercise 05: LoRALinear.delta_weight")', "return 'mine'"
    )
    (tmp_path / merge.files["lora"]).write_text(mine, encoding="utf-8")
    (tmp_path / start.files["lora"]).write_text(stub(start, "lora", start.modules["lora"]), encoding="utf-8")
    assert use(tmp_path) == ["lora:LoRALinear.delta_weight"]
    layer = LoRALinear(nn.Linear(2, 2), 1, 1)
    assert layer.delta_weight() == "mine"
    layer.unmerge()
    assert layer(torch.ones(2)).shape == (2,), "a stub took the place of working code"
    put_back()
    assert layer.delta_weight().shape == (2, 2)


def test_a_stub_has_what_it_needs_to_be_understood():
    text = stub(EXERCISES[2], "lora", EXERCISES[2].modules["lora"])
    assert "from torch.nn import functional as F" in text and "def merge(" not in text
    text = stub(EXERCISES[21], "lora", EXERCISES[21].modules["lora"])
    assert "def factors(self) -> tuple[Tensor, Tensor]:" in text and "torch.cat" not in text
    text = stub(EXERCISES[4], "adapters.inject", EXERCISES[4].modules["adapters.inject"])
    assert "from minilora.adapters.inject import linear_layers" in text and "import replace_module" in text


def test_of_one_function_that_is_asked_for_twice_the_later_counts(tmp_path):
    first, again = EXERCISES[2], EXERCISES[21]
    text = "def helper():\n    return {}\n\nclass LoRALinear:\n    def forward(self, x):\n        return helper()\n"
    (tmp_path / first.files["lora"]).write_text(text.format(2), encoding="utf-8")
    (tmp_path / again.files["lora"]).write_text(stub(again, "lora", again.modules["lora"]), encoding="utf-8")
    layer = LoRALinear(nn.Linear(2, 2), 1, 1)
    assert use(tmp_path) == ["lora:LoRALinear.forward"] and layer(torch.ones(2)) == 2
    (tmp_path / again.files["lora"]).write_text(text.format(21), encoding="utf-8")
    assert use(tmp_path) == ["lora:LoRALinear.forward"] and layer(torch.ones(2)) == 21


def test_models_run_on_a_forward_that_is_used_until_the_fast_one_is_written(tmp_path):
    forward, cheap = EXERCISES[2], EXERCISES[18]
    own, layer, x = FastLoRALinear.forward, FastLoRALinear(nn.Linear(2, 2), 1, 1), torch.ones(3, 2)
    y = layer(x)
    mine = "class LoRALinear:\n    def forward(self, x):\n        return 'mine'\n"
    (tmp_path / forward.files["lora"]).write_text(mine, encoding="utf-8")
    (tmp_path / cheap.files["fast"]).write_text(stub(cheap, "fast", cheap.modules["fast"]), encoding="utf-8")
    assert use(tmp_path) == ["lora:LoRALinear.forward"] and layer(x) == "mine"
    written_anew = importlib.import_module(cheap.name).SOLUTION["fast"]
    (tmp_path / cheap.files["fast"]).write_text(written_anew, encoding="utf-8")
    assert len(use(tmp_path)) == 5 and torch.allclose(layer(x), y), "exercise 18 is whole, and not in use"
    layer.enabled = False
    assert layer(x) == "mine"
    put_back()
    assert FastLoRALinear.forward is own and torch.equal(layer(x), layer.base_layer(x))


def test_use_refuses_by_name_and_leaves_the_package_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        use(tmp_path / "nothing")
    first, second = EXERCISES[2], EXERCISES[5]
    helper = "def helper():\n    return {}\n\n"
    forward = "class LoRALinear:\n    def forward(self, x):\n        return helper()\n"
    merge = "class LoRALinear:\n" + "".join(
        f"    def {name.partition('.')[2]}(self, *args):\n        return helper()\n" for name in second.modules["lora"]
    )
    before = LoRALinear.forward
    (tmp_path / first.files["lora"]).write_text(helper.format(1) + forward, encoding="utf-8")
    (tmp_path / second.files["lora"]).write_text(helper.format(2) + merge, encoding="utf-8")
    with pytest.raises(ValueError, match="both define helper"):
        use(tmp_path)
    assert LoRALinear.forward is before and not hasattr(minilora.lora, "helper")
    (tmp_path / second.files["lora"]).write_text(helper.format(1) + merge, encoding="utf-8")
    assert len(use(tmp_path)) == 1 + len(second.modules["lora"])
    (tmp_path / second.files["lora"]).write_text("import no_such_thing as helper\n" + merge, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{second.files['lora']} cannot be used: ModuleNotFoundError"):
        use(tmp_path)
    (tmp_path / second.files["lora"]).write_text("def (", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{second.files['lora']} is not Python: .* line 1"):
        use(tmp_path)
    assert LoRALinear.forward is before
