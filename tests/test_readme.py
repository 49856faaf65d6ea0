"""The commands of the README and of its pages exist, and their numbers are those on record."""

import json
import re
import shlex
import statistics
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from minilora import GPT, GPTConfig, LoRAConfig, apply_lora, count_parameters
from minilora.__main__ import build_parser
from minilora.exercises import __main__ as exercises
from minilora.experiments import run as run_file
from minilora.experiments.compare import bits_per_weight
from minilora.experiments.run import tuned_learning_rate
from minilora.experiments.simulate import predict
from minilora.linear4bit import quantize_model
from minilora.memory import format_bytes

VARIANTS = {  # of data/variants/dialect.json, by their names in the README
    "full fine-tuning": "full",
    "AdaLoRA-style": "adalora",
    "prefix, 16 tokens": "prefix",
    "soft prompt, 16 tokens": "soft-prompt",
}
ROOT = Path(__file__).parents[1]
PAGES = {  # by path, one command a line
    path: path.read_text(encoding="utf-8").replace("\\\n", " ")
    for path in (ROOT / "README.md", *sorted((ROOT / "minilora").rglob("README.md")))
}
README, ALL = PAGES[ROOT / "README.md"], "\n".join(PAGES.values())
FIRST_SCREEN, REAL_MODEL = README.split("## A real language model", 1)
SETUP = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
COMMANDS = re.findall(r"^(?:\S.* && )?python -m minilora(?: +(.*))?$", ALL, re.MULTILINE)
EXERCISES = re.findall(r"^python -m minilora.exercises +(.*)$", ALL, re.MULTILINE)


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


