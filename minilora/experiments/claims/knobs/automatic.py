"""Claims about ranks and layers chosen by a program."""

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from minilora.adapters.gradient_ranks import gradient_energies, spend, with_ranks
from minilora.adapters.inject import count_parameters, lora_layers
from minilora.adapters.prompts import Prompt
from minilora.config import LoRAConfig
from minilora.experiments.claims.claim import Claim, Record, Rule, better, no_worse
from minilora.experiments.claims.knobs.automatic_figures import KINDS, losses_by_arm, rank_maps
from minilora.experiments.claims.study import Arm, Plan, Setting, Study, dataset, loss_of, losses
from minilora.experiments.methods import BaseFolder
from minilora.inference.evaluate import score_task
from minilora.linear4bit import float_linears
from minilora.model import GPT
from minilora.rows import shuffled

UNIFORM = LoRAConfig(8, lora_alpha=16, target_modules="all-linear")  # all arms spend its numbers, at its scaling, 2
ROWS, AT_ONCE = 64, 16  # of the training data, that the choice is made on
THIRD = 3  # one in so many of the matrices


@lru_cache(maxsize=8)
def energies_of(base: BaseFolder, data: str, seed: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """By layer: σ_i² of the gradient on some rows of the data, other ones for each seed; what a component costs."""
    train, model = dataset(data, base).train, base.load()
    rows = shuffled(len(train), seed, 0)[:ROWS]
    batches = zip(train.input_ids[rows].split(AT_ONCE), train.labels[rows].split(AT_ONCE), strict=True)
    costs = {name: layer.in_features + layer.out_features for name, layer in float_linears(model).items()}
    return gradient_energies(model, batches), costs


def by_gradient(energies: Mapping[str, Tensor], costs: Mapping[str, int], seed: int) -> dict[str, int]:
    return spend(energies, costs, UNIFORM.r * sum(costs.values()))


def by_chance(energies: Mapping[str, Tensor], costs: Mapping[str, int], seed: int) -> dict[str, int]:
    """The gradient's ranks, dealt anew among layers of equal cost: as many numbers, as unevenly spread."""
    ranks, dice = by_gradient(energies, costs, seed), random.Random(seed)
    dealt: dict[str, int] = {}
    for cost in sorted(set(costs.values())):
        names = [name for name in costs if costs[name] == cost]
        dealt |= dict(zip(names, dice.sample([ranks.get(name, 0) for name in names], len(names)), strict=True))
    return {name: dealt[name] for name in costs if dealt[name]}


def steepest_third(energies: Mapping[str, Tensor], costs: Mapping[str, int], seed: int) -> dict[str, int]:
    """One rank for the third of the matrices with the most energy per number, and one more for the first of them."""
    most = UNIFORM.r * THIRD
    order = sorted(energies, key=lambda name: -energies[name][:most].sum().item() / costs[name])
    chosen, budget = order[: len(order) // THIRD], UNIFORM.r * sum(costs.values())
    r, left = divmod(budget, sum(costs[name] for name in chosen))
    ranks = {}
    for name in chosen:
        ranks[name] = r + (costs[name] <= left)
        left -= costs[name] * (ranks[name] - r)
    return ranks


CHOICES = {"gradient": by_gradient, "chance": by_chance, "third": steepest_third}


def measure(setting: Setting) -> dict:
    """Losses, right answers, and the rank of every adapted layer."""
    data, base, chosen = setting.dataset(), setting.base, setting
    if setting["by"]:
        config = with_ranks(UNIFORM, CHOICES[setting["by"]](*energies_of(base, data.name, setting.seed), setting.seed))
        if setting["one alpha"]:
            config = replace(config, alpha_pattern={})
        chosen = replace(setting, arm=replace(setting.arm, lora=vars(config)))
    if setting.arm.method is None:
        model: GPT | Prompt = base.load()
        record: dict = {"best_validation_loss": loss_of(model, data.validation)}
    else:
        finished = chosen.train(data, evaluations=4)
        model, record = finished.model, losses(finished)
    if not setting.tuning:
        assert data.task
        right = score_task(model, base.tokenizer, data.task).score
        record["scores"] = {"task": right, "numbers": count_parameters(model)[0] if setting.arm.method else 0}
        record["ranks"] = ranks_of(model)
    return record


def ranks_of(model: GPT | Prompt) -> dict[str, list[int]]:
    """By kind of matrix, the rank in each layer; 0 where there is no adapter."""
    ranks = {name: layer.r for name, layer in lora_layers(model)}
    blocks = [f"model.layers.{number}.{{}}.{{}}" for number in range(model.config.num_hidden_layers)]
    return {kind: [ranks.get(block.format(part, kind), 0) for block in blocks] for kind, part in KINDS.items()}


MLP = {"r": 13, "lora_alpha": 26, "target_modules": ("gate_proj", "up_proj", "down_proj")}  # 1.2 % more numbers
Q_V = {"r": 42, "lora_alpha": 84, "target_modules": ("q_proj", "v_proj")}  # 0.9 % fewer
HAND = {"uniform": Arm("lora"), "MLP": Arm("lora", MLP), "q,v": Arm("lora", Q_V)}
PROGRAM = {
    "gradient": Arm("lora", settings={"by": "gradient"}),
    "adalora": Arm("adalora"),
    "third": Arm("lora", settings={"by": "third"}),
}
SHUFFLED = {"shuffled": Arm("lora", settings={"by": "chance"})}
ONE_ALPHA = {"one alpha": Arm("lora", settings={"by": "gradient", "one alpha": True})}
SLOW = {  # asked for by the first results, as WIDE: a third of the rate that uniform ranks like best
    "uniform /3": Arm("lora", rate_of="uniform", rate_times=1 / 3),
    "gradient /3": Arm("lora", settings={"by": "gradient"}, rate_of="uniform", rate_times=1 / 3),
}
WIDE = {"r=12": Arm("lora", {"r": 12, "lora_alpha": 24})}  # as many ranks as AdaLoRA begins with
ARMS = {**HAND, **PROGRAM, **SHUFFLED, "base": Arm(None)}


def study(data: str, steps: int, seeds: int, more: Mapping[str, Arm] | None = None) -> Study:
    about = (
        f"{data}, {steps} steps; 162,816 trained numbers (2 % more or less; AdaLoRA: as many ranks), spread by rules"
    )
    plan = Plan(data, steps, seeds, minutes=0.4, settings={"by": None, "one alpha": False})
    arms = {**ARMS, **(more or {})}
    return Study(f"auto-{data}", about, arms, {"tiny": plan}, measure, figure=losses_by_arm, finer=True)


DIALECT = study("dialect", 100, 5, ONE_ALPHA | SLOW)
# Short runs: after more steps both tasks are all but solved by every arm.
FACTS = study("facts", 60, 3, WIDE | SLOW)
TASKS = (DIALECT, study("json", 30, 5), FACTS)


def best_of(runs: Mapping[str, Record], arms: Mapping[str, Arm]) -> float:
    return min(runs[arm]["best_validation_loss"] for arm in arms)


def as_good_as_by_hand(runs: Mapping[str, Record]) -> float:
    hand = best_of(runs, HAND)
    return 100 * (hand - best_of(runs, PROGRAM)) / hand


OBJECTION = "one small base, on which rank 8 is 5 % of the numbers, and short runs"
CLAIMS = [
    Claim(
        "auto-while",
        "Moving ranks to where they matter while training (AdaLoRA) beats uniform ranks.",
        "Zhang et al. 2023, arXiv:2303.10512, abstract",
        better("adalora", "uniform"),
        TASKS,
        f"{OBJECTION}: 30 to 100 steps, of which AdaLoRA has half for its choice; it begins with half as many ranks "
        "again, and ends with as many ranks as uniform but some percent fewer numbers, because it prefers attention; a "
        "simplified AdaLoRA, without the diagonal of singular values",
    ),
    Claim(
        "auto-before",
        "One backward pass before training tells where rank is needed: its ranks beat uniform ones.",
        "He et al. 2025, arXiv:2502.12171 (GoRA), abstract, of another score of the gradient",
        better("gradient", "uniform"),
        TASKS,
        f"{OBJECTION}; A starts at random, where the paper starts B along the gradient as well. On facts the one seed "
        "that chooses rates chose a lower one for these ranks than for uniform ones, 0.0055 against 0.01",
    ),
    Claim(
        "auto-chance",
        "The ranks that one backward pass gives are better than the same ranks dealt by chance.",
        "the control that auto-before needs",
        better("gradient", "shuffled"),
        TASKS,
        f"{OBJECTION}; ranks are dealt among layers of equal cost, so attention and MLP keep their shares; one deal "
        "for each seed, so a lucky deal is one of three or five",
    ),
    Claim(
        "auto-third",
        "A third of the matrices, where the loss is steepest, at nearly four times the rank, do as well as all.",
        "often said: adapt the layers that matter",
        no_worse("third", "uniform"),
        TASKS,
        f"{OBJECTION}; by steepness per number the third is mostly k and v and, on facts, the first layer: another "
        "score would choose other matrices. k and v are small, so at equal numbers the rank is 29 to 32, nearly four "
        "times 8 and not three times; which of the two does harm, few matrices or a high rank, is not asked",
    ),
    Claim(
        "auto-hand",
        "A program's choice of ranks and layers is as good as the best choice by hand.",
        "an open question of guides to LoRA",
        Rule(
            (*HAND, *PROGRAM, "base"),
            f"lowest loss of {', '.join(PROGRAM)} below the lowest of {'; '.join(HAND)}, percent, paired by seed",
            as_good_as_by_hand,
            bar=-5,
        ),
        TASKS,
        f"{OBJECTION}; the best of three beside the best of three, known only after all six were run: AdaLoRA, mostly, "
        "and uniform ranks on all linears",
        rank_maps,
    ),
    Claim(
        "auto-scale",
        "Where ranks differ, each layer's alpha should move along with its rank, so that all layers keep one scaling.",
        "PEFT's documentation of EVA, adjust_scaling_factors, which is on by default",
        better("gradient", "one alpha"),
        (DIALECT,),
        f"{OBJECTION}; each arm has a rate of its own, which makes up for the scalings' common size",
    ),
    Claim(
        "auto-slow",
        "At one rate for all, a third of the best, ranks from the gradient beat uniform ones.",
        "put here after the first results, before its own runs",
        better("gradient /3", "uniform /3"),
        (FACTS, DIALECT),
        f"{OBJECTION}; a search of the rate gives as much and more: see auto-before",
    ),
    Claim(
        "auto-wide",
        "What AdaLoRA gains on facts it gains by moving ranks, not by beginning with half as many ranks again.",
        "put here after the first results, before its own runs",
        better("adalora", "r=12"),
        (FACTS,),
        f"{OBJECTION}; three seeds; r=12 keeps all its numbers to the end, a third of which AdaLoRA gives up",
    ),
]
