"""Claims about what LoRA saves: parameters, memory, bytes on disk. All are counts, and exact."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from minilora.adapters.inject import apply_lora, count_parameters
from minilora.config import LoRAConfig
from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import Claim, Rule
from minilora.experiments.claims.study import Arm, Plan, Setting, Study
from minilora.experiments.simulate import simulate
from minilora.model import GPT, GPTConfig
from minilora.presets import PRESETS
from minilora.storage.adapters import save_adapter
from minilora.storage.config import load_config
from minilora.storage.models import save_model

ATTENTION = ["q_proj", "v_proj"]
GB = 10**9


def shape_of(setting: Setting) -> GPTConfig:
    """That of the preset which the plan names, or of the base."""
    name = setting.plan.data
    return GPTConfig.preset(name) if name in PRESETS else load_config(setting.base.directory)


def lora_of(setting: Setting) -> LoRAConfig:
    return LoRAConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **setting.arm.lora})


# Parameters


def share_trained(setting: Setting) -> dict[str, Any]:
    """Percent of all parameters that are trained, the adapter's counted among them, on a model without numbers."""
    with torch.device("meta"):
        model = GPT(shape_of(setting))
        if setting.arm.lora:
            apply_lora(model, lora_of(setting))
    trained, total = count_parameters(model)
    return {"scores": {"trained, %": 100 * trained / total}, "trained": trained, "total": total}


SHARE = Study(
    "share",
    "parameters that are trained, rank 8; the shape of the base, of SmolLM2-135M and of Llama-2-7B",
    {"full": Arm(None), "q, v": Arm(None, {"target_modules": ATTENTION}), "all linears": Arm(None, {"r": 8})},
    {
        "tiny": Plan("base", steps=0, seeds=1, minutes=0.1),
        "smollm2": Plan("smollm2", steps=0, seeds=1, minutes=0.1),
        "large": Plan("llama-2-7b", steps=0, seeds=1, minutes=0.1),
    },
    share_trained,
    chosen_by="",
    figure=bars(["trained, %"], "percent of all parameters, logarithmic", 1, log=True),
)

# Memory


def bytes_of_a_step(setting: Setting) -> dict[str, Any]:
    """GB of tensors of one training step, by kind and at the peak, of the real step on fake tensors."""
    report = simulate(
        shape_of(setting), setting["method"], target_modules="all-linear", **setting.plan.settings["step"]
    )
    sizes = {f"{kind}, GB": size / GB for kind, size in report.as_dict().items()}
    return {"scores": sizes, "step": report.title}


def memory_study(name: str, about: str, plans: dict[str, Plan]) -> Study:
    arms = {name: Arm(None, settings={"method": name}) for name in ("full", "lora", "qlora")}
    return Study(
        name, about, arms, plans, bytes_of_a_step, chosen_by="", figure=bars(["peak, GB"], "peak, GB of tensors")
    )


def step_plan(shape: str, dtype: str, rows: int, length: int, **more) -> Plan:
    step = dict(dtype=dtype, batch_size=rows, sequence_length=length, **more)
    return Plan(shape, steps=0, seeds=1, minutes=0.2, settings={"step": step})


TINY, SMOL = ("base", "float32", 16, 80), ("smollm2", "float32", 8, 96)  # as `compare` trains them
SEVEN = ("llama-2-7b", "bfloat16", 1, 2048)
KEPT = memory_study(
    "memory",
    "bytes of one AdamW step: the base 16 x 80 tokens, SmolLM2 8 x 96 (both float32), Llama-2-7B 1 x 2048 (bfloat16)",
    {
        "tiny": step_plan(*TINY, counted_tokens=36),
        "smollm2": step_plan(*SMOL, counted_tokens=36),
        "large": step_plan(*SEVEN),
    },
)
CHECKPOINTED = memory_study(
    "memory-checkpointed",
    "the same steps with activation checkpointing",
    {
        "tiny": step_plan(*TINY, counted_tokens=36, gradient_checkpointing=True),
        "smollm2": step_plan(*SMOL, counted_tokens=36, gradient_checkpointing=True),
        "large": step_plan(*SEVEN, gradient_checkpointing=True),
    },
)
SIXTY_FIVE = memory_study(
    "memory-65b",
    "one step of Llama-65B, 1 x 512 tokens, rank 64 on all linears, activation checkpointing, as the paper's figure 6",
    {"large": step_plan("llama-65b", "bfloat16", 1, 512, r=64, gradient_checkpointing=True)},
)

