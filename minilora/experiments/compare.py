"""The main job: several methods from one base on one data set, side by side.

Each method is trained with its own learning rate, tuned beforehand on a grid (`--tune`), on the same rows in the same
order, and everything that is said of it is measured here: parameters, bytes by kind, time per step, losses, the
score of its answers and the size of what it saves.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from minilora.adapters.inject import count_parameters
from minilora.experiments import plots
from minilora.experiments.finetune import (
    LEARNING_RATES,
    Base,
    Run,
    adapter_settings,
    run,
    run_config,
    save_base,
    tuned_learning_rate,
)
from minilora.experiments.methods import Extras, check_methods
from minilora.experiments.simulate import QUANTIZATION
from minilora.inference.evaluate import Scored, score_task
from minilora.inference.generate import generate
from minilora.lora import LoRAConfig
from minilora.memory import MemoryMeter, format_bytes
from minilora.model import GPT
from minilora.quant import float_linears, quantized_layers
from minilora.storage.files import make_folder, read_json, write_json
from minilora.text.datasets import Dataset
from minilora.train import NonFiniteError, batch_rows, make_optimizer, set_gradient_checkpointing, training_step

# Each about three times the one before; where the best is the first or the last, `tune` goes on. LoRA's best rate is
# said to lie about ten times above full fine-tuning's; here it was one to three times. LoRA+'s rate is A's, and PiSSA
# starts with large factors, so both begin lower; trained embeddings and keys want far larger steps.
GRIDS = {"full": [1e-3, 3e-3, 1e-2], "lora": [3e-3, 1e-2, 3e-2], "prompt": [3e-2, 1e-1, 3e-1]}
GRID_OF = {"full": "full", "lora+": "full", "pissa": "full", "soft-prompt": "prompt", "prefix": "prompt"}  # else lora's
TUNING_SEED = 1000  # not one of the seeds that are compared
TIMING_ROUNDS = 8


def compare(
    base: Base,
    dataset: Dataset,
    methods: list[str],
    lora: LoRAConfig,
    steps: int,
    batch_size: int,
    seeds: list[int],
    out: Path,
    learning_rates: dict[str, float] | None = None,
    quantization: dict = QUANTIZATION,
    extras: Extras | None = None,
    progress: bool = True,
) -> dict:
    """Runs every method with every seed; writes figures, artifacts and results.json to `out`; returns the results.

    learning_rates: by method, in place of the tuned ones. quantization: qlora's and loftq's, as arguments of
        quantize_model.
    """
    check_methods(methods)
    make_folder(out)
    given = learning_rates or {}
    rates = {method: given.get(method) or tuned_learning_rate(dataset.name, method) for method in methods}
    before = sample(base.load(), base, dataset)
    rows, first_runs = [], []
    for method in methods:
        for seed in seeds:
            began = time.perf_counter()
            config = run_config(steps, rates[method], batch_size, seed)
            done = run(base, dataset, method, lora, config, quantization, extras, progress=progress)
            wall_seconds = time.perf_counter() - began
            rows.append(describe(done, base, dataset, out / f"{method}-seed{seed}", wall_seconds))
            if seed == seeds[0]:
                first_runs.append(done)
    after = {done.method: sample(done.model, base, dataset) for done in first_runs}
    # From here on the models are only weights to compute with: timing and metering take further steps.
    for method, ratio in step_ratios(first_runs, dataset, progress).items():
        for row in rows:
            if row["method"] == method:
                row["step_ratio"] = ratio
    for done in first_runs:
        split = measure_bytes(done, dataset)
        for row in rows:
            if row["method"] == done.method:
                row["bytes"] = split
        if done.method == "loftq":  # the adapters of all seeds fit this 4-bit base and no other
            save_base(done, base, out / "loftq-base")
    results = {
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": base.device,
            "threads": torch.get_num_threads(),
        },
        "task": dataset.name,
        "base": base.directory.name,
        "seed": seeds[0],
        "seeds": seeds,
        "loss_floor": dataset.floor,
        "score_before": before.score if isinstance(before, Scored) else None,
        "runs": rows,
    }
    write_json(out / "results.json", results)
    for name, figure in plots.comparison_figures(results).items():
        figure.savefig(out / f"{name}.png", dpi=150)
    print(table(results))
    print(samples_text(before, after, dataset))
    return results


def describe(done: Run, base: Base, dataset: Dataset, artifact: Path, wall_seconds: float) -> dict:
    """The row of results.json that this run fills by itself."""
    trainable, total = count_parameters(done.model)
    return {
        "method": done.method,
        "seed": done.seed,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "bits_per_weight": bits_per_weight(done.model),
        "learning_rate": done.config.learning_rate,
        "seconds_per_step": done.history.seconds_per_step,
        "wall_seconds": wall_seconds,
        "train_loss": done.history.train_loss,
        "validation_loss": done.history.validation_loss,
        "best_validation_loss": done.history.best_validation_loss,
        "score": score_task(done.model, base.tokenizer, dataset.task).score if dataset.task else None,
        "artifact_bytes": done.save(artifact),
    }


def bits_per_weight(model: GPT) -> float:
    """Of the block linears, counted from the bytes of what is stored, adapters left out."""
    floats, codes = float_linears(model).values(), [layer.quantized for layer in quantized_layers(model).values()]
    stored = sum(layer.weight.nbytes for layer in floats) + sum(weight.nbytes for weight in codes)
    count = sum(layer.weight.numel() for layer in floats) + sum(math.prod(weight.shape) for weight in codes)
    return 8 * stored / count


def first_batch(done: Run, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    rows = batch_rows(len(dataset.train), 0, done.config)
    device = next(done.model.parameters()).device
    return dataset.train.input_ids[rows].to(device), dataset.train.labels[rows].to(device)


def measure_bytes(done: Run, dataset: Dataset) -> dict[str, int]:
    """Bytes of tensors in one training step, each kind's own largest, and the peak of the sum."""
    config = replace(done.config, learning_rate=1e-9)
    optimizer = make_optimizer(done.model, config)
    set_gradient_checkpointing(done.model, config.gradient_checkpointing)
    done.model.train()
    batch = first_batch(done, dataset)
    training_step(done.model, optimizer, *batch, config)  # makes the optimizer's state
    meter = MemoryMeter(done.model, optimizer)
    with meter:
        training_step(done.model, optimizer, *batch, config)
    return meter.highest


