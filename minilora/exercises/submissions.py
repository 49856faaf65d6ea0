"""What a student handed in, found and put in order: the files of the exercises under the names that they should have.

A submission is a folder or a zip. Files may lie in it directly, in its `work`, in folders below, or in zips within; a
name may differ in case, in its number or by the mark of a copy. A notebook's cells of exercises count where no file of
the exercise is there. What is taken under another name than the right one,
and what is not taken, is said in a note. Nothing is unpacked: of a zip only small files that could be an answer are
read, by their place in it, so neither a path such as ../../x nor a zip that grows without end does harm.
"""

import io
import json
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from minilora.exercises.catalog import EXERCISES

MOST = 2**20  # bytes of one file that is read
ENTRIES = 5000  # files of a submission that are looked at
DEPTH = 6  # folders below one another
TOLD = 4  # names in one note
IGNORED = ("__MACOSX", "__pycache__")
PROGRESS = "progress.json"  # what the student's own checks have noted, the hints among it
ARCHIVES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".rar", ".7z")
DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, NotImplementedError, EOFError, ValueError)


@dataclass
class Submission:
    """files: by the right name, what is in the file. notes: sentences for the teacher."""

    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hints: dict[str, int] = field(default_factory=dict)  # by number of an exercise, how many were taken


def find_submissions(folder: Path) -> list[Path]:
    """Folders and zips, and whatever else looks handed in: each of them gets a row."""
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".")
        and path.name not in IGNORED
        and (path.is_dir() or path.suffix.lower() in (".zip", ".py", ".ipynb", *ARCHIVES))
    )


def read_submission(path: Path) -> Submission:
    """Looks through a folder or a zip. Never raises for what is in it: a note says what could not be read."""
    found: dict[tuple[str, ...], bytes] = {}
    notes: list[str] = []
    if path.is_dir():
        places = walk(path, notes)
    elif path.suffix.lower() == ".zip":
        places = unzip(path.name, path, (), notes)
    else:
        return Submission(notes=[f"{path.name} is neither a folder nor a zip"])
    for place, content in places:
        found.setdefault(place, content)
    submission = Submission(notes=notes)
    unused = dict(found)
    for number, exercise in EXERCISES.items():
        for name in (*exercise.files.values(), f"{exercise.name}.md"):
            alike = sorted((place for place in found if fits(place[-1], number, name)), key=lambda p: rank(p, name))
            for place in alike:
                unused.pop(place, None)
            if not alike:
                continue
            submission.files[name] = found[alike[0]]
            if alike[0][-1] != name:
                notes.append(f"{'/'.join(alike[0])} was taken for {name}")
            if others := [place for place in alike[1:] if found[place] != found[alike[0]]]:
                notes.append(f"{name} from {'/'.join(alike[0])}, not from {told(others)}")
    for place in [place for place in found if place[-1] == PROGRESS]:
        submission.hints |= hints_in(found[place])
    for place in [place for place in found if place[-1].lower().endswith(".ipynb")]:
        solved = solved_in(found[place])
        if taken := sorted(solved.keys() - submission.files.keys()):
            submission.files |= {name: solved[name] for name in taken}
            notes.append(f"{', '.join(taken)} from the cells of {'/'.join(place)}")
        if solved:
            unused.pop(place, None)
    if strangers := [place for place in unused if place[-1].lower().endswith((".py", ".ipynb"))]:
        notes.append(f"not taken, for the name is of no exercise: {told(strangers)}")
    return submission


