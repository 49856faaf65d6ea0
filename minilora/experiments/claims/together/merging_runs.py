"""One run of the studies of merging: adapters trained apart and put together in every way, or one trained on all."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minilora.adapters.adapter import Adapter, extract_adapter
from minilora.adapters.combine import concatenate, drop, elect, trim, truncate
from minilora.experiments.claims.study import Arm, Setting, dataset
from minilora.inference.evaluate import score_task
from minilora.linear4bit import float_linears
from minilora.model import GPT
from minilora.text.batches import Batches, examples
from minilora.text.commands import user
from minilora.text.datasets import Dataset
from minilora.text.everyday import OTHERS
from minilora.text.instruction_sets import shipped_file
from minilora.text.rewordings import rewording
from minilora.text.tasks import Example, Task
from minilora.train import evaluate_loss
from minilora.train_settings import IGNORE

Changes = dict[str, Tensor]  # ΔW (out, in) by layer
METHODS = ("linear", "svd", "ties", "dare")  # with one weight for all adapters, which is tuned
WEIGHTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.1, 1.4, 1.7, 2.1, 2.6, 3.2, 4.0)
TRIM, DROP = 0.2, 0.1  # the shares of the entries that the papers keep


@dataclass(frozen=True)
class Skill:
    """A task, the held-out rows that choose weights and rates, those that are reported, and the questions asked."""

    task: Task
    tuning: list[Example]
    reported: list[Example]
    asked: Task


def skills_of(setting: Setting) -> dict[str, Skill]:
    """The plan's tasks. Of the rows held out, the first "tuned on" choose, and the others are reported."""
    skills, aside = {}, setting["tuned on"]
    for name in setting["tasks"]:
        if setting.plan.data == "rewordings":
            task, more = rewording(name, 1000, aside + setting["asked"]), []
        else:
            shipped = dataset(str(shipped_file(name)), setting.base).task
            assert shipped
            # A voice is heard in the answer to any question, and 16 are held out.
            task, more = shipped, [Example(user(each), "") for each in OTHERS] if name == "pirate" else []
        reported = task.validation[aside:]
        asked = replace(task, validation=[*reported, *more][: setting["asked"]])
        skills[name] = Skill(task, task.validation[:aside], reported, asked)
    return skills


def merges_of(names: Sequence[str], sizes: Sequence[int] | None = None) -> list[tuple[str, ...]]:
    """All pairs, all triples, and all together; or those of the sizes that are wanted."""
    wanted = sizes or sorted({2, min(3, len(names)), len(names)})
    return [merge for size in wanted for merge in itertools.combinations(names, size)]


class Bench:
    """The base, whose weights are changed and put back, and what is measured on it."""

    def __init__(self, setting: Setting, skills: Mapping[str, Skill]):
        self.setting, self.skills, self.tokenizer = setting, skills, setting.base.tokenizer
        self.model: GPT = setting.base.load().eval()
        self.linears = float_linears(self.model)

    def rows(self, found: Sequence[Example]) -> Batches:
        return examples([(each.prompt, each.completion) for each in found], self.tokenizer, 256)

    @contextmanager
    def changed(self, changes: Changes, weight: float = 1) -> Iterator[None]:
        """The base with W + weight·ΔW in the place of every W."""
        before = {name: self.linears[name].weight.data for name in changes}
        try:
            for name, change in changes.items():
                self.linears[name].weight.data = before[name] + weight * change
            yield
        finally:
            for name, weights in before.items():
                self.linears[name].weight.data = weights

    def loss(self, found: Sequence[Example]) -> float:
        return evaluate_loss(self.model, self.rows(found), 40, "float32")

    def tuning_loss(self, merge: Sequence[str], changes: Changes, weight: float) -> float:
        """Nats per token, mean over the tasks."""
        with self.changed(changes, weight):
            return sum(self.loss(self.skills[name].tuning) for name in merge) / len(merge)

    def report(self, merge: Sequence[str], changes: Changes, weight: float = 1) -> dict[str, list[float]]:
        """By task the loss and the share of right answers."""
        with self.changed(changes, weight):
            return {name: [round(value, 4) for value in self.measured(self.skills[name])] for name in merge}

    def measured(self, skill: Skill) -> tuple[float, float]:
        return self.loss(skill.reported), score_task(self.model, self.tokenizer, skill.asked).score

    def moments(self, name: str, changes: Changes) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each layer's inputs x (in,) on a task, its adapter in place: E[x xᵀ] and the covariance, both (in, in)."""
        rows, found, device = self.rows(self.skills[name].tuning), {}, self.setting.base.device
        real = ((rows.labels != IGNORE).flip(1).cumsum(1).flip(1) > 0).to(device)  # up to the end token: no padding

        def look_at(layer: str) -> Callable:
            def look(module, inputs):
                x = inputs[0][real].double()  # (N, in)
                found[layer] = x.T @ x / len(x), torch.cov(x.T, correction=0)

            return look

        hooks = [self.linears[layer].register_forward_pre_hook(look_at(layer)) for layer in changes]
        with self.changed(changes), torch.no_grad():
            self.model(rows.input_ids.to(device))
        for hook in hooks:
            hook.remove()
        return found


