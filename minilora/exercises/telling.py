"""A verdict in print, the same on the command line and in a notebook."""

from minilora.exercises.checking import Exercise, brief
from minilora.exercises.runner import Result

LINE = 109  # characters


def tell(exercise: Exercise, result: Result, seed: int, printed: str):
    """A line per property, and what the code printed. Of the first that fails all there is to say: on what, and the
    likely slip; of each further one a line, for most follow from the first."""
    print(f"Exercise {exercise.number:02d}: {exercise.title} (seed {seed})")
    extra = [statement for statement in result.outcomes if statement not in result.statements]
    first: dict = {}
    for statement in [*extra, *result.statements]:
        fault = result.outcomes.get(statement)
        print(f"  {'not run' if fault is None else 'WRONG' if fault else 'ok':8} {statement}")
        if fault and first:
            print(f"           {in_a_line(fault, first)}")
        elif fault:
            first = fault
            print(f"           {fault['message']}")
            if fault.get("case"):
                print(f"           on {fault['case']}")
            if fault.get("slip"):
                print(f"           likely: {fault['slip']}")
    if printed.strip():
        print("\nyour code printed:\n" + printed.rstrip())


def in_a_line(fault: dict, first: dict) -> str:
    """A fault behind the first one, in short."""
    if (fault.get("slip") and fault["slip"] == first.get("slip")) or fault["message"] == first["message"]:
        return "the same as above"
    return brief(f"likely: {fault['slip']}" if fault.get("slip") else fault["message"], LINE)
