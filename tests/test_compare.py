"""The numbers of `compare`: each is held against the same number worked out by hand."""

import copy
import json
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minilora import GPT, GPTConfig, LoRAConfig, MemoryMeter, apply_lora, count_parameters
from minilora.experiments import compare as compare_file
from minilora.experiments import timing
from minilora.experiments.compare import (
    bits_per_weight,
    compare,
    describe,
    measure_bytes,
    prepare_steps,
    sample,
    samples_text,
    step_ratios,
    table,
)
from minilora.experiments.methods import METHODS, prepare
from minilora.experiments.run import Run, run
from minilora.inference.evaluate import Scored, score_task
from minilora.linear4bit import quantize_model
from minilora.memory import KINDS
from minilora.quant import Quantization
from minilora.rows import batch_of, batch_rows
from minilora.text.tasks import load_task
from minilora.train import evaluate_loss, make_optimizer, training_step
from minilora.train_settings import IGNORE, History

MIB = 2**20


def untrained(experiment) -> Run:
    return Run(experiment, prepare(experiment.base.load(), experiment), History())


class Clock:
    """In place of the module `time`: it stands still but for what is added to it."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (compare_file, timing):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def pirate(make_experiment):
    """An experiment on eight examples of a task."""
    dataset = make_experiment().dataset
    task = load_task("pirate", 1, 8)
    return make_experiment(dataset=replace(dataset, task=task, prompts=[each.prompt for each in task.validation]))


# The row of a run


def test_a_row_says_what_the_run_was(make_experiment, tmp_path):
    finished = untrained(make_experiment("qlora"))
    finished.history = History(
        train_loss=[[0, 5.0], [1, 4.0]],
        validation_loss=[[0, 3.0], [2, 1.0], [3, 2.0]],
        step_seconds=[9.0, 1.0, 2.0, 2.5],
        tokens=64,
    )
    row = describe(finished, tmp_path / "artifact", 12.5, Scored([], [], [True, False, False, False]))
    trainable = sum(parameter.numel() for parameter in finished.model.parameters() if parameter.requires_grad)
    adapters = 2 * sum(16 + 16 + 16 + 8 + 16 + 8 + 16 + 16 + 3 * (16 + 32) for _ in range(1))  # r (in + out)
    whole = 2 * 800 * 16 + 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 3 * 16 + adapters
    expected = {
        "method": "qlora",
        "seed": 5,
        "trainable_parameters": trainable,
        "total_parameters": whole,
        "bits_per_weight": pytest.approx(4.0 + 8 / 16 + 7 * 8 * (4 + 4) / (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)),
        "learning_rate": 1e-2,
        "seconds_per_step": 2.25,  # the median
        "wall_seconds": 12.5,
        "train_loss": [[0, 5.0], [1, 4.0]],
        "validation_loss": [[0, 3.0], [2, 1.0], [3, 2.0]],
        "best_validation_loss": 1.0,
        "score": 0.25,
        "artifact_bytes": sum(file.stat().st_size for file in (tmp_path / "artifact").iterdir()),
    }
    assert row.keys() == expected.keys(), f"fields missing or too many: {row.keys() ^ expected.keys()}"
    for name, value in expected.items():
        assert row[name] == value, f"{name}: expected {value}, got {row[name]}"
    assert trainable == adapters, f"the adapters have {adapters} parameters, and {trainable} are said to be trained"
    text = make_experiment()
    row = describe(untrained_with_a_history(text), tmp_path / "text", 1.0, ["some", "text"])
    assert row["score"] is None, f"a text has no score, and this one {row['score']}"


def untrained_with_a_history(experiment) -> Run:
    finished = untrained(experiment)
    finished.history = History([[0, 1.0]], [[0, 1.0]], [1.0], 1)
    return finished


def blocks(dtype=torch.float32) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(64, 32, 48, 2, 4, 2, max_position_embeddings=16, attention_bias=True)).to(dtype)


def test_bits_per_weight_are_those_of_the_block_linears_as_stored():
    """Biases, embeddings, the head and adapters are none of them."""
    lora = LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear")
    nested = {(32, 32): 4 + 4, (16, 32): 4 + 4, (48, 32): 4 + 4}  # a float32 scale of scales and an offset a layer
    bytes_of = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "g": (48, 32), "u": (48, 32), "d": (48, 32)}
    count = sum(math.prod(shape) for shape in bytes_of.values())
    extra = 8 * sum(nested[shape] for shape in bytes_of.values()) / count
    cases = {
        "float32": (blocks(), 32),
        "bfloat16": (blocks(torch.bfloat16), 16),
        "4 bits, a float32 scale for 64": (quantize_model(blocks(), Quantization("nf4", 64, False)), 4 + 32 / 64),
        "4 bits, a float32 scale for 16": (quantize_model(blocks(), Quantization("int4", 16, False)), 4 + 32 / 16),
        "4 bits, an 8-bit scale for 32": (quantize_model(blocks(), Quantization("nf4", 32, True)), 4 + 8 / 32 + extra),
    }
    for name, (model, expected) in cases.items():
        for with_adapters in (False, True):
            found = bits_per_weight(apply_lora(model, lora) if with_adapters else model)
            what = f"{name}{', with adapters' if with_adapters else ''}"
            assert found == pytest.approx(expected, rel=1e-12), f"{what}: {expected} bits a weight, not {found}"
    model = quantize_model(blocks(), Quantization("nf4", 64, False), skip=("lm_head", "mlp"))
    floats, codes = 2 * 3 * 48 * 32, count * 2 - 2 * 3 * 48 * 32
    expected = (32 * floats + 4.5 * codes) / (floats + codes)
    found = bits_per_weight(model)
    assert found == pytest.approx(expected, rel=1e-12), f"half in floats: {expected} bits a weight, not {found}"


# One more step


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_more_step_is_a_training_step_that_changes_next_to_nothing(make_experiment, checkpointing):
    training = replace(make_experiment().training, gradient_checkpointing=checkpointing)
    experiment = make_experiment(training=training, lora=LoRAConfig(2, 4, target_modules=["q_proj"]))
    finished = untrained(experiment)
    model, data = finished.model, experiment.dataset.train
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.eval()  # as the loop leaves it
    step, optimizer = prepare_steps(finished)
    loss = step().item()
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {1e-9}, f"the rate should be too small to matter, and is {rates}"
    assert model.training and model.model.gradient_checkpointing == checkpointing, "not as in training"
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).abs().max().item()
        assert moved < 1e-8, f"{name} moved by {moved:.2g}, far more than 1e-9"
    rows = batch_rows(len(data), 0, training)
    expected = evaluate_loss(model, replace(data, input_ids=data.input_ids[rows], labels=data.labels[rows]), 4)
    assert loss == pytest.approx(expected, abs=1e-5), f"the loss of the first batch is {expected}, not {loss}"


def test_one_more_step_sees_the_batch_that_the_loop_sees(make_experiment):
    data = make_experiment().dataset.train
    labels = data.labels.clone()
    labels[:, 11:] = IGNORE
    dataset = replace(make_experiment().dataset, train=replace(data, labels=labels))
    finished, read = untrained(make_experiment(dataset=dataset)), []
    finished.model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    prepare_steps(finished)[0]()
    expected = data.input_ids[batch_rows(12, 0, finished.experiment.training)][:, :11]
    shape = tuple(read[0].shape)
    assert torch.equal(read[0], expected), f"4 rows, trimmed to 11 columns, were expected, got {shape} or other rows"


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix"])
def test_bytes_are_those_of_the_second_step(make_experiment, method):
    """The first makes the optimizer's state when activations are gone: its peak is not that of all the others."""
    experiment = make_experiment(method)
    finished = untrained(experiment)
    by_hand, training = copy.deepcopy(finished.model).train(), experiment.training
    ids, labels = batch_of(experiment.dataset.train, 0, training)
    optimizer, highest = make_optimizer(by_hand, training), []
    for _ in range(2):
        with MemoryMeter(by_hand, optimizer) as meter:
            training_step(by_hand, optimizer, ids, labels, training)
        highest.append(meter.highest)
    first, second = highest
    assert first["peak"] < second["peak"], f"the case shows nothing: peaks {first['peak']} and {second['peak']}"
    found = measure_bytes(finished)
    for kind in (*KINDS, "peak"):
        off = found[kind] - second[kind]
        assert off == 0, f"{kind}: the second step holds {second[kind]} bytes, off by {off} (a first: {first[kind]})"


