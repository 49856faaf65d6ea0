"""What the studies of rewards draw: shares over the steps of training, and reward against diversity."""

import statistics
import textwrap
from collections.abc import Mapping

from minilora.experiments.claims.study import Draw
from minilora.experiments.figures import LEGEND, Figure, new_figure

Runs = Mapping[str, Mapping[int, Mapping]]
STYLES = ("-o", "--s", ":^", "-.D", "-v", "--x", ":P", "-.*")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9", "#999999")


def mean_path(by_seed: Mapping[int, Mapping]) -> list[list[float]]:
    """The points of a curve, each number the mean of the seeds."""
    paths = [run["path"] for run in by_seed.values()]
    return [list(map(statistics.mean, zip(*points, strict=True))) for points in zip(*paths, strict=True)]


def curves(columns: Mapping[str, int], ylabel: str) -> Draw:
    """A function that draws columns of the path of each arm over the steps, the mean of the seeds and their band."""

    def draw(title: str, runs: Runs) -> Figure:
        figure, (axes,) = new_figure()
        trained = {arm: by_seed for arm, by_seed in runs.items() if all("path" in run for run in by_seed.values())}
        lines = [(arm, name) for arm in trained for name in columns]
        for (arm, name), style, colour in zip(lines, STYLES, COLOURS, strict=False):
            points, at = mean_path(trained[arm]), columns[name]
            steps = [point[0] for point in points]
            label = arm if len(columns) == 1 else f"{arm}, {name}"
            axes.plot(steps, [point[at] for point in points], style, color=colour, markersize=4, label=label)
            each = list(zip(*[[point[at] for point in run["path"]] for run in trained[arm].values()], strict=True))
            axes.fill_between(steps, list(map(min, each)), list(map(max, each)), color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="steps, samples of the five before", ylabel=ylabel, ylim=(0, 1.02))
        axes.set_title(textwrap.fill(title, 60), fontsize="small")
        figure.legend(**LEGEND, loc="outside lower center", ncols=3)
        return figure

    return draw


def reward_against_diversity(title: str, runs: Runs) -> Figure:
    """Of each arm the way through training, the mean of the seeds, and its end on new people, a mark for each seed.

    To the right more is right, upward more of the 16 wordings are in use. All ways begin at the mean of "start". A run
    that is stopped early ends further up on its own line: a penalty is worth something where its line lies above.
    """
    figure, (axes,) = new_figure(height=3.4)
    begin = [[run["scores"]["right"], run["scores"]["wordings"]] for run in runs.get("start", {}).values()]
    first = [list(map(statistics.mean, zip(*begin, strict=True)))] if begin else []
    for (arm, by_seed), style, colour in zip(runs.items(), STYLES, COLOURS, strict=False):
        ends = [(run["scores"]["right"], run["scores"]["wordings"]) for run in by_seed.values()]
        if all("path" in run for run in by_seed.values()):
            way = first + [[right, used] for _, right, _, used in mean_path(by_seed)]
            axes.plot(*zip(*way, strict=True), style[:-1], color=colour, linewidth=1)
        axes.plot(*zip(*ends, strict=True), style[-1], color=colour, markersize=5, label=arm)
    axes.axhline(16, color="#666666", linewidth=1, linestyle=":")
    axes.set(xlabel="share of samples that are right", ylabel="wordings in use, of 16", yscale="log", ylim=(0.9, 20))
    axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.set_title(textwrap.fill(title, 60), fontsize="small")
    figure.legend(**LEGEND, loc="outside lower center", ncols=4)
    return figure
