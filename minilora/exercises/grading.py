"""The grades of a class.

Solutions are public: they are this package's source. What a teacher can do about it is private seeds (results that
somebody copied still hold, results that somebody faked do not), private properties, points, and the written question
that ends each exercise; `grades.json` holds everyone's answer to it. All but the answers stand in a Python file that
stays at home:

    SEEDS = [71, 72]                            # each property must hold for all of them
    POINTS = {2: 10, 5: 20}                     # 1 for an exercise that is not named
    PROPERTIES = {2: {"zero tokens": function}} # further ones, written as in catalog/: function(draw) raises Wrong

In a property, objects of torch's and of this package's classes can be given to a student's function, and no others.
"""

import csv
import io
import os
import re
import runpy
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from minilora.exercises.attempts import answer, find_files
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.checking import brief
from minilora.exercises.runner import Result, run
from minilora.exercises.submissions import find_submissions, read_submission
from minilora.storage.files import make_folder, replacing, write_json

FORMULA = "=+-@\t\r\n＝＋－＠"  # with these a cell of a spreadsheet begins to compute


def grade(
    folder: Path, numbers: list[int], seed: int, private: Path | None, out: Path, limit: float, progress: bool = True
) -> str:
    """Grades every submission, a folder or a zip each (`submissions.py`). Writes grades.csv and grades.json into `out`,
    again and again on the way, and at the end properties.csv, with a row for each property, and for each student
    feedback/NAME.md and gradescope/NAME.json; returns the first as text. Tables begin with a byte order mark, without
    which Excel reads "Müller" wrong.

    An exercise gives its points times the share of its properties that hold. The same submissions give the same
    grades. Whatever is wrong with one submission stands in its row, and the others are graded. Raises FileNotFoundError
    and ValueError, before it begins, for a folder without submissions, for an unknown exercise, for a private file that
    cannot be used and for an `out` that cannot be written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    submissions = find_submissions(folder)
    if not submissions:
        raise ValueError(f"{folder} has no submissions; each is a folder or a zip of its own in there")
    if unknown := sorted(set(numbers) - set(EXERCISES)):
        raise ValueError(f"there is no exercise {unknown[0]}; they go from {min(EXERCISES)} to {max(EXERCISES)}")
    seeds, points = read_private(private, seed)
    make_folder(out)
    if blocked := [name for name in ("grades.csv", "grades.json") if (out / name).is_dir()]:
        raise ValueError(f"cannot write {out / blocked[0]}: it is a folder")
    about = {"seeds": seeds, "points": {f"{n:02d}": points.get(n, 1) for n in numbers}, "torch": torch.__version__}

    def judge(path: Path) -> dict:
        try:
            return grade_one(path, numbers, seeds, points, private, limit)
        except Exception as error:  # of one submission: the others must not suffer
            note = f"could not be graded: {type(error).__name__}: {error}"
            return {"submission": path.name, "total": 0.0, "notes": [note], "exercises": {}, "hints": {}}

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    graded: dict[Path, dict] = {}
    next_write, text = 0.0, ""
    with ThreadPoolExecutor(max_workers=cores) as pool:  # the work is in processes; threads wait for them
        tasks = {pool.submit(judge, path): path for path in submissions}
        try:
            for task in tqdm(as_completed(tasks), "grading", len(tasks), disable=not progress):
                when = {"handed in": handed_in(tasks[task])}
                graded[tasks[task]] = readable(task.result() | when)
                begun = time.monotonic()
                if begun >= next_write or len(graded) == len(submissions):
                    rows = [graded[path] for path in submissions if path in graded]
                    text = write_grades(out, {**about, "left": len(submissions) - len(rows)}, rows, numbers, points)
                    next_write = time.monotonic() + 10 * (time.monotonic() - begun)  # a tenth of the time at most
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    write_reports(out, [graded[path] for path in submissions])
    return text


def handed_in(path: Path) -> str:
    """When the newest of a submission's own files was written, in UTC; of a zip, when the zip was."""
    newest = max((each.lstat().st_mtime for each in [path, *path.glob("*")] if not each.is_dir()), default=None)
    if newest is None:
        return ""
    return datetime.fromtimestamp(newest, timezone.utc).isoformat(sep=" ", timespec="seconds")


def grade_one(path: Path, numbers: list[int], seeds: list[int], points: dict, private: Path | None, limit) -> dict:
    """What grades.json says of one submission."""
    submission = read_submission(path)
    notes = list(submission.notes)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, content in submission.files.items():
            (work / name).write_bytes(content)
        if not any(find_files(EXERCISES[number], work) for number in numbers):
            notes.insert(0, "no file of these exercises was found")
            return {"submission": path.name, "total": 0.0, "notes": notes, "exercises": {}, "hints": submission.hints}
        results, _ = run(work, numbers, seeds, private, limit)
        parts = {f"{number:02d}": part(results[number], points.get(number, 1), work) for number in numbers}
    for number, one in parts.items():
        if one["attempted"] and not one["passed"]:
            statement, fault = next(iter(one["faults"].items()), ("", {"message": "nothing was checked"}))
            notes.append(f"{number}: {brief(': '.join(filter(None, (statement, fault['message']))))}")
    total = round(sum(one["points"] for one in parts.values()), 4)
    return {"submission": path.name, "total": total, "notes": notes, "exercises": parts, "hints": submission.hints}


