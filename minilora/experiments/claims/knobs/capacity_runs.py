"""One run about capacity: adapters learn by heart what is random, and the bits that each holds are counted.

    stored = bits to learn - bits missing        missing = sum over the words to learn of -log2 p(word)

All of it is measured on the rows that are trained on. Who knows which words can occur, and nothing else, has stored 0
bits; an untrained base does not know that, and is below.

A run is thousands of small steps, and a GPU takes no longer for those of three seeds at once than for those of one. So
the seeds of an arm are trained side by side on one frozen base, each adapter with rows of its own. Nothing passes from
one to another: the loss is a sum over seeds, Adam works number by number, and gradients are not clipped by a norm that
the seeds would share.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.adapters.inject import find_targets, linear_layers
from minilora.experiments.claims.study import Setting
from minilora.experiments.run import schedule
from minilora.linear4bit import replace_module
from minilora.model import GPT
from minilora.quant import QLORA, scale_to_unit
from minilora.rows import counted_places
from minilora.text.batches import Batches, examples
from minilora.text.newcomers import TINY, Newcomers
from minilora.text.pairs import BITS, pairs
from minilora.train import forward, next_token_targets, train

ALPHA = 16
QUICK = 4  # a rate is chosen in runs of a fourth of the steps
POINTS = 20  # of a run's curve
NEW = 10_000  # added to a seed: rows that are never trained on
ROUNDED = {"bfloat16": 16, "8 bits": 8, "6 bits": 6, "5 bits": 5, "4 bits": 4, "3 bits": 3}  # of a number of an adapter
BLOCK = 64  # numbers that share a scale, below 16 bits


class SideBySide(nn.Module):
    """LoRA for S seeds at once: of x (S·b, T, in), b rows belong to each seed.

    A (S, r, in) is uniform within ±1/√in and B (S, out, r) zero, as in LoRALinear, with a generator for each seed.
    """

    def __init__(self, base_layer: Any, r: int, dice: Sequence[torch.Generator]):
        super().__init__()
        self.base_layer, self.scaling, bound = base_layer, ALPHA / r, base_layer.in_features**-0.5
        device = next(iter([*base_layer.parameters(), *base_layer.buffers()])).device
        starts = [torch.empty(r, base_layer.in_features).uniform_(-bound, bound, generator=one) for one in dice]
        self.A = nn.Parameter(torch.stack(starts).to(device))
        self.B = nn.Parameter(torch.zeros(len(dice), base_layer.out_features, r, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y, rows = self.base_layer(x), x.reshape(len(self.A), -1, x.shape[-1])  # (S, b·T, in)
        return y + (self.scaling * (rows @ self.A.mT) @ self.B.mT).view_as(y)  # (S, b·T, r) (S, r, out)


class AllRows(Batches):
    """Each step learns from all rows, in their order."""

    def draw(self, model: Any, step: int, config: Any) -> tuple[Tensor, Tensor]:
        return self.input_ids, self.labels


def measure(setting: Setting) -> dict[str, Any]:
    """`missing` chooses the rates, in runs of a fourth of the steps. The seeds of an arm are trained with the first."""
    if setting.tuning:
        return {"missing": trained(setting, [setting.seed])[0]["missing"]}
    key, seeds = repr(replace(setting, seed=0)), range(setting.plan.seeds)
    if setting.seed not in seeds:
        return trained(setting, [setting.seed])[0]
    if key not in LAST:
        LAST.clear()
        LAST[key] = trained(setting, seeds)
    return LAST[key][setting.seed]


LAST: dict[str, list[dict[str, Any]]] = {}  # by setting, the records of all seeds of the arm that was trained last


def trained(setting: Setting, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A record for each seed."""
    arm, count = setting.arm, len(seeds)
    steps = setting.plan.steps // (QUICK if setting.tuning else 1)
    (rows, bits), (others, _) = (to_learn(setting, [seed + more for seed in seeds]) for more in (0, NEW))
    model = setting.base.load(QLORA if arm.method == "qlora" else None).requires_grad_(False)
    curve: list[list[float]] = []
    if arm.method is not None:
        put_in(model, arm.lora["target_modules"], arm.lora["r"], seeds)

        def after_step(step: int, optimizer: torch.optim.Optimizer):
            if not setting.tuning and step % max(1, steps // POINTS) == 0:
                curve.append([step, *(bits - recall(model, rows, count)[0]).tolist()])

        assert setting.rate
        config = schedule(steps, setting.rate, seed=setting.seed, precision="float32", max_grad_norm=math.inf)
        train(model, rows, config, progress=setting.progress, description=setting.plan.data, after_step=after_step)
    missing, right = recall(model, rows, count)
    records: list[dict[str, Any]] = [
        {"bits": bits, "missing": round(lost, 2), "scores": {"stored": round(bits - lost, 2), "right": round(share, 4)}}
        for lost, share in zip(missing.tolist(), right.tolist(), strict=True)
    ]
    if setting.tuning or arm.method is None:
        return records
    new, rounded = recall(model, others, count)[0], when_rounded(model, rows, count)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) // count
    for seed, record in enumerate(records):
        stored, points = record["scores"]["stored"], [[step, round(at[seed])] for step, *at in curve]
        late = stored - points[(len(points) - 1) // 2][1]  # what the second half of the steps brought
        more = {"per parameter": stored / parameters, "late": late / parameters, "new": bits - new[seed].item()}
        record["scores"] |= {name: round(value, 4) for name, value in more.items()}
        record |= {"parameters": parameters, "curve": points}
        record["rounded"] = {name: round(bits - lost[seed].item(), 1) for name, lost in rounded.items()}
    return records


def to_learn(setting: Setting, seeds: Sequence[int]) -> tuple[AllRows, float]:
    """Rows, as many of each seed and one seed after the other, and the bits of a seed that only its rows tell."""
    tokenizer, count, device = setting.base.tokenizer, setting["count"], setting.base.device
    if setting["what"] == "pairs":
        parts = [pairs(count, seed, tokenizer) for seed in seeds]
        ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("input_ids", "labels"))
        bits = float(BITS * parts[0].counted_tokens)
    else:
        told = [facts(setting["count"], seed) for seed in seeds]
        both = examples([each for part in told for each in part], tokenizer, 32)
        ids, labels = both.input_ids, both.labels
        bits = count * sum(math.log2(len(values)) for values, _, _ in TINY.facts.values())  # all equally likely
    return AllRows(ids.to(device), labels.to(device)), bits


