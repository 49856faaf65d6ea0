"""Pairs of answers from files and from the world, and `finetune` with every objective and from a trained adapter."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minilora import LoRAConfig, disable_lora, load_adapter, load_model, objectives
from minilora.__main__ import main
from minilora.experiments import run as run_file
from minilora.experiments.goals import start_from
from minilora.experiments.methods import METHODS
from minilora.experiments.run import finetune, run
from minilora.storage import get
from minilora.text.batches import example_row
from minilora.text.preferences import is_first_wording, load_preferences, world_pairs
from minilora.text.tasks import Task
from minilora.train_settings import IGNORE

LENGTH = 60


def line(prompt="Two plus two?", chosen="Four.", rejected="Five, I think.") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write(path: Path, entries) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> Path:
    entries = [line(f"Number {n}?", f" it is {n}", f" some number, say {n + 1}") for n in range(10)]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", entries)


@pytest.fixture
def preferences(make_experiment, base_folder, pairs_file):
    """An experiment on the file's pairs; any field of it can be changed."""
    data = load_preferences(str(pairs_file), base_folder.tokenizer, LENGTH, 2)
    return lambda method="lora", **changes: make_experiment(method, **{"dataset": data, "objective": "dpo", **changes})


@pytest.fixture(scope="session")
def trained(make_experiment, tmp_path_factory) -> Path:
    """The folder of a finished adapter."""
    out = tmp_path_factory.mktemp("trained")
    finetune(make_experiment(), out, progress=False)
    return out


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_pair_is_two_rows_each_as_an_example_would_be(tokenizer, pairs_file):
    data = load_preferences(str(pairs_file), tokenizer, LENGTH, 3)
    assert data.train.input_ids.shape[:2] == (9, 2) and data.validation.input_ids.shape[:2] == (1, 2), (
        f"a tenth of ten pairs is held out, not {len(data.validation)} of {len(data.train) + len(data.validation)}"
    )
    entries = [json.loads(text) for text in pairs_file.read_text().splitlines()]
    found = set()
    for pair in range(9):
        both = []
        for side in range(2):
            labels = data.train.labels[pair, side]
            ids = data.train.input_ids[pair, side][: int((labels != IGNORE).nonzero().max()) + 1]
            both.append((ids.tolist(), labels[: len(ids)].tolist()))
        for entry in entries:
            rows = [example_row(entry["prompt"], entry[side], tokenizer) for side in ("chosen", "rejected")]
            if rows == both:
                found.add(entry["prompt"])
    assert len(found) == 9, f"chosen first and then rejected, each as example_row makes it; only {len(found)} of 9 are"
    assert "9 examples to train on, 1 held out" in data.notes


def test_pairs_that_are_too_long_are_left_out_by_their_longer_answer(tokenizer, tmp_path):
    entries = [line(f"Number {n}?", "yes", "no") for n in range(5)] + [line("Long?", "yes", "no " * LENGTH)]
    data = load_preferences(str(write(tmp_path / "a.jsonl", entries)), tokenizer, LENGTH, 1)
    assert len(data.train) + len(data.validation) == 5 and "left out 1 of 6 examples" in data.notes, data.notes