def test_bytes_of_weights_gradients_and_optimizer_in_closed_form(make_experiment):
    for method in ("full", "lora", "prefix"):
        finished = untrained(make_experiment(method))
        found = measure_bytes(finished)
        trained, tensors = count_parameters(finished.model)[0], len(list(finished.model.parameters()))
        tensors = sum(parameter.requires_grad for parameter in finished.model.parameters())
        expected = {
            "weights": 4 * sum(tensor.numel() for tensor in finished.model.parameters()),
            "gradients": 4 * trained,
            "optimizer": 8 * trained + 4 * tensors,
        }
        for kind, value in expected.items():
            assert found[kind] == value, f"{method}, {kind}: expected {value} bytes, off by {found[kind] - value}"


def timed_runs(monkeypatch, clock, seconds: dict[str, list[float]], in_training=0.1) -> tuple[list, list]:
    """Runs whose steps take the seconds of this list, one after the other, and the order in which they were taken.

    in_training: the median seconds of a step of each run, in its history.
    """
    taken = []

    def prepare_steps(finished):
        method = finished.experiment.method
        times, at_once = iter(seconds[method]), 0.5 if method == "full" else 0.1

        def step():
            taken.append(method)
            clock.now += next(times) * at_once
            return SimpleNamespace(item=wait)  # the rest passes while the device is waited for

        def wait():
            clock.now += seconds[method][taken.count(method) - 1] * (1 - at_once)

        return step, None

    monkeypatch.setattr(compare_file, "prepare_steps", prepare_steps)
    history = SimpleNamespace(seconds_per_step=in_training)
    return [SimpleNamespace(experiment=SimpleNamespace(method=method), history=history) for method in seconds], taken


