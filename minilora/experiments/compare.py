"""The main job: several methods from one base on one data set, side by side.

Each method is trained with its own learning rate, tuned beforehand on a grid (`--tune`), on the same rows in the same
order. All that is said of it is measured here: parameters, bytes by kind, time per step, losses, the score of its
answers and the size of what it saves.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minilora.adapters.inject import count_parameters
from minilora.adapters.prompts import Prompt
from minilora.experiments import figures
from minilora.experiments.methods import Experiment
from minilora.experiments.run import Run, run
from minilora.experiments.timing import Timing, ratios_in_turn
from minilora.inference.evaluate import Scored, score_task
from minilora.inference.generate import generate
from minilora.linear4bit import float_linears, quantized_layers
from minilora.memory import KINDS, MemoryMeter, format_bytes
from minilora.model import GPT
from minilora.ranges import SEED
from minilora.rows import batch_of
from minilora.storage.files import make_folder, replacing, write_json
from minilora.storage.folders import check_apart
from minilora.storage.locks import locked
from minilora.text.chat import encode_prompt
from minilora.text.datasets import Dataset
from minilora.train import make_optimizer, set_gradient_checkpointing, training_step

TIMING_ROUNDS = 7
COLUMNS = 5  # methods beside each other in the table


def compare(experiments: list[Experiment], seeds: list[int], out: Path, progress: bool = True) -> dict:
    """Runs every experiment with every seed; writes figures, artifacts and results.json to `out`; returns the results.

    experiments: one for each method, of the same base and data; their own seed is not used. One run writes `out` at a
    time. Raises ValueError where another does, where `out` is the base, for no experiment or no seed, for a method or a
    seed that comes twice, and for a seed out of range.
    """
    for what, named in (("method", [experiment.method for experiment in experiments]), ("seed", seeds)):
        if not named or len(set(named)) < len(named):
            raise ValueError(f"each {what} is compared once, and there must be one; these are {list(named)}")
    for seed in seeds:  # the last one is not to be refused when the others have run
        SEED.check("seed", seed)
    written = [f"{experiment.method}-seed{seed}" for experiment in experiments for seed in seeds]
    for name in ("", "loftq-base", *written):
        check_apart(out / name, base=experiments[0].base.directory)
    make_folder(out)
    with locked(out, patience=0):
        return _compare(experiments, seeds, out, progress)


def _compare(experiments: list[Experiment], seeds: list[int], out: Path, progress: bool) -> dict:
    base, dataset = experiments[0].base, experiments[0].dataset
    before = sample(base.load(), experiments[0])
    rows: list[dict] = []
    first_runs: list[Run] = []
    after: dict[str, Scored | list[str]] = {}
    for experiment in experiments:
        for seed in seeds:
            seeded = replace(experiment, training=replace(experiment.training, seed=seed))
            began = time.perf_counter()
            finished = run(seeded, progress=progress)
            seconds = time.perf_counter() - began
            if experiment.method == "loftq":
                vars(finished.model)["name_or_path"] = str((out / "loftq-base").resolve())
            said = sample(finished.model, seeded)
            rows.append(describe(finished, out / f"{experiment.method}-seed{seed}", seconds, said))
            if seed == seeds[0]:
                first_runs.append(finished)
                after[experiment.method] = said
    # From here on the models are only weights to compute with: timing and metering take further steps.
    ratios = step_ratios(first_runs, progress)
    for finished in first_runs:
        method = finished.experiment.method
        measured = {"step_ratio": ratios[method], "bytes": measure_bytes(finished)}
        rows = [row | measured if row["method"] == method else row for row in rows]
        if method == "loftq":  # the adapters of all seeds fit this 4-bit base and no other
            finished.save_base(out / "loftq-base")
    environment = {"torch": torch.__version__, "python": platform.python_version(), "device": base.device}
    results = {
        "environment": environment | {"threads": torch.get_num_threads()},
        "task": dataset.name,
        "base": base.name,
        "seed": seeds[0],
        "seeds": seeds,
        "loss_floor": dataset.floor,
        "score_before": before.score if isinstance(before, Scored) else None,
        "runs": rows,
    }
    write_json(out / "results.json", results)
    for name, figure in figures.comparison_figures(results).items():
        with replacing(out / f"{name}.png") as temporary:
            figure.write(temporary)
    print(table(results))
    print(samples_text(before, after, dataset))
    return results


def describe(finished: Run, artifact: Path, wall_seconds: float, said: Scored | list[str]) -> dict:
    """A row of results.json, without what is measured of several runs together."""
    experiment, model, history = finished.experiment, finished.model, finished.history
    trainable, total = count_parameters(model)
    return {
        "method": experiment.method,
        "seed": experiment.training.seed,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "bits_per_weight": bits_per_weight(model),
        "learning_rate": experiment.training.learning_rate,
        "seconds_per_step": history.seconds_per_step,
        "wall_seconds": wall_seconds,
        "train_loss": history.train_loss,
        "validation_loss": history.validation_loss,
        "best_validation_loss": history.best_validation_loss,
        "score": said.score if isinstance(said, Scored) else None,
        "artifact_bytes": finished.save(artifact),
    }


def bits_per_weight(model: nn.Module) -> float:
    """Of the block linears, from the bytes that are stored; adapters are left out."""
    floats, codes = float_linears(model).values(), [layer.quantized for layer in quantized_layers(model).values()]
    size = sum(layer.weight.nbytes for layer in floats) + sum(weight.nbytes for weight in codes)
    count = sum(layer.weight.numel() for layer in floats) + sum(math.prod(weight.shape) for weight in codes)
    return 8 * size / count


def prepare_steps(finished: Run) -> tuple[Callable[[], Tensor], Optimizer]:
    """A function that takes one more training step of the run, at a rate too small to matter; and its optimizer."""
    model, config = finished.model, replace(finished.experiment.training, learning_rate=1e-9)
    data, device = finished.experiment.dataset.train, finished.experiment.base.device
    input_ids, labels = (part.to(device) for part in batch_of(data, 0, config))  # (B, T)
    optimizer = make_optimizer(model, config)
    set_gradient_checkpointing(model, config.gradient_checkpointing)
    model.train()
    return lambda: training_step(model, optimizer, input_ids, labels, config), optimizer


def measure_bytes(finished: Run) -> dict[str, int]:
    """Bytes of tensors in one training step, each kind's own largest, and the peak of the sum."""
    step, optimizer = prepare_steps(finished)
    step()  # makes the optimizer's state
    with MemoryMeter(finished.model, optimizer) as meter:
        step()
    return meter.highest


