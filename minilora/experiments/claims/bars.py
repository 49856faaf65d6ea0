"""The figure of a study whose result is a few numbers: a bar for each, its interval over seeds, and where they lie."""

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence

from minilora.experiments.claims.claim import interval
from minilora.experiments.figures import LEGEND, Figure, look_of, new_figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999")  # of Okabe and Ito, as in figures.LOOKS
HATCHES = ("", "///", "...", "xxx", "---")


def bars(
    names: Sequence[str], xlabel: str, bar: float | None = None, log: bool = False
) -> Callable[[str, Mapping[str, Mapping[int, Mapping]]], Figure]:
    """A function that draws the scores called `names` of each arm, as Study.figure does. bar: the rule's, a line."""

    def draw(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
        height = 0.8 / len(names)
        figure, (axes,) = new_figure(height=max(3, 1.3 + 0.3 * len(names) * len(runs)))
        for place, by_seed in enumerate(runs.values()):
            for number, name in enumerate(names):
                values = [run["scores"][name] for run in by_seed.values() if name in run["scores"]]
                if values:
                    one_bar(axes, values, place + number * height, height, number)
        for number, name in enumerate(names if len(names) > 1 else ()):
            axes.barh([0], [0], color=COLOURS[number], hatch=HATCHES[number], edgecolor="white", label=name)
        if bar is not None:
            axes.axvline(bar, color="black", linestyle="--", linewidth=1, label=f"the rule's bar, {bar:g}")
        axes.set_yticks([place + 0.4 - height / 2 for place in range(len(runs))], [look_of(arm).label for arm in runs])
        axes.invert_yaxis()
        axes.set(xlabel=xlabel, xscale="log" if log else "linear")
        if not log:
            axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.18)
        axes.set_title(textwrap.fill(title, 70), fontsize="small")
        if axes.get_legend_handles_labels()[1]:
            figure.legend(**LEGEND, loc="outside lower center", ncols=3)
        return figure

    return draw


def one_bar(axes, values: Sequence[float], place: float, height: float, number: int):
    """The mean with its number, the 90 % interval, and a dot for each seed."""
    mean = statistics.mean(values)
    axes.barh(place, mean, height * 0.9, color=COLOURS[number], hatch=HATCHES[number], edgecolor="white")
    end = max(mean, *values) if len(values) > 1 else mean
    if len(values) > 1:
        low, _, high = interval(list(values))
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color="black", capsize=3)
        axes.scatter(values, [place] * len(values), color="white", edgecolor="black", s=12, zorder=3)
        end = max(end, high)
    axes.annotate(
        f"{mean:,.0f}" if mean >= 1000 else f"{round(mean, 5) + 0.0:.3g}",
        (end, place),
        (5, 0),
        textcoords="offset points",
        va="center",
        fontsize="small",
    )
