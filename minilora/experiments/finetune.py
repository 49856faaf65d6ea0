"""One method, one data set, one adapter or model out: the parts that `compare` and `finetune` share.

The methods differ in `prepare`, and nowhere else.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minilora.adapters.inject import apply_lora, count_parameters, lora_layers
from minilora.experiments.simulate import QUANTIZATION
from minilora.inference.evaluate import score_task
from minilora.lora import LoRAConfig
from minilora.model import GPT
from minilora.quant import quantize_model, quantized_layers
from minilora.storage.adapters import save_adapter
from minilora.storage.files import make_folder, read_json, replacing
from minilora.storage.models import load_model, save_model
from minilora.text.datasets import PYTHON_CODE, Dataset
from minilora.text.tasks import TASKS
from minilora.text.tokenizer import JsonTokenizer, Tokenizer, open_tokenizer
from minilora.train import History, TrainConfig, train

DATA = Path(__file__).parents[2] / "data"
BASE = DATA / "base"
LEARNING_RATES = DATA / "learning_rates.json"
METHODS = ("full", "lora", "qlora")


def prepare(model: GPT, method: str, lora: LoRAConfig, quantization: dict = QUANTIZATION) -> GPT:
    """The one line in which the methods differ: what is trainable, and for qlora how the rest is stored.

    A base that is in 4 bits already is taken as it is. Raises ValueError for an unknown method, and for full
    fine-tuning of a base in 4 bits.
    """
    in_4_bits = bool(quantized_layers(model))
    if method == "full" and in_4_bits:
        raise ValueError(
            "method full cannot train a base in 4 bits: its codes are whole numbers, which have no gradient and on "
            "which a small step rounds away; use method qlora, or a base in floats"
        )
    if method == "full":
        return model.requires_grad_(True)
    if method == "lora" or (method == "qlora" and in_4_bits):
        return apply_lora(model, lora)
    if method == "qlora":
        return apply_lora(quantize_model(model, **quantization), lora)
    raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")


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
    """The choice from the grid in data/learning_rates.json; where nothing was tuned, that of `json` for a task and of
    `python-code` for a text."""
    tuned = read_json(LEARNING_RATES)
    nearest = "json" if data in TASKS else PYTHON_CODE
    return tuned[data if data in tuned else nearest][method]["chosen"]


def adapter_settings(method: str, lora: LoRAConfig, quantization: dict) -> dict:
    """What a run depends on besides TrainConfig, as JSON holds it."""
    settings = {"lora": asdict(lora)} if method != "full" else {}
    return settings | ({"quantization": quantization} if method == "qlora" else {})


@dataclass
class Run:
    """A finished run: the trained model, in eval mode, with its losses."""

    method: str
    seed: int
    model: GPT
    config: TrainConfig
    history: History

    def save(self, directory: Path) -> int:
        """Saves what the method made, an adapter or a model, in place of what was there; returns its bytes."""
        if any(lora_layers(self.model)):
            save_adapter(self.model, directory)
            written = "adapter_model.safetensors", "adapter_config.json"
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
    state_path: Path | None = None,
    **more,
) -> Run:
    """Trains one method from the base. `more` goes to `train`; with `state_path`, what the run depends on is stored."""
    torch.manual_seed(config.seed)  # of the random start of A
    # Quantized while it is read, so that a base which only fits in 4 bits is never there in floats.
    model = prepare(base.load(quantization if method == "qlora" else None), method, lora, quantization)
    longest, limit = dataset.train.input_ids.shape[1], model.config.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"sequences of {longest} tokens are longer than the model's {limit}; shorten --sequence-length"
        )
    settings = {"method": method, "data": dataset.name, **adapter_settings(method, lora, quantization)}
    history = train(
        model,
        dataset.train,
        config,
        validation=dataset.validation,
        state_path=state_path,
        settings=settings,
        description=f"{method}, seed {config.seed}",
        **more,
    )
    return Run(method, config.seed, model, config, history)


def finetune(
    base: Base,
    dataset: Dataset,
    method: str,
    lora: LoRAConfig,
    config: TrainConfig,
    out: Path,
    quantization: dict = QUANTIZATION,
    resume: bool = False,
    progress: bool = True,
) -> dict:
    """Trains, saves an adapter or a model under `out`, and returns a summary. A killed run goes on with `resume`."""
    state = out / "training_state.safetensors"
    if resume and not state.exists():
        raise ValueError(f"nothing to resume: {state} is not there (a finished run removes it)")
    if state.exists() and not resume:
        raise ValueError(f"{state} holds an unfinished run: continue it with --resume, or remove it to begin anew")
    make_folder(out)
    done = run(base, dataset, method, lora, config, quantization, state, resume=resume, progress=progress)
    size = done.save(out)
    if method == "full":
        copy_tokenizer(base, out)
    state.unlink()
    trainable, total = count_parameters(done.model)
    return {
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
