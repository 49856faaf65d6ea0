"""The hand-out holds no line of a solution and works; the grades of a class are right, and the same each time."""

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.exercises.attempts import stub
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.classroom import exercise_told, grade, release, solution_lines
from minilora.exercises.graft import package_sources
from minilora.exercises.source import read_module, solution

ROOT = Path(__file__).parents[1]
FORWARD, RSLORA = 2, 7


@pytest.fixture(scope="module")
def handout(tmp_path_factory):
    return release(tmp_path_factory.mktemp("class") / "handout")


def write_answers(folder: Path, *numbers: int):
    """The solutions in other words, which the tests of the checkers have."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        for name, text in importlib.import_module(EXERCISES[number].name).SOLUTION.items():
            (folder / EXERCISES[number].files[name]).write_text(text, encoding="utf-8")


def run_verbs(folder: Path, verbs: list[list[str]]) -> list[tuple[int, str]]:
    """Status and output of each verb, run one after the other by the package in `folder`."""
    script = (
        "import contextlib, io, json, sys\n"
        "from minilora.exercises.__main__ import main\n"
        "for verb in json.loads(sys.argv[1]):\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):\n"
        "        status = main(verb)\n"
        "    print(json.dumps([status, text.getvalue()]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", script, json.dumps(verbs)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_handout_holds_no_line_of_a_solution(handout):
    folder, purged = handout
    lines = solution_lines()
    assert len(lines) > 100 and purged, "nothing to look for"
    assert not [name for name in purged if name.startswith("test_")], "helpers that other tests call may be among these"
    found = []
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".md", ".toml", ".txt"):
            texts = [path.read_text(encoding="utf-8")]
        elif path.suffix == ".ipynb":
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            texts = ["".join(cell["source"]) for cell in cells]
        else:
            continue
        for line in (line.strip() for text in texts for line in text.splitlines()):
            if line in lines:
                found.append(f"{path.name}: {line} (exercise {lines[line]:02d})")
    assert not found, "\n".join(found)


def test_telling_lines_of_every_exercise_are_looked_for():
    """The search is only as good as its list: of every exercise it knows most lines, where they say anything."""
    lines = solution_lines()
    for exercise in EXERCISES.values():
        body = [
            line.strip()
            for target in exercise.targets
            for line in solution(read_module(target.split(":")[0]), target.split(":")[1])
        ]
        long = [line for line in body if len(line) >= 16]
        assert sum(line in lines for line in long) >= 0.5 * len(long), f"{exercise.name}: {long}"


def test_handout_lacks_the_answers_and_keeps_the_rest(handout):
    folder, purged = handout
    assert not list(folder.rglob("tests/exercises")) and not list(folder.rglob("test_exercises_*"))
    for name in ("README.md", "LICENSE", "requirements.txt", "minilora/train.py", "data/base/model.safetensors"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(folder.rglob("__pycache__")) and not (folder / ".git").exists()
    assert not [path for path in folder.parent.iterdir() if path != folder], "something was left beside it"
    book = json.loads((folder / "notebooks/01_lora_from_scratch.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not [text for text in code if "class HandMadeLoRA" in text]
    assert [text for text in code if text.startswith("# This cell is exercise ")]
    lines = solution_lines()
    assert all(exercise_told(text, lines) is None for text in code)
    for path in (folder / "tests").rglob("*.py"):
        compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_handout_is_a_place_to_work_in(handout):
    """Stubs start from it, what they stand on is named, and answers count, with all that was written before."""
    folder, _ = handout
    write_answers(folder / "work", FORWARD, 6)
    (folder / "work" / EXERCISES[RSLORA].files["config"]).write_text("def (", encoding="utf-8")  # half typed
    write_answers(folder / "class/ada", *EXERCISES)
    verbs = [
        ["start", "04"],
        ["check", "02"],  # stands on nothing
        ["check", "06"],  # reading an adapter stands on 04, which is only started
        ["show", "02"],
        ["release", "again"],
        ["grade", "class"],
    ]
    done = run_verbs(folder, verbs)
    started = folder / "work" / EXERCISES[4].files["adapters.inject"]
    assert started.read_bytes() == (folder / "minilora/adapters/inject.py").read_bytes()
    assert [status for status, _ in done] == [0, 0, 1, 2, 2, 0], done
    assert "not written yet: exercise 04: find_targets" in done[2][1]
    assert f"{EXERCISES[RSLORA].name} is left out: SyntaxError" in done[1][1]
    assert "not in this hand-out" in done[3][1] and "is a hand-out itself" in done[4][1]
    assert f"ada,{'1.0,' * len(EXERCISES)}{float(len(EXERCISES))},{len(EXERCISES)}" in done[5][1]


def submission(folder: Path, **texts: str):
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")


def test_a_class_is_graded_and_again_the_same(tmp_path):
    right = {EXERCISES[n].name: text for n in (FORWARD, RSLORA) for text, _ in package_sources(EXERCISES[n]).values()}
    wrong = right[EXERCISES[FORWARD].name].replace("+ self.scaling * F.linear(", "+ F.linear(")
    submission(tmp_path / "class/ada", **right)
    submission(tmp_path / "class/ben/work", **{**right, EXERCISES[FORWARD].name: wrong})
    (tmp_path / "class/ben/work" / f"{EXERCISES[FORWARD].name}.md").write_text("## Your answer\n\nIt depends.\n")
    untouched = stub(EXERCISES[FORWARD], "lora", EXERCISES[FORWARD].modules["lora"])
    submission(tmp_path / "class/cem", **{EXERCISES[FORWARD].name: untouched})
    private = tmp_path / "private.py"
    private.write_text(
        "from minilora.exercises.checking import expect, require\n"
        "from minilora.config import lora_scaling\n"
        "SEEDS, POINTS = [3, 4], {2: 10}\n"
        "def secret(draw):\n    expect(lora_scaling(4, 8.0), 2.0)\n"
        "def never(draw):\n    require(False, 'no answer is good enough')\n"
        "PROPERTIES = {7: {'a secret one': secret, 'an unfair one': never}}\n"
    )
    texts = []
    for name in ("first", "second"):
        out = tmp_path / name
        table = grade(tmp_path / "class", [FORWARD, RSLORA], 0, private, out, 20, progress=False)
        assert table == (out / "grades.csv").read_text(encoding="utf-8")
        texts.append((out / "grades.json").read_bytes())
    assert texts[0] == texts[1], "the same submissions got other grades"
    rows = {row["submission"]: row for row in csv.DictReader(table.splitlines())}
    whole = len(EXERCISES[RSLORA].properties)
    seven = f"{(whole + 1) / (whole + 2):.4f}"
    assert float(rows["ada"]["02"]) == 10 and f"{float(rows['ada']['07']):.4f}" == seven
    assert 0 < float(rows["ben"]["02"]) < 10 and rows["cem"]["07"] == "" and rows["ada"]["of"] == "11"
    graded = {one["submission"]: one["exercises"] for one in json.loads(texts[0])["submissions"]}
    assert graded["ben"]["02"]["answer"] == "It depends."
    assert "not scaled" in str(graded["ben"]["02"]["faults"])
    assert list(graded["ada"]["07"]["faults"]) == ["an unfair one"]


@pytest.mark.parametrize(
    "text, fault",
    [
        ("SEEDS = []", "SEEDS \\[\\]"),
        ("SEEDS = ['a']", "SEEDS"),
        ("POINTS = {99: 1}", "POINTS"),
        ("PROPERTIES = 3", "PROPERTIES"),
        ("1 / 0", "cannot be run: ZeroDivisionError"),
    ],
)
def test_private_file_that_cannot_be_used_is_refused(tmp_path, text, fault):
    submission(tmp_path / "class/ada")
    (tmp_path / "private.py").write_text(text)
    with pytest.raises(ValueError, match=fault):
        grade(tmp_path / "class", [FORWARD], 0, tmp_path / "private.py", tmp_path / "out", 20, progress=False)
    assert not (tmp_path / "out").exists()


def test_nothing_to_grade_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no submissions"):
        grade(tmp_path, [FORWARD], 0, None, tmp_path / "out", 20)
    submission(tmp_path / "ada")
    with pytest.raises(ValueError, match="no exercise 99"):
        grade(tmp_path, [99], 0, None, tmp_path / "out", 20)
    with pytest.raises(FileNotFoundError, match="no file"):
        grade(tmp_path, [FORWARD], 0, tmp_path / "private.py", tmp_path / "out", 20)