def solved_in(content: bytes) -> dict[str, bytes]:
    """By the name that a file would have, the cells of a notebook in which exercises are written (`notebook.cells`)."""
    try:
        book = json.loads(content)
        written = {cell["id"]: "".join(cell["source"]) for cell in book["cells"] if cell.get("cell_type") == "code"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    found: dict[str, bytes] = {}
    for number, exercise in EXERCISES.items():
        if (text := written.get(f"exercise-{number:02d}-1")) is not None and "NotImplementedError" not in text:
            found |= dict.fromkeys(exercise.files.values(), text.encode("utf-8", "replace"))
    return found


def hints_in(content: bytes) -> dict[str, int]:
    try:
        noted = json.loads(content)
        taken = {f"{int(number):02d}": known.get("hints", 0) for number, known in noted.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {number: count for number, count in taken.items() if type(count) is int and 0 < count <= 3}


def told(places: list[tuple[str, ...]]) -> str:
    more = f" and {len(places) - TOLD} more" if len(places) > TOLD else ""
    return ", ".join("/".join(place) for place in places[:TOLD]) + more


def rank(place: tuple[str, ...], name: str) -> tuple:
    """The best place of a file first: the right name, in `work`, not far down, and of copies the last."""
    copy = re.search(r"\((\d+)\)", place[-1])
    return place[-1] != name, place[-2:-1] != ("work",), len(place), -int(copy[1]) if copy else 0, place


def fits(given: str, number: int, name: str) -> bool:
    """True if a file's name is the right one, or near enough that it can mean nothing else."""
    if given == name:
        return True
    stem, _, suffix = name.rpartition(".")
    near = given.lower().removesuffix(".txt")
    if not near.endswith(f".{suffix}"):
        return False
    near = re.sub(r"\(\d+\)|\bcopy( of)?\b|\bkopie( von)?\b", " ", near.removesuffix(f".{suffix}").replace("_", " "))
    words = re.sub(r"[^a-z0-9]+", " ", near).split()
    if words[:1] in (["ex"], ["exercise"]):
        words[:2] = ["".join(words[:2])]
    rest = stem.split("_")[1:]  # lora, forward
    if words and (written := re.fullmatch(r"(?:ex|exercise)?0*(\d{1,3})", words[0])):
        short = len(words) == 1 and len(EXERCISES[number].files) == 1
        return int(written[1]) == number and (words[1:] == rest or short)
    return words == rest


def walk(folder: Path, notes: list[str]) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """The places below the folder and their contents, shallow ones first; zips are looked into as if unpacked."""
    waiting: list[tuple[Path, tuple[str, ...]]] = [(folder, ())]
    seen = 0
    for inside, place in waiting:  # grows on the way
        try:
            paths = sorted(inside.iterdir())
        except OSError as error:
            notes.append(f"{'/'.join(place) or 'the folder'} cannot be read: {error.strerror}")
            continue
        for path in paths:
            seen += 1
            if seen > ENTRIES:
                notes.append(f"only the first {ENTRIES} files were looked at")
                return
            here = (*place, path.name)
            if path.name.startswith(".") or path.name in IGNORED:
                continue
            try:
                mode = path.lstat().st_mode
                if stat.S_ISDIR(mode) and len(here) <= DEPTH:
                    waiting.append((path, here))
                elif not stat.S_ISREG(mode):
                    if wanted(path.name) or stat.S_ISDIR(mode):
                        notes.append(f"{'/'.join(here)} is a link, or too deep, and was not followed")
                elif path.suffix.lower() == ".zip":
                    yield from unzip(path.name, path, place, notes)
                elif path.suffix.lower() in ARCHIVES:
                    notes.append(f"{'/'.join(here)} was not opened: of archives only zips are")
                elif wanted(path.name) and (content := limited(path, here, notes)) is not None:
                    yield here, content
            except OSError as error:
                notes.append(f"{'/'.join(here)} cannot be read: {error.strerror}")


def wanted(name: str) -> bool:
    return name == PROGRESS or name.lower().removesuffix(".txt").endswith((".py", ".md", ".ipynb"))


def limited(path: Path, here: tuple[str, ...], notes: list[str]) -> bytes | None:
    with path.open("rb") as file:
        content = file.read(MOST + 1)
    return fitting(content, here, notes)


def fitting(content: bytes, here: tuple[str, ...], notes: list[str]) -> bytes | None:
    if len(content) <= MOST:
        return content
    if not here[-1].lower().endswith(".ipynb"):
        notes.append(f"{'/'.join(here)} is larger than {MOST // 2**20} MB and was not read")
        return None
    return b""


def unzip(name: str, file: Path | io.BytesIO, place: tuple[str, ...], notes: list[str]) -> Iterator:
    """The same for a zip."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len(entries) > ENTRIES:
                notes.append(f"of {name} only the first {ENTRIES} files were looked at")
            for entry in entries[:ENTRIES]:
                parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
                hidden = any(part.startswith(".") or part in IGNORED for part in parts if part != "..")
                if not parts or entry.is_dir() or hidden:
                    continue
                if ".." in parts or parts[0] == "/":
                    notes.append(f"{name} has a file {entry.filename!r}, which was not taken: it leads out of the zip")
                elif parts[-1].lower().endswith((".zip", *ARCHIVES)):
                    notes.append(f"{name} has {entry.filename} in it, which was not opened")
                elif wanted(parts[-1]):
                    with archive.open(entry) as opened:
                        content = opened.read(MOST + 1)
                    if fitting(content, (*place, *parts), notes) is not None:
                        yield (*place, *parts), content
    except DAMAGED as error:
        notes.append(f"{name} cannot be unpacked: {error}")
