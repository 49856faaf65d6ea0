"""The hand-out holds no line of a solution and works; the grades of a class are right, and the same each time."""

import csv
import importlib
import io
import json
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minilora.exercises import grading
from minilora.exercises.attempts import stub
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.classroom import exercise_told, release, solution_lines, without_spoilers
from minilora.exercises.grading import grade, harmless
from minilora.exercises.graft import package_sources
from minilora.exercises.notebook import cells
from minilora.exercises.source import read_module, solution
from minilora.exercises.submissions import fits, read_submission

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
    names = EXERCISES[4].modules["adapters.inject"]
    assert started.read_text(encoding="utf-8") == stub(EXERCISES[4], "adapters.inject", names), (
        "as from the whole package"
    )
    assert [status for status, _ in done] == [0, 0, 1, 2, 2, 0], done
    assert "not written yet: exercise 04: find_targets" in done[2][1]
    assert f"{EXERCISES[RSLORA].name} is left out: SyntaxError" in done[1][1]
    assert "not in this hand-out" in done[3][1] and "is a hand-out itself" in done[4][1]
    assert f"ada,graded,{'1.0,' * len(EXERCISES)}{float(len(EXERCISES))},{len(EXERCISES)},100.0" in done[5][1]


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
        assert table == (out / "grades.csv").read_text(encoding="utf-8-sig")
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
    assert [rows[name]["status"] for name in ("ada", "ben", "cem")] == ["graded", "graded", "not attempted"]
    assert rows["ada"]["percent"] == f"{100 * float(rows['ada']['total']) / 11:.1f}"
    check_reports(tmp_path / "second", rows)


def check_reports(out: Path, rows: dict):
    """properties.csv and Gradescope's files add up to the totals; the feedback says what is wrong and why."""
    assert (out / "grades.csv").read_bytes().startswith(b"\xef\xbb\xbf"), "Excel needs the mark for its umlauts"
    points: dict[str, float] = {}
    with (out / "properties.csv").open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            points[row["submission"]] = points.get(row["submission"], 0) + float(row["points"])
    for place, name in enumerate(("ada", "ben", "cem"), 1):
        assert points[name] == pytest.approx(float(rows[name]["total"]), abs=1e-2)
        scored = json.loads((out / "gradescope" / f"{place:03d}-{name}.json").read_text(encoding="utf-8"))
        assert sum(test["score"] for test in scored["tests"]) == pytest.approx(scored["score"], abs=1e-2)
    words = (out / "feedback" / "002-ben.md").read_text(encoding="utf-8")
    assert "WRONG" in words and "not scaled" in words and "- holds: " in words


def test_the_exercise_cells_of_a_notebook_are_a_submission(tmp_path):
    kind, stub = cells(RSLORA)[1]
    solved = "def lora_scaling(r, lora_alpha, use_rslora=False):\n    return lora_alpha / (r**0.5 if use_rslora else r)"
    other = cells(FORWARD)[1][1]  # which nobody has touched
    for name, text in (("ada", solved), ("ben", stub)):
        book = {"cells": [{"id": f"exercise-{number:02d}-1", "cell_type": kind, "source": [source]}
                          for number, source in ((RSLORA, text), (FORWARD, other))]}  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "04_variants.ipynb").write_text(json.dumps(book), encoding="utf-8")
    found = read_submission(tmp_path / "ada")
    (file,) = EXERCISES[RSLORA].files.values()
    assert found.files == {file: solved.encode()} and f"{file} from the cells of 04_variants.ipynb" in found.notes
    assert read_submission(tmp_path / "ben").files == {}
    (tmp_path / "ada" / "04_variants.ipynb").write_text('{"cells": [7, {"id": [1]}]}', encoding="utf-8")
    assert read_submission(tmp_path / "ada").files == {}