def test_step_ratios_are_the_median_of_ratios_without_the_first(monkeypatch, clock):
    first = [7.0, 1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0]
    ratios = [900.0, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 90.0]  # the first warms up, and one slow step must not decide
    seconds = {"full": first, "lora": [a * ratio for a, ratio in zip(first, ratios, strict=True)]}
    seconds["dora"] = [2 * b for b in seconds["lora"]]
    runs, taken = timed_runs(monkeypatch, clock, seconds)
    found = step_ratios(runs, progress=False)
    assert taken == ["full", "lora", "dora"] * 8, f"eight steps of each, in turn: {taken}"
    for method, expected in (("full", 1.0), ("lora", 0.8), ("dora", 1.6)):
        with_warm_up = statistics.median(b / a for a, b in zip(first, seconds[method], strict=True))
        what = f"{method}: expected {expected} (with the warm-up {with_warm_up:.3g}), off by {found[method] - expected}"
        assert found[method] == pytest.approx(expected, rel=1e-9), what
    assert list(found) == ["full", "lora", "dora"], f"in the order of the runs: {list(found)}"


def test_long_steps_are_timed_in_fewer_rounds(monkeypatch, clock):
    seconds = {"full": [9.0, 4.0, 4.0, 4.0], "lora": [9.0, 2.0, 3.0, 2.0]}
    runs, taken = timed_runs(monkeypatch, clock, seconds, in_training=3.0)
    assert step_ratios(runs, progress=False) == {"full": 1.0, "lora": 0.5}
    assert taken == ["full", "lora"] * 4, f"a round to warm up and three that count: {taken}"


# The table


