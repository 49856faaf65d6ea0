"""The figures of merging: what is left over the number of adapters, and over what may predict it."""

import textwrap
from collections.abc import Mapping
from functools import partial

from minilora.experiments.claims.claim import interval
from minilora.experiments.claims.study import Draw
from minilora.experiments.claims.together.merging_bench import mean
from minilora.experiments.claims.together.merging_numbers import gains_left, predicts, shares
from minilora.experiments.looks import (
    BLACK,
    BLUE,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    legend_below,
    new_figure,
    titled,
    width_of,
)
from minilora.experiments.pictures import Figure, redrawable

Box = tuple[float, float, float, float]
WAYS = {  # arm and method: label, line and marker, colour
    ("apart", "sum"): ("sum, weights 1", ":v", GREY),
    ("apart", "linear"): ("sum, tuned weight", "-o", BLUE),
    ("a weight each", "weights"): ("sum, a weight each", "P", BLUE),
    ("gently", "linear"): ("sum, adapters trained\nat 0.3 of the rate", "p", PINK),
    ("apart", "svd"): ("sum, SVD to rank 8", "--s", SKY),
    ("apart", "ties"): ("TIES", "-^", VERMILION),
    ("apart", "dare"): ("DARE, 90 % dropped", "-D", ORANGE),
    ("union", "union"): ("trained on the union", "-*", GREEN),
    ("union short", "union"): ("the same, an n-th\nof the steps", "--x", BLACK),
}
STATISTICS = {
    "subspaces": "overlap of the singular vectors of the two ΔW",
    "inputs": "overlap of the covariances of the inputs",
    "outputs": "‖ΔW_j x‖ / ‖ΔW_i x‖ on the inputs x of task i",
    "cosine": "cosine between the two ΔW",
}


def left_by_way(runs: Mapping[str, Mapping[int, Mapping]]) -> dict[tuple, dict[int, dict[str, list[float]]]]:
    """By way to merge and by seed: of each merge the percent left of its tasks' scores alone."""
    found: dict[tuple, dict[int, dict[str, list[float]]]] = {}
    for arm, method in WAYS:
        for seed, record in runs.get(arm, {}).items():
            alone = record if "alone" in record else runs["apart"].get(seed)
            if alone is not None and method in record["merges"]:
                found.setdefault((arm, method), {})[seed] = shares(alone, record["merges"][method])
    return found


@redrawable
def over_number(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
    """The mean of all merges of so many adapters and of the seeds; one adapter alone is 100."""
    figure, (axes,) = new_figure(6.4, 3.4)
    for way, by_seed in left_by_way(runs).items():
        label, style, colour = WAYS[way]
        counts = sorted({len(left) for merges in by_seed.values() for left in merges.values()})
        left = [
            mean(mean(one) for merges in by_seed.values() for one in merges.values() if len(one) == count)
            for count in counts
        ]
        alone = counts[1:] != []  # a point where only pairs were merged
        line = ([1, *counts], [100, *left]) if alone else (counts, left)
        axes.plot(*line, style, color=colour, markersize=5, label=label)
    axes.axhline(80, color=DARK, linestyle=":", linewidth=1, label="add-tuned's bar, 80 %")
    axes.set(
        xlabel="adapters merged into one", ylabel="of the score alone, left (%)", xticks=[1, 2, 3, 6], ylim=(-3, 105)
    )
    titled(axes, title)
    legend_below(figure, axes)
    return figure


@redrawable
def task_bars(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
    """Of two tasks: what each way to merge leaves of either, a dot for each seed."""
    ways = left_by_way(runs)
    names = list(next(iter(runs["apart"].values()))["alone"])
    figure, (axes,) = new_figure(5.6, 0.9 + 0.42 * len(ways))
    for task, (name, marker, colour, hatch) in enumerate(
        zip(names, ("o", "s"), (BLUE, ORANGE), ("", "///"), strict=False)
    ):
        places = [row + 0.38 * task for row in range(len(ways))]
        left = [[merges[" + ".join(names)][task] for merges in by_seed.values()] for by_seed in ways.values()]
        axes.barh(places, list(map(mean, left)), 0.36, color=colour, hatch=hatch, edgecolor="white", label=name)
        for place, values in zip(places, left, strict=True):
            axes.scatter(values, [place] * len(values), marker=marker, color="white", edgecolor="black", s=14, zorder=3)
    axes.axvline(80, color="black", linestyle="--", linewidth=1, label="add-tuned's bar, 80 %")
    axes.set_yticks([row + 0.19 for row in range(len(ways))], [WAYS[way][0] for way in ways])
    axes.invert_yaxis()
    axes.set(xlabel="of the score alone, left (%)")
    titled(axes, title)
    legend_below(figure, axes)
    return figure


@redrawable
def pairs_over(statistic: str, title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
    """Of each pair, the statistic and what the plain sum leaves of the gain in loss."""
    figure, (axes,) = new_figure(5.4, 3.4)
    records = list(runs["apart"].values())
    points = {}
    for pair in gains_left(records[0], "sum"):
        x = mean(record["likeness"][pair][statistic] for record in records)
        y = 100 * mean(gains_left(record, "sum")[pair] for record in records)
        points["+".join(name[:3] for name in pair.split(" + "))] = x, y
    axes.plot(*zip(*points.values(), strict=True), "o", color=BLUE, markersize=5)
    name_points(axes, points)
    found = [predicts(record, statistic) for record in records]
    low, middle, high = interval(found) if len(found) > 1 else (found * 3)
    axes.set(xlabel=STATISTICS[statistic], ylabel="of the gain in loss, left by the sum (%)")
    rho = f"rank correlation with what is lost {middle:.2f} ({low:.2f} to {high:.2f})"
    axes.set_title(f"{textwrap.fill(title, 70)}\n{rho}", fontsize="small")
    return figure


def name_points(axes, points: Mapping[str, tuple[float, float]]):
    """Writes each point's name to the right of it, or left, below or above where it would lie on another."""
    axes.margins(x=0.15)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    wide, high = (0.8 * 72 * inches for inches in axes.figure.get_size_inches())  # of the axes, nearly, in points
    place = {
        name: ((x - left) / (right - left) * wide, (y - bottom) / (top - bottom) * high)
        for name, (x, y) in points.items()
    }
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in place.values()]  # boxes
    for name, (x, y) in place.items():
        width = 72 * width_of(name, 7) + 3
        for dx, dy in ((5, 0), (-5 - width, 0), (-width / 2, -9), (-width / 2, 9), (5, -8), (5, 8), (-5 - width, -8)):
            box = x + dx, y + dy - 4, x + dx + width, y + dy + 4
            if not any(crossing(box, other) for other in taken):
                break
        taken.append(box)
        axes.annotate(name, points[name], (dx, dy), textcoords="offset points", fontsize=7, va="center")


def crossing(one: Box, other: Box) -> bool:
    """Whether two boxes (left, bottom, right, top) have a place in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def pair_plot(statistic: str) -> Draw:
    return partial(pairs_over, statistic)
