"""The README's commands exist: what a newcomer types is what the package understands."""

import re
import shlex
from pathlib import Path

import pytest

from minilora.__main__ import build_parser
from minilora.exercises import __main__ as exercises

README = (
    (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
)  # one command a line
SETUP = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
COMMANDS = re.findall(r"^(?:\S.* && )?python -m minilora(?: +(.*))?$", README, re.MULTILINE)
EXERCISES = re.findall(r"^python -m minilora.exercises +(.*)$", README, re.MULTILINE)


def test_two_commands_do_all_the_set_up():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert lines == [SETUP + "python -m minilora", SETUP + "python -m pytest"]


def test_readme_shows_every_verb():
    shown = {shlex.split(command, comments=True)[0] for command in COMMANDS if command}
    verbs = set(build_parser()._subparsers._group_actions[0].choices)
    assert shown == verbs, f"not shown {verbs - shown}, not there {shown - verbs}"


@pytest.mark.parametrize("command", [command for command in COMMANDS if command])
def test_commands_parse(command):
    build_parser().parse_args(shlex.split(command, comments=True))


def test_readme_shows_every_verb_of_the_exercises_and_they_parse():
    shown = [exercises.build_parser().parse_args(shlex.split(command, comments=True)).run for command in EXERCISES]
    verbs = exercises.build_parser()._subparsers._group_actions[0].choices.values()
    assert set(shown) == {verb.get_default("run") for verb in verbs}


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    missing = [link for link in links if not (Path(__file__).parents[1] / link).exists()]
    assert links and not missing, f"the README links to what is not there: {missing}"


def test_first_screen_shows_figure_and_commands():
    first_screen = "\n".join(README.splitlines()[:25])
    assert "![" in first_screen and first_screen.count(SETUP) == 2


def test_python_block_prints_what_it_says(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    expected = block.strip().splitlines()[-1].removeprefix("# ")
    assert capsys.readouterr().out.strip() == expected
