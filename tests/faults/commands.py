"""Command lines that make no sense: each must end with status 2 and one sentence, and leave no file behind.

`python tests/faults/commands.py` tries them all and prints the counts; `tests/test_fault_commands.py` tries a part.
Most are made from the parsers' own options: every verb with every option, outside its range or with nonsense for a
value. No training starts: what would take long is replaced by an exception, which also shows that a line was taken.
"""

import argparse
import contextlib
import faulthandler
import io
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from minilora import __main__ as package
from minilora.command import Within, a_name, a_path, a_text
from minilora.exercises import __main__ as exercises
from minilora.experiments import compare, pretrain, run
from minilora.inference import generate
from minilora.options import CONVERSE, method_list

PROGRAMS = {"minilora": package, "minilora.exercises": exercises}
SECONDS = 20  # for one command line, most of it the generated data
LONG = "--" + "x" * 5000
BYTE = "caf\udce9"  # how Python hands on the Latin-1 of "café"
NUMBERS = ["", "abc", "nan", "inf", "-inf", "1e999", "0x10", "1.5.2", "9" * 5000, BYTE, str(2**70), str(-(2**70))]
WORDS = ["", "magic", "0", BYTE, LONG]
# What a verb needs besides its options.
NEEDS = {"merge": ["--adapter", "nowhere"], "convert": ["nowhere.gguf", "--out", "out"], "get": ["smollm2"]}
NEEDS |= {"generate": ["Hello"], "release": ["out"], "grade": ["nowhere"]}
NEEDS |= dict.fromkeys(("start", "check", "hint", "show"), ["3"])
PROGRESS = ["{", "[]", "", "\0", "3", '{"3": 4}', '{"3": {"of": 0, "passed": 0, "digest": ""}}', '{"3": {"of": 3}}']
PROGRESS += ['{"3": {"hints": "two"}}', '{"3": {"hints": -1}}', '{"3": {"of": 3, "passed": "x", "digest": "x"}}']


class Started(BaseException):
    """Raised where the work would begin."""


@dataclass(frozen=True)
class Case:
    program: str
    arguments: tuple[str, ...]
    legal: bool = False  # ends with status 0, or the work begins
    files: dict[str, str] = field(default_factory=dict)  # what lies in the folder before


def parsers(program: str) -> dict[str, argparse.ArgumentParser]:
    """By verb, its parser."""
    return PROGRAMS[program].build_parser()._subparsers._group_actions[0].choices


def nonsense(action: argparse.Action) -> list[str]:
    """Values that the option must refuse."""
    if isinstance(action.type, Within):
        allowed = action.type.allowed
        outside = [allowed.low - 1, allowed.high * 2 + 1]
        outside += [allowed.low] * allowed.above + [allowed.high] * allowed.below
        return [*NUMBERS[:-2], "-1e-9", *map(str, outside)] + NUMBERS[-2:] * allowed.whole + ["1.5"] * allowed.whole
    if action.choices is not None:
        return WORDS
    if action.type is method_list:
        return [*WORDS, ",", "lora,", "lora,lora", "full,lora,full", "Lora"]
    values = {a_path: ["", " ", BYTE], a_name: ["", "\t", BYTE], a_text: [BYTE], int: ["", "abc", "1.5", BYTE, "99"]}
    return values[action.type]


def generated() -> Iterator[Case]:
    for program in PROGRAMS:
        for verb, parser in parsers(program).items():
            before = (verb, *NEEDS.get(verb, ()))
            yield Case(program, (*before, "--nonsense"))
            yield Case(program, (*before, LONG))
            yield Case(program, (*before, "one", "two", "three"))
            for action in parser._actions:
                if action.dest == "help":
                    continue
                if not action.option_strings:
                    place = NEEDS.get(verb, [""])[1:]  # the other arguments
                    yield from (Case(program, (verb, word, *place)) for word in nonsense(action))
                elif action.nargs == 0:
                    yield from (Case(program, (*before, f"{name}=1")) for name in action.option_strings)
                else:
                    if action.const is not CONVERSE:
                        yield Case(program, (*before, action.option_strings[0]))  # without a value
                    needs = [] if verb == "generate" and action.dest == "chat" else NEEDS.get(verb, ())
                    for word in nonsense(action):
                        yield Case(program, (verb, *needs, f"{action.option_strings[0]}={word}"))