def test_hints_that_were_taken_are_counted_and_can_be_withheld(tmp_path):
    (tmp_path / "ada").mkdir()
    for content, counted in (
        ('{"7": {"hints": 2}, "2": {}}', {"07": 2}),
        ('{"7": {"hints": -1}, "x": 3}', {}),
        ("[", {}),
    ):
        (tmp_path / "ada" / "progress.json").write_text(content, encoding="utf-8")
        assert read_submission(tmp_path / "ada").hints == counted, content
    path = Path(grading.__file__).parent / "catalog" / "ex07_rslora.py"
    for hints in (True, False):
        text = without_spoilers(path.read_text(encoding="utf-8"), hints)
        scope: dict = {}
        exec(compile(text, "ex07", "exec"), scope)
        blank, whole = scope["EXERCISE"], EXERCISES[RSLORA]
        assert (blank.answer, blank.spoilers) == ("", ()) and whole.answer and whole.spoilers
        assert blank.hints == (whole.hints if hints else ("", "", "")) and blank.question == whole.question
        folded = cells(RSLORA, solved=False, hints=hints)[3][1]
        assert ("Hints" in folded) is hints and "One answer" not in folded and "own code" not in folded


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


LORA_SCALING = "def lora_scaling(r, lora_alpha, use_rslora=False):\n    "
RIGHT = LORA_SCALING + "return lora_alpha / (r**0.5 if use_rslora else r)\n"


def zipped(files: dict[str, str | bytes]) -> bytes:
    with zipfile.ZipFile(content := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def test_one_submission_never_costs_the_others_their_grades(tmp_path):
    """Names that are no text, half characters, formulas, damaged zips: each has its row, which says what happened."""
    name = EXERCISES[RSLORA].name
    submission(tmp_path / "class/ada", **{name: RIGHT})
    half = os.fsdecode(b"zo\xeb") if sys.platform == "linux" else "zoe"  # a name that is no UTF-8
    submission(tmp_path / "class" / half, **{name: LORA_SCALING + "raise ValueError('\\udc80')"})
    submission(tmp_path / "class/=cmd()")
    submission(tmp_path / "class/empty")
    submission(tmp_path / "class/strange", notes="x = 1")
    (tmp_path / "class/zip.zip").write_bytes(zipped({"hand-in/work/EX7_rslora (1).py": RIGHT}))
    (tmp_path / "class/torn.zip").write_bytes(zipped({f"{name}.py": RIGHT})[:-30])
    (tmp_path / "class/old.tar").write_bytes(b"")
    half = half.encode("utf-8", "backslashreplace").decode()
    people = ["'=cmd()", "ada", "empty", "old.tar", "strange", "torn.zip", "zip.zip", half]
    table = grade(tmp_path / "class", [RSLORA], 0, None, tmp_path / "out", 20, progress=False)
    assert (tmp_path / "out/grades.csv").read_text(encoding="utf-8-sig") == table
    rows = {row["submission"]: row for row in csv.DictReader(table.splitlines())}
    assert list(rows) == people
    points = {person: row["total"] for person, row in rows.items()}
    assert points == {person: "1.0" if person in ("ada", "zip.zip") else "0.0" for person in people}, table
    for person, says in {
        "empty": "no file of these exercises",
        half: "07: LoRA: s = alpha / r, not rounded: raised ValueError",
        "old.tar": "neither a folder nor a zip",
        "strange": "the name is of no exercise: notes.py",
        "torn.zip": "cannot be unpacked",
        "zip.zip": f"(1).py was taken for {name}.py",
    }.items():
        assert says in rows[person]["notes"], rows[person]
    assert not rows["ada"]["notes"]
    known = json.loads((tmp_path / "out/grades.json").read_text(encoding="utf-8"))
    assert known["left"] == 0 and len(known["submissions"]) == len(people)


def test_a_grading_that_fails_or_is_ended_keeps_the_other_rows(tmp_path, monkeypatch):
    for person in ("ada", "ben", "cem"):
        submission(tmp_path / "class" / person)

    def grade_one(path, *_):
        if path.name == "ben":
            raise RuntimeError("no more processes")
        if path.name == "cem":
            raise KeyboardInterrupt
        return {"submission": path.name, "total": 1.0, "notes": [], "exercises": {}, "hints": {}}

    monkeypatch.setattr(grading, "grade_one", grade_one)
    monkeypatch.setattr(grading, "ThreadPoolExecutor", lambda max_workers: ThreadPoolExecutor(1))
    with pytest.raises(KeyboardInterrupt):
        grade(tmp_path / "class", [RSLORA], 0, None, tmp_path / "out", 20, progress=False)
    rows = list(csv.DictReader((tmp_path / "out/grades.csv").read_text(encoding="utf-8-sig").splitlines()))
    assert rows[0]["submission"] == "ada" and rows[0]["total"] == "1.0"
    assert json.loads((tmp_path / "out/grades.json").read_text(encoding="utf-8"))["left"] > 0


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_graded(tmp_path, monkeypatch):
    submission(tmp_path / "class/ada")
    monkeypatch.setattr(grading, "grade_one", lambda *_: pytest.fail("it has begun to grade"))
    (tmp_path / "file").write_text("")
    (tmp_path / "out/grades.csv").mkdir(parents=True)
    for out, fault in ((tmp_path / "file", "cannot make the output folder"), (tmp_path / "out", "it is a folder")):
        with pytest.raises(ValueError, match=fault):
            grade(tmp_path / "class", [RSLORA], 0, None, out, 20, progress=False)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "  =1", "＝1"])
