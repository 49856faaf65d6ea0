"""Claims about many adapters served from one base, at the size of a real model."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from minilora.adapters.adapter import Adapter, extract_adapter
from minilora.adapters.inject import adapter_parameters, apply_lora, remove_lora
from minilora.adapters.prompts import PrefixTuning, SoftPrompt
from minilora.config import LoRAConfig
from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import Claim, Rule, quantity
from minilora.experiments.claims.study import Arm, Plan, Setting, Study
from minilora.experiments.claims.uses.speed import percent
from minilora.inference.bank import AdapterBank
from minilora.inference.generate import generate
from minilora.model import GPT
from minilora.storage.adapters import save_adapter
from minilora.storage.models import save_model

VARIANTS, ROWS = 64, 16
DIFFERENT = {"one adapter": 1, "4 adapters": 4, "16 adapters": ROWS}  # in a batch
VIRTUAL = 16  # tokens of a soft prompt or a prefix


def random_lora(model: GPT, **settings) -> Adapter:
    """Of rank 8 on all linears, with random numbers: as far as bytes and time are concerned, a trained one."""
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **settings}
    for parameter in adapter_parameters(apply_lora(model, LoRAConfig(**lora))):
        nn.init.normal_(parameter, std=0.02)
    adapter = extract_adapter(model)
    remove_lora(model)
    return adapter


# Bytes


def bytes_of_variants(setting: Setting) -> dict[str, Any]:
    """MB of the files of one model and of a folder of adapters, one written after the other; and in a bank's slots."""
    model, count = setting.base.load(), setting["variants"]
    with TemporaryDirectory() as folder:
        save_model(model, Path(folder, "model"))
        for number in range(count):
            apply_lora(model, LoRAConfig(8, 16, target_modules="all-linear"))
            save_adapter(model, Path(folder, "adapters", f"variant-{number}"))
            remove_lora(model)
        one, adapters = (
            sum(file.stat().st_size for file in Path(folder, name).rglob("*") if file.is_file())
            for name in ("model", "adapters")
        )
        bank = AdapterBank(model, {path.name: path for path in Path(folder, "adapters").iterdir()}, slots=count)
        bank.forward(torch.zeros(count, 1, dtype=torch.int64), bank.names)  # all of them into their slots
    slots = sum(tensor.nbytes for layer in bank.layers.values() for tensor in (layer.A, layer.B))
    sizes = {"models": count * one, "one base and adapters": one + adapters, "adapters in slots": slots}
    return {"scores": {f"{what}, MB": size / 10**6 for what, size in sizes.items()}, "bytes": sizes}


BYTES = Study(
    "variants-bytes",
    f"files of {VARIANTS} models, and of one with {VARIANTS} adapters of rank 8 on all linears, float32",
    {"bytes": Arm(None)},
    {
        scale: Plan("random numbers", steps=0, seeds=1, minutes=minutes, settings={"variants": VARIANTS})
        for scale, minutes in (("tiny", 0.2), ("smollm2", 1.5))
    },
    bytes_of_variants,
    chosen_by="",
    figure=bars(["models, MB", "one base and adapters, MB"], "MB of files"),
)

# Time


def time_of_variants(setting: Setting) -> dict[str, Any]:
    """16 rows continued by so many tokens, over the base alone, percent: all with one adapter, with 4 and with 16, all
    of them resident beside others; and four rows each of LoRA, DoRA, soft prompts and prefixes."""
    torch.manual_seed(setting.seed)
    new, length, count = setting["new_tokens"], setting["prompt_length"], setting["variants"]
    base, model = setting.base.load().eval(), setting.base.load()
    lora, dora = random_lora(model), random_lora(model, use_dora=True)
    names = [f"variant {number}" for number in range(count)]  # of one adapter: its numbers do not matter
    variants: dict[str, Any] = dict.fromkeys(names, lora) | {"dora": dora}
    variants |= {"soft prompt": SoftPrompt(model, VIRTUAL), "prefix": PrefixTuning(model, VIRTUAL)}
    bank = AdapterBank(model, variants, slots=count + 1)
    bank.forward(torch.zeros(count, 1, dtype=torch.int64), names)  # all of them into their slots
    texts = torch.randint(base.config.vocab_size, (ROWS, length)).tolist()
    actions: dict[str, Callable] = {"base": lambda: generate(base, texts, new)}
    for name, different in DIFFERENT.items():
        rows = names[:different] * (ROWS // different)
        actions[name] = lambda rows=rows: bank.generate(texts, rows, new)
    mixed = [*names[:4], *["dora", "soft prompt", "prefix"] * 4]
    actions["of four kinds"] = lambda: bank.generate(texts, mixed, new)
    return {"scores": percent(actions, setting["rounds"])}


TIME = Study(
    "variants-time",
    f"{ROWS} rows of 32 tokens continued by 32, in a bank of {VARIANTS} adapters of rank 8 on all linears, on a CPU",
    {"time": Arm(None)},
    {
        "smollm2": Plan(
            "random tokens",
            steps=0,
            seeds=3,
            minutes=2.5,
            settings={"variants": VARIANTS, "prompt_length": 32, "new_tokens": 32, "rounds": 5},
        )
    },
    time_of_variants,
    chosen_by="",
    figure=bars([*DIFFERENT, "of four kinds"], "time over the base's alone (%)", 115),
)

SOURCE = "popular articles; the documentation of servers for many adapters (vLLM, LoRAX)"

CLAIMS = [
    Claim(
        "variants-bytes",
        "One deployment holds many variants, in a tenth of what as many models would take.",
        SOURCE,
        Rule(
            ("bytes",),
            f"bytes of one base and {VARIANTS} adapters, percent of {VARIANTS} models'",
            lambda runs: 100 * runs["bytes"]["bytes"]["one base and adapters"] / runs["bytes"]["bytes"]["models"],
            bar=10,
            above=False,
            exact=True,
        ),
        (BYTES,),
        "a count, no experiment; whether an adapter says what a fully fine-tuned model would say is another claim",
    ),
    Claim(
        "variants-time",
        "One deployment serves many variants at once, in little more time than its base takes for one.",
        SOURCE,
        quantity(
            "time",
            "16 adapters",
            f"time for {ROWS} rows with {ROWS} adapters of {VARIANTS}, percent of the base's alone",
            115,
            above=False,
        ),
        (TIME,),
        "one machine, a CPU: a GPU waits less for memory and more for the number of operations, which a bank adds to",
    ),
]
