"""Claims about time: of a training step, of inference, of changing adapters, and of many at once."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from minilora.adapters.adapter import Adapter, extract_adapter
from minilora.adapters.inject import adapter_parameters, apply_lora, merge_lora, remove_lora, unmerge_lora
from minilora.adapters.swap import AdapterShelf
from minilora.config import LoRAConfig
from minilora.experiments.bench import BenchSettings, step_of
from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import Claim, Record, Rule, quantity
from minilora.experiments.claims.study import Arm, Plan, Setting, Study
from minilora.experiments.timing import Timing, ratios_in_turn
from minilora.inference.bank import AdapterBank
from minilora.inference.generate import generate
from minilora.linear4bit import quantize_model
from minilora.model import GPT
from minilora.storage.adapters import load_adapter, save_adapter
from minilora.storage.models import save_model

LORA = LoRAConfig(8, 16, target_modules="all-linear")


def random_adapter(model: GPT) -> GPT:
    """The model with an adapter of random numbers: as far as time is concerned, a trained one."""
    for parameter in adapter_parameters(apply_lora(model, LORA)):
        nn.init.normal_(parameter, std=0.02)
    return model.eval()


def percent(actions: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The median time of each action but the first over the first's, taken in turn."""
    with torch.no_grad():
        ratios = ratios_in_turn(actions, Timing(rounds, progress=False), "in turn")
    return {name: 100 * statistics.median(each) for name, each in ratios.items()}


# Time of a step


def time_of_a_step(setting: Setting) -> dict[str, Any]:
    """Steps of four kinds in turn, A B C D A B C D: the median of their times over full fine-tuning's, percent."""
    shape: dict[str, Any] = setting.plan.settings.get("shape", {})
    settings = BenchSettings(rounds=setting["rounds"], progress=False, seed=setting.seed, **shape)
    if shape:
        ids = labels = settings.random_ids(settings.batch_size, settings.sequence_length)
        fresh: Callable[[], GPT] = settings.build_model
    else:
        data = setting.dataset().train
        fresh, ids, labels = setting.base.load, data.input_ids[:16], data.labels[:16]
    models: dict[str, nn.Module] = {"full": fresh().requires_grad_(True)}
    models["q, v"] = apply_lora(fresh(), replace(LORA, target_modules=["q_proj", "v_proj"]))
    models["all linears"] = apply_lora(fresh(), LORA)
    models["qlora"] = apply_lora(quantize_model(fresh()), LORA)
    actions = {name: step_of(model, ids, labels) for name, model in models.items()}
    ratios = ratios_in_turn(actions, Timing(setting["rounds"], progress=False), "step")
    return {"scores": {name: 100 * statistics.median(each) for name, each in ratios.items()}, "ratios": ratios}


def speed_study(name: str, about: str, plan: Plan) -> Study:
    figure = bars(["q, v", "all linears", "qlora"], "time of a step over full fine-tuning's (%)", 80)
    return Study(name, about, {"steps": Arm(None)}, {"tiny": plan}, time_of_a_step, chosen_by="", figure=figure)


WIDE = {"num_hidden_layers": 4, "batch_size": 4, "sequence_length": 128}
SPEED = (
    speed_study(
        "speed",
        "steps of 16 x 80 tokens on the shipped base, 192 wide, float32 on one or two CPU cores, in turn",
        Plan("json", steps=0, seeds=5, minutes=0.3, settings={"rounds": 9}),
    ),
    speed_study(
        "speed-wide",
        "steps of 4 x 128 tokens, 4 layers, 512 wide, float32 on one or two CPU cores, in turn",
        Plan("random tokens", steps=0, seeds=3, minutes=0.5, settings={"rounds": 5, "shape": WIDE}),
    ),
)

# What merging costs, and not merging


def latency(setting: Setting) -> dict[str, Any]:
    """Text token after token, one row, over the base alone, percent: with the adapter merged and written as a plain
    model, merged and still in its LoRA layers, each a function call more, and apart."""
    base, merged, apart = (setting.base.load().eval() for _ in range(3))
    merge_lora(random_adapter(merged)), random_adapter(apart)
    with TemporaryDirectory() as folder:
        save_model(merged, Path(folder))
        plain = replace(setting.base, directory=Path(folder)).load().eval()
    models = {"base": base, "merged": plain, "merged, in its layers": merged, "apart": apart}
    actions = {name: lambda model=model: generate(model, [[1]], 16) for name, model in models.items()}
    return {"scores": percent(actions, 15)}


LATENCY = Study(
    "latency",
    "16 tokens, one after another, one row, the shipped base on a CPU; time over the base's without an adapter",
    {"time": Arm(None)},
    {"tiny": Plan("base", steps=0, seeds=5, minutes=0.1)},
    latency,
    chosen_by="",
    figure=bars(["merged", "merged, in its layers", "apart"], "time over the base's (%)", 105),
)


def median_ms(action: Callable, times: int) -> float:
    seconds = []
    for _ in range(1 + times):  # the first warms up
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds[1:])


