"""A claim about LoRA: who says it, the arms that are trained, and the rule that decides, written before the runs.

The words of a rule and the code that decides are one object, so neither can be changed alone. A verdict is computed
from the stored runs whenever it is asked for; it is never stored.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

# Student's t at 95 %, by degrees of freedom: mean ± t·s/√n holds the true mean in nine of ten experiments.
T = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}

Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by arm and by seed, the record of a run


@dataclass(frozen=True)
class Finding:
    """What the runs say. number lies in the middle of low and high, the ends of its 90 % interval over seeds."""

    verdict: str  # "holds", "fails" or "open"
    number: float
    low: float
    high: float
    seeds: int

    def text(self) -> str:
        """The number that decides; where nothing is decided, also the size of what these seeds can tell apart."""
        said = f"{self.number:+.1f} % ({self.low:+.1f} to {self.high:+.1f})"
        return said if self.verdict != "open" else f"{said}; these seeds tell ±{self.high - self.number:.1f} apart"


class Rule(Protocol):
    """What is computed of the runs, what follows from it in words, and the same in code."""

    @property
    def statistic(self) -> str: ...

    @property
    def words(self) -> str: ...

    def decide(self, runs: Runs) -> Finding: ...


@dataclass(frozen=True)
class Difference:
    """By how many percent of `than`'s loss the loss of `arm` lies below it, paired by seed.

    gain: the claim says that it lies lower by `least` percent or more. Without, that it lies higher by no more than
    that. `least` is what seeds and rounding alone move a loss by: less is no reason to choose.
    """

    arm: str
    than: str
    gain: bool = True
    least: float = 5.0
    measure: str = "best_validation_loss"

    @property
    def bar(self) -> float:
        return self.least if self.gain else -self.least

    @property
    def statistic(self) -> str:
        return f"{self.measure} of {self.arm} below that of {self.than}, percent of the latter, paired by seed"

    @property
    def words(self) -> str:
        return f"holds if the 90 % interval lies above {self.bar:g} %, fails if it lies below, and is open in between"

    def decide(self, runs: Runs) -> Finding:
        pairs = sorted(runs[self.arm].keys() & runs[self.than].keys())
        losses = [(runs[self.arm][seed][self.measure], runs[self.than][seed][self.measure]) for seed in pairs]
        low, number, high = interval([100 * (than - arm) / than for arm, than in losses])
        verdict = "holds" if low > self.bar else "fails" if high < self.bar else "open"
        return Finding(verdict, number, low, high, len(pairs))


def better(arm: str, than: str) -> Difference:
    return Difference(arm, than)


def no_worse(arm: str, than: str) -> Difference:
    return Difference(arm, than, gain=False)


def interval(values: list[float]) -> tuple[float, float, float]:
    """(low, mean, high), the ends of the 90 % interval of the mean. ValueError for less than two values or too many."""
    if len(values) - 1 not in T:
        raise ValueError(f"an interval needs from 2 to {len(T) + 1} seeds, and there are {len(values)}")
    mean, half = statistics.mean(values), T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean, mean + half


@dataclass(frozen=True)
class Arm:
    """One of the things compared: a method, and the fields of its LoRAConfig that are not the default."""

    method: str
    lora: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How a claim is run at one scale."""

    data: str
    steps: int
    seeds: int
    minutes: int  # on two cores


@dataclass(frozen=True)
class Claim:
    name: str
    sentence: str  # as people say it
    source: str  # who says it, and where
    arms: dict[str, Arm]
    rule: Rule
    plans: dict[str, Plan]  # by scale: "tiny" is the shipped base, "smollm2" the real model
    objection: str  # the strongest one to this experiment
