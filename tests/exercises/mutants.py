"""What the tests of the checkers share: mistakes, by name, and running a checker without a process of its own."""

from dataclasses import dataclass

from minilora.exercises.checking import Exercise, run_property
from minilora.exercises.graft import grafted


@dataclass(frozen=True)
class Mutant:
    """A mistake: `old` in the solution, which must occur once, becomes `new`; the checker must say `says`.

    old, new: several replacements may be given as tuples of the same length.
    """

    name: str
    old: str | tuple[str, ...]
    new: str | tuple[str, ...]
    says: str

    def applied_to(self, solution: dict[str, str]) -> dict[str, str]:
        sources = dict(solution)
        pairs = [(self.old, self.new)] if isinstance(self.old, str) else zip(self.old, self.new, strict=True)
        for old, new in pairs:
            places = [module for module, text in sources.items() for _ in range(text.count(old))]
            assert len(places) == 1, f"{self.name}: {old!r} occurs {len(places)} times in the solution, not once"
            sources[places[0]] = sources[places[0]].replace(old, new)
        return sources


def failures(exercise: Exercise, sources: dict[str, str], seed: int, until: str = "") -> dict[str, dict]:
    """By property, what is wrong with these sources (text by module); nothing for a right answer.

    until: what need not be looked for any further once a fault says it."""
    files = {module: (text, f"<{exercise.files[module]}>") for module, text in sources.items()}
    names = {filename: exercise.files[module] for module, (_, filename) in files.items()}
    found = {}
    with grafted(exercise, files):
        for statement, check in exercise.properties.items():
            if outcome := run_property(statement, check, seed, names):
                found[statement] = outcome
            if until and until in told(found):
                break
    return found


def told(found: dict) -> str:
    return "\n".join(f"{text}: {fault['message']} | {fault['case']} | {fault['slip']}" for text, fault in found.items())