def readable(value):
    """The same with all text such that a file can hold it: bytes that are no UTF-8 written out."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {readable(key): readable(item) for key, item in value.items()}
    return [readable(item) for item in value] if isinstance(value, list) else value


def harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula: behind an apostrophe if it begins like one."""
    return f"'{text}" if text.lstrip(" ")[:1] in FORMULA and text.strip(" ") else text


def write_grades(out: Path, about: dict, graded: list[dict], numbers: list[int], points: dict) -> str:
    write_json(out / "grades.json", {**about, "submissions": graded})
    text, names = io.StringIO(), [f"{number:02d}" for number in numbers]
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["submission", "status", *names, "total", "of", "percent", "hints", "handed in", "notes"])
    most = sum(points.get(number, 1) for number in numbers)
    for one in graded:
        parts = [one["exercises"].get(name, {"attempted": False}) for name in names]
        row = [part["points"] if part["attempted"] else "" for part in parts]
        percent = round(100 * one["total"] / most, 1) if most else ""
        notes = " ".join("; ".join(one["notes"]).split())
        name, notes = harmless(one["submission"]), harmless(brief(notes, 500))
        hints = sum(one["hints"].get(name, 0) for name in names)
        table.writerow([name, status_of(one), *row, one["total"], most, percent, hints, one["handed in"], notes])
    with replacing(out / "grades.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8-sig")
    return text.getvalue()


def status_of(one: dict) -> str:
    if not one["exercises"]:
        return "nothing found" if "no file" in " ".join(one["notes"]) else "not graded"
    return "graded" if any(part["attempted"] for part in one["exercises"].values()) else "not attempted"


def write_reports(out: Path, graded: list[dict]):
    """Each property of each student: in one table, and for the student in words and as Gradescope reads it."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["submission", "exercise", "property", "points", "of"])
    for folder in ("feedback", "gradescope"):
        make_folder(out / folder)
    for place, one in enumerate(graded, 1):
        words, tests = [f"# {one['submission']}", *one["notes"]], []
        for number, part in one["exercises"].items():
            words.append(f"## Exercise {number}: {part['points']:g} of {part['worth']:g} points")
            each = part["worth"] / max(1, len(part["statements"]))
            for statement in part["statements"]:
                fault = part["faults"].get(statement)
                holds = part["attempted"] and statement not in part["faults"] and statement in part["held"]
                said = fault["message"] + (f" Likely: {fault['slip']}" if fault.get("slip") else "") if fault else ""
                words.append(f"- {'holds' if holds else 'WRONG' if fault else 'not run'}: {statement}. {said}".strip())
                table.writerow([harmless(one["submission"]), number, statement, round(each * holds, 4), round(each, 4)])
                test = {"name": f"{number}: {statement}", "score": round(each * holds, 4), "max_score": round(each, 4)}
                status = "passed" if holds else "failed"
                tests.append({**test, "status": status, "output": said, "visibility": "visible"})
        name = f"{place:03d}-{re.sub(r'[^A-Za-z0-9 ._-]', '_', one['submission'])[:80]}"
        with replacing(out / "feedback" / f"{name}.md") as temporary:
            temporary.write_text("\n\n".join(words) + "\n", encoding="utf-8")
        write_json(
            out / "gradescope" / f"{name}.json",
            {"score": one["total"], "output": "\n".join(one["notes"]), "tests": tests},
        )
    with replacing(out / "properties.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8-sig")


def part(result: Result, points: float, work: Path) -> dict:
    """What grades.json says of one exercise of one submission."""
    earned = round(points * result.passed / len(result.statements), 4)
    faults = {statement: fault for statement, fault in result.outcomes.items() if fault}
    words = answer(EXERCISES[result.number], work)
    return {
        "attempted": result.attempted,
        "points": earned,
        "worth": points,
        "statements": result.statements,
        "held": [statement for statement, fault in result.outcomes.items() if not fault],
        "passed": result.passed,
        "of": len(result.statements),
        "faults": faults,
        "answer": words,
    }


def read_private(path: Path | None, seed: int) -> tuple[list[int], dict[int, float]]:
    """(seeds, points) of the teacher's file. Its properties are read where they run."""
    if path is None:
        return [seed], {}
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        private = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    seeds, points = private.get("SEEDS", [seed]), private.get("POINTS", {})
    if not isinstance(seeds, list) or not seeds or not all(type(value) is int for value in seeds):
        raise ValueError(f"{path} has SEEDS {seeds!r}; a list of whole numbers is needed")
    kinds = {"POINTS": lambda value: isinstance(value, (int, float)) and value >= 0}
    kinds["PROPERTIES"] = lambda value: isinstance(value, dict) and all(map(callable, value.values()))
    for name, fits in kinds.items():
        given = private.get(name, {})
        if not isinstance(given, dict) or not set(given) <= set(EXERCISES) or not all(map(fits, given.values())):
            what = "its points" if name == "POINTS" else "a dictionary of functions by statement"
            raise ValueError(f"{path} has {name} {given!r}; by number of exercise {what} is needed")
    return seeds, points
