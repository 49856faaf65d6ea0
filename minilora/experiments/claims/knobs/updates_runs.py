"""One run of the studies of what an update looks like: singular vectors and ranks of W, of ΔW and of W + ΔW."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.adapters.inject import lora_layers
from minilora.adapters.starts import energy_rank
from minilora.experiments.claims.study import Setting, loss_of, losses
from minilora.experiments.claims.uses.basics import directions
from minilora.experiments.methods import BaseFolder
from minilora.linear4bit import float_linears
from minilora.text.batches import Batches
from minilora.train_settings import NonFiniteError

TOP = 10  # singular vectors of W + ΔW, those of its largest singular values
NEAR = 0.5  # the cosine from which on a vector counts as one of W's
NEARS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SIZES = (1, 2, 4, 8, 16, 32, 64)  # of the subspaces that are compared


def left(W: Tensor) -> Tensor:
    """The left singular vectors of W (out, in), the largest singular value's first: (out, min(out, in))."""
    return F.normalize(directions(W)[1], dim=0)


def right(W: Tensor, count: int) -> Tensor:
    """The first right singular vectors of W, in rows: (count, in)."""
    return F.normalize(directions(W)[2][:count], dim=1)


def shuffled(change: Tensor, seed: int) -> Tensor:
    """ΔW with its rows and columns in a random order and with random signs: its singular values, and new directions."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):  # rows, then columns
        order = torch.randperm(len(change), generator=generator).to(change.device)
        signs = torch.randint(2, (len(change), 1), generator=generator).to(change) * 2 - 1
        change = (change[order] * signs).T
    return change


class Before:
    """The linear layers of a base as they are before training; of every so many blocks one, for time."""

    def __init__(self, base: BaseFolder, stride: int):
        linears = float_linears(base.load())
        self.W = {
            name: layer.weight.detach() for name, layer in linears.items() if not int(name.split(".")[2]) % stride
        }
        self.U = {name: left(W) for name, W in self.W.items()}
        self.tenth = {name: directions(W)[0][TOP - 1].sqrt() for name, W in self.W.items()}  # singular value

    def changes(self, model: nn.Module) -> dict[str, Tensor]:
        """ΔW by name."""
        if adapters := dict(lora_layers(model)):
            return {name: adapters[name].delta_weight().detach() for name in self.W}
        linears = float_linears(model)
        return {name: linears[name].weight.detach() - W for name, W in self.W.items()}

    def cosines(self, changes: dict[str, Tensor]) -> Tensor:
        """The largest |cosine| of each of the first vectors of W + ΔW with any vector of W, (matrices, TOP)."""
        pairs = ((left(self.W[name] + change)[:, :TOP], self.U[name]) for name, change in changes.items())
        return torch.stack([(after.T @ U).abs().amax(1) for after, U in pairs])

    def intruders(self, changes: dict[str, Tensor], near: float = NEAR) -> float:
        return count(self.cosines(changes), near)

    def rank(self, changes: dict[str, Tensor]) -> float:
        """The directions that hold 90 % of ‖ΔW‖², mean of the matrices."""
        return mean([energy_rank(directions(change)[0].sqrt(), 0.9) for change in changes.values()])


before_of = lru_cache(maxsize=1)(Before)


def mean(values: list) -> float:
    return round(float(sum(values) / len(values)), 4)


def count(cosines: Tensor, near: float) -> float:
    """How many vectors of a matrix are new, mean of the matrices."""
    return mean([(cosines < near).sum().item() / len(cosines)])


@torch.no_grad()
def new_vectors(setting: Setting) -> dict[str, Any]:
    """Curve: [step, task loss, intruders], as the base has none and at each evaluation."""
    data, steps = setting.dataset(), setting.plan.steps
    if setting.tuning:
        return losses(trained(setting, data, evaluations=2))
    before, every = before_of(setting.base, setting["stride"]), max(1, steps // setting["evaluations"])
    counts = [0.0]

    def watch(model, step: int):
        if step % every == 0 or step == steps:
            counts.append(before.intruders(before.changes(model)))

    try:
        finished = trained(setting, data, watch, evaluations=setting["evaluations"])
    except NonFiniteError:  # at another arm's rate; what was counted last remains
        return {"best_validation_loss": None, "scores": {"intruders": counts[-1]}}
    changes, history = before.changes(finished.model), finished.history.validation_loss
    cosines = before.cosines(changes)
    turned = {name: shuffled(change, setting.seed) for name, change in changes.items()}
    sizes = [directions(change)[0][0].sqrt() / before.tenth[name] for name, change in changes.items()]
    return losses(finished) | {
        "curve": [[step, round(loss, 5), new] for (step, loss), new in zip(history, counts, strict=True)],
        "by_cosine": [count(cosines, near) for near in NEARS],
        "scores": {
            "intruders": count(cosines, NEAR),
            "intruders, shuffled": before.intruders(turned),
            "rank for 90 %": before.rank(changes),
            "size": mean(sizes),
            "loss at rank 1": loss_at_rank_1(setting, finished.model, data.validation),
        },
    }


def trained(setting: Setting, *arguments, **training):
    with torch.enable_grad():
        return setting.train(*arguments, **training)


def loss_at_rank_1(setting: Setting, model: nn.Module, rows: Batches) -> float:
    """Of full fine-tuning with each linear layer's ΔW cut to its first direction; of an adapter as it is."""
    if setting.arm.method == "full":
        base = float_linears(setting.base.load())
        for name, linear in float_linears(model).items():
            _, L, R = directions(linear.weight - base[name].weight)
            linear.weight.copy_(base[name].weight + L[:, :1] @ R[:1])
    return loss_of(model, rows)