def step_ratios(runs: list[Run], progress: bool) -> dict[str, float]:
    """Each method's time per step over the first's: steps taken in turn, A B A B, and the median of the ratios."""
    steps = {finished.experiment.method: prepare_steps(finished)[0] for finished in runs}
    actions = {method: lambda step=step: step().item() for method, step in steps.items()}  # item waits for the device
    dear = sum(finished.history.seconds_per_step for finished in runs) > 2  # seconds; a long step needs fewer rounds
    timing = Timing(3 if dear else TIMING_ROUNDS, progress=progress)
    ratios = ratios_in_turn(actions, timing, "timing steps in turn")
    medians = {method: statistics.median(values) for method, values in ratios.items()}
    return {next(iter(steps)): 1.0} | medians


def sample(model: GPT | Prompt, experiment: Experiment) -> Scored | list[str]:
    """For a task the model's scored answers, for a text how the model continues three beginnings."""
    dataset, tokenizer = experiment.dataset, experiment.base.tokenizer
    if dataset.task:
        return score_task(model, tokenizer, dataset.task)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in dataset.prompts]
    room = model.config.max_position_embeddings - max(len(prompt) for prompt in prompts)
    ends, pieces = tokenizer.end_ids, tokenizer.vocab_size
    written = generate(model, prompts, min(48, room), temperature=0.7, seed=0, eos_id=ends, vocab_size=pieces)
    return [tokenizer.decode(ids) for ids in written]


def table(results: dict) -> str:
    """One column for each method; with several seeds, means, and ± half the distance from lowest to highest."""
    place, rows = results["environment"], figures.methods_of(results)
    head = f"{results['task']} from {results['base']}, seeds {', '.join(map(str, results['seeds']))}"
    columns = [column(some, next(iter(rows)), results) for some in rows.values()]
    blocks = [f"{head}, {place['device']}, torch {place['torch']}"]
    for start in range(0, len(columns), COLUMNS):
        beside = columns[start : start + COLUMNS]
        lines = [f"{name:<34}" + "".join(f"{cells[name]:>18}" for cells in beside) for name in beside[0]]
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)


def column(rows: list[dict], first: str, results: dict) -> dict[str, str]:
    """One method's cells by the name of their line. rows: one for each seed; first: the method of the first column."""
    row, floor = rows[0], results["loss_floor"]

    def mean(key: str, form: str) -> str:
        values = [each[key] for each in rows]
        spread = f" ±{format((max(values) - min(values)) / 2, form)}" if len(values) > 1 else ""
        return format(statistics.mean(values), form) + spread

    cells = {
        "": row["method"],
        "trainable parameters": f"{row['trainable_parameters']:,d}",
        "  of all": f"{row['trainable_parameters'] / row['total_parameters']:.2%}",
        "bits per weight, block linears": f"{row['bits_per_weight']:.2f}",
        "bytes of tensors: weights": format_bytes(row["bytes"]["weights"]),
        **{f"  {kind}": format_bytes(row["bytes"][kind]) for kind in (*KINDS[1:], "peak")},
        "learning rate": f"{row['learning_rate']:g}",
        "seconds per step": f"{statistics.median(each['seconds_per_step'] for each in rows):.3f}",
        f"  over {first}'s, measured in turn": f"{row['step_ratio']:.2f}",
        "best validation loss, nats/token": mean("best_validation_loss", ".4f"),
    }
    if floor is not None:
        above = statistics.mean(each["best_validation_loss"] for each in rows) - floor
        cells |= {"  above the entropy floor": f"{above:.4f}", f"  (the floor is {floor:.4f})": ""}
    if results["score_before"] is not None:
        cells |= {"score before": f"{results['score_before']:.3f}", "score after": mean("score", ".3f")}
    return cells | {"saved artifact": format_bytes(row["artifact_bytes"])}


def samples_text(before: Scored | list[str], after: dict[str, Scored | list[str]], dataset: Dataset) -> str:
    """One example in the data's own words: the prompt, what the base said, and what each method says now."""

    def first(said: Scored | list[str]) -> str:
        return said.answers[0] if isinstance(said, Scored) else said[0]

    prompt = before.examples[0].prompt if isinstance(before, Scored) else dataset.prompts[0]
    said = {"prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"], "base, before": first(before)}
    said |= {f"{method}, after": first(sampled) for method, sampled in after.items()}
    lines = [""]
    for name, text in said.items():
        lines += [name, *(f"    {line}" for line in text.strip().splitlines()[:12])]
    return "\n".join(lines)