def written() -> Iterator[Case]:
    """What reaches beyond the parsers, and what is said of several options together."""
    finetune, compare, generate = ("finetune", "--out", "out"), ("compare", "--out", "out"), ("generate", "Hello")
    for words in (
        ("magic",),
        (BYTE,),
        ("finetune", "lora"),
        (*finetune, "--data", "orders", "--task", "json"),
        (*compare, "--data", "orders", "--task", "pirate"),
        (*compare, "--tune", "--learning-rate", "0.1"),
        (*compare, "--seed", str(2**32 - 1), "--seeds", "2"),
        (*finetune, "--rank", "1000000000"),
        (*finetune, "--rank", "705"),  # in + out of the MLP is 192 + 512
        (*finetune, "--method", "adalora", "--rank", "470"),
        (*finetune, "--batch-size", str(2**60)),
        (*finetune, "--batch-size", "16", "--accumulation-steps", "3"),
        (*finetune, "--sequence-length", "0"),
        (*finetune, "--sequence-length", "1"),
        (*finetune, "--sequence-length", "1048576", "--data", "python-code"),
        (*finetune, "--sequence-length", "513", "--data", "python-code"),
        (*finetune, "--method", "prefix", "--virtual-tokens", "600"),
        (*finetune, "--method", "full", "--dtype", "bfloat16"),
        (*finetune, "--targets", "query"),
        (*finetune, "--targets", "q_proj,,v_proj"),
        (*finetune, "--targets", "("),
        (*finetune, "--data", "nowhere.txt"),
        (*finetune, "--data", "x" * 5000),
        (*finetune, "--base", "x" * 5000),
        (*finetune, "--resume"),
        ("generate",),
        (*generate, "--chat", "Hello"),
        (*generate, "--chat"),
        (*generate, "--adapter", "a", "--adapter", "b"),
        (*generate, "--max-new-tokens", "512"),
        ("generate", "word " * 600),
        ("memory", "--model", "llama-7b", "--base", "nowhere"),
        ("memory", "--base", "nowhere"),
        ("memory", "--model", "base", "--sequence-length", "513"),
        ("memory", "--model", "base", "--sequence-length", "64", "--counted-tokens", "64"),
        ("memory", "--model", "base", "--sequence-length", "64", "--method", "lora", "--rank", "400"),
        ("memory", "--model", "base", "--batch-size", "2", "--accumulation-steps", "4"),
        ("merge", "--adapter", "nowhere", "--out", "out"),
        ("convert", "nowhere.gguf", "--out", "out"),
        ("evaluate", "--base", "nowhere"),
        ("bench", "--base", "nowhere"),
    ):
        yield Case("minilora", words)
    grade = [("grade", "nowhere"), ("grade", "."), ("grade", ".", "--only", "0"), ("grade", ".", "--only", "2,,3")]
    for words in (("check", "99"), ("check", "-1"), *grade):
        yield Case("minilora.exercises", words)
    for text in PROGRESS:
        yield Case("minilora.exercises", ("status", "--work", "."), files={"progress.json": text})
        yield Case("minilora.exercises", ("hint", "3", "--work", "."), files={"progress.json": text})
    for words in (
        ("--steps", "1", "--seeds", "1000"),
        (*finetune, "--learning-rate", "5e-324", "--seed", str(2**32 - 1)),
        (*finetune, "--rank", "512", "--dropout", "0", "--save-every", "0", "--steps", "1000000000"),
        (*finetune, "--batch-size", "65536", "--accumulation-steps", "65536", "--count", "1"),
        ("compare", "--methods", "prefix,lora", "--task", "facts", "--virtual-tokens", "1"),
        ("pretrain", "--steps", "100000"),
        ("generate", "", "--temperature", "0", "--top-k", "1", "--top-p", "1"),
        ("generate", r"C:\new", "--temperature", "1e300", "--max-new-tokens", "1"),
        ("memory", "--base", str(run.BASE), "--sequence-length", "1", "--counted-tokens", "0"),
        ("evaluate", "--count", "1"),
        ("bench", "--rounds", "1000"),
    ):
        yield Case("minilora", words, legal=True)
    for words in (("list",), ("status",), ("start", "03", "--work", "out"), ("hint", "3", "--work", "out")):
        yield Case("minilora.exercises", words, legal=True)
    for program in PROGRAMS:
        yield Case(program, ("--help",), legal=True)
        yield from (Case(program, (verb, "--help"), legal=True) for verb in parsers(program))


def guards() -> contextlib.ExitStack:
    """What would take long raises Started."""
    stack = contextlib.ExitStack()
    long = {
        package: ["tune", "talk", "merge_adapter", "evaluate_world", "score_task", "get_model"],
        package.benchmarks: ["report"],
        package.bench_model: ["report"],
        compare: ["sample"],
        generate: ["_new_tokens"],
        pretrain: ["make_tokenizer"],
        run: ["train"],
        exercises: ["run", "release_package"],
    }
    for module, names in long.items():
        for name in names:
            stack.enter_context(patch.object(module, name, side_effect=Started))
    return stack


def fault_of(case: Case) -> str:
    """Runs the command line in an empty folder: "" if it ended as it should, or what it did instead."""
    said, printed, began, before = io.StringIO(), io.StringIO(), time.perf_counter(), os.getcwd()
    faulthandler.dump_traceback_later(10 * SECONDS, exit=True, file=sys.__stderr__)
    with tempfile.TemporaryDirectory() as folder, guards():
        for name, text in case.files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        os.chdir(folder)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
                status = PROGRAMS[case.program].main(list(case.arguments))
        except SystemExit as end:
            status = end.code
        except Started:
            status = "started"
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
        finally:
            os.chdir(before)
            faulthandler.cancel_dump_traceback_later()
        files = {path.name for path in Path(folder).rglob("*") if path.is_file()} - set(case.files)
    seconds = time.perf_counter() - began
    if seconds > SECONDS:
        return f"it took {seconds:.0f} seconds"
    if case.legal:
        return "" if status in (0, "started") else f"it is legal, and ended with {status}: {said.getvalue()[-300:]}"
    lines = said.getvalue().strip().splitlines()
    if status != 2:
        return f"status 2 was expected, not {status}"
    if not lines or not lines[-1].startswith("error: ") or any("Traceback" in line for line in lines):
        return f"an error in one line was expected, not {said.getvalue()[-300:]!r}"
    if [line for line in lines[:-1] if not line.startswith(("learning rate ", "simulating "))]:
        return f"one sentence was expected, not {lines}"
    return f"it wrote {sorted(files)}" if files else ""


def main() -> int:
    counts: Counter[str] = Counter()
    for case in itertools.chain(written(), generated()):
        fault = fault_of(case)
        counts["tried"] += 1
        counts["other" if fault else "legal, and taken" if case.legal else "refused with a sentence"] += 1
        if fault:
            print(f"{case.program} {ascii(case.arguments)[:200]}\n    {fault}")
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    return 1 if counts["other"] else 0


if __name__ == "__main__":
    sys.exit(main())