@torch.no_grad()
def ranks_by_step(setting: Setting) -> dict[str, Any]:
    """ranks: [step, directions that hold 90 % of ‖ΔW‖²] after a thirtieth of the run, a tenth, a third, and all."""
    data, steps = setting.dataset(), setting.plan.steps
    if setting.tuning:
        return losses(trained(setting, data, evaluations=2))
    before, ranks = before_of(setting.base, setting["stride"]), []

    def watch(model, step: int):
        if step in (steps // 30, steps // 10, steps // 3, steps):
            ranks.append([step, before.rank(before.changes(model))])

    record = losses(trained(setting, data, watch, evaluations=3))
    possible = mean([min(W.shape) for W in before.W.values()])
    return record | {"ranks": ranks, "scores": {"rank for 90 %": ranks[-1][1], "possible": possible}}


@torch.no_grad()
def shared_directions(setting: Setting) -> dict[str, Any]:
    """Three adapters, of the arm's rank with two seeds and of rank 8 with a third, and what their subspaces share.

    φ(i) = ‖Vᵢ Wᵢᵀ‖² / i for the first i right singular vectors of two matrices, in the rows of V and W: 1 where they
    span the same space, i / in for random spaces. "A": of A, as in the paper; "ΔW": of s·BA.
    """
    data, stride = setting.dataset(), setting["stride"]
    if setting.tuning:
        return losses(trained(setting, data, evaluations=2))
    first = trained(setting, data, evaluations=1)
    one = vectors(first.model, stride)
    other = vectors(trained(replace(setting, seed=setting.seed + 100), data, evaluations=1).model, stride)
    low = replace(setting.arm, lora={**setting.arm.lora, "r": 8})
    small = vectors(trained(replace(setting, arm=low, seed=setting.seed + 200), data, evaluations=1).model, stride)
    shared = {
        f"{name}, {of}": [overlap(one[of], than[of], size) for size in SIZES if size <= len(than[of][0])]
        for name, than in (("seeds", other), ("ranks", small))
        for of in ("A", "ΔW")
    }
    chance = [mean([size / V.shape[1] for V in one["A"]]) for size in SIZES]
    scores = {
        "top, ranks": shared["ranks, A"][0],
        "top, seeds": shared["seeds, A"][0],
        "8, seeds": shared["seeds, A"][3],
    }
    return losses(first) | {"shared": shared, "chance": chance, "scores": scores}


def vectors(model: nn.Module, stride: int) -> dict[str, list[Tensor]]:
    """The right singular vectors of A and of ΔW, (r, in) for each layer."""
    layers = [layer for name, layer in lora_layers(model) if not int(name.split(".")[2]) % stride]
    return {
        "A": [right(layer.lora_A, layer.r) for layer in layers],
        "ΔW": [right(layer.delta_weight(), layer.r) for layer in layers],
    }


def overlap(one: list[Tensor], other: list[Tensor], size: int) -> float:
    return mean([(V[:size] @ W[:size].T).square().sum().item() / size for V, W in zip(one, other, strict=True)])
