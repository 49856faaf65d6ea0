"""One run: a method trains on a data set from a base, and its adapter or model is saved.

`compare` calls `run` for every method and seed; `finetune` is one such run, kept on disk and resumable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minilora.adapters.inject import count_parameters, lora_layers, remove_lora
from minilora.adapters.prompts import Prompt
from minilora.distributed import rank, shard, unshard, wait_for_all
from minilora.experiments.goals import data_of, find_teacher, micro_batch, objective_of, start_from
from minilora.experiments.methods import BaseFolder, Experiment, finish, prepare, training_options
from minilora.inference.evaluate import score_task
from minilora.model import GPT
from minilora.objectives import preferred
from minilora.places import DATA
from minilora.ranges import LEARNING_RATE, STEPS, whole
from minilora.storage.adapters import save_adapter
from minilora.storage.config import MODEL_CONFIG, load_config
from minilora.storage.files import make_folder, read_json
from minilora.storage.folders import check_apart, check_free
from minilora.storage.get import find_base
from minilora.storage.locks import locked
from minilora.storage.models import MODEL_WEIGHTS, save_model
from minilora.storage.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from minilora.storage.prompts import save_prompt
from minilora.storage.training_state import check_resume
from minilora.text.datasets import PYTHON_CODE, Dataset
from minilora.text.tasks import TASKS
from minilora.text.tokenizer import open_tokenizer
from minilora.train import train
from minilora.train_settings import History, TrainConfig

BASE = DATA / "base"
LEARNING_RATES = DATA / "learning_rates.json"
WIDE = 384  # hidden_size; the shipped base has 192, SmolLM2 576
EVALUATIONS = whole(1, 1000)  # of a run


def open_base(base: str | Path, device: str = "cpu") -> BaseFolder:
    """base: a Llama-layout folder with a tokenizer, a GGUF file, or the name of a model that `get` has fetched.

    Raises FileNotFoundError or ValueError for anything else.
    """
    path = find_base(base)
    return BaseFolder(path, open_tokenizer(path), device)


def schedule(
    steps: int, learning_rate: float, batch_size: int = 16, seed: int = 0, evaluations: int = 10, **more
) -> TrainConfig:
    """The TrainConfig that every method gets: a twentieth of the run to warm up. more: its other fields.

    Raises ValueError, naming the field, for a value out of range.
    """
    STEPS.check("steps", steps)
    EVALUATIONS.check("evaluations", evaluations)
    warmup_steps, eval_every = min(steps - 1, max(1, steps // 20)), max(1, steps // evaluations)
    return TrainConfig(steps, batch_size, learning_rate, warmup_steps, eval_every=eval_every, seed=seed, **more)


def tuned_learning_rate(data: str, method: str, base: BaseFolder | None = None) -> float:
    """The choice from the grid in data/learning_rates.json that `find_rate` finds; base None is the shipped one."""
    return find_rate(data, method, base)[0]


def find_rate(data: str, method: str, base: BaseFolder | None = None) -> tuple[float, str, str]:
    """A tuned learning rate, the key of data/learning_rates.json that it stands under, and the method it was tuned for.

    Where nothing was tuned for this base and data, the shipped base's choice for `json` or else `dialect`; for a text,
    `python-code` first. A rate depends on a model's width: from WIDE on, a base borrows from SmolLM2 and not from the
    narrow one that we ship, and there QLoRA, which is LoRA on a rounded base, takes LoRA's rate until it has one of its
    own. Raises ValueError where there is none, and for a file that holds something else.
    """
    tuned = read_rates(LEARNING_RATES)
    is_text, wide = data not in TASKS and not data.endswith(".jsonl"), base is not None and is_wide(base)
    if base and wide:
        names = [
            f"{owner}/{name}" for owner in (base.name, "smollm2") for name in (data, "orders.jsonl", "pirate.jsonl")
        ]
    else:
        names = [rates_key(data, base), data, *([PYTHON_CODE] if is_text else []), "json", "dialect"]
    for name in names:
        if method in tuned.get(name, {}):
            return tuned[name][method]["chosen"], name, method
    if method == "qlora" and wide:
        return find_rate(data, "lora", base)
    raise ValueError(f"no learning rate was tuned for method {method!r}; give one with --learning-rate")


def rates_key(data: str, base: BaseFolder | None = None) -> str:
    """Where the rates of a base and data stand in data/learning_rates.json: those of the shipped base under the data
    alone."""
    if base is None or base.directory.resolve() == BASE.resolve():
        return data
    return f"{base.name}/{data}"


def borrowed_rate(data: str, method: str, base: BaseFolder) -> str:
    """A sentence that says where a tuned rate comes from; "" if it was tuned for the method on this base and data."""
    rate, key, owner = find_rate(data, method, base)
    if (key, owner) == (rates_key(data, base), method):
        return ""
    here, there = rates_key(data, base), f"{key} of the shipped base" if "/" not in key else key
    what = f"tuned on {there}" if owner == method else f"tuned for {owner} on {there}"
    change = "--learning-rate gives another, compare --tune finds one"
    return f"learning rate {rate:g} for {method}: {what}, not on {here}; {change}"


def read_rates(path: Path) -> dict:
    """By base and data, and then by method, what `tune` chose. ValueError for a file that holds anything else."""
    tuned = read_json(path)
    for name, methods in tuned.items():
        for method, choice in methods.items() if isinstance(methods, dict) else [("", None)]:
            if not isinstance(choice, dict) or not LEARNING_RATE.holds(choice.get("chosen")):
                fault = f"{path} names no learning rate under {name!r}, {method!r}"
                raise ValueError(f'{fault}; what `compare --tune` writes there has "chosen", {LEARNING_RATE}')
    return tuned


def is_wide(base: BaseFolder) -> bool:
    return load_config(base.directory).hidden_size >= WIDE


def tuned_experiments(
    base: BaseFolder, data: Dataset, methods: Sequence[str], steps: int | None = None, **more
) -> list[Experiment]:
    """One experiment for each method, at the rate that was tuned for it on this data. more: fields of Experiment."""
    training = data.training | ({} if steps is None else {"steps": steps})
    rates = {method: tuned_learning_rate(data.name, method, base) for method in methods}
    plans = {method: schedule(learning_rate=rate, **training) for method, rate in rates.items()}
    return [Experiment(base, data, method, plan, **more) for method, plan in plans.items()]


def files_of(method: str) -> tuple[str, str]:
    """Weights and config of what a method makes: a model or an adapter."""
    return (MODEL_WEIGHTS, MODEL_CONFIG) if method == "full" else (ADAPTER_WEIGHTS, ADAPTER_CONFIG)


@dataclass
class Run:
    """A finished run: the trained model, in eval mode, with its losses."""

    experiment: Experiment
    model: GPT | Prompt
    history: History

    def save(self, directory: Path, overwrite: bool = False) -> int:
        """Saves the adapter, or the model with all that belongs to it, in place of the old; returns its bytes."""
        written = files_of(self.experiment.method)
        if isinstance(self.model, Prompt):
            save_prompt(self.model, directory, overwrite)
        elif any(lora_layers(self.model)):
            save_adapter(self.model, directory, overwrite)
        else:
            save_model(self.model, directory, self.experiment.base.companions(), overwrite)
        return sum((directory / name).stat().st_size for name in written)

    def save_base(self, directory: Path, overwrite: bool = False):
        """Writes the model that the run's adapter acts on. The adapter is taken out: save it before."""
        model = self.model.base_model if isinstance(self.model, Prompt) else self.model
        remove_lora(model)
        save_model(model, directory, self.experiment.base.companions(), overwrite)


