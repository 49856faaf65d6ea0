"""What a run trains for and where it starts: objectives by name, a teacher, an adapter that was trained before.

    sft      supervised: cross entropy on given answers, the default
    dpo      preferences: pairs of answers, the chosen over the rejected
    grpo     rewards: answers that the model draws itself, each scored and held against the others to its prompt
    distill  a teacher's distribution at the same places, the teacher being a model or an adapter on the base

The loop knows none of them by name, and an objective knows no method: `data_of` brings the two together.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.adapters.inject import absorb_lora
from minilora.adapters.prompts import Prompt
from minilora.experiments.methods import IN_4_BITS, LORA_CHANGES, BaseFolder, Experiment
from minilora.inference.evaluate import longest
from minilora.inference.rollouts import Rollouts
from minilora.model import GPT
from minilora.objectives import Distillation, GroupPolicy, Preference, with_reference
from minilora.storage.adapters import load_adapter
from minilora.storage.get import find_base
from minilora.storage.models import load_model
from minilora.storage.peft import ADAPTER_CONFIG, base_quantization, peft_type
from minilora.storage.prompts import PROMPTS, load_prompt
from minilora.text.datasets import Dataset, load_dataset
from minilora.text.preferences import PAIRS, load_preferences
from minilora.text.tokenizer import AnyTokenizer, open_tokenizer
from minilora.train_settings import CROSS_ENTROPY, Objective, Rows, TrainConfig

PROBE = 'Mara Hale\'s 3 goats, {"and": 17} more:\n\tnaïve café.'  # tokenizers that agree on it are taken for the same
REWARD_TRAINING = {"steps": 40, "batch_size": 64}  # samples
TASK = "json"  # where neither a task nor data is named


def load_data(
    objective: str | None, name: str | None, tokenizer: AnyTokenizer, sequence_length: int, count: int
) -> Dataset:
    """The data of that name as the objective reads it. Raises ValueError as load_dataset or load_preferences does."""
    if objective == "dpo":
        return load_preferences(name or PAIRS[0], tokenizer, sequence_length, count)
    dataset = load_dataset(name or TASK, tokenizer, sequence_length, count=count)
    return replace(dataset, training=dict(REWARD_TRAINING)) if objective == "grpo" else dataset


def untuned_rate(objective: str, method: str) -> float:
    """Of dpo and grpo. Full fine-tuning takes a tenth of what adapters take, as with cross entropy."""
    return (3e-4 if objective == "dpo" else 4e-3) * (0.1 if method == "full" else 1)


def start_from(model: GPT, adapter: Path) -> GPT:
    """The base with the adapter merged for good, so that a new one starts where the old one ended: with the new one
    switched off, the model is that start bit for bit. Raises as load_adapter does, and ValueError for a prompt."""
    if peft_type(adapter) in PROMPTS:
        raise ValueError(f"{adapter} holds a prompt, which cannot be merged into a base; start from a LoRA adapter")
    absorb_lora(load_adapter(model, adapter))
    return model


def find_teacher(teacher: Path) -> Path:
    """An adapter folder, or a model as `find_base` finds one. Raises FileNotFoundError where there is none."""
    return teacher if (teacher / ADAPTER_CONFIG).is_file() else find_base(teacher)


def check_teacher(experiment: Experiment, teacher: Path):
    """Raises ValueError for a teacher that the student equals before training: nothing is left to learn from it."""
    start = experiment.adapter or experiment.base.directory
    as_start = experiment.method == "full" or (experiment.method in LORA_CHANGES and experiment.method not in IN_4_BITS)
    if as_start and teacher.resolve() == start.resolve():
        raise ValueError(f"the teacher {teacher} is what the student starts from, which has nothing to learn from it")


def load_teacher(base: BaseFolder, teacher: Path) -> GPT | Prompt:
    """A model, or an adapter, which is put on the base in the form that it was trained on.

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
        return Preference(0.1 if experiment.beta is None else experiment.beta)
    if experiment.objective == "grpo":
        return GroupPolicy(experiment.beta or 0.0, vocab_size=experiment.base.tokenizer.vocab_size)
    if experiment.objective == "distill":
        assert experiment.teacher is not None
        teacher = find_teacher(experiment.teacher)
        check_teacher(experiment, teacher)
        return Distillation(load_teacher(experiment.base, teacher))
    return CROSS_ENTROPY


def micro_batch(config: TrainConfig) -> int:
    """How many rows or pairs go through the model at once."""
    return config.batch_size // config.accumulation_steps


def data_of(experiment: Experiment, model: GPT | Prompt) -> tuple[Rows, Rows | None]:
    """The data to train on and to validate on; rewards have no validation loss.

    For preferences, where the method leaves no adapter that could be switched off to give the start, with what the
    model as it starts says of them."""
    data = experiment.dataset.train, experiment.dataset.validation
    if experiment.objective == "dpo" and not experiment.starts_as_base:
        at_once = micro_batch(experiment.training), experiment.training.precision
        return with_reference(data[0], model, *at_once), with_reference(data[1], model, *at_once)
    if (task := experiment.dataset.task) is not None and experiment.objective == "grpo":
        tokenizer, size = experiment.base.tokenizer, experiment.samples
        most = longest([example.completion for example in task.train], tokenizer)
        return Rollouts(task.train, task.is_right, tokenizer, most, size), None
    return data
