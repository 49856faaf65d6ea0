"""The exercises' command line: `python -m minilora.exercises list | start 03 | check 03 | hint 03 | show 03 | status`,
and for teachers `release OUT | grade DIR`.

`check` ends with status 0 if the answer is right, 1 if it is wrong, 2 if there is none; bad input ends with 2 as well.
"""

import argparse
import secrets
import shutil
import sys
from itertools import zip_longest
from pathlib import Path

from minilora.command import Parser, a_name, a_path, number, run_command
from minilora.exercises import attempts
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.checking import Exercise
from minilora.exercises.classroom import release as release_package
from minilora.exercises.grading import grade as grade_class
from minilora.exercises.runner import LIMIT, run
from minilora.exercises.source import definition, is_released, read_module
from minilora.exercises.telling import tell
from minilora.ranges import SECONDS, SEED

BAR = 20  # characters


def chosen(options) -> Exercise:
    if options.number not in EXERCISES:
        raise ValueError(f"there is no exercise {options.number}; they go from {min(EXERCISES)} to {max(EXERCISES)}")
    return EXERCISES[options.number]


def list_exercises(options) -> int:
    for exercise in EXERCISES.values():
        print(
            f"{exercise.number:02d}  {'*' * exercise.difficulty:4}{exercise.minutes:3d} min  {exercise.title:52}"
            f"notebook {exercise.notebook[:2]}, {exercise.section}"
        )
    return 0


def start(options) -> int:
    exercise = chosen(options)
    new, old = attempts.start(exercise, options.work)
    for path in old:
        print(f"{path} is there already and stays as it is")
    for path in new:
        print(f"wrote {path}")
    print()
    print(attempts.instructions(exercise).partition(attempts.ANSWER)[0].rstrip())
    print(f"\nThen: python -m minilora.exercises check {exercise.number:02d}")
    return 0


def check(options) -> int:
    exercise = chosen(options)
    if not attempts.find_files(exercise, options.work):
        print(
            f"not attempted: `start {exercise.number:02d}` writes {options.work / next(iter(exercise.files.values()))}"
        )
        return 2
    number = secrets.randbelow(10**6) if options.seed is None else options.seed
    digest = attempts.digest(exercise, options.work)  # of what is checked: the file may change meanwhile
    results, printed = run(options.work, [exercise.number], [number], None, options.time_limit, stop=True, fork=True)
    result = results[exercise.number]
    if not result.attempted:
        print(f"not attempted: {', '.join(exercise.files.values())} still holds only stubs")
        return 2
    tell(exercise, result, number, printed)
    try:
        attempts.record(exercise, options.work, passed=result.passed, of=len(result.statements), digest=digest)
    except (ValueError, OSError) as error:  # the verdict stands all the same
        print(f"\nnot noted for `status`: {error}")
    if result.right:
        print(f"\nright. `show {exercise.number:02d}` puts the package's own code beside yours.", end=" ")
        print("The question, for the file of words:")
        print(exercise.question)
        return 0
    print(f"\n{result.passed} of {len(result.statements)} hold; with --seed {number} you get the same cases again")
    return 1


def hint(options) -> int:
    """The next hint, one more each time; after the third, all of them again."""
    exercise = chosen(options)
    if not any(exercise.hints):
        print("this hand-out has no hints")
        return 2
    given = attempts.read_progress(options.work).get(str(exercise.number), {}).get("hints", 0)
    if given >= len(exercise.hints):
        print("\n".join(f"{number}. {text}" for number, text in enumerate(exercise.hints, 1)))
        print("That was all; `show` gives the package's code, after an attempt.")
        return 0
    print(f"{given + 1}. {exercise.hints[given]}")
    attempts.record(exercise, options.work, hints=given + 1)
    return 0


def show(options) -> int:
    exercise = chosen(options)
    sources = attempts.read_sources(exercise, options.work)
    if not attempts.attempted(exercise, sources):
        print(f"not attempted: try exercise {exercise.number:02d} first; `hint {exercise.number:02d}` helps")
        return 2
    if is_released():
        print("the package's own solutions are not in this hand-out")
        return 2
    for module, names in exercise.modules.items():
        for name in names:
            try:
                yours = definition(sources[module][0], name).splitlines()
            except (SyntaxError, ValueError) as error:
                yours = [f"cannot be read: {error}"]
            print(f"\n{module.replace('.', '/')}.py: {name}")
            print_beside(yours, definition(read_module(module), name).splitlines())
    return 0


