"""Curves of the loss over the learning rate: how one is made, and what is read off it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from minilora.experiments.claims.claim import Record
from minilora.experiments.claims.study import Setting
from minilora.train_settings import History, NonFiniteError

STEP = 2  # from one rate of a curve to the next
Curve = Sequence[tuple[float, float | None]]  # rate and last validation loss, None where the run diverged


def bracketed(loss_at, first: float, count: int = 4) -> list[tuple[float, float | None]]:
    """The curve at `count` rates from `first` up, and beyond its ends until the lowest loss has neighbours that are
    higher. Where every run diverges it goes down until one does not."""
    rates = [first * STEP**place for place in range(count)]
    losses = {rate: loss_at(rate) for rate in rates}
    while True:
        finite = [rate for rate in losses if losses[rate] is not None]
        best = min(finite, key=lambda rate: losses[rate]) if finite else min(losses)
        if min(losses) < best < max(losses):
            return sorted(losses.items())
        further = best / STEP if best == min(losses) else best * STEP
        losses[further] = loss_at(further)


def curve(setting: Setting) -> dict:
    """One seed's curve, the best of its rates, and along the run at the lowest point the validation losses.

    The arm has no rate that was chosen before: it names its method, and where its curve begins.
    """
    histories = {}

    def loss_at(rate: float) -> float | None:
        try:
            histories[rate] = trained(setting, rate)
        except NonFiniteError:
            return None
        return last(histories[rate])

    found = bracketed(loss_at, setting["first"])
    return {
        **along(min(histories.values(), key=last)),
        "scores": {"best rate, thousandths": 1000 * best_rate(found)},
        "curve": [[float(f"{rate:.6g}"), loss and round(loss, 5)] for rate, loss in found],
        "alpha": setting.arm.lora.get("lora_alpha", 16),
    }


def at_one_rate(setting: Setting) -> dict:
    return along(trained(setting, setting["rate"])) | {"alpha": setting.arm.lora["lora_alpha"]}


def trained(setting: Setting, rate: float) -> History:
    """A run of the method that the arm's settings name, with their fields of TrainConfig."""
    setting = replace(setting, arm=replace(setting.arm, method=setting["method"]), rate=rate)
    return setting.train(setting.dataset(), evaluations=setting["evaluations"], **setting["training"]).history


def along(history: History) -> dict:
    losses = [[step, round(loss, 5)] for step, loss in history.validation_loss]
    return {"best_validation_loss": last(history), "validation_loss": losses}


def last(history: History) -> float:
    return history.validation_loss[-1][1]


def best_rate(found: Curve) -> float:
    """The vertex of the parabola through the lowest point and its two neighbours, in the logarithms of both.

    So the rate is not one of the grid's: it lies up to half a step beside the lowest point. A run that diverged counts
    as the highest loss of the curve.
    """
    highest = max(loss for _, loss in found if loss is not None)
    logs = [math.log(highest if loss is None else loss) for _, loss in found]
    at = logs.index(min(logs))
    left, lowest, right = logs[at - 1 : at + 2]
    return found[at][0] * STEP ** ((left - right) / (left - 2 * lowest + right) / 2)


def best(record: Record) -> float:
    return best_rate(record["curve"])


def share_needed(record: Record, level: float) -> float:
    """The part of a run, in percent, after which its validation loss first lies at `level`: 100 if it never does.

    Between two evaluations the loss goes on a straight line over its logarithm.
    """
    losses = record["validation_loss"]
    for (step, before), (next_step, after) in pairwise(losses):
        if after <= level:
            part = math.log(before / level) / math.log(before / after) if before > level else 0
            return 100 * (step + part * (next_step - step)) / losses[-1][0]
    return 100
