"""What a checker says: numbers that can be told apart, all that fits, and whose fault an error is."""

import threading

import pytest
import torch

from minilora.exercises.catalog import EXERCISES
from minilora.exercises.checking import Wrong, difference, expect, run_property
from minilora.exercises.processes import can_fork
from minilora.exercises.runner import Result
from minilora.exercises.telling import tell


@pytest.mark.parametrize(
    "found, expected",
    [
        (16.743163, 16.743164),
        (1 / 3, 1 / 3 + 1e-9),
        (torch.tensor([1.0, 2.00001]), torch.tensor([1.0, 2.00002])),
        (torch.tensor(1 / 3).double(), torch.tensor(1 / 3, dtype=torch.float64)),
        (torch.tensor([1 / 3]), torch.tensor([1 / 3], dtype=torch.float64)),
        ([*range(200), 1], [*range(200), 2]),
        ([*range(200)], [*range(201)]),
        (5, 5.00000001),
    ],
)
def test_what_was_expected_and_what_came_differ_in_print(found, expected):
    told = difference(found, expected, 1e-14)
    wanted, _, got = told.removeprefix("at place").partition(", got ")
    assert told and wanted.partition("expected ")[2] != got.partition(":")[0], told


def test_all_slips_that_fit_are_named():
    with pytest.raises(Wrong) as caught:
        expect(4, 3, slips={"doubled": 4, "squared": lambda: 4, "right": 3, "halved": 2})
    assert caught.value.slip == "doubled -- or: squared"


def test_an_error_in_the_checkers_lines_is_told_as_what_it_is():
    def detached(draw):
        torch.autograd.grad(torch.ones(1).sum(), torch.ones(1, requires_grad=True))

    told = run_property("p", detached, 0, {})
    assert told["message"].startswith("what your code gave could not be used any further: RuntimeError")
    assert "detached" in told["slip"]
    namespace: dict = {}
    exec(compile("def mine():\n    return 1 / 0", "mine.py", "exec"), namespace)
    told = run_property("p", lambda draw: namespace["mine"](), 0, {"mine.py": "ex01.py"})
    assert told["message"].startswith("raised ZeroDivisionError") and "from line 2 of ex01.py" in told["message"]


def test_the_first_fault_is_told_in_full_and_each_further_one_in_a_line(capsys):
    first = {"message": "y: expected 1, got 2", "case": "x = 3", "slip": "not halved"}
    outcomes = {
        "a": {},
        "b": first,
        "c": {**first, "message": "z: expected 4"},
        "d": {"message": "long " * 99},
        "e": {},
    }
    tell(EXERCISES[2], Result(2, [*outcomes, "f"], True, outcomes), seed=3, printed="")
    head, *lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert head == "Exercise 02: The LoRA forward pass (seed 3)"
    assert lines[:5] == ["ok       a", "WRONG    b", "y: expected 1, got 2", "on x = 3", "likely: not halved"]
    assert lines[5:8] == ["WRONG    c", "the same as above", "WRONG    d"] and lines[8].startswith("long long")
    assert len(lines) == 11 and len(lines[8]) < 110 and lines[10] == "not run  f"


def test_a_process_with_threads_is_not_forked():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert not can_fork()
    stop.set()
    thread.join()