def run(
    experiment: Experiment,
    state_path: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    watch: Callable[[GPT | Prompt, int], None] | None = None,
) -> Run:
    """Trains one method from the base; with `state_path`, the state is saved there and a killed run can be resumed.

    watch: called with the model and the number of steps done after each step; it must leave the model as it is.
    """
    method, dataset, config = experiment.method, experiment.dataset, experiment.training
    torch.manual_seed(config.seed)  # of the random start of A
    objective, device = objective_of(experiment), experiment.base.device
    if experiment.sharded:  # what is too large for a device begins on the CPU
        experiment = replace(experiment, base=replace(experiment.base, device="cpu"))
    # For qlora the base is quantized while it is read, so that a base which only fits in 4 bits is never in floats.
    base = experiment.base.load(experiment.quantization if method == "qlora" else None)
    model = prepare(base if experiment.adapter is None else start_from(base, experiment.adapter), experiment)
    if experiment.sharded:
        shard(model, model.model.layers, device)
        config, state_path = replace(config, save_every=0), None  # a state in pieces could not be resumed
    longest, limit = dataset.train.input_ids.shape[-1], model.config.max_position_embeddings
    if longest > limit:
        raise ValueError(f"sequences of {longest} tokens exceed the model's {limit}; shorten --sequence-length")
    options = training_options(model, experiment)
    if watch is not None:
        own = options.get("after_step")

        def after_step(step: int, optimizer: torch.optim.Optimizer):
            if own is not None:
                own(step, optimizer)
            watch(model, step)

        options["after_step"] = after_step
    data, validation = data_of(experiment, model)
    history = train(
        model,
        data,
        config,
        validation,
        state_path=state_path,
        resume=resume,
        description=f"{method}, seed {config.seed}",
        progress=progress,
        settings={"method": method, "data": dataset.name, **experiment.method_settings},
        objective=objective,
        **options,
    )
    unshard(model)
    return Run(experiment, finish(model, experiment), history)