def step_ratios(runs: list[Run], dataset: Dataset, progress: bool) -> dict[str, float]:
    """Each method's time per step over the first's: steps taken in turn, A B A B, and the median of the ratios."""
    actions = {}
    for done in runs:
        config = replace(done.config, learning_rate=1e-9)
        optimizer, batch = make_optimizer(done.model, config), first_batch(done, dataset)
        done.model.train()
        actions[done.method] = lambda d=done, o=optimizer, b=batch, c=config: training_step(d.model, o, *b, c)
    seconds = {method: [] for method in actions}
    for _ in tqdm(range(TIMING_ROUNDS), "timing steps in turn", disable=not progress):
        for method, action in actions.items():
            began = time.perf_counter()
            action().item()  # waits for the device
            seconds[method].append(time.perf_counter() - began)
    first = seconds[runs[0].method]
    pairs = {method: zip(times[1:], first[1:], strict=True) for method, times in seconds.items()}  # the first warms up
    return {method: statistics.median(b / a for b, a in pair) for method, pair in pairs.items()}


def sample(model, base: Base, dataset: Dataset) -> Scored | list[str]:
    """What the model says: for a task its scored answers, for a text how it continues three beginnings."""
    if dataset.task:
        return score_task(model, base.tokenizer, dataset.task)
    prompts = [[base.tokenizer.bos_id, *base.tokenizer.encode(prompt)] for prompt in dataset.prompts]
    room = model.config.max_position_embeddings - max(len(prompt) for prompt in prompts)
    written = generate(model, prompts, min(48, room), temperature=0.7, seed=0, eos_id=base.tokenizer.eos_id)
    return [base.tokenizer.decode(ids) for ids in written]


def table(results: dict) -> str:
    """One column for each method, five beside each other; with several seeds, means, and ± half the distance from
    lowest to highest."""
    columns, width = plots.methods_of(results), 5
    methods = list(columns)
    head = (
        f"{results['task']} from {results['base']}, seeds {', '.join(map(str, results['seeds']))}, "
        f"{results['environment']['device']}, torch {results['environment']['torch']}"
    )
    blocks = [methods[start : start + width] for start in range(0, len(methods), width)]
    return "\n\n".join([head, *(_block(results, columns, block, methods[0]) for block in blocks)])


