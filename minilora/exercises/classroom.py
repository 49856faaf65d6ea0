"""The package as a hand-out with every exercise blank, for teachers. `grading.py` has the grades of a class."""

import ast
import json
import shutil
from pathlib import Path

from minilora.exercises.catalog import EXERCISES
from minilora.exercises.notebook import cells
from minilora.exercises.source import PACKAGE, blank, body_lines, is_released, path_of, read_module

HANDED_OUT = ("README.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore", "data", "notebooks", "tests")
KEPT_BACK = ("exercises", "test_exercises_*.py", "test_notebooks.py")  # of the tests: answers, and what checks those
NOISE = ("__pycache__", ".ipynb_checkpoints", "*.egg-info", "*.pyc")
TELLING = 16  # characters from which on a line says something


def release(out: Path, hints: bool = True) -> tuple[Path, list[str]]:
    """Writes the hand-out into a new folder: (the folder, what was taken out of tests and notebooks).

    The teacher's copy is the package itself: its notebooks have solutions and answers, folded.

    Raises ValueError for a folder that is there already, for a package without its tests and notebooks, and in a
    hand-out.
    """
    root = PACKAGE.parent
    missing = [name for name in HANDED_OUT if not (root / name).exists()]
    if missing:
        raise ValueError(f"a hand-out is made from a whole checkout; {root} has no {', '.join(missing)}")
    if is_released():
        raise ValueError(f"{root} is a hand-out itself")
    inside = [name for name in (*HANDED_OUT, PACKAGE.name) if (root / name) in out.resolve().parents]
    if inside:
        raise ValueError(f"{out} lies in {inside[0]}, which is handed out itself; give a folder elsewhere")
    if out.exists():
        raise ValueError(f"{out} is there already; give the name of a new folder")
    lines = solution_lines()
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        for name in (*HANDED_OUT, PACKAGE.name):
            if (root / name).is_dir():
                noise = (*NOISE, *(KEPT_BACK if name == "tests" else ()))
                ignored = shutil.ignore_patterns(*noise)
                shutil.copytree(root / name, beside / name, symlinks=True, ignore=ignored)
            else:
                shutil.copy2(root / name, beside / name)
        for module, text in blanked().items():
            (beside / path_of(module).relative_to(root)).write_text(text, encoding="utf-8")
        for path in (beside / PACKAGE.name / "exercises" / "catalog").glob("ex*.py"):
            path.write_text(without_spoilers(path.read_text(encoding="utf-8"), hints), encoding="utf-8")
        purged = []
        for path in sorted((beside / "notebooks").glob("*.ipynb")):
            purged += [f"{path.name} cell {number}" for number in purge_notebook(path, lines, hints)]
        for path in sorted((beside / "tests").rglob("*.py")):
            purged += [f"{path.name} {name}" for name in purge_tests(path, lines)]
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out, purged


def blanked() -> dict[str, str]:
    """By module, its text with the functions of all exercises blank, and those that do what a solution does."""
    texts: dict[str, str] = {}
    for exercise in EXERCISES.values():
        for target in (*exercise.targets, *exercise.also) if exercise.again is None else ():
            module, name = target.split(":")
            texts[module] = blank(texts.get(module) or read_module(module), [name], f"exercise {exercise.number:02d}")
    return texts


def solution_lines() -> dict[str, int]:
    """Every telling line of a solution, stripped -> its exercise. What the package has elsewhere too tells nothing."""
    lines: dict[str, int] = {}
    ambient = set()
    bodies: dict[str, dict[int, int]] = {}  # by module, the number of each line of a solution -> its exercise
    for exercise in EXERCISES.values():
        for module, names in exercise.modules.items():
            for name in names:
                numbers = body_lines(read_module(module), name)
                bodies.setdefault(module, {}).update(dict.fromkeys(numbers, exercise.number))
    for path in PACKAGE.rglob("*.py"):
        inside = next((bodies[module] for module in bodies if path_of(module) == path), {})
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            if number in inside and len(line.strip()) >= TELLING:
                lines.setdefault(line.strip(), inside[number])
            else:
                ambient.add(line.strip())
    return {line: number for line, number in lines.items() if line not in ambient}


def exercise_told(text: str, lines: dict[str, int]) -> int | None:
    """The exercise whose solution a piece of code gives away, by a line of it or by one of its spoilers, or None."""
    for line in text.splitlines():
        if line.strip() in lines:
            return lines[line.strip()]
        for exercise in EXERCISES.values():
            if line.strip().startswith(exercise.spoilers):
                return exercise.number
    return None


def without_spoilers(text: str, hints: bool) -> str:
    """A catalog file without its `spoilers` and its `answer`, and perhaps without its hints."""
    empty = {"spoilers": "()", "answer": '""', **({} if hints else {"hints": '("", "", "")'})}
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.keyword) and node.arg in empty]
    for said, keyword in [(ast.get_source_segment(text, keyword.value) or "", keyword.arg) for keyword in found]:
        text = text.replace(said, empty[str(keyword)], 1)
    return text


def purge_notebook(path: Path, lines: dict[str, int], hints: bool = True) -> list[int]:
    """Empties each code cell that gives a solution away: the numbers of those cells, from 1. The cells of exercises
    lose solution, answer and outputs, and count as well."""
    book, emptied = json.loads(path.read_text(encoding="utf-8")), []
    for number, cell in enumerate(book["cells"], 1):
        if cell.get("id", "").startswith("exercise-"):
            exercise, place = map(int, cell["id"].split("-")[1:])
            cell["source"] = cells(exercise, solved=False, hints=hints)[place][1].splitlines(keepends=True)
            cell |= {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
            emptied += [number] * (place == 3)
            continue
        if cell["cell_type"] != "code" or (told := exercise_told("".join(cell["source"]), lines)) is None:
            continue
        cell["source"] = [f"# This cell is exercise {told:02d}.\n", f'raise NotImplementedError("exercise {told:02d}")']
        cell["outputs"], cell["execution_count"] = [], None
        emptied.append(number)
    if emptied:
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return emptied


def purge_tests(path: Path, lines: dict[str, int]) -> list[str]:
    """Takes out each function or class of a test file that gives a solution away: their names."""
    text = path.read_text(encoding="utf-8")
    names: list[str] = []
    rows = text.splitlines(keepends=True)
    for node in reversed(ast.parse(text).body):
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        if exercise_told("".join(rows[first : node.end_lineno]), lines) is not None:
            del rows[first : node.end_lineno]
            names.insert(0, getattr(node, "name", f"line {node.lineno}"))
    if names:
        path.write_text("".join(rows), encoding="utf-8")
    return names
