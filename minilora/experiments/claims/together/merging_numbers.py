"""What the runs of merging say, in numbers: what is left of a task, and how well a statistic predicts it."""

from collections.abc import Callable, Mapping
from typing import Any

from minilora.experiments.claims.claim import Record
from minilora.experiments.claims.knobs.orders import rank_correlation
from minilora.experiments.claims.together.merging_bench import mean
from minilora.experiments.claims.together.merging_runs import METHODS


def shares(record: Record, merges: Mapping[str, Any]) -> dict[str, list[float]]:
    """By merge, of each task's score with its adapter alone (in `record`) the percentage that is left."""
    alone = {name: score for name, (_, score) in record["alone"].items()}
    return {
        merge: [100 * score / alone[name] for name, (_, score) in found["tasks"].items()]
        for merge, found in merges.items()
    }


def kept(record: Record, method: str, count: int | None = None, of: Callable = mean) -> float:
    """The mean over the merges of `count` adapters, or of any number. of: of the tasks of one merge."""
    found = shares(record, record["merges"][method])
    return mean(of(left) for left in found.values() if count in (None, len(left)))


def best_merges(record: Record) -> dict[str, Any]:
    """Of each merge the method whose loss on the rows that chose the weights is lowest."""
    merges = record["merges"]
    return {
        merge: min((merges[method][merge] for method in METHODS), key=lambda found: found["tuning_loss"])
        for merge in merges["linear"]
    }


def merged_above_union(runs: Mapping[str, Record]) -> float:
    """Points, on the merges for which there is a union."""
    record, unions = runs["apart"], runs["union"]["merges"]["union"]
    best = {merge: found for merge, found in best_merges(record).items() if merge in unions}
    return mean(map(mean, shares(record, best).values())) - mean(map(mean, shares(record, unions).values()))


def gains_left(record: Record, method: str) -> dict[str, float]:
    """By pair, of what its adapter alone gains in loss over the base the share that is left: the mean of both tasks."""
    base, alone = record["base"], record["alone"]
    return {
        pair: mean((base[name][0] - loss) / (base[name][0] - alone[name][0]) for name, (loss, _) in tasks.items())
        for pair, found in record["merges"][method].items()
        if len(tasks := found["tasks"]) == 2
    }


def predicts(record: Record, statistic: str, method: str = "sum") -> float:
    """Spearman's correlation over the pairs of adapters between the statistic and what they cost each other."""
    left = gains_left(record, method)
    order = sorted(left, key=lambda pair: record["likeness"][pair][statistic])
    return rank_correlation(order, {pair: -share for pair, share in left.items()})


def kept_alone(record: Record) -> float:
    """Percent of the scores that single adapters keep when DARE drops nine of ten entries."""
    return mean(100 * record["dropped"][name][1] / score for name, (_, score) in record["alone"].items())
