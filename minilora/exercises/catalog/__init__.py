"""The exercises, one file each: what to write, hints, and the properties that a right answer has."""

import importlib
import pkgutil

from minilora.exercises.checking import Exercise


def load() -> dict[int, Exercise]:
    """All exercises by number, the easiest first."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"{__name__}.{name}").EXERCISE for name in names]
    return {exercise.number: exercise for exercise in found}


EXERCISES = load()
