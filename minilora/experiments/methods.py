"""The methods that can be compared, each as what it changes: what is trainable, and where it starts.

Three places, and nothing else of a run knows which method it is: `prepare` before training, `training_options` for
what the loop is given, `finish` after it.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from minilora.adapters.allocate import RankAllocator, shrink
from minilora.adapters.inject import apply_lora, lora_layers
from minilora.adapters.prompts import PrefixTuning, SoftPrompt
from minilora.adapters.starts import apply_loftq, eva_start, freeze_A
from minilora.adapters.variants import loraplus_groups
from minilora.experiments.simulate import QUANTIZATION
from minilora.lora import LoRAConfig
from minilora.model import GPT
from minilora.quant import quantize_model, quantized_layers
from minilora.train import TrainConfig

# By method, the fields of LoRAConfig in which it differs from plain LoRA. QLoRA and LoftQ differ in how the base is
# stored, LoRA+, LoRA-FA and AdaLoRA in how A and B are trained.
LORA_CHANGES = {
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
METHODS = ("full", *LORA_CHANGES, "soft-prompt", "prefix")
DEFAULT_METHODS = ("full", "lora", "qlora")
IN_4_BITS = ("qlora", "loftq")
EVA_ROWS = 64  # of the training data, whose activations tell where A starts


@dataclass(frozen=True)
class Extras:
    """What single methods need besides LoRAConfig: the length of soft prompts and prefixes, and LoRA+'s ratio."""

    virtual_tokens: int = 16
    loraplus_ratio: float = 16


def check_methods(methods: list[str] | tuple[str, ...]):
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}; known: {', '.join(METHODS)}")


def prepare(
    model: GPT,
    method: str,
    lora: LoRAConfig,
    quantization: dict = QUANTIZATION,
    extras: Extras | None = None,
    input_ids: Tensor | None = None,
) -> nn.Module:
    """Makes a plain base trainable by one method: what is trained, and for qlora and loftq how the rest is stored.

    input_ids: rows of the training data, (N, T), from which eva starts, and soft-prompt and prefix (None: from random
    tokens). A base that is in 4 bits already is taken as it is. Raises ValueError for an unknown method, for full
    fine-tuning of a base in 4 bits, for eva without data, and for what the method itself refuses.
    """
    check_methods([method])
    if method == "eva" and input_ids is None:
        raise ValueError("method eva starts from the training data; give its input_ids")
    extras, in_4_bits = extras or Extras(), bool(quantized_layers(model))
    if method == "full":
        if in_4_bits:
            raise ValueError(
                "method full cannot train a base in 4 bits: its codes are whole numbers, which have no gradient and on "
                "which a small step rounds away; use method qlora, or a base in floats"
            )
        return model.requires_grad_(True)
    if method in ("soft-prompt", "prefix"):
        kind = SoftPrompt if method == "soft-prompt" else PrefixTuning
        return kind(model, extras.virtual_tokens, None if input_ids is None else input_ids[0].tolist())
    config = replace(lora, **LORA_CHANGES[method])
    if method == "loftq":
        return apply_loftq(model, config, **quantization)
    if method == "qlora" and not in_4_bits:
        quantize_model(model, **quantization)
    if method == "adalora":  # half as many ranks again as will be left, at the same scaling
        wide = config.r + (config.r + 1) // 2
        config = replace(config, r=wide, lora_alpha=config.lora_alpha * wide / config.r)
    apply_lora(model, config)
    if method == "lora-fa":
        freeze_A(model)
    if method == "eva":
        eva_start(model, input_ids[:EVA_ROWS])
    return model


def training_options(
    model: nn.Module, method: str, lora: LoRAConfig, config: TrainConfig, extras: Extras | None = None
) -> dict:
    """The arguments of `train` that a method brings: LoRA+'s parameter groups, AdaLoRA's look after every step."""
    if method == "lora+":
        ratio = (extras or Extras()).loraplus_ratio
        return {"parameter_groups": loraplus_groups(model, config.learning_rate, ratio)}
    if method == "adalora":
        budget = lora.r * len(dict(lora_layers(model)))  # as many as plain LoRA has
        start, end = config.steps // 10, max(config.steps // 10 + 1, config.steps // 2)
        return {"after_step": RankAllocator(model, budget, start, end)}
    return {}


def finish(model: nn.Module, method: str) -> nn.Module:
    """What is left to do when training is done: AdaLoRA takes out the ranks that it did without."""
    return shrink(model) if method == "adalora" else model