def _block(results: dict, columns: dict[str, list[dict]], methods: list[str], first: str) -> str:
    """The lines of some of the methods beside each other; `first` is the one that step times are held against."""
    floor = results["loss_floor"]

    def line(name: str, cell) -> str:
        return f"{name:<34}" + "".join(f"{cell(columns[method]):>18}" for method in methods)

    def mean(rows: list[dict], key: str, form: str) -> str:
        values = [row[key] for row in rows]
        spread = f" ±{format((max(values) - min(values)) / 2, form)}" if len(values) > 1 else ""
        return format(statistics.mean(values), form) + spread

    def share(rows: list[dict]) -> str:
        return f"{rows[0]['trainable_parameters'] / rows[0]['total_parameters']:.2%}"

    lines = [
        line("", lambda rows: rows[0]["method"]),
        line("trainable parameters", lambda rows: f"{rows[0]['trainable_parameters']:,d}"),
        line("  of all", share),
        line("bits per weight, block linears", lambda rows: f"{rows[0]['bits_per_weight']:.2f}"),
        *(
            line(f"bytes of tensors: {kind}" if kind == "weights" else f"  {kind}", cell)
            for kind in ("weights", "gradients", "optimizer", "activations", "peak")
            for cell in [lambda rows, kind=kind: format_bytes(rows[0]["bytes"][kind])]
        ),
        line("learning rate", lambda rows: f"{rows[0]['learning_rate']:g}"),
        line("seconds per step", lambda rows: f"{statistics.median(r['seconds_per_step'] for r in rows):.3f}"),
        line(f"  over {first}'s, measured in turn", lambda rows: f"{rows[0]['step_ratio']:.2f}"),
        line("best validation loss, nats/token", lambda rows: mean(rows, "best_validation_loss", ".4f")),
    ]
    if floor is not None:
        above = line(
            "  above the entropy floor",
            lambda rows: f"{statistics.mean(row['best_validation_loss'] for row in rows) - floor:.4f}",
        )
        lines += [above, f"  (the floor is {floor:.4f})"]
    if results["score_before"] is not None:
        lines += [
            line("score before", lambda rows: f"{results['score_before']:.3f}"),
            line("score after", lambda rows: mean(rows, "score", ".3f")),
        ]
    lines.append(line("saved artifact", lambda rows: format_bytes(rows[0]["artifact_bytes"])))
    return "\n".join(lines)


def samples_text(before: Scored | list[str], after: dict, dataset: Dataset) -> str:
    """One example in the data's own words: the prompt, what the base said, and what each method says now."""
    if dataset.task:
        prompt = before.examples[0].prompt
        said = {"base": before.answers[0]} | {method: scored.answers[0] for method, scored in after.items()}
    else:
        prompt = dataset.prompts[0]
        said = {"base": before[0]} | {method: texts[0] for method, texts in after.items()}
    lines = ["", "prompt", *indent(prompt)]
    for name, text in said.items():
        lines += ["base, before" if name == "base" else f"{name}, after", *indent(text)]
    return "\n".join(lines)


def indent(text: str) -> list[str]:
    return [f"    {line}" for line in text.strip().splitlines()[:12]]


def tune(
    base: Base,
    dataset: Dataset,
    methods: list[str],
    lora: LoRAConfig,
    steps: int,
    batch_size: int,
    quantization: dict = QUANTIZATION,
    extras: Extras | None = None,
    progress: bool = True,
) -> dict:
    """Tries each method's grid of learning rates with a seed of its own and stores the choice for this data set.

    A choice at an end of the grid says only on which side the best rate lies: the grid is then extended by its own
    factor until both neighbours of the best are worse.
    """
    check_methods(methods)
    extras, chosen = extras or Extras(), {}
    for method in methods:

        def loss_at(rate: float, method=method) -> float | None:
            config = run_config(steps, rate, batch_size, TUNING_SEED)
            try:
                done = run(base, dataset, method, lora, config, quantization, extras, progress=progress)
            except NonFiniteError:  # diverged: out of the question
                return None
            return done.history.best_validation_loss

        losses = search(loss_at, GRIDS[GRID_OF.get(method, "lora")])
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not finite:
            raise ValueError(f"{method} diverged at every rate of its grid, {', '.join(map(str, losses))}")
        chosen[method] = {
            "grid": [{"learning_rate": rate, "validation_loss": losses[rate]} for rate in sorted(losses)],
            "chosen": min(finite, key=finite.get),
            "steps": steps,
            "batch_size": batch_size,
            "seed": TUNING_SEED,
            **adapter_settings(method, lora, quantization, extras),
        }
        stored = read_json(LEARNING_RATES) if LEARNING_RATES.exists() else {}
        stored[dataset.name] = stored.get(dataset.name, {}) | {method: chosen[method]}
        write_json(LEARNING_RATES, stored)
    return chosen


def search(loss_at: Callable[[float], float | None], grid: list[float]) -> dict[float, float | None]:
    """The loss at every rate of the grid (None: diverged), and beyond its ends as long as the best lies at one."""
    losses = {rate: loss_at(rate) for rate in grid}
    while any(loss is not None for loss in losses.values()):
        best = min((rate for rate in losses if losses[rate] is not None), key=losses.get)
        if best == min(losses):
            further = float(f"{best**2 / sorted(losses)[1]:.0e}")  # one digit: 1e-2, 3e-3
        elif best == max(losses):
            further = float(f"{best**2 / sorted(losses)[-2]:.0e}")
        else:
            break
        losses[further] = loss_at(further)
    return losses
