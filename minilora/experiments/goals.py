"""What a run trains for and where it starts: objectives by name, a teacher, an adapter that was trained before.

sft      supervised: cross entropy on the answers, the default
dpo      preferences: pairs of answers, the chosen over the rejected
distill  a teacher's distribution at the same places, the teacher being a model or an adapter on the base
"""

from pathlib import Path
from typing import Any

from minilora.adapters.inject import absorb_lora
from minilora.adapters.prompts import Prompt
from minilora.experiments.methods import BaseFolder, Experiment
from minilora.model import GPT
from minilora.objectives import Distillation, Preference, with_reference
from minilora.storage.adapters import load_adapter
from minilora.storage.models import load_model
from minilora.storage.peft import ADAPTER_CONFIG, base_quantization, peft_type
from minilora.storage.prompts import PROMPTS, load_prompt
from minilora.text.datasets import Dataset, load_dataset
from minilora.text.preferences import PAIRS, load_preferences
from minilora.text.tokenizer import AnyTokenizer, open_tokenizer
from minilora.train_settings import CROSS_ENTROPY, Objective, Rows

PROBE = 'Mara Hale\'s 3 goats, {"and": 17} more:\n\tnaïve café.'  # tokenizers that agree on it are taken for the same
TASK = "json"  # where neither a task nor data is named


def load_data(
    objective: str | None, name: str | None, tokenizer: AnyTokenizer, sequence_length: int, count: int
) -> Dataset:
    """The data of that name as the objective reads it. Raises ValueError as load_dataset or load_preferences does."""
    if objective == "dpo":
        return load_preferences(name or PAIRS[0], tokenizer, sequence_length, count)
    return load_dataset(name or TASK, tokenizer, sequence_length, count=count)


def dpo_rate(method: str) -> float:
    """Full fine-tuning takes a tenth of what adapters take, as with cross entropy."""
    return 3e-5 if method == "full" else 3e-4


def start_from(model: GPT, adapter: Path) -> GPT:
    """The base with the adapter merged for good, so that a new one starts where the old one ended: with the new one
    switched off, the model is that start bit for bit. Raises as load_adapter does, and ValueError for a prompt."""
    if peft_type(adapter) in PROMPTS:
        raise ValueError(f"{adapter} holds a prompt, which cannot be merged into a base; start from a LoRA adapter")
    absorb_lora(load_adapter(model, adapter))
    return model


def load_teacher(base: BaseFolder, teacher: Path) -> GPT | Prompt:
    """A model folder, or an adapter folder, whose adapter is put on the base in the form that it was trained on.

    Raises FileNotFoundError and ValueError as the loaders do, and ValueError for a model with another tokenizer.
    """
    if not (teacher / ADAPTER_CONFIG).is_file():
        ours, theirs = (tokenizer.encode(PROBE) for tokenizer in (base.tokenizer, open_tokenizer(teacher)))
        if ours != theirs:
            raise ValueError(f"{teacher} has another vocabulary than {base.directory}; a teacher reads the same tokens")
        return load_model(teacher, base.dtype, base.device)
    load: Any = load_prompt if peft_type(teacher) in PROMPTS else load_adapter
    return load(base.load(base_quantization(teacher)), teacher)


def objective_of(experiment: Experiment) -> Objective:
    if experiment.objective == "dpo":
        return Preference(experiment.beta)
    if experiment.objective == "distill":
        assert experiment.teacher is not None
        return Distillation(load_teacher(experiment.base, experiment.teacher))
    return CROSS_ENTROPY


def data_of(experiment: Experiment, model: GPT | Prompt) -> tuple[Rows, Rows]:
    """The data to train on and to validate on. For preferences, where the method leaves no adapter that could be
    switched off to give the start, with what the model as it starts says of them."""
    data = experiment.dataset.train, experiment.dataset.validation
    if experiment.objective == "dpo" and not experiment.starts_as_base:
        precision = experiment.training.precision
        return with_reference(data[0], model, precision=precision), with_reference(data[1], model, precision=precision)
    return data