def facts(count: int, seed: int) -> list[tuple[str, str]]:
    """("Anna Hale lives in", " Marlow."), four of each of `count` people who do not exist."""
    people = Newcomers(TINY, count, 1, seed).people
    stated = [TINY.state(person, kind).partition(f" {person.facts[kind]}") for person in people for kind in TINY.facts]
    return [(before, value + end) for before, value, end in stated]


def put_in(model: GPT, targets: str, r: int, seeds: Sequence[int]):
    dice, layers = [torch.Generator().manual_seed(seed) for seed in seeds], linear_layers(model)
    for name in find_targets(list(layers), targets):
        replace_module(model, name, SideBySide(layers[name], r, dice))


@torch.no_grad()
def recall(model: GPT, rows: Batches, seeds: int) -> tuple[Tensor, Tensor]:
    """By seed, the bits missing, and the share of rows of which each word is the likeliest, given those before it."""
    targets = next_token_targets(rows.labels)  # (S·b, T)
    where = counted_places(targets)
    logits = forward(model, rows.input_ids, where, "float32")  # (N, V)
    what = logits, targets[where], where[0], len(targets)
    missing, known = bits_missing(*what).view(seeds, -1), rows_known(*what).view(seeds, -1)  # (S, b)
    return missing.sum(1), known.double().mean(1)


def bits_missing(logits: Tensor, words: Tensor, row: Tensor, rows: int) -> Tensor:
    """-log2 p(word), summed over the words of each row: logits (N, V), words (N,), the row of each (N,) -> (rows,)."""
    nats = F.cross_entropy(logits, words, reduction="none").double()  # (N,)
    return nats.new_zeros(rows).index_add(0, row, nats) / math.log(2)


def rows_known(logits: Tensor, words: Tensor, row: Tensor, rows: int) -> Tensor:
    """True where each word of a row is the likeliest, (rows,); arguments as above."""
    wrong = (logits.argmax(-1) != words).long()  # (N,)
    return wrong.new_zeros(rows).index_add(0, row, wrong) == 0


@torch.no_grad()
def when_rounded(model: GPT, rows: Batches, seeds: int) -> dict[str, Tensor]:
    """The bits missing, by seed, with each number of the adapters rounded to so many bits. They are left whole."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept, missing = [parameter.clone() for parameter in trainable], {}
    for name, digits in ROUNDED.items():
        round_adapters(model, digits)
        missing[name], _ = recall(model, rows, seeds)
        for parameter, value in zip(trainable, kept, strict=True):
            parameter.copy_(value)
    return missing


@torch.no_grad()
def round_adapters(model: nn.Module, digits: int):
    """16 digits: to bfloat16. Fewer: to evenly spaced levels, 2^(digits - 1) - 1 on each side of zero and zero itself;
    the outermost are at a block's largest magnitude."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.bfloat16() if digits == 16 else in_steps(parameter, 2 ** (digits - 1) - 1))


def in_steps(weight: Tensor, most: int) -> Tensor:
    scaled, absmax = scale_to_unit(weight.flatten(), BLOCK)  # (n,) within ±1, (N,)
    return ((scaled * most).round() / most * absmax.repeat_interleave(BLOCK)[: len(scaled)]).view_as(weight)
