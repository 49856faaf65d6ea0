"""Part of the command lines of `faults/commands.py`, and what holds the parser's ranges and the package's together."""

import random
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from faults.commands import PROGRAMS, Case, Started, fault_of, generated, guards, parsers, written

from minilora import LoRAConfig, TrainConfig, generate
from minilora import __main__ as command_line
from minilora.command import Within, run_command, unescape
from minilora.exercises import __main__ as exercises
from minilora.experiments import run as run_file
from minilora.experiments.compare import compare
from minilora.experiments.pretrain import pretraining_config
from minilora.experiments.timing import Timing
from minilora.ranges import ALPHA, DROPOUT, LEARNING_RATE, TEMPERATURE, TOP_P, Range, whole
from minilora.train_settings import TrainConfig as Settings

SLOW = {"finetune", "memory", "python-code", "--count", "--seeds"}  # they make data, or load what the suite loads later


def test_part_of_the_command_lines_ends_as_it_should():
    """Refused in one sentence, with status 2 and no file left behind; or taken, where it is legal."""
    made, thought_of = list(generated()), [case for case in written() if not SLOW & set(case.arguments)]
    assert len(made) > 1000, f"there should be more than 1000 command lines, not {len(made)}"
    dice = random.Random(0)
    for case in dice.sample(made, 60) + dice.sample(thought_of, 40):
        fault = fault_of(case)
        assert not fault, f"{case.program} {case.arguments}: {fault}"


@pytest.mark.parametrize("words", [["--rank", "705"], ["--method", "prefix", "--virtual-tokens", "600"]], ids=str)
def test_what_exceeds_the_model_is_refused_before_it_is_allocated(words):
    case = Case("minilora", ("finetune", "--out", "out", "--count", "1", *words))
    assert not (fault := fault_of(case)), fault


