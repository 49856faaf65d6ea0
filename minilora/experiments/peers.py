"""transformers and PEFT as their own users run them, for the rows that hold our time against theirs.

They are imported when they are asked for: nothing here needs them to be installed.
"""

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.model import GPTConfig
from minilora.train import make_optimizer
from minilora.train_settings import TrainConfig


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("transformers", "peft"))


def can_read(base: Path) -> bool:
    """Whether both are installed, and `base` is a folder: a GGUF file has no config.json for them."""
    return base.is_dir() and installed()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what they warn of, which is theirs to mend."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def transformers_offline() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when they are imported: all is here already
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load(base: Path, r: int | None = None) -> Any:
    """transformers' model in float32, in training mode; with r, PEFT's LoRA of that rank on all linears of it.

    It has no end token, so that every row is continued to the last token.
    """
    model = transformers_offline().AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return prepared(model, r)


def make(config: GPTConfig, device: str, r: int | None = None, **lora: Any) -> Any:
    """The same with random weights in the shape of `config`, on a device. lora: other fields of PEFT's LoraConfig."""
    transformers = transformers_offline()
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"]
    theirs = transformers.LlamaConfig(**{name: getattr(config, name) for name in names})
    with torch.device(device):
        model = transformers.LlamaForCausalLM(theirs)
    return prepared(model.to(device, torch.float32), r, **lora)


def prepared(model: Any, r: int | None, **lora: Any) -> Any:
    model.train().generation_config.eos_token_id = None
    if r is None:
        return model
    peft: Any = importlib.import_module("peft")
    settings = {"lora_alpha": 2 * r, "target_modules": "all-linear", **lora}
    return peft.get_peft_model(model, peft.LoraConfig(r=r, **settings))


def training_step_of(model: Any, input_ids: Tensor, labels: Tensor, autocast=False) -> Callable[[], Tensor]:
    """A function that takes one step as their users' loops do, always on the same batch, (B, T) both.

    Loss (over the logits of all places), backward, clipping, and the optimizer that we use: fused AdamW. autocast:
    forward runs its products in bfloat16.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(model, TrainConfig(1, len(input_ids), 1e-4))

    def step() -> Tensor:
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def decoder(model: Any, input_ids: Tensor, new_tokens: int) -> Callable[[], list[list[int]]]:
    """A function that continues the prompts (B, T) greedily, with their cache; it returns the new tokens only.

    Raises ValueError where it stops early: the time of fewer tokens cannot be held against ours.
    """
    options = dict(attention_mask=torch.ones_like(input_ids), max_new_tokens=new_tokens, do_sample=False)

    def decode() -> list[list[int]]:
        new = model.generate(input_ids, pad_token_id=0, **options)[:, input_ids.shape[1] :]  # (B, new_tokens)
        if new.shape[1] != new_tokens:
            raise ValueError(f"transformers stopped after {new.shape[1]} of {new_tokens} new tokens")
        return new.tolist()

    return decode