def result_row(method: str, seed: int, **changes) -> dict:
    row = {
        "method": method,
        "seed": seed,
        "trainable_parameters": 162_816,
        "total_parameters": 3_114_432,
        "bits_per_weight": 4.126,
        "learning_rate": 0.003,
        "seconds_per_step": 0.1234,
        "step_ratio": 0.876,
        "best_validation_loss": 0.6,
        "score": 0.5,
        "artifact_bytes": 662_368,
        "bytes": dict(weights=12 * MIB, gradients=636 * 2**10, optimizer=3 * MIB // 2, activations=100, peak=2**30),
    }
    return row | changes


def results_of(rows: list[dict], **changes) -> dict:
    seeds = sorted({row["seed"] for row in rows})
    results = {"task": "pirate", "base": "small", "seeds": seeds, "environment": {"device": "cpu", "torch": "2.99"}}
    return results | {"loss_floor": 0.25, "score_before": 0.0625, "runs": rows} | changes


def lines_of(results: dict) -> list[list[str]]:
    """The table's lines, each split where two or more spaces stand."""
    lines = [line.strip() for line in table(results).splitlines()]
    return [[cell.strip() for cell in line.replace("  ", "\t").split("\t") if cell] for line in lines]


def assert_lines(found: list[list[str]], expected: list[list[str]]):
    for line in expected:
        alike = [other for other in found if other and line and other[0] == line[0]]
        assert line in found, f"expected the line {line}, got {alike or found}"
    assert found == expected, f"lines too many or in another order: {[line[0] for line in found if line]}"


def test_the_table_of_several_seeds_says_means_and_half_the_spread():
    full = dict(trainable_parameters=3_000_000, total_parameters=3_000_000, bits_per_weight=32.0, step_ratio=1.0)
    rows = [
        *(result_row("full", seed, **full, best_validation_loss=loss) for seed, loss in enumerate((0.3, 0.5, 0.4))),
        result_row("lora", 0, best_validation_loss=0.6, score=0.5, seconds_per_step=0.2),
        result_row("lora", 1, best_validation_loss=0.65, score=0.75, seconds_per_step=0.9),
        result_row("lora", 2, best_validation_loss=0.58, score=0.4, seconds_per_step=0.3),
    ]
    expected = [
        ["pirate from small, seeds 0, 1, 2, cpu, torch 2.99"],
        [],
        ["full", "lora"],
        ["trainable parameters", "3,000,000", "162,816"],
        ["of all", "100.00%", "5.23%"],
        ["bits per weight, block linears", "32.00", "4.13"],
        ["bytes of tensors: weights", "12.00 MiB", "12.00 MiB"],
        ["gradients", "636.00 KiB", "636.00 KiB"],
        ["optimizer", "1.50 MiB", "1.50 MiB"],
        ["activations", "100 B", "100 B"],
        ["peak", "1.00 GiB", "1.00 GiB"],
        ["learning rate", "0.003", "0.003"],
        ["seconds per step", "0.123", "0.300"],  # the median
        ["over full's, measured in turn", "1.00", "0.88"],
        ["best validation loss, nats/token", "0.4000 ±0.1000", "0.6100 ±0.0350"],
        ["above the entropy floor", "0.1500", "0.3600"],
        ["(the floor is 0.2500)"],
        ["score before", "0.062", "0.062"],
        ["score after", "0.500 ±0.000", "0.550 ±0.175"],
        ["saved artifact", "646.84 KiB", "646.84 KiB"],
    ]
    assert_lines(lines_of(results_of(rows)), expected)


def test_a_table_of_one_seed_on_a_text_has_no_spread_no_floor_and_no_score():
    results = results_of([result_row("lora", 4, score=None)], loss_floor=None, score_before=None)
    lines = lines_of(results)
    assert ["best validation loss, nats/token", "0.6000"] in lines, lines
    assert lines[0] == ["pirate from small, seeds 4, cpu, torch 2.99"], lines[0]
    assert ["over lora's, measured in turn", "0.88"] in lines, "the first method is what the others are held against"
    text = table(results)
    found = [word for word in ("±", "floor", "score") if word in text]
    assert not found, f"on a text with one seed there is no {found}:\n{text}"


def test_a_floor_of_zero_is_a_floor_and_a_score_of_zero_a_score():
    lines = lines_of(results_of([result_row("lora", 0)], loss_floor=0.0, score_before=0.0))
    for line in (["above the entropy floor", "0.6000"], ["(the floor is 0.0000)"], ["score before", "0.000"]):
        assert line in lines, f"expected the line {line} in {lines}"


def test_a_table_of_many_methods_comes_in_blocks():
    text = table(results_of([result_row(method, 0) for method in METHODS], loss_floor=None))
    for method in METHODS:
        count = text.count(f" {method}\n") + text.count(f" {method} ")
        assert count == 1, f"{method} heads {count} columns, not 1:\n{text}"
    assert text.count("over full's") == 3, f"13 methods make three blocks, all held against the first:\n{text}"
    widest = max(map(len, text.splitlines()))
    assert widest <= 124, f"a line has {widest} characters, more than five methods need"


# All together


def test_compare_runs_each_method_with_each_seed_and_measures_the_first(
    pirate, clock, monkeypatch, tmp_path, capsys, make_experiment
):
    experiments = [replace(pirate, method=method) for method in ("lora", "loftq")]
    models, bases, saved = {}, [], []

    def fake_run(experiment, progress):
        model = models[experiment.method, experiment.training.seed] = SimpleNamespace()
        clock.now += 10 + experiment.training.seed
        return Run(experiment, model, History())

    def fake_describe(finished, artifact, seconds, said):
        assert said.answers[0] == f"from {finished.experiment.method}, seed {finished.experiment.training.seed}"
        method, seed = finished.experiment.method, finished.experiment.training.seed
        assert finished.model is models[method, seed]
        row = result_row(method, seed, best_validation_loss=0.5 + seed / 100)
        return row | {"wall_seconds": seconds, "artifact": artifact.name, "validation_loss": [[0, 1.0]]}

    def fake_sample(model, experiment):
        before = isinstance(model, GPT)
        bases.append(before)
        said = "from the base" if before else f"from {experiment.method}, seed {experiment.training.seed}"
        return Scored(pirate.dataset.task.validation, [said] * 4, [True] + [not before] * 3)

    monkeypatch.setattr(compare_file, "run", fake_run)
    monkeypatch.setattr(compare_file, "describe", fake_describe)
    monkeypatch.setattr(compare_file, "sample", fake_sample)
    monkeypatch.setattr(compare_file, "step_ratios", lambda runs, progress: {"lora": 1.0, "loftq": 1.25})
    monkeypatch.setattr(compare_file, "measure_bytes", lambda finished: sizes[finished.experiment.method])
    monkeypatch.setattr(Run, "save_base", lambda finished, path: saved.append((finished.experiment.method, path.name)))
    methods_of = compare_file.figures.methods_of
    figures = SimpleNamespace(comparison_figures=lambda results: {}, methods_of=methods_of)
    monkeypatch.setattr(compare_file, "figures", figures)
    sizes = {method: result_row(method, 0)["bytes"] | {"peak": peak} for method, peak in (("lora", 7), ("loftq", 9))}
    results = compare(experiments, [3, 4], tmp_path, progress=False)

    rows = results["runs"]
    order = [(row["method"], row["seed"]) for row in rows]
    assert order == [("lora", 3), ("lora", 4), ("loftq", 3), ("loftq", 4)], f"each method, each seed: {order}"
    for row in rows:
        expected = {
            "wall_seconds": 10 + row["seed"],
            "artifact": f"{row['method']}-seed{row['seed']}",
            "step_ratio": {"lora": 1.0, "loftq": 1.25}[row["method"]],
            "bytes": sizes[row["method"]],
        }
        for name, value in expected.items():
            assert row[name] == value, f"{row['method']}, seed {row['seed']}: {name} is {value}, not {row[name]}"
    assert bases == [True, *[False] * 4], f"asked once: the base before, and each run after: {bases}"
    assert saved == [("loftq", "loftq-base")], f"LoftQ's own base is written, and no other: {saved}"
    head = {"task": "words", "base": pirate.base.directory.name, "seed": 3, "seeds": [3, 4], "loss_floor": None}
    head |= {"score_before": 0.25}
    for name, value in head.items():
        assert results[name] == value, f"{name}: expected {value}, got {results[name]}"
    place = results["environment"]
    expected = {"torch": torch.__version__, "device": "cpu", "threads": torch.get_num_threads()}
    assert {name: place[name] for name in expected} == expected, f"expected {expected}, got {place}"
    assert json.loads((tmp_path / "results.json").read_text()) == results, "what is written is what is returned"
    said = capsys.readouterr().out
    for words in (table(results), "from the base", "from lora, seed 3", "from loftq, seed 3"):
        assert words in said, f"{words!r} is not in what was printed:\n{said}"


@pytest.mark.parametrize("length", [1, 40])
def test_a_text_is_continued_and_a_task_is_answered(make_experiment, pirate, monkeypatch, length):
    experiment = make_experiment(dataset=replace(make_experiment().dataset, prompts=["The", "Q" * length]))
    model, tokenizer, asked = experiment.base.load(), experiment.base.tokenizer, []
    generate = compare_file.generate
    monkeypatch.setattr(
        compare_file, "generate", lambda *given, **how: asked.append((*given, how)) or generate(*given, **how)
    )
    written = sample(model, experiment)
    prompts = [[*tokenizer.prefix, *tokenizer.encode(prompt)] for prompt in experiment.dataset.prompts]
    room = min(48, 64 - len(prompts[1]))
    how = dict(temperature=0.7, seed=0, eos_id=tokenizer.end_ids, vocab_size=tokenizer.vocab_size)
    assert asked == [(model, prompts, room, how)], f"expected {(prompts, room, how)}, asked for {asked[0][1:]}"
    expected = [tokenizer.decode(ids) for ids in generate(model, prompts, room, **how)]
    assert written == expected, f"expected {expected}, got {written}"
    scored, expected = sample(model, pirate), score_task(model, tokenizer, pirate.dataset.task)
    assert scored == expected, f"a task is scored: {expected}, not {scored}"


def test_a_sample_is_the_prompt_and_what_each_model_says(pirate, make_experiment):
    dataset = pirate.dataset
    before, after = (Scored(dataset.task.validation, [word, "more"], [False, True]) for word in ("no\nidea", "arr"))
    said = samples_text(before, {"lora": after}, dataset).splitlines()
    prompt = [f"    {line}" for line in dataset.task.validation[0].prompt.strip().splitlines()]
    expected = ["", "prompt", *prompt, "base, before", "    no", "    idea", "lora, after", "    arr"]
    assert said == expected, f"expected {expected}, got {said}"
    text = samples_text(["one"], {"full": ["two", "three"]}, make_experiment().dataset).splitlines()
    assert text == ["", "prompt", "    The", "base, before", "    one", "full, after", "    two"], text
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = samples_text(["one"], {}, make_experiment(dataset=replace(dataset, prompts=[chat])).dataset).splitlines()
    assert text[:3] == ["", "prompt", "    Why?"], f"of a chat, what the user said last: {text}"


def test_losses_of_a_real_run_are_those_of_its_model(make_experiment, tmp_path):
    """From the loop to the row: the last validation loss is the saved model's, the first the base's."""
    experiment = make_experiment()
    finished = run(experiment, progress=False)
    row, data = describe(finished, tmp_path / "artifact", 1.0, []), experiment.dataset.validation
    for step, model in ((0, experiment.base.load()), (-1, finished.model)):
        expected, found = evaluate_loss(model, data, 4), row["validation_loss"][step][1]
        assert found == pytest.approx(expected, abs=1e-5), (
            f"point {step}: expected {expected}, off by {found - expected}"
        )
    assert row["best_validation_loss"] == min(loss for _, loss in row["validation_loss"]), row["validation_loss"]