@pytest.mark.parametrize(
    "words, says",
    [
        (["generate", "caf\udce9"], "'caf\\udce9' is not UTF-8 text"),
        (["finetune", "--out", ""], "'' names nothing"),
        (["finetune", "--rank", "0"], "'0' is not a whole number from 1 to 65,536"),
        (["compare", "--methods", "lora,lora"], "lora is there twice, and each method is compared once"),
        (["compare", "--methods", "lora,"], "unknown method ''; known: full, lora"),
        (["finetune", "--" + "x" * 5000], "unrecognized arguments"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_sentence_says_what_would_be_right(words, says, capsys):
    with pytest.raises(SystemExit):
        command_line.main(words)
    said = capsys.readouterr().err
    assert says in said and len(said) < 700, f"{says!r} should be in one short sentence, {said[:900]!r}"


# -- the ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "allowed, inside, outside, words",
    [
        (whole(1, 5), [1, 5], [0, 6, 1.0, True, "3", None, 2**70], "a whole number from 1 to 5"),
        (
            ALPHA,
            [5e-324, 3, 1e9],
            [0, -1, 1e10, float("inf"), float("nan"), True],
            "a number above 0 and at most 1,000,000,000",
        ),
        (LEARNING_RATE, [5e-324, 3, 1e308], [0, -1, float("inf"), float("nan"), True, 10**400], "a number above 0"),
        (TEMPERATURE, [0, 0.0, 1e308], [-1e-9, float("inf"), float("nan")], "a number of at least 0"),
        (DROPOUT, [0, 0.999], [1, -0.1, float("nan")], "a number of at least 0 and below 1"),
        (TOP_P, [1, 1e-9], [0, 1.001, "0.5"], "a number above 0 and at most 1"),
        (Range(0, 1), [0, 1], [-0.1, 1.1], "a number from 0 to 1"),
    ],
    ids=str,
)
def test_a_range_holds_what_it_says(allowed, inside, outside, words):
    assert str(allowed) == words
    for value in inside:
        assert allowed.holds(value), f"{value!r} is {words}"
        allowed.check("x", value)
    for value in outside:
        assert not allowed.holds(value), f"{value!r} is not {words}"
        with pytest.raises(ValueError, match=f"^x is .*; it must be {words}$"):
            allowed.check("x", value)


def numbers(program: str):
    for verb, parser in parsers(program).items():
        yield from ((verb, action) for action in parser._actions if isinstance(action.type, Within))


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_number_has_its_range_in_the_help_and_a_default_inside(program):
    for verb, parser in parsers(program).items():
        plain = [action.dest for action in parser._actions if action.type in (int, float) and not action.choices]
        assert plain in ([], ["number"]), f"{program} {verb}: {plain} are numbers without a range"  # of an exercise
    for verb, action in numbers(program):
        where, allowed = f"{program} {verb} {action.option_strings}", action.type.allowed
        assert str(allowed) in action.help, f"{where}: {allowed} should be in its help, {action.help!r}"
        assert action.default is None or allowed.holds(action.default), f"{where}: {action.default} is not {allowed}"


def test_the_parser_takes_what_the_settings_of_a_run_take():
    """At both ends of a whole number's range, and beyond them neither takes it."""
    names = {field.name for field in fields(TrainConfig)}
    found = {action.dest: action.type.allowed for verb, action in numbers("minilora") if verb == "finetune"}
    assert len(names & found.keys()) >= 6, f"too few of the parser's numbers are settings: {names & found.keys()}"
    for name in names & found.keys():
        allowed = found[name]
        for value in (allowed.low, allowed.high, allowed.low - 1, allowed.high * 2 + 1):
            settings = dict(steps=10, batch_size=2**16, learning_rate=1.0) | {name: value}
            if allowed.holds(value):
                Settings(**settings)
            else:
                with pytest.raises(ValueError, match=f"^{name} is "):
                    Settings(**settings)


def test_a_learning_rate_of_zero_is_refused_and_not_replaced():
    with pytest.raises(ValueError, match="learning_rate is 0"):
        TrainConfig(1, 1, 0)
    assert not LEARNING_RATE.holds(0)
    assert not (fault := fault_of(Case("minilora", ("finetune", "--learning-rate", "0")))), fault


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: LoRAConfig(r=2**40), "r is"),
        (lambda: LoRAConfig(lora_alpha=float("nan")), "lora_alpha is"),
        (lambda: LoRAConfig(lora_dropout="0"), "lora_dropout is"),
        (lambda: TrainConfig(1, 2**60, 1.0), "batch_size is"),
        (lambda: TrainConfig(1, 1, 1.0, seed=2**70), "seed is"),
        (lambda: TrainConfig(1, 1, 1.0, weight_decay=float("nan")), "weight_decay is"),
        (lambda: Timing(rounds=0), "rounds is"),
        (lambda: run_file.schedule(10, 1.0, evaluations=0), "evaluations is"),
        (lambda: run_file.schedule(0, 1.0), "steps is"),
        (lambda: pretraining_config(100_001, 0), "steps is"),
    ],
)
def test_the_package_refuses_the_same_from_python(make, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        make()


@pytest.mark.parametrize("field, value", [("virtual_tokens", 0), ("virtual_tokens", 2**40), ("loraplus_ratio", -1)])
def test_an_experiment_refuses_them_too(make_experiment, field, value):
    with pytest.raises(ValueError, match=f"^{field} is"):
        make_experiment(**{field: value})


@pytest.mark.parametrize(
    "setting, value",
    [("seed", 2**70), ("seed", 1.5), ("top_k", 2**70), ("temperature", float("nan")), ("max_new_tokens", 2**40)],
)
def test_generate_refuses_them_too(base_folder, setting, value):
    with pytest.raises(ValueError, match=f"^{setting} is"):
        generate(base_folder.load(), [[1]], **{"max_new_tokens": 4, setting: value})


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_any_temperature_above_zero_draws_a_token(base_folder, temperature):
    model = base_folder.load()
    drawn = generate(model, [[1]], 4, temperature, seed=1)
    if temperature < 1:
        assert drawn == generate(model, [[1]], 4), "so cold, only the likeliest token is left"


def test_compare_refuses_what_comes_twice_and_a_seed_too_large_before_the_first_run(make_experiment, tmp_path):
    one = make_experiment()
    for experiments, seeds, named in (
        ([one, one], [0], "method"),
        ([], [0], "method"),
        ([one], [], "seed"),
        ([one], [3, 3], "seed"),
        ([one], [0, 2**32], "seed"),
    ):
        with pytest.raises(ValueError, match=named):
            compare(experiments, seeds, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists(), "nothing may be written"


# -- what a command line means -----------------------------------------------------------------------------------------


def test_escapes_are_read_only_where_they_are_asked_for(monkeypatch, capsys):
    read = []
    monkeypatch.setattr(command_line, "encode_prompt", lambda tokenizer, prompt: read.append(prompt) or [1])
    for words in ([r"C:\new\table"], [r"One\nTwo\tThree\\n", "--escapes"]):
        with guards(), pytest.raises(Started):
            command_line.main(["generate", *words])
    assert read == [r"C:\new\table", "One\nTwo\tThree\\n"], f"read as {read}"
    assert unescape(r"\\n \x \\") == r"\n \x " + "\\"


@pytest.mark.parametrize("data, base_name, says", [("json", None, False), ("pirate", None, True), ("json", "x", True)])
def test_a_rate_that_was_tuned_elsewhere_is_named(monkeypatch, base_folder, data, base_name, says):
    """`json` was tuned on the shipped base; on other data, or on another base, a sentence says whose rate it is."""
    if base_name is None:
        monkeypatch.setattr(run_file, "BASE", base_folder.directory)
    said = run_file.borrowed_rate(data, "lora", base_folder)
    assert bool(said) == says, said
    if says:
        here = data if base_name is None else f"{base_folder.name}/{data}"
        assert all(word in said for word in ("0.01", "lora", "json of the shipped base", f"not on {here}")), said


def test_a_wide_base_s_borrowed_rate_is_named(monkeypatch, base_folder):
    monkeypatch.setattr(run_file, "WIDE", 1)
    said = run_file.borrowed_rate("mine.jsonl", "qlora", base_folder)
    assert "0.003 for qlora: tuned for lora on smollm2/orders.jsonl" in said and "/mine.jsonl" in said, said


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_memory_that_does_not_suffice_is_one_sentence(monkeypatch, capsys, fault):
    def fail(options):
        raise fault

    parser = exercises.build_parser()
    parsers = parser._subparsers._group_actions[0].choices
    parsers["list"].set_defaults(run=fail)
    assert run_command(parser, ["list"]) == 2
    assert capsys.readouterr().err.startswith("error: the memory does not suffice")


@pytest.mark.skipif(not hasattr(signal, "raise_signal"), reason="a signal cannot be raised here")
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_interrupt_while_torch_loads_ends_with_one_line(tmp_path, program):
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parents[1])!r}]; sys.argv = ['-m']; "
    # Where the tests run in a shell's background, their children would ignore an interrupt.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    # As `python -m` does: the package is imported while sys.argv[0] is "-m".
    done = subprocess.run([sys.executable, "-c", f"{heed}{path}import {program}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n"), f"{done.returncode}: {done.stderr}"
