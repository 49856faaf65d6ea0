"""minilora: LoRA and what stands around it, from scratch, in plain PyTorch.

Start reading at `model.py` (the transformer), `lora.py` (the layer), `quant.py` (four bits), `train.py` (the loop) and
`memory.py` (where the bytes go). `python -m minilora` runs the comparison that the rest explains.
"""

from minilora.adapters.inject import (
    adapter_parameters,
    apply_lora,
    count_parameters,
    disable_lora,
    lora_layers,
    merge_lora,
    print_trainable_parameters,
    unmerge_lora,
)
from minilora.adapters.prompts import PrefixTuning, SoftPrompt
from minilora.adapters.starts import apply_loftq, eva_start, freeze_A
from minilora.adapters.variants import loraplus_groups
from minilora.experiments.simulate import MemoryReport, simulate
from minilora.inference.bank import AdapterBank
from minilora.inference.generate import generate
from minilora.lora import LoRAConfig, LoRALinear
from minilora.memory import MemoryMeter
from minilora.model import GPT, GPTConfig
from minilora.storage.adapters import load_adapter, save_adapter
from minilora.storage.models import load_model, save_model
from minilora.storage.prompts import load_prompt, save_prompt
from minilora.text.tokenizer import Tokenizer
from minilora.train import TrainConfig, train

__all__ = [
    "AdapterBank",
    "GPT",
    "GPTConfig",
    "LoRAConfig",
    "LoRALinear",
    "MemoryMeter",
    "MemoryReport",
    "PrefixTuning",
    "SoftPrompt",
    "Tokenizer",
    "TrainConfig",
    "adapter_parameters",
    "apply_loftq",
    "apply_lora",
    "count_parameters",
    "disable_lora",
    "eva_start",
    "freeze_A",
    "generate",
    "load_adapter",
    "load_model",
    "load_prompt",
    "lora_layers",
    "loraplus_groups",
    "merge_lora",
    "print_trainable_parameters",
    "save_adapter",
    "save_model",
    "save_prompt",
    "simulate",
    "train",
    "unmerge_lora",
]