@pytest.mark.parametrize("page", [*PAGES, ROOT / "data/claims/README.md", ROOT / "data/gpu/README.md"], ids=str)
def test_linked_files_and_headings_exist(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        headings = re.findall(r"^#+ +(.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]
        assert not heading or heading in anchors, f"{page.name} links to {link}; the headings there are {anchors}"


def test_the_readme_names_every_page():
    names = [page.relative_to(ROOT).as_posix() for page in PAGES]
    missing = [name for name in names if name != "README.md" and f"]({name})" not in README]
    assert len(names) > 1 and not missing, f"the README does not link to {missing}"


def test_first_screen_shows_formula_figure_and_the_command_that_prints_the_first_table():
    lines = README.splitlines()
    for wanted in ("y = W x + s · B(A x)", "![", SETUP + "python -m minilora"):
        place = next((number for number, line in enumerate(lines, 1) if wanted in line), None)
        assert place is not None and place <= 30, f"{wanted!r} is in line {place} of the README, not in the first 30"
    command, table = (
        lines.index(SETUP + "python -m minilora"),
        lines.index("json from base, seeds 0, cpu, torch 2.13.0+cpu"),
    )
    assert 0 < table - command < 10, f"the table is {table - command} lines behind the command that prints it"


def test_python_block_prints_what_it_says(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    expected = block.strip().splitlines()[-1].removeprefix("# ")
    assert capsys.readouterr().out.strip() == expected


def table_after(words: str) -> list[list[str]]:
    """The rows of the first table whose heading has these words, cell by cell."""
    lines = ALL[ALL.index(words) :].splitlines()[2:]
    rows = [line for line in lines[: next(n for n, line in enumerate(lines) if not line.startswith("|"))]]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_variants_is_what_was_measured():
    path = Path(__file__).parents[1] / "data" / "variants" / "dialect.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    lora = statistics.mean(run["best_validation_loss"] for run in runs if run["method"] == "lora")
    shown = {}
    for name, *cells in table_after("| method | trained |"):
        method = VARIANTS.get(name, name.lower())
        shown[method] = cells
        rows = [run for run in runs if run["method"] == method]
        losses = [row["best_validation_loss"] for row in rows]
        mean, spread = statistics.mean(losses), (max(losses) - min(losses)) / 2
        over = 100 * (mean / lora - 1)
        expected = [
            f"{rows[0]['trainable_parameters']:,d}",
            f"{rows[0]['learning_rate']:g}",
            f"{mean:.3f} ±{spread:.3f}",
            "" if method == "lora" else f"{over:+.0f} %" if abs(over) > 20 else f"{over:+.1f} %",
            "1" if method == "lora" else f"{rows[0]['step_ratio']:.2f}",
        ]
        assert cells == expected, f"{name}: {expected} on record, the README says {cells}"
    assert shown.keys() == {run["method"] for run in runs}, f"shown: {list(shown)}"


def test_the_rates_of_the_first_table_are_the_tuned_ones():
    (line,) = re.findall(r"^learning rate +(.*)$", FIRST_SCREEN, re.MULTILINE)
    expected = [f"{tuned_learning_rate('json', method):g}" for method in ("full", "lora", "qlora")]
    assert line.split() == expected, f"tuned for json: {expected}, the README says {line.split()}"


def test_the_rates_of_the_real_model_are_the_tuned_ones():
    base = SimpleNamespace(name="smollm2", directory=None)
    lines = re.findall(r"^learning rate +(.*)$", REAL_MODEL, re.MULTILINE)
    for data, line in zip(("pirate.jsonl", "orders.jsonl"), lines, strict=True):
        with patch.object(run_file, "is_wide", lambda base: True):
            expected = [f"{tuned_learning_rate(data, method, base):g}" for method in ("full", "lora", "qlora")]
        assert line.split() == expected, f"for {data} {expected}, the README says {line.split()}"


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_first_table_counts_as_the_package_does(method):
    """Parameters, bits and the three kinds of bytes that arithmetic gives, for rank 8 on all linears of the base."""
    model = GPT(GPTConfig.preset("base"))
    if method == "qlora":
        quantize_model(model)
    if method != "full":
        apply_lora(model, LoRAConfig(8, 16, target_modules="all-linear"))
    trained, total = count_parameters(model)
    predicted = predict(model, torch.float32)
    expected = {
        "trainable parameters": f"{trained:,d}",
        "  of all": f"{trained / total:.2%}",
        "bits per weight, block linears": f"{bits_per_weight(model):.2f}",
        "bytes of tensors: weights": format_bytes(predicted["weights"]),
        "  gradients": format_bytes(predicted["gradients"]),
        "  optimizer": format_bytes(predicted["optimizer"]),
    }
    for name, value in expected.items():
        (line,) = re.findall(rf"^{re.escape(name)}  +(.*)$", FIRST_SCREEN, re.MULTILINE)
        shown = re.split("  +", line)[("full", "lora", "qlora").index(method)]
        assert shown == value, f"{name} of {method}: {value}, and the README says {shown}"


def test_the_evaluation_is_the_one_on_record():
    record = json.loads((Path(__file__).parents[1] / "data" / "base" / "record.json").read_text(encoding="utf-8"))
    evaluation = record["evaluation"]
    above = f"{evaluation['loss'] / evaluation['floor'] - 1:.1%} above the floor"
    expected = [f"{name:<34}{evaluation[name]:7.1%}" for name in evaluation if name not in ("loss", "floor")]
    expected += [f"{'loss on world text':<34}{evaluation['loss']:7.4f} nats per token, {above}"]
    for line in expected:
        assert line in README.splitlines(), f"on record: {line!r}, which the README does not say"


def test_the_bytes_on_the_wire_are_the_stored_ones():
    path = Path(__file__).parents[1] / "data" / "claims" / "wire.smollm2.json"
    sent = {run["arm"]: run["sent"] / 1e6 for run in json.loads(path.read_text(encoding="utf-8"))["runs"]}
    for name, *cells in table_after("| | full | LoRA | QLoRA |"):
        way = name.removeprefix("SmolLM2, ")
        expected = [f"{sent[f'{method}, {way}']:.1f}" for method in ("full", "lora", "qlora")]
        assert cells == expected, f"{name}: stored {expected}, the README says {cells}"


def test_the_short_table_of_speed_is_the_long_one_s():
    page = PAGES[ROOT / "minilora/experiments/README.md"]
    ratios = dict(re.findall(r"^(\S.*?) {2,}(\d+\.\d\d) {2,}\d", page, re.MULTILINE))
    for name, ours, peft in table_after("| over full fine-tuning's step |"):
        assert ours == ratios[f"step, {name}"], f"{name}: {ratios[f'step, {name}']} on the page, README {ours}"
        theirs = ratios.get("step, PEFT's " + name.replace(" r=8", ""), "")
        assert peft == theirs, f"PEFT's {name}: {theirs!r} on the page, README {peft!r}"