@pytest.mark.parametrize(
    "entry, fault",
    [
        (line(chosen="Four.", rejected=" Four. "), '"chosen" and "rejected" are the same'),
        (line(chosen="  "), '"chosen" is empty'),
        (line(rejected=""), '"rejected" is empty'),
        (line(rejected=4), '"rejected" is 4, not a string'),
        ({"prompt": "Two?", "completion": "2"}, 'a pair needs "prompt", "chosen" and "rejected"'),
        (
            {key: [{"role": "user", "content": "Two?"}] for key in ("chosen", "rejected")},
            'a pair of lists of messages has its prompt within; write what both begin with as "prompt"',
        ),
        ([1], "an object in braces is needed"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tokenizer, tmp_path, entry, fault):
    file = write(tmp_path / "pairs.jsonl", [line("First?"), entry])
    with pytest.raises(ValueError, match=f"pairs.jsonl, line 2: {fault}"):
        load_preferences(str(file), tokenizer, LENGTH, 1)


@pytest.mark.parametrize("name", ["voice", "wording"])
def test_pairs_of_the_world_prefer_what_the_scorer_takes_for_right(tokenizer, name):
    data = load_preferences(name, tokenizer, 128, 20)
    assert data.train.input_ids.shape[1] == 2 and len(data.validation) == 20
    pairs = world_pairs(name, "validation", 20)
    wrong = [pair for pair in pairs if not data.task.is_right(pair[0], pair[0].completion)]
    assert not wrong, f"chosen, but not right by the scorer: {wrong[:1]}"
    right = [pair for pair in pairs if data.task.is_right(*pair)]
    assert not right, f"rejected, but right by the scorer: {right[:1]}"
    known = {example.prompt for example in data.task.train}
    assert not known & {example.prompt for example in data.task.validation}, "held-out people occur in training"


def test_the_first_wording_is_told_from_the_second():
    assert is_first_wording(None, " lives in Marlow. Mara has a house in Farley.")
    assert not is_first_wording(None, " has a house in Marlow. She lives in it.")


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_preferences_from_its_own_start(preferences, method):
    """The first loss is ln 2 wherever the reference is what the model was when training began."""
    history = run(preferences(method), progress=False).history
    first = history.validation_loss[0][1]
    assert first == pytest.approx(0.693147, abs=2e-4), f"{method}: the first loss is ln 2, not {first}"
    last = history.validation_loss[-1][1]
    assert last < first or method in ("prefix", "soft-prompt"), f"{method}: from {first} to {last}"


def test_a_new_adapter_starts_where_the_old_one_ended(make_experiment, base_folder, trained, tmp_path):
    """`out`/base is the old adapter's model; the new adapter fits it and, switched off, is it bit for bit."""
    ids = torch.arange(20).view(2, 10)
    old = load_adapter(base_folder.load(), trained)(ids)
    summary = finetune(make_experiment(adapter=trained), tmp_path, progress=False)
    base = load_model(summary["base"])
    gap = (base(ids) - old).abs().max().item()
    assert gap < 1e-5, f"{summary['base']} should say what the old adapter said, and differs by {gap:.2e}"
    again = load_adapter(load_model(summary["base"]), tmp_path)
    with disable_lora(again):
        assert torch.equal(again(ids), base(ids)), "the new adapter switched off is that start bit for bit"
    assert not torch.equal(again(ids), base(ids)), "and switched on it is something new"
    own = re.escape(f"another base than this model; use the one beside it (--base {tmp_path / 'base'})")
    with pytest.raises(ValueError, match=f"{own}$"):
        load_adapter(base_folder.load(), tmp_path)
    for further in (dict(adapter=tmp_path), dict(objective="distill", teacher=tmp_path)):
        with pytest.raises(ValueError, match=f"{own}$"):
            run(make_experiment(**further), progress=False)


@pytest.mark.parametrize("method", ["full", "soft-prompt"])
def test_other_methods_go_on_from_an_adapter_too(make_experiment, base_folder, trained, tmp_path, method):
    start = start_from(base_folder.load(), trained)
    summary = finetune(make_experiment(method, adapter=trained), tmp_path, progress=False)
    if method == "full":
        assert "base" not in summary and load_model(tmp_path).config == start.config
    else:
        gap = (load_model(summary["base"]).lm_head.weight - start.lm_head.weight).abs().max().item()
        assert gap == 0, f"what the prompt stands before is the start, which differs by {gap:.2e}"


@pytest.mark.parametrize("goal", ["dpo", "distill", "adapter"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(preferences, make_experiment, trained, tmp_path, goal):
    def make():
        if goal == "dpo":
            return preferences("full")  # with a reference computed beforehand, from the start and not from the state
        return make_experiment(
            **({"objective": "distill", "teacher": trained} if goal == "distill" else {"adapter": trained})
        )

    experiment = make()
    experiment = replace(experiment, training=replace(experiment.training, save_every=1))
    whole = dict(run(experiment, tmp_path / "whole", progress=False).model.named_parameters())

    def die(model, step):
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(experiment, tmp_path / "state", progress=False, watch=die)
    resumed = dict(run(experiment, tmp_path / "state", resume=True, progress=False).model.named_parameters())
    gap = max((whole[name] - resumed[name]).abs().max().item() for name in whole)
    assert gap == 0, f"the resumed run should end bit for bit with the same weights, and differs by {gap:.2e}"


def test_a_student_comes_close_to_its_teacher(make_experiment, base_folder, trained):
    """Also where the teacher is an adapter, which acts while the student's is trained."""
    longer = replace(make_experiment().training, steps=20)
    student = make_experiment(objective="distill", teacher=trained, training=longer)
    found = run(student, progress=False).history.validation_loss
    assert found[-1][1] < 0.5 * found[0][1], f"nats from the teacher: {found}"
    for method in ("lora", "full", "pissa"):
        with pytest.raises(ValueError, match="is what the student starts from, which has nothing to learn from it"):
            run(make_experiment(method, objective="distill", teacher=base_folder.directory), progress=False)
    with pytest.raises(ValueError, match="is what the student starts from"):
        run(make_experiment(objective="distill", teacher=trained, adapter=trained), progress=False)
    for method in ("qlora", "prefix"):  # which begin elsewhere
        rounded = run(make_experiment(method, objective="distill", teacher=base_folder.directory), progress=False)
        assert rounded.history.validation_loss[0][1] > 1e-6


@pytest.mark.parametrize("method", ["lora", "loftq"])
def test_a_base_folder_that_is_taken_is_said_before_training_and_can_be_overwritten(
    make_experiment, trained, tmp_path, monkeypatch, method
):
    """Where the run writes a base of its own: what goes on from an adapter, and LoftQ."""
    experiment = make_experiment(method, adapter=trained if method == "lora" else None)
    shutil.copytree(trained, tmp_path / "base")
    with monkeypatch.context() as patch:
        patch.setattr(run_file, "run", lambda *_: pytest.fail("it trained before it looked at the folder"))
        with pytest.raises(ValueError, match="base holds an adapter .* a folder holds one thing"):
            finetune(experiment, tmp_path, progress=False)
    assert (tmp_path / "base" / "adapter_config.json").is_file(), "what was there is there still"
    finetune(experiment, tmp_path, progress=False, overwrite=True)
    load_adapter(load_model(tmp_path / "base"), tmp_path)
    assert not (tmp_path / "base" / "adapter_config.json").exists(), "the base took the adapter's place"


def test_no_more_pairs_are_read_at_once_than_a_micro_batch_has(preferences, tmp_path, monkeypatch):
    """Full fine-tuning reads all pairs before training, and every run reads the held-out ones after it."""
    sizes, forward = [], objectives.forward
    monkeypatch.setattr(
        objectives, "forward", lambda model, ids, *how: sizes.append(len(ids)) or forward(model, ids, *how)
    )
    experiment = preferences("full")
    finetune(replace(experiment, training=replace(experiment.training, accumulation_steps=2)), tmp_path, progress=False)
    assert max(sizes) == 4, f"a micro-batch has 2 pairs, 4 rows; so many went through the model at once: {sizes}"


# --- the command line ------------------------------------------------------------------------------------------------


def words(base_folder, out, *more) -> list[str]:
    common = ["finetune", "--base", base_folder.directory, "--out", out, "--steps", 2, "--batch-size", 2, "--count", 2]
    return [str(word) for word in (*common, "--rank", 2, "--learning-rate", 0.01, *more)]


def test_the_command_line_says_how_many_chosen_answers_are_likelier(base_folder, pairs_file, tmp_path, capsys):
    assert main(words(base_folder, tmp_path, "--objective", "dpo", "--data", pairs_file, "--beta", "0.2")) == 0
    said = capsys.readouterr().out
    assert "chosen_likelier" in said and "9 examples to train on, 1 held out" in said, said


def test_the_command_line_goes_on_from_an_adapter_to_a_teachers_word(
    base_folder, make_experiment, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("minilora.__main__.load_data", lambda *_: make_experiment().dataset)
    goal = ["--objective", "distill", "--teacher", base_folder.directory, "--adapter", trained]
    assert main(words(base_folder, tmp_path, *goal)) == 0
    assert load_file(tmp_path / "adapter_model.safetensors") and (tmp_path / "base" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "more, fault",
    [
        (("--objective", "dpo", "--data", "nowhere.jsonl"), "'nowhere.jsonl' is neither pairs of the world (voice,"),
        (("--objective", "dpo", "--task", "pirate"), "'pirate' is neither pairs of the world"),
        (("--objective", "dpo", "--data", "PAIRS", "--dropout", "0.1"), "objective dpo with lora_dropout 0.1"),
        (("--beta", "0.2"), "objective sft has no use for a beta"),
        (("--objective", "distill", "--teacher", "BASE", "--beta", "0"), "objective distill has no use for a beta"),
        (("--group-size", "8"), "objective sft has no use for a group size"),
        (("--objective", "dpo", "--data", "PAIRS", "--group-size", "4"), "objective dpo has no use for a group size"),
        (("--objective", "grpo", "--group-by-length"), "objective grpo has no use for group_by_length"),
        (("--objective", "distill"), "distill needs a teacher"),
        (("--teacher", "BASE"), "sft has no use for a teacher"),
        (("--objective", "distill", "--teacher", "nowhere"), "nowhere"),
        (("--adapter", "nowhere"), "nowhere"),
        (("--adapter", "TRAINED", "--method", "qlora"), "method qlora rounds the base to 4 bits"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    base_folder, pairs_file, trained, tmp_path, capsys, monkeypatch, make_experiment, more, fault
):
    places = {"PAIRS": pairs_file, "BASE": base_folder.directory, "TRAINED": trained}
    if "dpo" not in more:
        task = Task("count", [], [], lambda example, answer: True)
        monkeypatch.setattr("minilora.__main__.load_data", lambda *_: replace(make_experiment().dataset, task=task))
    status = main(words(base_folder, tmp_path / "out", *(places.get(word, word) for word in more)))
    said = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and "error: " in said[-1] and fault in said[-1], f"status {status}, it said {said}"
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert not left, f"a refused run leaves {left}"


def test_a_prompt_is_no_start(make_experiment, base_folder, tmp_path):
    finetune(make_experiment("soft-prompt"), tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds a prompt, which cannot be merged"):
        start_from(base_folder.load(), tmp_path)


def test_a_teacher_is_found_as_a_base_is(make_experiment, base_folder, tmp_path, monkeypatch):
    """By the name of a model that get has fetched, which no run writes over."""
    shutil.copytree(base_folder.directory, tmp_path / "smollm2")
    monkeypatch.setattr(get, "MODELS", tmp_path)
    student = make_experiment("qlora", objective="distill", teacher=Path("smollm2"))
    assert run(student, progress=False).history.validation_loss
    with pytest.raises(ValueError, match="smollm2 is the teacher itself"):
        finetune(student, tmp_path / "smollm2", progress=False)


def test_a_teacher_with_another_tokenizer_is_refused(make_experiment):
    with pytest.raises(ValueError, match="another vocabulary than .*; a teacher reads the same tokens"):
        run(make_experiment(objective="distill", teacher=run_file.BASE), progress=False)


def test_dropout_and_unknown_objectives_are_refused_before_anything_is_loaded(make_experiment):
    with pytest.raises(ValueError, match="unknown objective 'ppo'; known: sft, dpo, grpo, distill"):
        make_experiment(objective="ppo")
    with pytest.raises(ValueError, match="beta is 0; it must be a number above 0"):
        make_experiment(objective="dpo", beta=0)
    with pytest.raises(ValueError, match="dropout must be 0"):
        make_experiment(objective="dpo", lora=LoRAConfig(2, 4, 0.1))
    for method in ("full", "soft-prompt"):  # where nothing is dropped
        assert make_experiment(method, objective="dpo", lora=LoRAConfig(2, 4, 0.1)).lora.lora_dropout == 0.1
