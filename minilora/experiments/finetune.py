"""One method, one data set, one adapter or model out: the parts that `compare` and `finetune` share.

How the methods differ is in `methods.py`.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from minilora.adapters.inject import count_parameters, lora_layers, remove_lora
from minilora.adapters.prompts import PrefixTuning, SoftPrompt
from minilora.experiments.methods import (
    IN_4_BITS,
    LORA_CHANGES,
    Extras,
    check_methods,
    finish,
    prepare,
    training_options,
)
from minilora.experiments.simulate import QUANTIZATION
from minilora.inference.evaluate import score_task
from minilora.lora import LoRAConfig
from minilora.model import GPT
from minilora.storage.adapters import save_adapter
from minilora.storage.files import make_folder, read_json, replacing
from minilora.storage.models import load_model, save_model
from minilora.storage.prompts import save_prompt
from minilora.text.datasets import PYTHON_CODE, Dataset
from minilora.text.tasks import TASKS
from minilora.text.tokenizer import JsonTokenizer, Tokenizer, open_tokenizer
from minilora.train import History, TrainConfig, train

DATA = Path(__file__).parents[2] / "data"
BASE = DATA / "base"
LEARNING_RATES = DATA / "learning_rates.json"


@dataclass
class Base:
    """A base model's folder, loaded anew for every run, and its tokenizer."""

    directory: Path
    tokenizer: Tokenizer | JsonTokenizer
    device: str

    def load(self, quantization: dict | None = None) -> GPT:
        """In float32, or with the block linears in 4 bits: arguments of quantize_model."""
        settings = dict(quantization or {})
        return load_model(self.directory, torch.float32, self.device, settings.pop("scheme", None), **settings)


def open_base(directory: str | Path, device: str = "cpu") -> Base:
    """Raises FileNotFoundError or ValueError for a folder that is not a Llama-layout model with a tokenizer."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no base model folder {directory}")
    return Base(directory, open_tokenizer(directory), device)


def copy_tokenizer(base: Base, directory: Path):
    """A model without its tokenizer says nothing, so whoever writes a model folder puts it in."""
    for file in (base.tokenizer.path, base.tokenizer.path.with_name("tokenizer_config.json")):
        if file.is_file():
            with replacing(directory / file.name) as copy:
                copy.write_bytes(file.read_bytes())


def run_config(steps: int, learning_rate: float, batch_size: int = 16, seed: int = 0, **more) -> TrainConfig:
    """The schedule that every method gets: a twentieth of the run to warm up, ten evaluations."""
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=min(steps - 1, max(1, steps // 20)),
        eval_every=max(1, steps // 10),
        seed=seed,
        **more,
    )


def tuned_learning_rate(data: str, method: str) -> float:
    """The choice from the grid in data/learning_rates.json; where nothing was tuned for this data, that of `json` or
    else of `dialect` for a task, and of `python-code` first for a text."""
    tuned = read_json(LEARNING_RATES)
    for name in (data, *([PYTHON_CODE] if data not in TASKS else []), "json", "dialect"):
        if method in tuned.get(name, {}):
            return tuned[name][method]["chosen"]
    raise ValueError(f"no learning rate was tuned for method {method!r}; give one with --learning-rate")


def adapter_settings(method: str, lora: LoRAConfig, quantization: dict, extras: Extras) -> dict:
    """What a run depends on besides TrainConfig, as JSON holds it."""
    settings = {}
    if method in LORA_CHANGES:
        settings["lora"] = asdict(replace(lora, **LORA_CHANGES[method]))
    if method in IN_4_BITS:
        settings["quantization"] = quantization
    if method == "lora+":
        settings["loraplus_ratio"] = extras.loraplus_ratio
    if method in ("soft-prompt", "prefix"):
        settings["virtual_tokens"] = extras.virtual_tokens
    return settings


@dataclass
class Run:
    """A finished run: the trained model, in eval mode, with its losses."""

    method: str
    seed: int
    model: nn.Module
    config: TrainConfig
    history: History

    def save(self, directory: Path) -> int:
        """Saves what the method made, an adapter or a model, in place of what was there; returns its bytes."""
        written = "adapter_model.safetensors", "adapter_config.json"
        if isinstance(self.model, (SoftPrompt, PrefixTuning)):
            save_prompt(self.model, directory)
        elif any(lora_layers(self.model)):
            save_adapter(self.model, directory)
        else:
            save_model(self.model, directory)
            written = "model.safetensors", "config.json"
        return sum((directory / name).stat().st_size for name in written)


def run(
    base: Base,
    dataset: Dataset,
    method: str,
    lora: LoRAConfig,
    config: TrainConfig,
    quantization: dict = QUANTIZATION,
    extras: Extras | None = None,
    state_path: Path | None = None,
    **more,
) -> Run:
    """Trains one method from the base. `more` goes to `train`; with `state_path`, what the run depends on is stored."""
    check_methods([method])
    extras = extras or Extras()
    torch.manual_seed(config.seed)  # of the random start of A
    # For qlora quantized while it is read, so that a base which only fits in 4 bits is never there in floats.
    plain = base.load(quantization if method == "qlora" else None)
    model = prepare(plain, method, lora, quantization, extras, dataset.train.input_ids.to(base.device))
    longest, limit = dataset.train.input_ids.shape[1], model.config.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"sequences of {longest} tokens are longer than the model's {limit}; shorten --sequence-length"
        )
    settings = {"method": method, "data": dataset.name, **adapter_settings(method, lora, quantization, extras)}
    history = train(
        model,
        dataset.train,
        config,
        validation=dataset.validation,
        state_path=state_path,
        settings=settings,
        description=f"{method}, seed {config.seed}",
        **training_options(model, method, lora, config, extras),
        **more,
    )
    return Run(method, config.seed, finish(model, method), config, history)


def finetune(
    base: Base,
    dataset: Dataset,
    method: str,
    lora: LoRAConfig,
    config: TrainConfig,
    out: Path,
    quantization: dict = QUANTIZATION,
    extras: Extras | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict:
    """Trains, saves an adapter or a model under `out`, and returns a summary. A killed run goes on with `resume`.

    LoftQ's adapter fits a base that it made itself: that is written to `out`/base.
    """
    state = out / "training_state.safetensors"
    if resume and not state.exists():
        raise ValueError(f"nothing to resume: {state} is not there (a finished run removes it)")
    if state.exists() and not resume:
        raise ValueError(f"{state} holds an unfinished run: continue it with --resume, or remove it to begin anew")
    make_folder(out)
    done = run(base, dataset, method, lora, config, quantization, extras, state, resume=resume, progress=progress)
    size = done.save(out)
    if method == "full":
        copy_tokenizer(base, out)
    trainable, total = count_parameters(done.model)
    summary = {
        "method": method,
        "data": dataset.name,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "validation_loss": done.history.validation_loss[-1][1],
        "loss_floor": dataset.floor,
        "score": score_task(done.model, base.tokenizer, dataset.task).score if dataset.task else None,
        "artifact": str(out),
        "artifact_bytes": size,
    }
    if method == "loftq":  # its adapter fits this 4-bit base and no other
        save_base(done, base, out / "base")
        summary["base"] = str(out / "base")
    state.unlink()  # last: killed before this, the run can be resumed
    return summary


def save_base(done: Run, base: Base, directory: Path):
    """Writes the model that the run's adapter stands on. The adapter is taken out: save it before."""
    remove_lora(done.model)
    save_model(done.model, directory)
    copy_tokenizer(base, directory)
