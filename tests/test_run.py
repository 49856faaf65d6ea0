"""One run: its seed, its schedule, how its base is loaded, and what it says of what it saves."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from minilora import count_parameters, load_adapter, load_model, lora_layers
from minilora.__main__ import build_parser, experiments_of
from minilora.adapters.prompts import Prompt
from minilora.experiments import run as run_file
from minilora.experiments.methods import DEFAULT_METHODS, LORA_CHANGES, METHODS, BaseFolder
from minilora.experiments.run import (
    BASE,
    Run,
    finetune,
    open_base,
    run,
    schedule,
    tuned_experiments,
    tuned_learning_rate,
)
from minilora.inference.evaluate import Scored
from minilora.linear4bit import quantized_layers
from minilora.model import GPT
from minilora.quant import QLORA, Quantization
from minilora.storage.files import write_json
from minilora.storage.prompts import load_prompt
from minilora.train_settings import History

IDS = torch.arange(20).view(2, 10)
RATES = {  # 1 to 10 in place of rates, so that each says where it comes from
    "story.txt": {"lora": 1},
    "python-code": {"lora": 2, "full": 3},
    "json": {"lora": 4, "full": 5, "dora": 6},
    "dialect": {"lora": 7, "full": 8, "dora": 9, "eva": 10},
}


def factors(model) -> torch.Tensor:
    return torch.cat([layer.lora_A.detach().flatten() for _, layer in lora_layers(model)])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


# What decides a run


def test_a_run_is_a_function_of_its_seed(make_experiment):
    """Also the random start of A, which is drawn before training begins."""
    found = []
    for seed in (5, 5, 6):
        experiment = make_experiment(training=replace(make_experiment().training, seed=seed, learning_rate=1e-9))
        torch.manual_seed(len(found))  # whatever was drawn before must not matter
        found.append(factors(run(experiment, progress=False).model))
    off = (found[0] - found[1]).abs().max().item()
    assert off == 0, f"two runs with seed 5 should have the same A, which differ by up to {off:.3g}"
    other = (found[0] - found[2]).abs().max().item()  # the order of the rows alone moves A by about 1e-9
    assert other > 1e-3, f"seed 6 should draw another A than seed 5, and it differs by {other:.3g} at most"


@pytest.mark.parametrize("steps, warmup, every", [(1, 0, 1), (2, 1, 1), (20, 1, 2), (100, 5, 10), (150, 7, 15)])
def test_the_schedule_warms_up_for_a_twentieth_and_evaluates_ten_times(steps, warmup, every):
    config = schedule(steps, 0.25, batch_size=6, seed=3, precision="bfloat16")
    found = (config.steps, config.learning_rate, config.batch_size, config.seed, config.precision)
    assert found == (steps, 0.25, 6, 3, "bfloat16"), f"what was asked for did not arrive: {found}"
    assert config.warmup_steps == warmup, f"of {steps} steps {warmup} warm up, not {config.warmup_steps}"
    assert config.eval_every == every, f"of {steps} steps every {every} is evaluated, not every {config.eval_every}"
    plain = schedule(steps, 0.25)
    assert (plain.batch_size, plain.seed) == (16, 0), f"16 rows and seed 0 by default, not {plain}"


@pytest.mark.parametrize(
    "data, method, expected, why",
    [
        ("dialect", "lora", 7, "its own, tuned"),
        ("json", "dora", 6, "its own, tuned"),
        ("story.txt", "lora", 1, "its own, also of a text"),
        ("story.txt", "full", 3, "python-code's: it is a text"),
        ("story.txt", "dora", 6, "json's, for want of python-code's"),
        ("python-code", "eva", 10, "dialect's, the last resort"),
        ("notes.jsonl", "full", 5, "json's: instruction data is no text"),
        ("pirate", "full", 5, "json's: a task borrows nothing from a text"),
        ("pirate", "eva", 10, "dialect's, for want of json's"),
    ],
)
def test_a_rate_that_was_not_tuned_is_borrowed_in_order(monkeypatch, tmp_path, data, method, expected, why):
    rates = {name: {key: {"chosen": rate} for key, rate in row.items()} for name, row in RATES.items()}
    write_json(tmp_path / "rates.json", rates)
    monkeypatch.setattr(run_file, "LEARNING_RATES", tmp_path / "rates.json")
    found = tuned_learning_rate(data, method)
    names = {rate: name for name, row in RATES.items() for rate in row.values()}
    assert found == expected, f"{method} on {data} takes {why}, and not {names[found]}'s"
    with pytest.raises(ValueError, match="'magic'.*--learning-rate"):
        tuned_learning_rate(data, "magic")


def test_the_data_says_how_long_a_run_is_unless_asked_otherwise(make_experiment, tmp_path):
    plan = {"steps": 6, "batch_size": 3, "evaluations": 2, "group_by_length": True}
    data = replace(make_experiment().dataset, name="json", training=plan)
    for asked, steps in ((None, 6), (8, 8)):
        (experiment,) = tuned_experiments(make_experiment().base, data, ["lora"], asked)
        found = experiment.training
        expected = (steps, 3, steps // 2, True, tuned_learning_rate("json", "lora"))
        shown = found.steps, found.batch_size, found.eval_every, found.group_by_length, found.learning_rate
        assert shown == expected, f"expected {expected}, got {shown}"


def test_instruction_data_takes_short_runs_of_rows_of_like_length(base_folder, tmp_path):
    file = tmp_path / "notes.jsonl"
    lines = [{"prompt": f"Number {n}?", "completion": f" {n}"} for n in range(100)]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    common = ["finetune", "--base", str(base_folder.directory), "--sequence-length", "32", "--learning-rate", "1"]

    def training_of(*more):
        (experiment,) = experiments_of(build_parser().parse_args([*common, *more]), ["lora"])
        return experiment.training

    short, long = training_of("--data", str(file)), training_of("--task", "dialect", "--sequence-length", "64")
    assert (short.steps, short.batch_size, short.eval_every, short.group_by_length) == (30, 8, 10, True), short
    assert (long.steps, long.batch_size, long.eval_every, long.group_by_length) == (150, 16, 25, False), long
    file.write_text("\n".join(json.dumps(line) for line in lines[:12]))  # one of them held out
    assert (few := training_of("--data", str(file)).steps) == 6, f"four passes over 11 rows are 6 steps of 8, not {few}"
    asked = training_of("--data", str(file), "--steps", "4", "--batch-size", "2", "--no-group-by-length")
    assert (asked.steps, asked.batch_size, asked.group_by_length) == (4, 2, False), asked


def test_a_wide_base_borrows_from_a_wide_one(base_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(run_file, "WIDE", 16)  # the base of the tests is as wide
    name = base_folder.name
    rates = {
        f"{name}/notes.jsonl": 1,
        f"{name}/orders.jsonl": 2,
        "smollm2/pirate.jsonl": 3,
        "json": 4,
        "notes.jsonl": 5,
    }
    for expected, kept in ((1, list(rates)), (2, list(rates)[1:]), (3, list(rates)[2:])):
        write_json(tmp_path / "rates.json", {key: {"lora": {"chosen": rates[key]}} for key in kept})
        monkeypatch.setattr(run_file, "LEARNING_RATES", tmp_path / "rates.json")
        found = tuned_learning_rate("notes.jsonl", "lora", base_folder)
        assert found == expected, f"of {kept} the rate of {kept[0]} is the nearest, not {found}"
        assert tuned_learning_rate("notes.jsonl", "qlora", base_folder) == expected, "QLoRA's is LoRA's"
    write_json(tmp_path / "rates.json", {"json": {"lora": {"chosen": 4}}})
    with pytest.raises(ValueError, match="no learning rate was tuned"):
        tuned_learning_rate("notes.jsonl", "lora", base_folder)
    monkeypatch.setattr(run_file, "WIDE", 17)
    assert tuned_learning_rate("notes.jsonl", "lora", base_folder) == 4, "a narrow base borrows from the shipped one"


def test_every_method_has_a_tuned_rate():
    for method in METHODS:
        for data in ("json", "dialect"):
            rate = tuned_learning_rate(data, method)
            assert 0 < rate < 10, f"the rate of {method} on {data} is {rate}"


@pytest.mark.parametrize("method", METHODS)
def test_only_qlora_s_base_is_in_4_bits_from_the_start(make_experiment, monkeypatch, method):
    """Loaded in floats first it would need the memory that QLoRA is there to save."""
    experiment, asked, load = make_experiment(method), [], BaseFolder.load
    monkeypatch.setattr(BaseFolder, "load", lambda self, how=None: asked.append(how) or load(self, how))
    run(experiment, progress=False)
    expected = experiment.quantization if method == "qlora" else None
    assert asked == [expected], f"{method}'s base should be loaded with quantization {expected}, and was with {asked}"


@pytest.mark.parametrize("quantization", [None, QLORA, Quantization("int4", 16, False)], ids=str)
def test_a_base_is_loaded_as_asked_for(base_folder, quantization):
    model = base_folder.load(quantization)
    found = {layer.quantization for layer in quantized_layers(model).values()}
    assert found == ({quantization} if quantization else set()), f"asked for {quantization}, got {found}"
    kinds = {parameter.dtype for parameter in model.parameters()}
    assert kinds == {torch.float32}, f"what is in floats should be in float32, and is in {kinds}"


def test_the_loop_is_given_the_method_s_options_and_settings(make_experiment, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(run_file, "train", lambda *words, **options: given.append((words, options)) or History())
    for method, more in (("lora", set()), ("lora+", {"parameter_groups"}), ("adalora", {"after_step"})):
        experiment = make_experiment(method)
        finished = run(experiment, tmp_path / "state", True, progress=False)
        (model, *words), options = given.pop()
        assert words == [experiment.dataset.train, experiment.training, experiment.dataset.validation], words
        assert model is finished.model and finished.experiment is experiment, "another model or experiment came back"
        assert options.keys() & {"parameter_groups", "after_step"} == more, f"{method} brings {more}: {list(options)}"
        expected = {"method": method, "data": "words", **experiment.method_settings}
        assert options["settings"] == expected, f"a resumed run must agree on {expected}, not {options['settings']}"
        found = options["state_path"], options["resume"], options["description"]
        assert found == (tmp_path / "state", True, f"{method}, seed 5"), found


def test_what_comes_out_of_a_run_is_finished(make_experiment):
    """AdaLoRA ends with as many ranks as LoRA has."""
    training = replace(make_experiment().training, steps=10)
    layers = dict(lora_layers(run(make_experiment("adalora", training=training), progress=False).model))
    ranks = sum(layer.r for layer in layers.values())
    assert ranks == 2 * len(layers), f"{2 * len(layers)} ranks in all should be left, not {ranks}"


def test_a_run_is_watched_and_remains_what_it_was(make_experiment):
    """Also where the method itself acts after every step."""
    experiment = make_experiment("adalora", training=replace(make_experiment().training, steps=10))
    alone, steps = run(experiment, progress=False).model.state_dict(), []
    watched = run(experiment, progress=False, watch=lambda model, step: steps.append(step)).model.state_dict()
    assert steps == list(range(1, 11))
    assert alone.keys() == watched.keys() and all(torch.equal(alone[name], watched[name]) for name in alone)


def test_sequences_beyond_the_model_are_refused(make_experiment):
    experiment = make_experiment()
    rows = torch.zeros(4, 65, dtype=torch.int64)
    long = replace(experiment.dataset, train=replace(experiment.dataset.train, input_ids=rows, labels=rows))
    with pytest.raises(ValueError, match="65 tokens.*model's 64; shorten --sequence-length"):
        run(replace(experiment, dataset=long), progress=False)


def test_a_folder_that_is_no_base_is_refused(tmp_path, base_folder):
    with pytest.raises(FileNotFoundError, match="no base model folder.*nowhere"):
        open_base(tmp_path / "nowhere")
    assert open_base(base_folder.directory, "meta").device == "meta", "the device is not the one asked for"
    assert (BASE / "config.json").exists(), f"the shipped base is not in {BASE}"


# What a run leaves behind


@pytest.mark.parametrize("method", [*DEFAULT_METHODS, "loftq", "soft-prompt", "prefix"])
def test_what_is_saved_is_the_model_and_its_bytes_are_counted(make_experiment, tmp_path, method):
    experiment = make_experiment(method)
    finished = run(experiment, progress=False)
    for _ in range(2):  # in place of what was there
        size = finished.save(tmp_path / "artifact")
    files = {file.name: file.stat().st_size for file in (tmp_path / "artifact").iterdir()}
    files.pop("tokenizer.model", None)  # a model's, which is no part of what was trained
    assert size == sum(files.values()), f"{size} bytes were counted, and there are {sum(files.values())}: {files}"
    expected, base = logits(finished.model), experiment.base
    if method == "full":
        again = load_model(tmp_path / "artifact")
    elif method == "loftq":
        finished.save_base(tmp_path / "base")
        again = load_adapter(open_base(tmp_path / "base").load(), tmp_path / "artifact")
        assert not any(lora_layers(finished.model)), "the adapter is no part of the base"
    elif isinstance(finished.model, Prompt):
        again = load_prompt(base.load(), tmp_path / "artifact")
    else:
        again = load_adapter(base.load(experiment.quantization if method == "qlora" else None), tmp_path / "artifact")
    off = (logits(again) - expected).abs().max().item()
    assert off < 1e-6, f"what was saved says something else: logits differ by {off:.3g}"


def test_the_summary_of_a_fine_tune(make_experiment, monkeypatch, tmp_path):
    experiment = make_experiment(dataset=replace(make_experiment().dataset, floor=0.25, task="a task"))
    history = History(validation_loss=[[0, 3.0], [2, 1.0], [3, 2.0]])

    def finished(*_):
        tmp_path.joinpath("training_state.safetensors").touch()
        return Run(experiment, run_file.prepare(experiment.base.load(), experiment), history)

    monkeypatch.setattr(run_file, "run", finished)
    monkeypatch.setattr(run_file, "score_task", lambda *_: Scored([], [], [True, True, False, True]))
    summary = finetune(experiment, tmp_path, progress=False)
    trainable, total = count_parameters(finished().model)
    (tmp_path / "training_state.safetensors").unlink()
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    expected = {
        "method": "lora",
        "data": "words",
        "trainable_parameters": trainable,
        "total_parameters": total,
        "validation_loss": 2.0,  # of the model that was saved: the last, not the best
        "loss_floor": 0.25,
        "score": 0.75,
        "artifact": str(tmp_path),
        "artifact_bytes": size,
    }
    assert summary == expected, f"expected {expected}, got {summary}"


def test_the_state_is_there_until_all_processes_have_come(make_experiment, tmp_path, monkeypatch):
    there = []
    state = tmp_path / "training_state.safetensors"
    monkeypatch.setattr(run_file, "wait_for_all", lambda: there.append(state.exists()))
    finetune(make_experiment(), tmp_path, progress=False)
    assert there == [False, True] and not state.exists()


def test_a_text_has_no_score_and_a_full_fine_tune_its_tokenizer(make_experiment, tmp_path):
    summary = finetune(make_experiment("full"), tmp_path, progress=False)
    assert summary["score"] is None and summary["loss_floor"] is None, f"a text has neither: {summary}"
    assert summary["trainable_parameters"] == summary["total_parameters"], summary
    assert math.isfinite(summary["validation_loss"]) and isinstance(open_base(tmp_path).load(), GPT), f"{summary}"
    assert not (tmp_path / "training_state.safetensors").exists(), "a finished run leaves no state"


def test_what_is_in_the_settings_decides_the_run(make_experiment):
    """Two experiments that differ in what their method depends on differ in their settings, and in nothing else."""
    changes = dict(lora=replace(make_experiment().lora, r=3), quantization=QLORA, virtual_tokens=9, loraplus_ratio=9)
    of_method = {method: {"lora"} for method in LORA_CHANGES} | {"full": set()}
    of_method |= {"soft-prompt": {"virtual_tokens"}, "prefix": {"virtual_tokens"}}
    of_method |= {"lora+": {"lora", "loraplus_ratio"}}
    of_method |= {method: {"lora", "quantization"} for method in ("qlora", "loftq")}
    for method in METHODS:
        plain = make_experiment(method).method_settings
        assert plain.keys() == of_method[method], f"{method} depends on {of_method[method]}, not on {plain.keys()}"
        for field, value in changes.items():
            changed = make_experiment(method, **{field: value}).method_settings != plain
            assert changed == (field in of_method[method]), f"{method}: settings change with {field}: {changed}"
    settings = make_experiment("qlora").method_settings["quantization"]
    assert settings == asdict(Quantization(block_size=16)), settings
