"""What the studies of rewards draw: shares over the steps of training, and reward against diversity."""

import statistics
from collections.abc import Mapping
from functools import partial

from minilora.experiments.claims.study import Draw
from minilora.experiments.looks import DARK, OTHERS, finished, legend_below, new_figure, titled
from minilora.experiments.pictures import Figure, redrawable

Runs = Mapping[str, Mapping[int, Mapping]]


def mean_path(by_seed: Mapping[int, Mapping]) -> list[list[float]]:
    """The points of a curve, each number the mean of the seeds."""
    paths = [run["path"] for run in by_seed.values()]
    return [list(map(statistics.mean, zip(*points, strict=True))) for points in zip(*paths, strict=True)]


def curves(columns: Mapping[str, int], ylabel: str) -> Draw:
    """A function that draws columns of the path of each arm over the steps, the mean of the seeds and their band."""
    return partial(draw_curves, columns=columns, ylabel=ylabel)


@redrawable
def draw_curves(title: str, runs: Runs, columns: Mapping[str, int], ylabel: str) -> Figure:
    figure, (axes,) = new_figure(height=3.4)
    trained = {arm: by_seed for arm, by_seed in runs.items() if all("path" in run for run in by_seed.values())}
    names = [(arm, name) for arm in trained for name in columns]
    for (arm, name), look in zip(names, OTHERS, strict=False):
        points, at = mean_path(trained[arm]), columns[name]
        steps = [point[0] for point in points]
        label = arm if len(columns) == 1 else f"{arm}, {name}"
        axes.plot(steps, [point[at] for point in points], **look._replace(label=label).style)
        each = list(zip(*[[point[at] for point in run["path"]] for run in trained[arm].values()], strict=True))
        band = dict(color=look.colour, alpha=0.15, linewidth=0)
        axes.fill_between(steps, list(map(min, each)), list(map(max, each)), **band)
    titled(axes, title)
    return finished(figure, axes, xlabel="steps, samples of the five before", ylabel=ylabel, ylim=(0, 1.02))


@redrawable
def reward_against_diversity(title: str, runs: Runs) -> Figure:
    """Of each arm the way through training, the mean of the seeds, and its end on new people, a mark for each seed.

    To the right more is right, upward more of the 16 wordings are in use. All ways begin at the mean of "start". A run
    that is stopped early ends further up on its own line: a penalty is worth something where its line lies above.
    """
    figure, (axes,) = new_figure(height=3.4)
    begin = [[run["scores"]["right"], run["scores"]["wordings"]] for run in runs.get("start", {}).values()]
    first = [list(map(statistics.mean, zip(*begin, strict=True)))] if begin else []
    for (arm, by_seed), look in zip(runs.items(), OTHERS, strict=False):
        ends = [(run["scores"]["right"], run["scores"]["wordings"]) for run in by_seed.values()]
        if all("path" in run for run in by_seed.values()):
            way = first + [[right, used] for _, right, _, used in mean_path(by_seed)]
            axes.plot(*zip(*way, strict=True), look.line, color=look.colour, linewidth=1)
        axes.plot(*zip(*ends, strict=True), look.marker, color=look.colour, markersize=5, label=arm)
    axes.axhline(16, color=DARK, linewidth=1, linestyle=":")
    axes.set(xlabel="share of samples that are right", ylabel="wordings in use, of 16", yscale="log", ylim=(0.9, 20))
    axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    titled(axes, title)
    legend_below(figure, axes)
    return figure
