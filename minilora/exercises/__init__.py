"""Graded exercises, made from the package's own source: `python -m minilora.exercises list`.

    source.py     stubs: the file as it is, the body of a function blank
    graft.py      a student's functions in place of the package's
    checking.py   what an exercise is, and the words a checker is written in
    catalog/      the exercises, one file each
    attempts.py   the student's folder
    runner.py     has a folder checked, whatever its code does
    child.py      the process that draws and compares; it calls the student's functions in another one
    remote.py     those calls; processes.py, pipe.py and wire.py carry them over
    student.py    the other process
    classroom.py  for teachers: the hand-out
    grading.py    and the grades of a class; submissions.py finds what was handed in, whatever it is called

`use("work")` puts all that you have written in place of the package's code, in a notebook say, and `put_back()` takes
it out again.
"""

from pathlib import Path

from minilora.exercises.attempts import read_sources, to_be_used
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.graft import Graft
from minilora.exercises.source import written
from minilora.fast import FastLoRALinear
from minilora.lora import LoRALinear

_IN_USE = Graft()
FORWARD, CHEAP = (set(EXERCISES[number].targets) for number in (2, 18))  # LoRALinear's forward, and a faster one


def use(folder: str | Path = "work") -> list[str]:
    """From now on the package runs on what was written in this folder: the names of those functions.

    Whoever imported them before gets the new ones as well. What is still a stub is left out, and the package's own
    code stands. A forward of LoRALinear (exercise 02) also counts for the layers of models, which are
    FastLoRALinear, until exercise 18 is written, on which their own forward stands. Where exercise 21 is written,
    whose function is that of 02 again, it stands in for both. A second call starts anew. Raises FileNotFoundError
    for a folder that is not there, and ValueError, naming the file, for one that is not Python, lacks a function,
    or has a helper of the same name as another file's; then the package is as it was.
    """
    put_back()
    folder, used = Path(folder), []
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; `python -m minilora.exercises start 01` makes it")
    try:
        for exercise in to_be_used(folder):
            for module, (text, filename) in read_sources(exercise, folder).items():
                names = [name for name in exercise.modules[module] if written(text, [name])]
                if names:
                    _IN_USE.file(module, names, text, filename)
                    used += [f"{module}:{name}" for name in names]
    except SyntaxError as error:
        put_back()
        raise ValueError(f"{filename} is not Python: {error.msg} in line {error.lineno}") from None
    except ValueError:
        put_back()
        raise
    except Exception as error:
        put_back()
        raise ValueError(f"{filename} cannot be used: {type(error).__name__}: {error}") from error
    if FORWARD <= set(used) and not CHEAP <= set(used):
        _IN_USE.put(FastLoRALinear, "forward", LoRALinear.forward)
    return used


def put_back():
    """The package's own code again, everywhere."""
    _IN_USE.undo()
