"""minilora: LoRA and everything around it, from scratch, in plain PyTorch.

Start reading at `lora.py` (the layer), `model.py` (the transformer), `train.py` (the loop), `quant.py` (four bits) and
`memory.py` (where the bytes go). `python -m minilora` runs the comparison that the rest explains.

`from minilora import ...` gives every name in the list below. A name of the list never hides a module, so the function
`train` is imported from the module of the same name: `from minilora.train import train`.
"""

import os
import sys

from minilora.command import interrupt_quietly

# `python -m minilora`: a thread waiting for work spins for a moment, then sleeps. By default OpenMP threads spin on,
# which costs up to ten times where other programs run beside them; threads that sleep at once make the thin operations
# of a small model a third slower. GNU's OpenMP (Linux) reads the variable once, when torch is imported, below.
if sys.argv[0] == "-m" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if sys.argv[0] == "-m":
    interrupt_quietly()  # torch takes seconds to load

from minilora.adapters.inject import (
    adapter_parameters,
    apply_loftq,
    apply_lora,
    count_parameters,
    disable_lora,
    lora_layers,
    merge_lora,
    print_trainable_parameters,
    unmerge_lora,
)
from minilora.adapters.prompts import PrefixTuning, SoftPrompt
from minilora.adapters.variants import freeze_A, loraplus_groups
from minilora.config import LoRAConfig
from minilora.experiments.simulate import MemoryReport, simulate
from minilora.inference.bank import AdapterBank
from minilora.inference.generate import generate
from minilora.lora import LoRALinear
from minilora.memory import MemoryMeter
from minilora.model import GPT, GPTConfig
from minilora.quant import Quantization
from minilora.storage.adapters import load_adapter, save_adapter
from minilora.storage.models import load_model, save_model
from minilora.storage.prompts import load_prompt, save_prompt
from minilora.text.tokenizer import Tokenizer
from minilora.train_settings import TrainConfig

__all__ = [
    "AdapterBank",
    "GPT",
    "GPTConfig",
    "LoRAConfig",
    "LoRALinear",
    "MemoryMeter",
    "MemoryReport",
    "PrefixTuning",
    "Quantization",
    "SoftPrompt",
    "Tokenizer",
    "TrainConfig",
    "adapter_parameters",
    "apply_loftq",
    "apply_lora",
    "count_parameters",
    "disable_lora",
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
    "unmerge_lora",
]