def test_no_cell_is_a_formula(text):
    assert harmless(text) == f"'{text}" and harmless("ada =1") == "ada =1" and harmless("") == ""


@pytest.mark.parametrize(
    "given",
    [
        "ex02_lora_forward.py",
        "EX02_LoRA_forward.PY",
        "ex2_lora_forward.py",
        "02_lora_forward.py",
        "ex02-lora-forward.py",
        "ex02 lora forward (3).py",
        "Copy of ex02_lora_forward.py",
        "ex02_lora_forward - Copy.py",
        "ex02_lora_forward.py.txt",
        "lora_forward.py",
        "ex02.py",
        "exercise 2.py",
    ],
)
def test_a_name_that_can_mean_but_one_thing_is_understood(given):
    fitting = [
        name for number, exercise in EXERCISES.items() for name in exercise.files.values() if fits(given, number, name)
    ]
    assert fitting == ["ex02_lora_forward.py"]


@pytest.mark.parametrize("given", ["ex03_lora_forward.py", "forward.py", "ex11.py", "ex032.py", "notes.py", "ex02.txt"])
def test_a_name_that_could_mean_another_is_not_taken(given):
    assert not [n for n, exercise in EXERCISES.items() for name in exercise.files.values() if fits(given, n, name)]


def test_files_are_found_wherever_they_lie_and_the_best_is_taken(tmp_path):
    name = f"{EXERCISES[RSLORA].name}.py"
    submission(tmp_path / "ada/hand-in/work", **{EXERCISES[RSLORA].name: "right"})
    submission(tmp_path / "ada/older", **{EXERCISES[RSLORA].name: "old"})
    (tmp_path / "ada/more.zip").write_bytes(zipped({"deep/er/ex02_lora_forward.py": "zipped", "__MACOSX/._x.py": "no"}))
    found = read_submission(tmp_path / "ada")
    assert found.files == {name: b"right", "ex02_lora_forward.py": b"zipped"}
    assert found.notes == [f"{name} from hand-in/work/{name}, not from older/{name}"]


def test_a_zip_does_no_harm(tmp_path):
    name = f"{EXERCISES[RSLORA].name}.py"
    bomb = zipped({name: bytes(2**25), "ex02.py": "fine", "../../outside.py": "no", "/etc/x.py": "no", "in.zip": "no"})
    (tmp_path / "a.zip").write_bytes(bomb)
    found = read_submission(tmp_path / "a.zip")
    assert found.files == {"ex02_lora_forward.py": b"fine"} and [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    said = "; ".join(found.notes)
    assert "larger than 1 MB" in said and said.count("leads out of the zip") == 2 and "in.zip in it" in said, said


def test_nothing_to_grade_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no submissions"):
        grade(tmp_path, [FORWARD], 0, None, tmp_path / "out", 20)
    submission(tmp_path / "ada")
    with pytest.raises(ValueError, match="no exercise 99"):
        grade(tmp_path, [99], 0, None, tmp_path / "out", 20)
    with pytest.raises(FileNotFoundError, match="no file"):
        grade(tmp_path, [FORWARD], 0, tmp_path / "private.py", tmp_path / "out", 20)
