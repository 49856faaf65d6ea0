"""The exercises' command line, and students' code that does its worst."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.exercises.__main__ import main
from minilora.exercises.attempts import read_progress, stub
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.graft import package_sources
from minilora.exercises.runner import run

COUNT, FORWARD, RSLORA, MERGE = 1, 2, 7, 5  # exercises of one file that are used here


def write(folder: Path, number: int, replace=None, text: str | None = None):
    """A student's file: the stub with the body of its first function replaced, or a text of its own."""
    exercise = EXERCISES[number]
    (module,) = exercise.modules
    if text is None:
        first = exercise.modules[module][0]
        text = stub(exercise, module, exercise.modules[module])
        old = f'raise NotImplementedError("exercise {number:02d}: {first}")'
        assert text.count(old) == 1
        text = text.replace(old, replace)
    folder.mkdir(exist_ok=True)
    (folder / exercise.files[module]).write_text(text, encoding="utf-8")


def package(number: int) -> str:
    ((text, _),) = package_sources(EXERCISES[number]).values()
    return text


def test_list_names_every_exercise(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in lines] == [f"{number:02d}" for number in EXERCISES]


def test_start_writes_the_stub_and_never_overwrites(tmp_path, capsys):
    work = tmp_path / "work"
    for number, exercise in EXERCISES.items():
        assert main(["start", f"{number:02d}", "--work", str(work)]) == 0
        for module, name in exercise.files.items():
            assert (work / name).read_text(encoding="utf-8") == stub(exercise, module, exercise.modules[module])
    assert "## Your answer" not in capsys.readouterr().out
    mine = work / EXERCISES[COUNT].files["adapters.inject"]
    mine.write_text("mine", encoding="utf-8")
    mine.with_suffix(".md").unlink()
    assert main(["start", "1", "--work", str(work)]) == 0
    assert mine.read_text(encoding="utf-8") == "mine" and mine.with_suffix(".md").is_file()
    assert f"{mine} is there already" in capsys.readouterr().out


def test_hints_come_one_at_a_time(tmp_path, capsys):
    work = ["--work", str(tmp_path)]
    for number, text in enumerate(EXERCISES[FORWARD].hints, 1):
        assert main(["hint", "02", *work]) == 0
        assert capsys.readouterr().out == f"{number}. {text}\n"
    assert main(["hint", "02", *work]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in EXERCISES[FORWARD].hints)


def test_check_says_right_wrong_and_not_attempted(tmp_path, capsys):
    work = ["--work", str(tmp_path)]
    assert main(["check", "02", *work]) == 2
    assert "not attempted" in capsys.readouterr().out
    main(["start", "02", *work])
    assert main(["check", "02", *work]) == 2
    assert main(["show", "02", *work]) == 2, "a solution is shown before an attempt"
    assert "F.linear(F.linear" not in capsys.readouterr().out

    write(tmp_path, FORWARD, "import warnings; warnings.warn('hm'); print('here'); return self.base_layer(x)")
    assert main(["check", "02", *work, "--seed", "3"]) == 1
    out = capsys.readouterr().out
    assert "WRONG    y = W x + b + s·B(A x)" in out and "on x = [[" in out and "off by" in out
    assert "your code printed:" in out and "with --seed 3 you get the same" in out
    assert main(["show", "02", *work]) == 0
    out = capsys.readouterr().out
    assert "warnings.warn('hm')" in out and "self.scaling * F.linear(F.linear(dropped, A), B)" in out

    main(["start", "05", *work])
    write(tmp_path, MERGE, "return self.scaling * self.lora_B @ self.lora_A")
    assert main(["check", "05", *work]) == 1
    assert "not written yet: exercise 05: LoRALinear.merge" in capsys.readouterr().out

    write(tmp_path, FORWARD, text=package(FORWARD))
    assert main(["check", "02", *work]) == 0
    out = capsys.readouterr().out
    assert out.count("  ok  ") == len(EXERCISES[FORWARD].properties) and EXERCISES[FORWARD].question in out
    assert main(["status", *work]) == 0
    assert "[####################] right" in capsys.readouterr().out
    write(tmp_path, FORWARD, "return x")
    main(["status", *work])
    assert "changed since the last check" in (out := capsys.readouterr().out) and "0 of" in out.splitlines()[-1]
    assert read_progress(tmp_path)["2"]["passed"] == len(EXERCISES[FORWARD].properties)


