"""Claims about many adapters served from one base, at the size of a real model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.adapter import Adapter, extract_adapter
from minilora.adapters.inject import adapter_parameters, apply_lora, remove_lora
from minilora.adapters.prompts import PrefixTuning, SoftPrompt
from minilora.config import LoRAConfig
from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import Claim, Rule, quantity
from minilora.experiments.claims.study import ROW, Arm, Plan, Setting, Study
from minilora.experiments.claims.uses.speed import percent
from minilora.experiments.run import finetune, tuned_experiments
from minilora.inference.bank import AdapterBank
from minilora.inference.generate import generate
from minilora.model import GPT
from minilora.storage.adapters import save_adapter
from minilora.storage.models import save_model
from minilora.text.datasets import load_dataset

LORA = LoRAConfig(8, 16, target_modules="all-linear")
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
            apply_lora(model, LORA)
            save_adapter(model, Path(folder, "adapters", f"variant-{number}"))
            remove_lora(model)
        return counted_bytes(Path(folder), model)[0]


def counted_bytes(folder: Path, model: GPT) -> tuple[dict[str, Any], Tensor]:
    """The record of the files in `folder`/model and `folder`/adapters, and of each of these adapters the logits after a
    token, (adapters, V), when all are served together."""
    one, all_adapters = (
        sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        for name in ("model", "adapters")
    )
    adapters = {path.name: path for path in (folder / "adapters").iterdir()}
    bank = AdapterBank(model, adapters, slots=len(adapters))
    logits = bank.forward(torch.ones(len(adapters), 1, dtype=torch.int64), bank.names)[:, 0]  # all into their slots
    slots = sum(tensor.nbytes for layer in bank.layers.values() for tensor in (layer.A, layer.B))
    bank.close()
    sizes = {"models": len(adapters) * one, "one base and adapters": one + all_adapters, "adapters in slots": slots}
    return {"scores": {f"{what}, MB": size / 10**6 for what, size in sizes.items()}, "bytes": sizes}, logits


def bytes_of_trained(setting: Setting) -> dict[str, Any]:
    """The same of what `finetune` writes: adapters that it trained, so many of each task, each under a name of its own,
    and one model. "unlike" counts the pairs of adapters that say different things when all are served together."""
    base, tasks = setting.base, setting["tasks"]
    each = setting["variants"] // len(tasks)
    with TemporaryDirectory() as folder:
        for task in tasks:
            data = load_dataset(task, base.tokenizer, ROW, count=setting["held out"])
            (plan,) = tuned_experiments(base, data, ["lora"], setting.plan.steps, lora=LORA)
            for seed in range(each):
                own = replace(plan, training=replace(plan.training, seed=seed))
                finetune(own, Path(folder, "adapters", f"{task}-{seed}"), progress=False)
        (full,) = tuned_experiments(base, data, ["full"], setting.plan.steps)
        finetune(full, Path(folder, "model"), progress=False)
        record, logits = counted_bytes(Path(folder), base.load())
    pairs = len(logits) * (len(logits) - 1) // 2
    return record | {"pairs": pairs, "unlike": int((torch.pdist(logits) > 0).sum())}


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

TRAINED = Study(
    "variants-trained",
    f"{VARIANTS} adapters that finetune trained for a moment and wrote, of four tasks, beside a model that it wrote",
    {"bytes": Arm(None)},
    {
        "tiny": Plan(
            "four tasks",
            steps=10,
            seeds=1,
            minutes=4,
            settings={"variants": VARIANTS, "tasks": ("json", "pirate", "dialect", "facts"), "held out": 20},
        )
    },
    bytes_of_trained,
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
        (BYTES, TRAINED),
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
