"""Exercises inside notebooks: their cells come from the catalog, and `check` grades what a cell defines."""

import json
import re
from pathlib import Path

import pytest

from minilora.exercises import notebook
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.notebook import cells, check

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
RIGHT = "def lora_scaling(r, lora_alpha, use_rslora=False):\n    return lora_alpha / (r**0.5 if use_rslora else r)\n"


@pytest.fixture
def shell():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    yield lambda text: shell.run_cell(text, store_history=True)
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_has_its_cells(number):
    (_, task), (kind, stub), check_cell, (_, below) = cells(number)
    assert task.startswith(f"### Exercise {number:02d}: {EXERCISES[number].title}") and kind == "code"
    compile(stub, "stub", "exec")
    assert "NotImplementedError" in stub and check_cell == ("code", f"check({number})")
    assert re.findall("<summary>(.*?)</summary>", below) == [
        "Hints",
        "The package's own code",
        "A question to answer in words",
    ]
    assert EXERCISES[number].answer in below
    asked = [name for names in EXERCISES[number].modules.values() for name in names]
    assert (notebook.OF_A_CLASS in task) == any("." in name for name in asked), asked


def test_the_stub_is_not_attempted_and_the_answer_right_or_wrong(shell, capsys):
    shell(cells(7)[1][1])
    check(7)
    assert capsys.readouterr().out.startswith("not attempted")
    shell(RIGHT.replace("r**0.5", "r**0.25"))
    check(7, seed=3)
    said = capsys.readouterr().out
    assert said.startswith("Exercise 07: rsLoRA's scaling (seed 3)") and "WRONG" in said
    shell("import math\n" + RIGHT)  # the latest cell counts
    shell("lora_scaling(8, 16)")
    shell("def broken(:\n")
    check(7)
    said = capsys.readouterr().out
    assert "WRONG" not in said and "  ok " in said, said


def test_whatever_is_asked_there_is_an_answer_and_no_exception(capsys, monkeypatch):
    check(99)
    assert "there is no exercise 99" in capsys.readouterr().out
    check(7)  # in no notebook at all
    assert "not attempted" in capsys.readouterr().out
    monkeypatch.setattr(notebook, "entered", lambda: ["def lora_scaling(r, lora_alpha, use_rslora=False):\n    x = \0"])
    check(7)
    assert "not attempted" in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_exercises_of_a_notebook_are_as_the_catalog_has_them(path):
    found: dict[int, list] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell.get("id", "").startswith("exercise-"):
            number = int(cell["id"].split("-")[1])
            found.setdefault(number, []).append((cell["cell_type"], "".join(cell["source"])))
    for number, there in found.items():
        assert EXERCISES[number].notebook == path.stem, f"exercise {number} belongs to {EXERCISES[number].notebook}"
        assert there == cells(number), f"the cells of exercise {number} are not those that `cells({number})` gives"
