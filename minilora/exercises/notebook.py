"""Exercises where the reading happens: the cells of one, and `check(2)`, which grades what a cell above has defined.

A notebook has three cells for an exercise, and this module makes them from the catalog and the package's source, so
that they cannot drift:

    the task      in words, with its title, minutes and stars
    the stub      what is to be written, which raises NotImplementedError until it is
    check(2)      and below it, folded: hints, the package's solution, and the question with an answer

`check` takes the source of the last cell that defines what the exercise asks for, together with the import lines of
that cell: the same text that the command line takes from a file. What such a cell uses of other cells must stand in it.
"""

import ast
import secrets
import sys
import tempfile
from pathlib import Path

from minilora.exercises import attempts
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.checking import Exercise
from minilora.exercises.runner import run
from minilora.exercises.source import definition, is_released, read_module
from minilora.exercises.telling import tell

Cell = tuple[str, str]  # "markdown" or "code", and the text
OF_A_CLASS = (
    "Of a class the cell below has only what you write; `check` puts it into the package's own, which has the rest."
)


def cells(number: int, solved: bool = True, hints: bool = True) -> list[Cell]:
    """The cells of an exercise, as a notebook has them; solved: with the solution and an answer, as no hand-out's."""
    exercise = EXERCISES[number]
    about = f"{'★' * exercise.difficulty} about {exercise.minutes} minutes"
    task = f"### Exercise {number:02d}: {exercise.title}\n\n{about}. {exercise.explanation.strip()}"
    if any("." in name for names in exercise.modules.values() for name in names):
        task += f"\n\n{OF_A_CLASS}"
    stubs = [bare(attempts.stub(exercise, module, names)) for module, names in exercise.modules.items()]
    below = "\n\n".join(folded(exercise, solved and not is_released(), hints))
    return [("markdown", task), ("code", "\n\n\n".join(stubs)), ("code", f"check({number})"), ("markdown", below)]


def bare(stub: str) -> str:
    """A stub without its first docstring, which speaks of files."""
    return stub.partition('"""')[2].partition('"""')[2].strip()


def folded(exercise: Exercise, solved: bool, hints: bool) -> list[str]:
    said = "\n".join(f"{number}. {text}" for number, text in enumerate(exercise.hints, 1))
    parts = [("Hints", said)] if hints else []
    if solved:
        own = [definition(read_module(module), name) for module, names in exercise.modules.items() for name in names]
        parts.append(("The package's own code", "```python\n" + "\n\n".join(own) + "\n```"))
    question = f"{exercise.question}\n\n*One answer:* {exercise.answer}" if solved else exercise.question
    parts.append(("A question to answer in words", question))
    return [f"<details><summary>{title}</summary>\n\n{text}\n\n</details>" for title, text in parts]


def check(number: int, seed: int | None = None):
    """Prints what `python -m minilora.exercises check` prints, of the functions that this notebook's cells define.

    Raises nothing: whatever is wrong with the code, the verdict says it. seed: the cases of an earlier check again.
    """
    if number not in EXERCISES:
        print(f"there is no exercise {number}; they go from {min(EXERCISES)} to {max(EXERCISES)}")
        return
    exercise = EXERCISES[number]
    seed = secrets.randbelow(10**6) if seed is None else seed
    with tempfile.TemporaryDirectory() as folder:
        work, history = Path(folder), entered()
        for module, names in exercise.modules.items():
            text = last_that_defines(history, {name.split(".")[0] for name in names})
            if text is not None:
                (work / exercise.files[module]).write_text(text, encoding="utf-8")
        if not attempts.attempted(exercise, attempts.read_sources(exercise, work)):  # what is missing is a stub
            print(f"not attempted: the cell above still has only the stub of exercise {number:02d}")
            return
        try:
            results, printed = run(work, [number], [seed], stop=True)
        except OSError as error:
            print(f"could not be checked: {error}")
            return
        tell(exercise, results[number], seed, printed)


def entered() -> list[str]:
    """The sources of the cells that were run, the latest last; without IPython there are none."""
    kernel = sys.modules.get("IPython")
    shell = kernel.get_ipython() if kernel is not None else None
    return [] if shell is None else list(shell.history_manager.input_hist_parsed)


def last_that_defines(history: list[str], names: set[str]) -> str | None:
    """The latest cell that defines one of the names at its top level, or None."""
    for text in reversed(history):
        try:
            made = {getattr(node, "name", None) for node in ast.parse(text).body}
        except (SyntaxError, ValueError):
            continue
        if made & names:
            return text
    return None