def change_of(adapter: Adapter) -> Changes:
    return {name: adapter.scaling(name) * adapter.B[name] @ A for name, A in adapter.A.items()}


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


def likeness(adapters: Mapping[str, Adapter], bench: Bench) -> dict[str, dict[str, float]]:
    """Of every pair of adapters what may predict that they disturb each other, a mean over layers:

    subspaces  ½ (‖U_iᵀ U_j‖² + ‖V_iᵀ V_j‖²) / r, the singular vectors of ΔW: 0 where they are orthogonal, 1 the same
    inputs     ⟨C_i, C_j⟩ / (‖C_i‖ ‖C_j‖), the covariances of what the layer is given on either task
    outputs    ‖ΔW_j x‖ / ‖ΔW_i x‖ on the inputs x of task i, and the same on those of task j: the mean of the two
    cosine     ⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖)
    """
    changes = {name: {k: w.double() for k, w in change_of(adapter).items()} for name, adapter in adapters.items()}
    moments = {name: bench.moments(name, change_of(adapter)) for name, adapter in adapters.items()}
    layers = list(next(iter(changes.values())))

    def bases(name: str, layer: str) -> tuple[Tensor, Tensor]:
        parts = adapters[name].B[layer], adapters[name].A[layer].T
        return tuple(torch.linalg.qr(part.double())[0] for part in parts)  # type: ignore[return-value]

    def alike(i: str, j: str, layer: str) -> dict[str, float]:
        (Ui, Vi), (Uj, Vj), (Di, Dj) = bases(i, layer), bases(j, layer), (changes[i][layer], changes[j][layer])
        (Mi, Ci), (Mj, Cj) = moments[i][layer], moments[j][layer]

        def size(delta: Tensor, moment: Tensor) -> Tensor:  # E‖ΔW x‖²
            return (delta @ moment * delta).sum()

        ratios = size(Dj, Mi) / size(Di, Mi), size(Di, Mj) / size(Dj, Mj)
        found = {
            "subspaces": ((Ui.T @ Uj).square().sum() + (Vi.T @ Vj).square().sum()) / (2 * Ui.shape[1]),
            "inputs": (Ci * Cj).sum() / (Ci.norm() * Cj.norm()),
            "outputs": sum(ratio.sqrt() for ratio in ratios) / 2,
            "cosine": (Di * Dj).sum() / (Di.norm() * Dj.norm()),
        }
        return {name: float(value) for name, value in found.items()}

    result = {}
    for i, j in itertools.combinations(adapters, 2):
        by_layer = [alike(i, j, layer) for layer in layers]
        result[f"{i} + {j}"] = {name: round(mean(each[name] for each in by_layer), 5) for name in by_layer[0]}
    return result


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


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


def apart(setting: Setting) -> dict[str, Any]:
    """An adapter for each task, each from an A of its own; every merge of them in every way, measured on its tasks."""
    bench = Bench(setting, skills_of(setting))
    names, steps = list(bench.skills), setting.plan.steps
    made = {name: trained(setting, bench, [name], steps, setting.seed + 100 * n) for n, name in enumerate(names, 1)}
    record: dict[str, Any] = {"tuning_loss": mean(loss for _, loss in made.values())}
    if setting.tuning:
        return record
    adapters = {name: adapter for name, (adapter, _) in made.items()}
    record["base"] = bench.report(names, {})
    record["alone"] = {name: bench.report([name], change_of(each))[name] for name, each in adapters.items()}
    record["dropped"] = {
        name: bench.report([name], merged("dare", [each], setting.seed))[name] for name, each in adapters.items()
    }
    record["merges"] = {method: {} for method in ("sum", *METHODS)}
    for merge in merges_of(names):
        for method in ("sum", *METHODS):
            changes = merged(method, [adapters[name] for name in merge], setting.seed)
            weight, loss = 1.0, bench.tuning_loss(merge, changes, 1.0)
            if method != "sum":
                weight, loss = best_weight(partial(bench.tuning_loss, merge, changes))
            tasks = bench.report(merge, changes, weight)
            record["merges"][method][" + ".join(merge)] = {
                "weight": weight,
                "tuning_loss": round(loss, 4),
                "tasks": tasks,
            }
    return record | ({"likeness": likeness(adapters, bench)} if len(names) > 2 else {})


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