def switching(setting: Setting) -> dict[str, Any]:
    """Milliseconds to change adapters: on a shelf, from a file, by merging in and out; and to load the model."""
    base = setting.base.load().eval()
    if setting["wide"]:
        heads = replace(base.config, num_attention_heads=24, num_key_value_heads=8)
        base = GPT(replace(heads, hidden_size=768, intermediate_size=2048)).eval()
    with TemporaryDirectory() as folder, torch.no_grad():
        adapter = extract_adapter(random_adapter(base))
        save_adapter(base, Path(folder))

        def from_file():
            remove_lora(base)
            load_adapter(base, folder)

        scores = {"from a file, ms": median_ms(from_file, 9)}
        scores["merged in and out, ms"] = median_ms(lambda: (merge_lora(base), unmerge_lora(base)), 9)
    remove_lora(base)
    shelf = AdapterShelf(base)
    for name in "ab":
        shelf.add(name, adapter)
    scores["switch, ms"] = median_ms(lambda: (shelf.switch("a"), shelf.switch("b")), 99) / 2
    if not setting["wide"]:
        scores["load the model, ms"] = median_ms(setting.base.load, 5)
    return {"scores": scores}


SWITCH = Study(
    "switch",
    "two adapters on all linears of 6 layers, 192 wide and 768 wide, on a CPU",
    {"base": Arm(None, settings={"wide": False}), "wide": Arm(None, settings={"wide": True})},
    {"tiny": Plan("base", steps=0, seeds=5, minutes=0.1)},
    switching,
    chosen_by="",
    figure=bars(
        ["switch, ms", "from a file, ms", "merged in and out, ms", "load the model, ms"], "milliseconds", 10, log=True
    ),
)


# Many adapters at once

ROWS = 16


def many_at_once(setting: Setting) -> dict[str, Any]:
    """16 rows continued by 16 tokens: each with an adapter of its own in one batch, and one after the other, over the
    base alone, percent."""
    shape: dict[str, Any] = setting.plan.settings.get("shape", {})
    settings = BenchSettings(progress=False, seed=setting.seed, **shape)
    fresh: Callable[[], GPT] = settings.build_model if shape else setting.base.load
    adapter: Adapter = extract_adapter(random_adapter(fresh()))
    names = [f"adapter {number}" for number in range(ROWS)]  # of one adapter: its numbers do not matter
    base, bank, shelf = (
        fresh().eval(),
        AdapterBank(fresh(), dict.fromkeys(names, adapter)),
        AdapterShelf(fresh().eval()),
    )
    for name in names:
        shelf.add(name, adapter)
    prompts = settings.random_ids(ROWS, 16).tolist()

    def one_after_the_other():
        for name, prompt in zip(names, prompts, strict=True):
            shelf.switch(name)
            generate(shelf.model, [prompt], 16)

    actions = {
        "base": lambda: generate(base, prompts, 16),
        "one batch": lambda: bank.generate(prompts, names, 16),
        "one after the other": one_after_the_other,
    }
    return {"scores": percent(actions, setting["rounds"])}


def serving_study(name: str, about: str, plan: Plan) -> Study:
    figure = bars(["one batch", "one after the other"], "time over the base's alone (%)", 125)
    return Study(name, about, {"time": Arm(None)}, {"tiny": plan}, many_at_once, chosen_by="", figure=figure)


SERVING = (
    serving_study(
        "serving",
        "16 rows, 16 adapters on all linears, 16 tokens each, on the shipped base, 192 wide, on a CPU",
        Plan("random tokens", steps=0, seeds=5, minutes=0.2, settings={"rounds": 7}),
    ),
    serving_study(
        "serving-wide",
        "the same on 8 layers, 512 wide",
        Plan("random tokens", 0, seeds=3, minutes=0.6, settings={"rounds": 5, "shape": {"sequence_length": 64}}),
    ),
)


def slower_switch(runs: Mapping[str, Record]) -> float:
    return max(run["scores"]["switch, ms"] for run in runs.values())


CLAIMS = [
    Claim(
        "speed",
        "LoRA trains faster: a step takes a fifth less time, or better.",
        "Hu et al. 2021, section 4.2: 25 % faster at the size of GPT-3; popular articles",
        quantity(
            "steps",
            "all linears",
            "time of a LoRA step, rank 8 on all linears, percent of full fine-tuning's",
            80,
            above=False,
        ),
        SPEED,
        "CPU, float32, our own kernels; a repeated measurement is what a seed is here, and one machine is not another",
    ),
    Claim(
        "merge-free",
        "A merged adapter costs nothing at inference.",
        'Hu et al. 2021, abstract: "no additional inference latency"',
        quantity("time", "merged", "time of text token after token, merged, percent of the base's", 105, above=False),
        (LATENCY,),
        "it is the same arithmetic by construction, so only a mistake could make it fail",
    ),
    Claim(
        "swap",
        "Adapters of one base are swapped in milliseconds.",
        "Hu et al. 2021, section 4.2: tasks are switched by swapping the LoRA weights; popular articles",
        Rule(
            ("base", "wide"),
            "milliseconds from one adapter to another, both in memory, the slower of two bases",
            slower_switch,
            bar=10,
            unit="ms",
            above=False,
        ),
        (SWITCH,),
        "both adapters are in memory; from a file it takes as long as reading and checking it",
    ),
    Claim(
        "serving",
        "Many adapters share one base and one batch at little cost.",
        "Chen et al. 2023 (Punica), arXiv:2310.18547; Sheng et al. 2023 (S-LoRA), arXiv:2311.03285, abstracts",
        quantity(
            "time", "one batch", "time for 16 rows with 16 adapters, percent of the base's alone", 125, above=False
        ),
        SERVING,
        "token after token, where fixed work in each layer counts most; the papers have kernels of their own",
    ),
]
