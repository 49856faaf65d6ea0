"""A method decides which parameters are trained, where they start, and how the base is stored.

The training loop does not know which method it runs: `prepare` acts before it, `training_options` are its arguments,
`finish` acts after it.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.adapters.allocate import RankAllocator, shrink
from minilora.adapters.inject import apply_loftq, apply_lora, lora_layers
from minilora.adapters.prompts import PrefixTuning, Prompt, SoftPrompt
from minilora.adapters.variants import freeze_A, loraplus_groups
from minilora.config import LoRAConfig
from minilora.dtypes import HALF_PRECISION, dtype_name
from minilora.linear4bit import quantize_model, quantized_layers
from minilora.model import GPT
from minilora.quant import QLORA, Quantization
from minilora.ranges import BETA, GROUP_SIZE, LORAPLUS_RATIO, NOT_NEGATIVE, VIRTUAL_TOKENS
from minilora.storage.folders import companions_of
from minilora.storage.models import load_model
from minilora.text.datasets import Dataset
from minilora.text.tokenizer import AnyTokenizer, tokenizer_files
from minilora.train_settings import TrainConfig

# By method, the fields of LoRAConfig in which it differs from plain LoRA. QLoRA and LoftQ differ in how the base is
# stored, LoRA+, LoRA-FA and AdaLoRA in how A and B are trained.
LORA_CHANGES: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {},
    "loftq": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "lora+": {},
    "lora-fa": {},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "adalora": {},
}
PROMPT_METHODS: dict[str, type[Prompt]] = {"soft-prompt": SoftPrompt, "prefix": PrefixTuning}
IN_4_BITS = ("qlora", "loftq")  # which round the base
METHODS = ("full", *LORA_CHANGES, *PROMPT_METHODS)
OBJECTIVES = ("sft", "dpo", "grpo", "distill")
DEFAULT_METHODS = ("full", "lora", "qlora")
GROUP = 8  # samples of a prompt
EVA_ROWS = 64  # of the training data, whose activations tell where A starts


@dataclass(frozen=True)
class BaseFolder:
    """A base model's folder, loaded anew for every run, and its tokenizer."""

    directory: Path
    tokenizer: AnyTokenizer
    device: str
    dtype: torch.dtype = torch.float32  # of the base's weights; adapters are float32 on a base in half precision too

    @property
    def name(self) -> str:
        return self.directory.name

    def load(self, quantization: Quantization | None = None) -> GPT:
        """In floats, or with the block linears in 4 bits."""
        return load_model(self.directory, self.dtype, self.device, quantization)

    def companions(self) -> dict[str, bytes]:
        """What belongs to the model and is no weight, by file name: it goes where a model made of this one goes."""
        return companions_of(self.directory) if self.directory.is_dir() else tokenizer_files(self.tokenizer)


