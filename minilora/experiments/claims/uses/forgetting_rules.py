"""The rules on forgetting: what a run has forgotten by the time it reaches a task loss.

Along a run the task loss falls and the loss on old text rises. What is forgotten at a task loss is read off that curve
(`price`), so that no method is called gentle because it has learned less.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

from minilora.experiments.claims.claim import Record, Rule

LEAST = 0.05  # nats: where neither of two has forgotten as much, the difference is a part of this


def points(record: Record) -> list[tuple[float, float]]:
    """(task loss, forgotten) along a run. Forgotten: the loss on old text above that of the base."""
    return [(task, old - record["curve"][0][2]) for _, task, old in record["curve"]]


def reached(record: Record) -> float:
    return min(task for task, _ in points(record))


def price(record: Record, level: float) -> float:
    """The least that is forgotten where a run is at the task loss `level` or below.

    Between two evaluations, what is forgotten goes on a straight line over the logarithm of the task loss.
    """
    curve = points(record)
    paid = [forgotten for task, forgotten in curve if task <= level]
    for (task, forgotten), (next_task, then) in pairwise(curve):
        if min(task, next_task) < level < max(task, next_task):
            share = math.log(task / level) / math.log(task / next_task)
            paid.append(forgotten + share * (then - forgotten))
    return min(paid)


def less(mine: float, other: float) -> float:
    """By how many percent of the larger of two forgettings mine is the smaller; negative where it is the larger."""
    return 100 * (other - mine) / max(mine, other, LEAST)


Names = tuple[str, ...]


def at_equal_loss(runs: Mapping[str, Record], arms: Names, than: Names) -> float:
    """At the worse of the two best task losses; of several arms on one side, the one that forgets least there."""
    level = max(min(reached(runs[arm]) for arm in side) for side in (arms, than))
    mine, other = (min(price(runs[arm], level) for arm in side if reached(runs[arm]) <= level) for side in (arms, than))
    return less(mine, other)


def forgets_less(arms: str | Names, than: str | Names, bar: float = 20) -> Rule:
    arms, than = ((side,) if isinstance(side, str) else side for side in (arms, than))
    words = f"how much less {' or '.join(arms)} forgets than {' or '.join(than)}, percent of the larger, at the lowest "
    words += "task loss that both sides reach along their runs, paired by seed"
    if len(arms) + len(than) > 2:
        words += "; of each side the arm that forgets least there"
    return Rule((*arms, *than), words, lambda runs: at_equal_loss(runs, arms, than), bar)


def ends_less(arm: str, than: str, bar: float = 20) -> Rule:
    """The base is measured beside them."""
    words = f"how much less {arm} has forgotten than {than} after the last step, percent of the larger, paired by seed"
    return Rule((arm, than, "base"), words, lambda runs: less(points(runs[arm])[-1][1], points(runs[than])[-1][1]), bar)


def one_curve(arms: Names, than: Names, bar: float = 20) -> Rule:
    words = f"the difference between what {' or '.join(arms)} and {' or '.join(than)} forget, percent of the larger, "
    words += "at the lowest task loss that both sides reach, each side with its arm that forgets least there"
    return Rule((*arms, *than), words, lambda runs: abs(at_equal_loss(runs, arms, than)), bar, above=False)


def scaling_back(arm: str, scale: str, kept: float, given_back: float) -> Rule:
    """The lesser of two margins decides, so that both have to be above zero."""

    def margin(runs: Mapping[str, Record]) -> float:
        (start, _), *_, (end, forgotten) = points(runs[arm])
        task, old = runs[arm]["scaled"][scale]
        then = old - runs[arm]["curve"][0][2]
        return min(100 * (start - task) / (start - end) - kept, less(then, forgotten) - given_back)

    words = f"of {arm} with its update times {scale}, the smaller of two margins: percent of the gain in task loss "
    words += f"kept, minus {kept:g}, and percent of what was forgotten given back, minus {given_back:g}"
    return Rule((arm,), words, margin, 0, "points")


def scaling_or_stopping(arm: str, scale: str, bar: float = 20) -> Rule:
    def number(runs: Mapping[str, Record]) -> float:
        task, old = runs[arm]["scaled"][scale]
        return less(old - runs[arm]["curve"][0][2], price(runs[arm], max(task, reached(runs[arm]))))

    words = f"how much less {arm} with its update times {scale} has forgotten than its run had at the same task loss, "
    return Rule((arm,), words + "percent of the larger", number, bar)


def halved_answers(arm: str, bar: float = -10) -> Rule:
    def number(runs: Mapping[str, Record]) -> float:
        scores = runs[arm]["scores"]
        return 100 * (scores["task, halved"] - scores["task"])

    return Rule(
        (arm,), f"right answers of {arm} with half of its update, above those with the whole", number, bar, "points"
    )


def heart_before_reading(arm: str, bar: float = 20) -> Rule:
    def number(runs: Mapping[str, Record]) -> float:
        heart, notes = (
            kinds[-1] - kinds[0]
            for kinds in (runs[arm]["kinds"][kind] for kind in ("answer by heart", "answer from notes"))
        )
        return less(notes, heart)

    words = f"how much less the loss of {arm} rises on answers read from notes than on answers known by heart, "
    words += "percent of the larger rise"
    return Rule((arm,), words, number, bar)