def finetune(
    experiment: Experiment, out: Path, resume: bool = False, progress: bool = True, overwrite: bool = False
) -> dict:
    """Trains, saves an adapter or a model under `out`, and returns a summary. A killed run goes on with `resume`.

    LoftQ's adapter fits a base that LoftQ made itself, and what goes on from a trained adapter fits the base with that
    adapter merged; such a base is written to `out`/base. `overwrite` replaces a model by an adapter or an adapter by a
    model, in both folders; without it, neither may hold the other kind. One run writes `out` at a time. Of several
    processes (`distributed.py`) all train, and the first alone writes; the others return an empty summary.
    """
    teacher = None if experiment.teacher is None else find_teacher(experiment.teacher)
    sources = dict(base=experiment.base.directory, adapter=experiment.adapter, teacher=teacher)
    for folder in (out, out / "base"):
        check_apart(folder, **sources)
    if rank() > 0:
        return _finetune(experiment, out, resume, False, overwrite)
    make_folder(out)
    with locked(out, patience=0):
        return _finetune(experiment, out, resume, progress, overwrite)


def _finetune(experiment: Experiment, out: Path, resume: bool, progress: bool, overwrite: bool) -> dict:
    state = out / "training_state.safetensors"
    check_resume(state, resume)
    companions = experiment.base.companions()
    own_files = *files_of(experiment.method), *(companions if experiment.method == "full" else ())
    check_free(out, own_files, overwrite)
    own_base = experiment.method == "loftq" or (experiment.adapter is not None and experiment.method != "full")
    if own_base:
        check_free(out / "base", (MODEL_WEIGHTS, MODEL_CONFIG, *companions), overwrite)
    wait_for_all()  # nothing is written before all have looked
    finished = run(experiment, state, resume, progress)
    wait_for_all()  # the state goes when all have read it: a run may be resumed from its last step
    if rank() > 0:
        return {}
    model, base, dataset = finished.model, experiment.base, experiment.dataset
    if own_base:
        vars(model)["name_or_path"] = str((out / "base").resolve())
    size = finished.save(out, overwrite)
    trainable, total = count_parameters(model)
    task = None if experiment.sharded else dataset.task  # a base that needed several devices is not scored on one
    summary = {
        "method": experiment.method,
        "data": dataset.name,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "validation_loss": validation[-1][1] if (validation := finished.history.validation_loss) else None,
        "loss_floor": dataset.floor if experiment.objective == "sft" else None,
        "score": score_task(model, base.tokenizer, task).score if task else None,
        "artifact": str(out),
        "artifact_bytes": size,
    }
    if experiment.objective == "dpo":
        at_once = micro_batch(experiment.training), experiment.training.precision
        summary["chosen_likelier"] = preferred(model, dataset.validation, *at_once)
    if rewards := finished.history.rewards:
        summary |= {"first_reward": rewards[0][1], "last_reward": rewards[-1][1]}  # means over a step's samples
        summary["agreeing_fraction"] = sum(agree for *_, agree in rewards) / len(rewards)  # of groups: no gradient
    if own_base:
        finished.save_base(out / "base", overwrite)
        summary["base"] = str(out / "base")
    state.unlink(missing_ok=experiment.sharded)  # last: killed before this, the run can be resumed
    return summary