def print_beside(left: list[str], right: list[str]):
    """Two texts in two columns, or one below the other where the terminal is too narrow for both."""
    width = max(map(len, left), default=0)
    if width + 3 + max(map(len, right), default=0) > shutil.get_terminal_size().columns:
        print("\n".join(["--- yours", *left, "--- the package's", *right]))
        return
    print(
        "\n".join(
            f"{a:{width}} | {b}" for a, b in zip_longest(["yours", *left], ["the package's", *right], fillvalue="")
        )
    )


def status(options) -> int:
    progress, right = attempts.read_progress(options.work), 0
    for exercise in EXERCISES.values():
        known = progress.get(str(exercise.number), {})
        share = known["passed"] / known["of"] if "of" in known else 0
        files = attempts.find_files(exercise, options.work)
        if not files:
            state = ""
        elif "of" not in known:
            state = "not checked yet"
        elif known["digest"] != attempts.digest(exercise, options.work):
            state = "changed since the last check"
        else:
            state = "right" if share == 1 else f"{known['passed']} of {known['of']} properties"
        right += state == "right"
        bar = "#" * round(BAR * share)
        print(f"{exercise.number:02d}  {exercise.title:50} [{bar:{BAR}}] {state}".rstrip())
    print(f"{right} of {len(EXERCISES)} are right")
    return 0


def release(options) -> int:
    folder, purged = release_package(options.out, options.hints)
    print(f"wrote {folder}: {len(EXERCISES)} exercises blank; taken out with them: {', '.join(purged)}")
    return 0


def grade(options) -> int:
    words = options.only.split(",") if options.only else []
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--only {options.only!r} is not a list of exercises such as 2,3,5")
    numbers = list(dict.fromkeys(map(int, words))) or list(EXERCISES)
    table = grade_class(options.dir, numbers, options.seed, options.private, options.out, options.time_limit)
    print(table)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m minilora.exercises", description="Graded exercises.")
    verbs = parser.add_subparsers(required=True, metavar="verb")
    limit = number(SECONDS, f"seconds of computing for a property ({LIMIT})", default=LIMIT)

    def verb(name, function, help, number=False):
        added = verbs.add_parser(name, help=help, description=help)
        added.set_defaults(run=function)
        if number:
            added.add_argument("number", type=int, help="of the exercise, 3 or 03")
        added.add_argument("--work", type=a_path, default=attempts.WORK, help="the folder of your files (work)")
        return added

    verb("list", list_exercises, "all exercises, the easiest first")
    verb("start", start, "write the files of an exercise; what is there already stays", number=True)
    added = verb(
        "check", check, "run your code and say what holds: status 0 right, 1 wrong, 2 not attempted", number=True
    )
    added.add_argument("--seed", **number(SEED, "the cases of an earlier check again"))
    added.add_argument("--time-limit", **limit)
    verb("hint", hint, "the next of three hints", number=True)
    verb("show", show, "the package's own code beside yours, after an attempt", number=True)
    verb("status", status, "how far you are")
    added = verb("release", release, "for teachers: write the package with every exercise blank")
    added.add_argument("out", type=a_path, help="a new folder")
    added.add_argument("--no-hints", action="store_false", dest="hints", help="withhold the hints")
    added = verb("grade", grade, "for teachers: grade a folder of submissions, into grades.csv and grades.json")
    added.add_argument("dir", type=a_path, help="it holds a folder or a zip for each submission")
    added.add_argument("--seed", **number(SEED, default=0))
    added.add_argument("--private", type=a_path, help="a Python file of yours: SEEDS, POINTS, PROPERTIES")
    added.add_argument("--only", type=a_name, help="numbers of the exercises that were assigned, 2,3,5 (all)")
    added.add_argument("--out", type=a_path, default=Path("runs/grades"))
    added.add_argument("--time-limit", **limit)
    return parser


def main(arguments: list[str] | None = None) -> int:
    return run_command(build_parser(), sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