# Bytes on disk


def saved_bytes(setting: Setting) -> dict[str, Any]:
    """MB of the file of the model, or of the adapter. Where the plan names a large shape: of its tensors, bfloat16."""
    config, with_lora = shape_of(setting), bool(setting.arm.lora)
    if setting.plan.settings:
        with torch.device("meta"):
            model = GPT(config)
            if with_lora:
                apply_lora(model, lora_of(setting))
        each = 4 if with_lora else 2  # an adapter is float32, as save_adapter writes it and PEFT too
        size = each * sum(p.numel() for p in model.parameters() if p.requires_grad)
    else:
        model = setting.base.load()
        with TemporaryDirectory() as folder:
            if with_lora:
                apply_lora(model, lora_of(setting))
                save_adapter(model, Path(folder))
            else:
                save_model(model, Path(folder))
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {"scores": {"MB": size / 10**6}, "bytes": size}


SIZE = Study(
    "size",
    "files of the saved model and adapters; at Llama-65B the bytes of their tensors, model bfloat16, adapter float32",
    {
        "full": Arm(None),
        "q, v, r=4": Arm(None, {"r": 4, "target_modules": ATTENTION}),
        "all linears, r=8": Arm(None, {"r": 8}),
    },
    {
        "tiny": Plan("base", steps=0, seeds=1, minutes=0.1),
        "smollm2": Plan("smollm2", steps=0, seeds=1, minutes=0.2),
        "large": Plan("llama-65b", steps=0, seeds=1, minutes=0.1, settings={"tensors": True}),
    },
    saved_bytes,
    chosen_by="",
    figure=bars(["MB"], "MB on disk, logarithmic", log=True),
)

CLAIMS = [
    Claim(
        "share",
        "LoRA trains less than 1 % of the parameters.",
        "popular articles; Hu et al. 2021, table 4, at the size of GPT-3: 0.01 to 0.02 %",
        Rule(
            ("full", "q, v", "all linears"),
            "parameters that are trained, percent of all, rank 8 on all linears",
            lambda runs: runs["all linears"]["scores"]["trained, %"],
            bar=1,
            above=False,
            exact=True,
        ),
        (SHARE,),
        "a count of shapes, no experiment; on q and v alone, the paper's choice, the shares are several times smaller",
    ),
    Claim(
        "memory",
        "LoRA needs a third of the memory of full fine-tuning.",
        'Hu et al. 2021, section 4.2: "up to 2/3" less',
        Rule(
            ("full", "lora", "qlora"),
            "peak of tensors in a LoRA step, percent of full fine-tuning's step",
            lambda runs: 100 * runs["lora"]["scores"]["peak, GB"] / runs["full"]["scores"]["peak, GB"],
            bar=33.4,
            above=False,
            exact=True,
        ),
        (KEPT, CHECKPOINTED),
        "full fine-tuning all in bfloat16 is the least it can take; with a float32 copy LoRA would save more",
    ),
    Claim(
        "qlora-65b",
        "QLoRA fine-tunes a model of 65 billion parameters on one card of 48 GB.",
        "Dettmers et al. 2023, arXiv:2305.14314, abstract",
        Rule(
            ("full", "lora", "qlora"),
            "peak of tensors in a QLoRA step; the card's 48 GiB less one for its context",
            lambda runs: runs["qlora"]["scores"]["peak, GB"] * GB / 2**30,
            bar=47,
            unit="GiB",
            above=False,
            exact=True,
        ),
        (SIXTY_FIVE,),
        "bytes of tensors, simulated: fragments and the scratch memory of kernels are not among them",
    ),
    Claim(
        "size",
        "An adapter is ten thousand times smaller than its model.",
        "Hu et al. 2021, abstract and section 4.2: 35 MB for 350 GB, at the size of GPT-3",
        Rule(
            ("full", "q, v, r=4", "all linears, r=8"),
            "bytes of the model over those of an adapter, rank 4 on q and v; half of ten thousand would do",
            lambda runs: runs["full"]["bytes"] / runs["q, v, r=4"]["bytes"],
            bar=5000,
            unit="times",
            exact=True,
        ),
        (SIZE,),
        "at GPT-3's own shape, with the adapter in 16 bits, the same count gives 9,300 times",
    ),
]
