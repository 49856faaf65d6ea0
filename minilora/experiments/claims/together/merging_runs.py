"""One run of the studies of merging: adapters trained apart and put together in every way, or one trained on all."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minilora.adapters.adapter import Adapter, extract_adapter
from minilora.adapters.combine import concatenate, drop, elect, trim, truncate
from minilora.experiments.claims.study import Arm, Setting
from minilora.experiments.claims.together.merging_bench import (
    Bench,
    Changes,
    change_of,
    likeness,
    mean,
    merges_of,
    skills_of,
)
from minilora.text.datasets import Dataset

METHODS = ("linear", "svd", "ties", "dare")  # with one weight for all adapters, which is tuned
EVERY_WAY = {"methods": ("sum", *METHODS), "sizes": None, "times": 1}  # all pairs and triples and the whole
WEIGHTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.1, 1.4, 1.7, 2.1, 2.6, 3.2, 4.0)
TRIM, DROP = 0.2, 0.1  # the shares of the entries that the papers keep


def merged(method: str, adapters: Sequence[Adapter], seed: int) -> Changes:
    """The ΔW of adapters put together with weights of 1. A weight for all of them is a factor of the whole."""
    ones = [1.0] * len(adapters)
    if method in ("sum", "linear"):
        return change_of(concatenate(adapters, ones))
    if method == "svd":
        return change_of(truncate(adapters, ones, adapters[0].config.r)[0])
    generator = torch.Generator().manual_seed(seed)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ties": lambda deltas: elect(trim(deltas, TRIM)),
        "dare": lambda deltas: drop(deltas, DROP, generator).sum(0),
    }
    parts = [change_of(adapter) for adapter in adapters]
    return {name: ways[method](torch.stack([part[name] for part in parts])) for name in parts[0]}


def best_weight(loss_at: Callable[[float], float]) -> tuple[float, float]:
    """The weight of WEIGHTS both of whose neighbours are worse, found by walking downhill from 0.6, and its loss."""
    found: dict[int, float] = {}
    place = WEIGHTS.index(0.6)
    while True:
        near = [at for at in (place, place - 1, place + 1) if 0 <= at < len(WEIGHTS)]
        found |= {at: loss_at(WEIGHTS[at]) for at in near if at not in found}
        best = min(near, key=lambda at: found[at])
        if best == place:
            return WEIGHTS[place], found[place]
        place = best


def trained(setting: Setting, bench: Bench, merge: Sequence[str], steps: int, seed: int) -> tuple[Adapter, float]:
    """An adapter trained on the tasks of `merge`, as many examples of each, and its loss on their tuning rows."""
    skills = [bench.skills[name] for name in merge]
    most = max(len(skill.task.train) for skill in skills)  # the smaller tasks' rows are repeated
    shown = [row for skill in skills for row in itertools.islice(itertools.cycle(skill.task.train), most)]
    train, tuning = bench.rows(shown), bench.rows([row for skill in skills for row in skill.tuning])
    data = Dataset(" and ".join(merge), train, tuning, None, None, [], training=dict(setting["training"]))
    rate = setting.rate or mean(setting["rates"][name] for name in merge)
    run = replace(setting, arm=Arm("lora"), rate=rate, seed=seed).train(data, steps=steps, evaluations=1)
    return extract_adapter(run.model), run.history.validation_loss[-1][1]


def tuned_weights(
    bench: Bench, merge: Sequence[str], adapters: Sequence[Adapter]
) -> tuple[Changes, list[float], float]:
    """The sum with a weight for each adapter, its weights and its loss: downhill in one after the other, twice."""
    parts, weights, loss = [change_of(adapter) for adapter in adapters], [0.4] * len(adapters), 0.0

    def weighted() -> Changes:
        changes = ([w * part[name] for w, part in zip(weights, parts, strict=True)] for name in parts[0])
        return {name: torch.stack(each).sum(0) for name, each in zip(parts[0], changes, strict=True)}

    def loss_with(place: int, weight: float) -> float:
        weights[place] = weight
        return bench.tuning_loss(merge, weighted(), 1.0)

    for place in [*range(len(adapters))] * 2:
        weights[place], loss = best_weight(partial(loss_with, place))
    return weighted(), weights, loss


def apart(setting: Setting) -> dict[str, Any]:
    """An adapter for each task, each from an A of its own; merges of them in many ways, measured on their tasks."""
    bench = Bench(setting, skills_of(setting))
    names, steps, methods = list(bench.skills), setting.plan.steps * setting["times"], setting["methods"]
    made = {name: trained(setting, bench, [name], steps, setting.seed + 100 * n) for n, name in enumerate(names, 1)}
    record: dict[str, Any] = {"tuning_loss": mean(loss for _, loss in made.values())}
    if setting.tuning:
        return record
    adapters = {name: adapter for name, (adapter, _) in made.items()}
    record["base"] = bench.report(names, {})
    record["alone"] = {name: bench.report([name], change_of(each))[name] for name, each in adapters.items()}
    record["merges"] = {method: {} for method in methods}
    for merge in merges_of(names, setting["sizes"]):
        chosen = [adapters[name] for name in merge]
        for method in methods:
            if method == "weights":
                changes, weights, loss = tuned_weights(bench, merge, chosen)
                found: dict[str, Any] = {"weights": weights}
                weight = 1.0
            else:
                changes = merged(method, chosen, setting.seed)
                at = partial(bench.tuning_loss, merge, changes)
                weight, loss = (1.0, at(1.0)) if method == "sum" else best_weight(at)
                found = {"weight": weight}
            tasks = bench.report(merge, changes, weight)
            record["merges"][method][" + ".join(merge)] = found | {"tuning_loss": round(loss, 4), "tasks": tasks}
    if "dare" in methods:
        dropped = {name: merged("dare", [each], setting.seed) for name, each in adapters.items()}
        record["dropped"] = {name: bench.report([name], change)[name] for name, change in dropped.items()}
    return record | ({"likeness": likeness(adapters, bench)} if setting["sizes"] is None and len(names) > 2 else {})


def union(setting: Setting) -> dict[str, Any]:
    """One adapter for each merge, trained on all of its tasks; a run that chooses a rate takes all of the tasks."""
    bench = Bench(setting, skills_of(setting))
    names = list(bench.skills)
    sizes = [len(names)] if setting.tuning else sorted({2, min(setting["largest"], len(names)), len(names)})
    record: dict[str, Any] = {"merges": {"union": {}}}
    for merge in merges_of(names, sizes):
        steps = setting.plan.steps * (len(merge) if setting["as long"] else 1)
        adapter, record["tuning_loss"] = trained(setting, bench, merge, steps, setting.seed)
        if not setting.tuning:
            tasks = bench.report(merge, change_of(adapter))
            record["merges"]["union"][" + ".join(merge)] = {"tuning_loss": record["tuning_loss"], "tasks": tasks}
    return record


def measure(setting: Setting) -> dict[str, Any]:
    return (union if setting["one for all"] else apart)(setting)
