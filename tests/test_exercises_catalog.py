"""The graders are graded: for every exercise the package's code passes, a differently written solution passes, and
named mistakes fail, each with the sentence that belongs to it."""

import importlib
from itertools import combinations

import pytest
from mutants import failures, told

from minilora.exercises.attempts import stub
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.checking import difference, expect
from minilora.exercises.graft import Graft, package_sources

ANSWERS = {number: importlib.import_module(exercise.name) for number, exercise in EXERCISES.items()}
SOLUTIONS = [
    (n, each) for n, answers in ANSWERS.items() for each in [answers.SOLUTION, *getattr(answers, "FURTHER", [])]
]
MUTANTS = [(number, mutant) for number, answers in ANSWERS.items() for mutant in answers.MUTANTS]


@pytest.mark.parametrize("number", EXERCISES)
def test_package_code_passes_and_slips_can_be_told_apart(number, monkeypatch):
    """Two mistakes may come to the same in one case, and then both are named; in every case they must not."""
    module, apart = importlib.import_module(f"minilora.exercises.catalog.{EXERCISES[number].name}"), {}

    def noting(found, expected, case=None, slips=None, what="the result", tolerance=1e-9):
        made = {sentence: wrong() if callable(wrong) else wrong for sentence, wrong in (slips or {}).items()}
        for one, other in combinations(made, 2):
            same = not difference(made[one], made[other], max(tolerance, 1e-9))
            apart[one, other] = apart.get((one, other), False) or not same
        expect(found, expected, case, made, what, tolerance)

    monkeypatch.setattr(module, "expect", noting)
    sources = {module: text for module, (text, _) in package_sources(EXERCISES[number]).items()}
    for seed in (0, 1, 2):
        found = failures(EXERCISES[number], sources, seed)
        assert not found, f"seed {seed}: {told(found)}"
    alike = [pair for pair, ever in apart.items() if not ever]
    assert not alike, alike


@pytest.mark.parametrize("number, solution", SOLUTIONS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_other_solutions_pass(number, solution, seed):
    found = failures(EXERCISES[number], solution, seed)
    assert not found, told(found)


@pytest.mark.parametrize("number, mutant", MUTANTS, ids=[f"{number:02d} {mutant.name}" for number, mutant in MUTANTS])
def test_mutant_fails_with_its_message(number, mutant):
    for seed in (0, 1):
        found = failures(EXERCISES[number], mutant.applied_to(ANSWERS[number].SOLUTION), seed, mutant.says)
        assert found, f"the checker passes it with seed {seed}"
        assert mutant.says in told(found), told(found)


@pytest.mark.parametrize("number", EXERCISES)
def test_at_least_five_mutants(number):
    names = {mutant.name for mutant in ANSWERS[number].MUTANTS}
    assert len(names) == len(ANSWERS[number].MUTANTS) >= 5, f"{len(names)} named mutants"


@pytest.mark.parametrize("number", EXERCISES)
def test_in_a_handout_an_exercise_stands_on_those_before_it(number):
    """All else is blank there. Two look ahead: what LoRALinear starts with has 07's scaling in it, and a DoRA layer is
    switched off and merged by 21."""
    blank, written = Graft(), Graft()
    try:
        for exercise in EXERCISES.values():
            for module, names in exercise.modules.items():
                blank.file(module, names, stub(exercise, module, names), "blank.py")
        ahead = [7] if 3 <= number < 7 else [21] if number == 15 else []
        for earlier in [*range(1, number), *ahead]:
            for module, text in ANSWERS[earlier].SOLUTION.items():
                written.file(module, EXERCISES[earlier].modules[module], text, f"{earlier}.py")
        found = failures(EXERCISES[number], ANSWERS[number].SOLUTION, 0)
    finally:
        written.undo()
        blank.undo()
    assert not found, told(found)
