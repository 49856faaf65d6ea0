"""A claim about LoRA: who says it, the studies that test it, and the rule that decides, written before the runs.

The words of a rule and the code that decides are one object, so neither can be changed alone. A verdict is computed
from the stored runs whenever it is asked for; it is never stored.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minilora.experiments.claims.study import Draw, Study

# Student's t at 95 %, by degrees of freedom: mean ± t·s/√n holds the true mean in nine of ten experiments.
T = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}

Record = Mapping[str, Any]  # of one run
Runs = Mapping[str, Mapping[int, Record]]  # by arm and by seed


@dataclass(frozen=True)
class Finding:
    """What the runs say. number lies in the middle of low and high, the ends of its 90 % interval over seeds."""

    verdict: str  # "holds", "fails" or "open"
    number: float
    low: float
    high: float
    seeds: int
    unit: str = "%"
    difference: bool = True  # of arms: written with its sign

    def text(self) -> str:
        """The number that decides; where nothing is decided, also the size of what these seeds can tell apart."""
        number, low, high = (digits(value, self.difference) for value in (self.number, self.low, self.high))
        if self.seeds == 1:
            return f"{number} {self.unit}, exact"
        said = f"{number} {self.unit} ({low} to {high})"
        apart = digits(self.high - self.number, signed=False)
        return said if self.verdict != "open" else f"{said}; these seeds tell ±{apart} apart"


def digits(value: float, signed: bool) -> str:
    """One decimal, and two for what is below one. What rounds to nothing has no minus."""
    places = 1 if abs(value) >= 1 or value == 0 else 2
    value = round(value, places) + 0.0  # -0.0 + 0.0 is 0.0
    return f"{value:+.{places}f}" if signed else f"{value:.{places}f}"


@dataclass(frozen=True)
class Rule:
    """A number of each seed, computed from that seed's runs, and the bar that its 90 % interval is held against."""

    arms: tuple[str, ...]
    statistic: str  # the number, in words
    number: Callable[[Mapping[str, Record]], float]  # one seed's records, by arm
    bar: float
    unit: str = "%"
    above: bool = True  # whether the claim says that the number lies above the bar, or below
    exact: bool = False  # a count, of which every seed would give the same: one run decides
    signed: bool = True  # of several arms: whether the number is a difference, and not a ratio

    @property
    def words(self) -> str:
        yes, no = ("above", "below") if self.above else ("below", "above")
        bar = f"{self.bar:g} {self.unit}"
        if self.exact:
            return f"an exact number: holds if it lies {yes} {bar}, fails if it lies {no}"
        return f"holds if the 90 % interval lies {yes} {bar}, fails if it lies {no}, and is open in between"

    def seeds(self, runs: Runs) -> list[int]:
        """Those of which every arm has a run."""
        return sorted(set.intersection(*(set(runs[arm]) for arm in self.arms)))

    def decide(self, runs: Runs) -> Finding:
        seeds = self.seeds(runs)
        numbers = [self.number({arm: runs[arm][seed] for arm in self.arms}) for seed in seeds]
        low, number, high = (numbers[0],) * 3 if self.exact else interval(numbers)
        above, below = low > self.bar, high < self.bar
        holds, fails = (above, below) if self.above else (below, above)
        verdict = "holds" if holds else "fails" if fails else "open"
        difference = self.signed and len(self.arms) > 1 and not self.exact and self.unit != "times"
        return Finding(verdict, number, low, high, len(seeds), self.unit, difference)


def lower_loss(arm: str, than: str, bar: float, measure: str = "best_validation_loss") -> Rule:
    """By how many percent of `than`'s loss the loss of `arm` lies below it."""

    def number(runs: Mapping[str, Record]) -> float:
        return 100 * (runs[than][measure] - runs[arm][measure]) / runs[than][measure]

    words = f"{measure} of {arm} below that of {than}, percent of the latter, paired by seed"
    return Rule((arm, than), words, number, bar)


# Seeds and rounding alone move a loss by 5 %: less is no reason to choose.


def better(arm: str, than: str, least: float = 5) -> Rule:
    return lower_loss(arm, than, least)


def no_worse(arm: str, than: str, most: float = 5) -> Rule:
    return lower_loss(arm, than, -most)


def score(arm: str, name: str, bar: float, above: bool = True) -> Rule:
    """The percentage of right answers of one kind, `name` in the record's scores."""
    words = f"right answers of {arm}, {name}"
    return Rule((arm,), words, lambda runs: 100 * runs[arm]["scores"][name], bar, "%", above)


def more_right(arm: str, than: str, name: str, bar: float, above: bool = True) -> Rule:
    """By how many points, hundredths of all answers, `arm` is right more often than `than`."""
    words = f"right answers of {arm}, {name}, above those of {than}, paired by seed"

    def number(runs: Mapping[str, Record]) -> float:
        return 100 * (runs[arm]["scores"][name] - runs[than]["scores"][name])

    return Rule((arm, than), words, number, bar, "points", above)


def quantity(
    arm: str, name: str, words: str, bar: float, unit: str = "%", above: bool = True, exact: bool = False
) -> Rule:
    """The number `name` in the scores of `arm`, as it was measured. words: what it is."""
    return Rule((arm,), words, lambda runs: runs[arm]["scores"][name], bar, unit, above, exact)


def interval(values: list[float]) -> tuple[float, float, float]:
    """(low, mean, high), the ends of the 90 % interval of the mean. ValueError for less than two values or too many."""
    if len(values) - 1 not in T:
        raise ValueError(f"an interval needs from 2 to {len(T) + 1} seeds, and there are {len(values)}")
    mean, half = statistics.mean(values), T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean, mean + half


@dataclass(frozen=True)
class Claim:
    name: str
    sentence: str  # as people say it
    source: str  # who says it, and where
    rule: Rule
    studies: tuple[Study, ...]  # each has the rule's arms
    objection: str  # the strongest one to these studies
    figure: Draw | None = None  # of the rule's arms; without it the study's is drawn


def summary(findings: list[Finding]) -> str:
    """One word for all the studies of a claim: "depends" where one holds and another fails, whatever the others say.

    Else "open" where any is open: one that holds and one that is open are "open" together, not "holds".
    """
    verdicts = [found.verdict for found in findings]
    if "holds" in verdicts and "fails" in verdicts:
        return "depends"
    if "open" in verdicts:
        return "open"
    return verdicts[0] if verdicts else "not run"
