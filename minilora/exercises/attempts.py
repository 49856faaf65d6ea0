"""A student's folder: which file belongs to which exercise, what was tried in it, and how the last check went.

work/ex02_lora_forward.py    the functions of the exercise blank, with what they need around them, then written
work/ex02_lora_forward.md    the explanation, and room for the answer to its question
work/progress.json           of each exercise the last check, and how many hints were given
"""

import hashlib
import re
from pathlib import Path

from minilora.exercises.catalog import EXERCISES
from minilora.exercises.checking import Exercise
from minilora.exercises.source import PACKAGE, blank, imports_for, outline, path_of, read_module, written
from minilora.storage.files import make_folder, read_json, replacing, write_json
from minilora.storage.locks import locked

WORK = Path("work")
ANSWER = "## Your answer"
WORD = re.compile(r"[A-Za-z_]\w*")


def start(exercise: Exercise, folder: Path) -> tuple[list[Path], list[Path]]:
    """Writes the files of an exercise that are not there yet: (those written, those that were there and stay)."""
    make_folder(folder)
    texts = {folder / f"{exercise.name}.md": instructions(exercise)}
    for module, names in exercise.modules.items():
        texts[folder / exercise.files[module]] = stub(exercise, module, names)
    new = [path for path in texts if not path.exists()]
    for path in new:
        with replacing(path) as temporary:
            temporary.write_text(texts[path], encoding="utf-8")
    return new, [path for path in texts if path not in new]


def stub(exercise: Exercise, module: str, names: list[str]) -> str:
    """The functions asked for, blank, and what they need to be understood: imports, the rest of their class in outline
    where the exercise speaks of it, and what else of the module it names."""
    text = read_module(module)
    told = set(WORD.findall(f"{exercise.explanation} {' '.join(exercise.hints)}"))
    part = outline(blank(text, names, f"exercise {exercise.number:02d}"), names, told)
    where = path_of(module).relative_to(PACKAGE.parent).as_posix()
    head = f'"""Exercise {exercise.number:02d}: {exercise.title}.\n\nYour code also sees all else in {where}.\n"""'
    return "\n".join([head, "", *imports_for(part, text, module, told), "", "", part, ""])


def instructions(exercise: Exercise) -> str:
    """The text that stands beside the code, in Markdown."""
    files = [
        f"- `{exercise.files[module]}` ({path_of(module).name}): {', '.join(f'`{name}`' for name in names)}"
        for module, names in exercise.modules.items()
    ]
    return "\n".join(
        [
            f"# Exercise {exercise.number:02d}: {exercise.title}",
            "",
            f"Difficulty {exercise.difficulty} of 3, about {exercise.minutes} minutes. Notebook "
            f'`notebooks/{exercise.notebook}.ipynb`, section "{exercise.section}".',
            "",
            exercise.explanation.strip(),
            "",
            "## What to write",
            "",
            *files,
            "",
            "Taken from your file are these functions, and what they use of your imports and of what you define beside",
            "them in the same file under a new name; changes to anything else in it have no effect.",
            "",
            "## Question",
            "",
            exercise.question,
            "",
            ANSWER,
            "",
            "",
        ]
    )


def find_files(exercise: Exercise, folder: Path) -> dict[str, Path]:
    """By module, the student's files of this exercise that exist."""
    return {module: folder / name for module, name in exercise.files.items() if (folder / name).is_file()}


def read_sources(exercise: Exercise, folder: Path) -> dict[str, tuple[str, str]]:
    """By module, text and file name, as `grafted` takes them. A file that is missing is as good as its stub.

    Raises ValueError for a file that is not UTF-8.
    """
    sources = {}
    for module, names in exercise.modules.items():
        path = folder / exercise.files[module]
        try:
            text = path.read_text(encoding="utf-8-sig") if path.is_file() else stub(exercise, module, names)
        except UnicodeDecodeError:
            raise ValueError(f"{path.name} is not UTF-8 text") from None
        sources[module] = text, str(path)
    return sources


def attempted(exercise: Exercise, sources: dict[str, tuple[str, str]]) -> bool:
    """True if anything was written: a function that is no longer a stub, or text that Python cannot read."""
    for module, names in exercise.modules.items():
        try:
            if written(sources[module][0], names):
                return True
        except (SyntaxError, ValueError):  # ValueError: null bytes
            return True
    return False


def to_be_used(folder: Path) -> list[Exercise]:
    """The exercises of which the folder has files, but for one whose functions a later one, which is written too, has
    again. ValueError as in `read_sources`."""
    found = [exercise for exercise in EXERCISES.values() if find_files(exercise, folder)]
    later = [exercise for exercise in found if exercise.again is not None]
    again = {exercise.again for exercise in later if attempted(exercise, read_sources(exercise, folder))}
    return [exercise for exercise in found if exercise.number not in again]


def answer(exercise: Exercise, folder: Path) -> str:
    """What the student wrote under the question; "" for nothing."""
    path = folder / f"{exercise.name}.md"
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace").partition(ANSWER)[2].strip()


def digest(exercise: Exercise, folder: Path) -> str:
    """A mark of the student's files as they are now."""
    files = find_files(exercise, folder).values()
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def read_progress(folder: Path) -> dict:
    path = folder / "progress.json"
    progress = read_json(path) if path.is_file() else {}
    if not all(map(_is_record, progress.values())):
        raise ValueError(f"{path} is not what `check` wrote; delete it, only `status` and `hint` look into it")
    return progress


def _is_record(known) -> bool:
    """Whether this is what `record` notes: {}, or hints given, or a check, or both."""
    if not isinstance(known, dict) or type(known.get("hints", 0)) is not int or known.get("hints", 0) < 0:
        return False
    check = [known.get(name) for name in ("passed", "of", "digest")]
    if check == [None, None, None]:
        return True
    return [type(value) for value in check] == [int, int, str] and 0 <= known["passed"] <= known["of"] > 0


def record(exercise: Exercise, folder: Path, **changes):
    """Notes something about an exercise in progress.json, beside what is noted already."""
    with locked(folder / "progress.json"):
        progress = read_progress(folder)
        progress[str(exercise.number)] = {**progress.get(str(exercise.number), {}), **changes}
        write_json(folder / "progress.json", progress)
