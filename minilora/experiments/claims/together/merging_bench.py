"""The bench that merged adapters are measured on, and what of two adapters may predict that they disturb each other."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minilora.adapters.adapter import Adapter
from minilora.experiments.claims.study import Setting, dataset
from minilora.inference.evaluate import score_task
from minilora.linear4bit import float_linears
from minilora.model import GPT
from minilora.text.batches import Batches, examples
from minilora.text.commands import user
from minilora.text.everyday import OTHERS
from minilora.text.instruction_sets import shipped_file
from minilora.text.rewordings import rewording
from minilora.text.tasks import Example, Task
from minilora.train import evaluate_loss
from minilora.train_settings import IGNORE

Changes = dict[str, Tensor]  # ΔW (out, in) by layer


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
