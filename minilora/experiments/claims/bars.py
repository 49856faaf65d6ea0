"""The figure of a study whose result is a few numbers: a bar for each, its interval over seeds, and where they lie."""

import math
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from minilora.experiments.claims.claim import interval
from minilora.experiments.looks import (
    BLACK,
    HATCHES,
    LOOKS,
    OTHERS,
    SMALL,
    Look,
    legend_below,
    look_of,
    new_figure,
    titled,
)
from minilora.experiments.pictures import Figure, redrawable


def bars(
    names: Sequence[str], xlabel: str, bar: float | None = None, log: bool = False
) -> Callable[[str, Mapping[str, Mapping[int, Mapping]]], Figure]:
    """A function that draws the scores called `names` of each arm, as Study.figure does. bar: the rule's, a line."""
    return partial(draw_bars, names=names, xlabel=xlabel, bar=bar, log=log)


@redrawable
def draw_bars(
    title: str,
    runs: Mapping[str, Mapping[int, Mapping]],
    names: Sequence[str],
    xlabel: str,
    bar: float | None = None,
    log: bool = False,
) -> Figure:
    height = 0.8 / len(names)
    figure, (axes,) = new_figure(height=max(3, 1.3 + 0.3 * len(names) * len(runs)))
    for place, (arm, by_seed) in enumerate(runs.items()):
        for number, name in enumerate(names):
            values = [run["scores"][name] for run in by_seed.values() if name in run["scores"]]
            if values:
                look = OTHERS[number] if len(names) > 1 else arm_look(arm)
                one_bar(axes, values, place + number * height, height, look, HATCHES[number])
    for number, name in enumerate(names if len(names) > 1 else ()):
        axes.barh([0], [0], color=OTHERS[number].colour, hatch=HATCHES[number], edgecolor="white", label=name)
    if bar is not None:
        axes.axvline(bar, color=BLACK, linestyle="--", linewidth=1, label=f"the rule's bar, {bar:g}")
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(runs))], [look_of(arm).label for arm in runs])
    axes.invert_yaxis()
    axes.set(xlabel="\n".join(map(wrapped, xlabel.split("\n"))), xscale="log" if log else "linear")
    if not log:
        axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.18)
    titled(axes, title)
    if axes.get_legend_handles_labels()[1]:
        legend_below(figure, axes)
    return figure


def wrapped(line: str, most: int = 46) -> str:
    """In as few lines as it takes, of about the same length."""
    return textwrap.fill(line, math.ceil(len(line) / math.ceil(len(line) / most)) + 4)


def arm_look(arm: str) -> Look:
    """The look of the method that the arm's name begins with; of an arm that names none, LoRA's."""
    return LOOKS.get(re.split("[ ,]", arm)[0], LOOKS["lora"])


def one_bar(axes, values: Sequence[float], place: float, height: float, look: Look, hatch: str):
    """The mean with its number, the 90 % interval, and a dot for each seed."""
    mean = statistics.mean(values)
    axes.barh(place, mean, height * 0.9, color=look.colour, hatch=hatch, edgecolor="white")
    end = max(mean, *values) if len(values) > 1 else mean
    if len(values) > 1:
        low, _, high = interval(list(values))
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color=BLACK, capsize=3)
        axes.scatter(values, [place] * len(values), color="white", edgecolor=BLACK, s=12, zorder=3)
        end = max(end, high)
    clear = dict(facecolor="white", edgecolor="none", pad=1)  # of the rule's line
    text = f"{mean:,.0f}" if mean >= 1000 else f"{round(mean, 5) + 0.0:.3g}" if abs(mean) >= 1e-4 else "0"
    beside = dict(textcoords="offset points", va="center", fontsize=SMALL, bbox=clear)
    axes.annotate(text, (end, place), (6, 0), **beside)