@dataclass(frozen=True)
class Experiment:
    """Everything that decides one run. Raises ValueError for an unknown method, for one that trains weights in half
    precision, for virtual tokens or a ratio out of range, and for an objective that does not fit the rest."""

    base: BaseFolder
    dataset: Dataset
    method: str
    training: TrainConfig
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    quantization: Quantization = QLORA  # of the base, for qlora and loftq
    virtual_tokens: int = 16  # of soft-prompt and prefix
    loraplus_ratio: float = 16  # B's learning rate over A's
    objective: str = "sft"
    beta: float | None = None  # of dpo, 0.1 by default, and of grpo the weight of the KL divergence, 0
    group_size: int | None = None  # of grpo: samples of each prompt, 8 by default
    teacher: Path | None = None  # of distill: a model or an adapter on the base
    adapter: Path | None = None  # merged into the base before training begins
    sharded: bool = False  # cut among the processes, for a base that is too large for one device

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}")
        VIRTUAL_TOKENS.check("virtual_tokens", self.virtual_tokens)
        LORAPLUS_RATIO.check("loraplus_ratio", self.loraplus_ratio)
        self.check_objective()
        if self.sharded and self.objective in ("grpo", "distill"):
            raise ValueError(f"objective {self.objective} cannot train a sharded model: it answers in one piece alone")
        if self.method == "full" and self.base.dtype in HALF_PRECISION:
            fault = f"method full cannot train weights in {dtype_name(self.base.dtype)}: a step far below the weight"
            raise ValueError(f"{fault} rounds away; use float32 weights, which precision bfloat16 makes fast as well")

    def check_objective(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}; known: {', '.join(OBJECTIVES)}")
        if self.beta is not None and self.objective not in ("dpo", "grpo"):
            raise ValueError(f"objective {self.objective} has no use for a beta: it is of dpo and grpo (--beta)")
        if self.group_size is not None and self.objective != "grpo":
            raise ValueError(f"objective {self.objective} has no use for a group size: it is of grpo (--group-size)")
        if self.beta is not None:
            (NOT_NEGATIVE if self.objective == "grpo" else BETA).check("beta", self.beta)
        if self.objective == "grpo":
            self.check_rewards()
        if (self.objective == "distill") != (self.teacher is not None):
            fault = "distill needs a teacher" if self.teacher is None else f"{self.objective} has no use for a teacher"
            raise ValueError(f"objective {fault}: --objective distill --teacher DIR, a model or an adapter on the base")
        if self.objective in ("dpo", "grpo") and self.method in LORA_CHANGES and self.lora.lora_dropout > 0:
            fault = f"objective {self.objective} with lora_dropout {self.lora.lora_dropout:g}"
            raise ValueError(
                f"{fault}: the model that it is held against has none, and noise would part them; dropout must be 0"
            )
        if self.adapter is not None and self.method in IN_4_BITS:
            fault = f"method {self.method} rounds the base to 4 bits, and most of what {self.adapter} learned with it"
            raise ValueError(f"{fault}; go on from an adapter with lora, or merge it and quantize on purpose")

    def check_rewards(self):
        GROUP_SIZE.check("group_size", self.samples)
        if self.dataset.task is None:
            raise ValueError(f"objective grpo needs answers that can be scored, and nothing scores {self.dataset.name}")
        if self.training.group_by_length:
            raise ValueError(
                "objective grpo has no use for group_by_length: answers have no length before they are drawn"
            )
        if self.training.batch_size % self.samples:
            fault = f"batch_size is {self.training.batch_size}; under objective grpo it must be whole groups"
            raise ValueError(f"{fault} of group_size, which is {self.samples}")
        if self.beta and not self.starts_as_base:
            fault = f"method {self.method} leaves no adapter to switch off for a reference"
            raise ValueError(f"objective grpo with beta {self.beta:g}: {fault}; use lora, or beta 0")

    @property
    def samples(self) -> int:
        """Of each prompt, under grpo."""
        return GROUP if self.group_size is None else self.group_size

    @property
    def starts_as_base(self) -> bool:
        """Whether the model with its adapter switched off is the model as it was when training began."""
        return self.method in LORA_CHANGES and self.method not in ("loftq", "pissa", "olora")

    @property
    def method_settings(self) -> dict:
        """The fields that the method depends on, as JSON holds them."""
        method = self.method
        settings: dict[str, Any] = {}
        if method in LORA_CHANGES:
            settings["lora"] = asdict(replace(self.lora, **LORA_CHANGES[method]))
        if method in IN_4_BITS:
            settings["quantization"] = asdict(self.quantization)
        if method == "lora+":
            settings["loraplus_ratio"] = self.loraplus_ratio
        if method in PROMPT_METHODS:
            settings["virtual_tokens"] = self.virtual_tokens
        return settings


def prepare(model: GPT, experiment: Experiment) -> GPT | Prompt:
    """Makes a plain base trainable by the experiment's method. A base that is in 4 bits already is taken as it is.

    Raises ValueError for full fine-tuning of a base in 4 bits, and for all that the method itself refuses.
    """
    method, in_4_bits = experiment.method, bool(quantized_layers(model))
    input_ids = experiment.dataset.train.input_ids.flatten(0, -2).to(experiment.base.device)  # (N, T)
    if method == "full":
        if in_4_bits:
            fault = "its codes are whole numbers, which have no gradient and on which a small step rounds away"
            raise ValueError(
                f"method full cannot train a base in 4 bits: {fault}; use method qlora, or a base in floats"
            )
        return model.requires_grad_(True)
    if method in PROMPT_METHODS:
        return PROMPT_METHODS[method](model, experiment.virtual_tokens, input_ids[0].tolist())
    config = replace(experiment.lora, **LORA_CHANGES[method])
    if method == "loftq":
        apply_loftq(model, config, experiment.quantization)
        return model
    if method == "qlora" and not in_4_bits:
        quantize_model(model, experiment.quantization)
    if method == "adalora":  # begins with 1.5 times the ranks that it may keep, at the same scaling
        wide = config.r + (config.r + 1) // 2
        config = replace(config, r=wide, lora_alpha=config.lora_alpha * wide / config.r)
    apply_lora(model, config, input_ids[:EVA_ROWS])
    if method == "lora-fa":
        freeze_A(model)
    return model


def training_options(model: nn.Module, experiment: Experiment) -> dict:
    """The arguments of `train` that a method brings: LoRA+'s parameter groups, AdaLoRA's work after every step."""
    if experiment.method == "lora+":
        rate = experiment.training.learning_rate  # A's
        return {"parameter_groups": loraplus_groups(model, rate, experiment.loraplus_ratio)}
    if experiment.method == "adalora":
        budget, steps = experiment.lora.r * len(dict(lora_layers(model))), experiment.training.steps  # LoRA's ranks
        return {"after_step": RankAllocator(model, budget, steps // 10, max(steps // 10 + 1, steps // 2))}
    return {}


def finish(model: GPT | Prompt, experiment: Experiment) -> GPT | Prompt:
    """AdaLoRA takes out the ranks that it did without; the other methods leave the model as it is."""
    if experiment.method == "adalora":
        shrink(model)
    return model