@pytest.mark.parametrize(
    "arguments, fault",
    [
        (["check", "99"], "there is no exercise 99"),
        (["grade", "nowhere"], "there is no folder nowhere"),
        (["release", "tests"], "tests is there already"),
    ],
)
def test_bad_input_is_one_sentence(arguments, fault, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {fault}")


@pytest.mark.parametrize("option", ["--seed=-1", f"--seed={2**70}", "--seed=x", "--time-limit=nan", "--time-limit=0"])
def test_numbers_that_cannot_be_are_refused(option, capsys):
    for verb in (["check", "01"], ["grade", "nowhere"]):
        with pytest.raises(SystemExit, match="2"):
            main([*verb, option])
        assert option.partition("=")[0] in capsys.readouterr().err


def test_whatever_the_code_does_there_is_an_answer(tmp_path):
    """One folder, a different disaster in each exercise. What ends the process must not take the next ones along."""
    disasters = {
        1: ("raise SystemExit(0)", "ended the program (SystemExit)"),
        2: ("return torch.zeros(10**12)", "memory"),
        5: ("while True: pass", "after 1 seconds of computing: a loop without an end"),
        7: ("print('x' * 10**8, flush=True)", "OSError"),
        8: ("return loraplus_groups(model, lr, ratio)", "RecursionError"),
        9: ("import os; os._exit(0)", "ended the process"),
        12: ("raise KeyboardInterrupt", "ended the program (KeyboardInterrupt)"),
    }
    files = {
        4: ("def find_targets(:\n", f"invalid syntax, in line 1 of {EXERCISES[4].name}.py"),
        6: ("x = 3\n", "has no function save_adapter"),
        10: (
            "import no_such_thing as no\ndef energy_rank(*a): return no\ndef pissa(*a): pass\n",
            f"from line 1 of {EXERCISES[10].name}.py",
        ),
        15: ("\0", "null bytes"),
    }
    for number, (body, _) in disasters.items():
        write(tmp_path, number, body)
    for number, (text, _) in files.items():
        write(tmp_path, number, text=text)
    (tmp_path / EXERCISES[14].files["linear4bit"]).write_bytes(b"\xff\xfe")
    write(tmp_path, 16, text=package(16))
    expected = {number: says for number, (_, says) in {**disasters, **files}.items()} | {14: "is not UTF-8"}
    results, printed = run(tmp_path, [*sorted(expected), 16], [0], limit=1)
    for number, says in expected.items():
        messages = [fault["message"] for fault in results[number].outcomes.values() if fault]
        assert any(says in message for message in messages), f"{number}: expected {says!r}, got {messages}"
        assert not results[number].right
    assert results[16].right, results[16].outcomes
    assert len(printed) <= 2000


def test_one_property_does_not_take_the_others_along(tmp_path):
    """One input of all ends the process in 02, and fills the output; the others are right, and so is 07 after them."""
    answer = importlib.import_module(EXERCISES[FORWARD].name).SOLUTION["lora"]
    forward = "    def forward(self, x):\n"
    assert answer.count(forward) == 1
    for ending, says in (
        ("import os; print('x' * 10**7, flush=True); os._exit(0)", "ended the process"),
        ("while True: pass", "a loop without an end, or far too slow, from line"),
    ):
        text = answer.replace(forward, f"{forward}        if x.dim() == 4:\n            {ending}\n")
        write(tmp_path, FORWARD, text=text)
        write(
            tmp_path,
            RSLORA,
            text="import sys\n"
            + package(RSLORA).replace(
                "    return lora_alpha /", "    print('hm', file=sys.stderr)\n    return lora_alpha /"
            ),
        )
        results, _ = run(tmp_path, [FORWARD, RSLORA], [0], limit=2)
        assert results[RSLORA].right, results[RSLORA].outcomes
        faults = {statement: fault["message"] for statement, fault in results[FORWARD].outcomes.items() if fault}
        assert len(faults) == 1 and says in faults.popitem()[1], faults
        assert results[FORWARD].passed == len(EXERCISES[FORWARD].properties) - 1


def test_verdict_stands_where_it_cannot_be_noted_or_printed_in_full(tmp_path, capsys):
    write(tmp_path, RSLORA, text="\ufeff" + package(RSLORA))
    (tmp_path / "progress.json").write_text("{", encoding="utf-8")
    command = [sys.executable, "-m", "minilora.exercises", "check", "07", "--work", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="cp1252")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right." in done.stdout and "not noted" in done.stdout


def test_check_ends_with_its_status_from_the_shell(tmp_path):
    command = [sys.executable, "-m", "minilora.exercises", "check", "02"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "work" in done.stdout and not done.stderr, done.stderr
