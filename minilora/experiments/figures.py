"""The figures that runs draw, one function each: numbers in, a matplotlib `Figure` out, with axes in units.

Each method has one look, wherever it appears (`looks.LOOKS`); other figures take their colours from the same place.
"""

import statistics

from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from minilora.experiments.looks import (
    BLACK,
    LIGHT,
    SMALL,
    finished,
    look_of,
    new_figure,
    rows_downward,
    titled,
)
from minilora.experiments.pictures import Figure, redrawable
from minilora.memory import KINDS

BESIDE = dict(textcoords="offset points")


def methods_of(results: dict) -> dict[str, list[dict]]:
    """method -> its rows of results.json, one for each seed, in the order of the results."""
    methods: dict[str, list[dict]] = {}
    for row in results["runs"]:
        methods.setdefault(row["method"], []).append(row)
    return methods


def comparison_figures(results: dict) -> dict[str, Figure]:
    """The figures of `compare`, by the name of their file."""
    return {
        "loss": loss_curves(results),
        "parameters": parameter_bars(results),
        "tradeoff": loss_over_parameters(results),
        "memory": memory_bars({method: rows[0]["bytes"] for method, rows in methods_of(results).items()}),
    }


@redrawable
def loss_curves(results: dict) -> Figure:
    """Validation loss over steps: the mean of the seeds, a band from lowest to highest, and the entropy floor.

    The axis is logarithmic where the floor is zero: there each factor of ten is as much worth seeing as the last.
    """
    methods, floor = methods_of(results), results["loss_floor"]
    figure, (axes,) = new_figure(height=max(3, 1 + 0.25 * len(methods)))
    for method, rows in methods.items():
        steps = [step for step, _ in rows[0]["validation_loss"]]
        losses = list(zip(*[[loss for _, loss in row["validation_loss"]] for row in rows], strict=True))
        look = look_of(method)
        axes.plot(steps, list(map(statistics.mean, losses)), **look.style)
        if len(rows) > 1:
            low, high = list(map(min, losses)), list(map(max, losses))
            axes.fill_between(steps, low, high, color=look.colour, alpha=0.2, linewidth=0)
    if floor == 0:
        axes.set_yscale("log")
    elif floor is not None:
        axes.axhline(floor, color=BLACK, linestyle="--", linewidth=1, label="entropy floor")
    axes.set_title(f"Task: {results['task']}" + ("; the entropy floor is 0" if floor == 0 else ""))
    return finished(figure, axes, xlabel="optimizer steps", ylabel="validation loss (nats/token)")


@redrawable
def loss_over_parameters(results: dict) -> Figure:
    """What each method trains and what it reaches: a row a method, so that none hides another, a dot for each seed.

    Panels: trainable parameters, best validation loss, and the score where there is one, all of it from 0 to 1.
    """
    methods = methods_of(results)
    keys = {
        "trainable_parameters": "trainable parameters",
        "best_validation_loss": "best validation loss\n(nats/token)",
    }
    if results["score_before"] is not None:
        keys["score"] = "score (share of\nanswers right)"
    figure = Figure(figsize=(1.3 + 2.1 * len(keys), 1.3 + 0.27 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True)
    for axes, (key, title) in zip(panels, keys.items(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        values = {method: sorted({row[key] for row in rows}) for method, rows in methods.items()}
        for place, (method, each) in enumerate(values.items()):
            look = look_of(method)
            axes.plot(each, [place] * len(each), look.marker, color=look.colour, markersize=5, alpha=0.8)
            axes.plot([statistics.mean(row[key] for row in methods[method])], [place], "|", color=look.colour, ms=14)
        axes.set(xlabel=title, xlim=(-0.05, 1.05) if key == "score" else None)
        axes.grid(axis="y", color=LIGHT, linewidth=0.6)
        axes.set_axisbelow(True)
        every = [value for each in values.values() for value in each]
        if key != "score" and min(every) > 0 and max(every) > 3 * min(every):
            axes.set_xscale("log")
            axes.set_xlim(min(every) / 1.6, max(every) * 1.6)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if max(every) < 50 * min(every) else (1,)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.margins(x=0.12)
            axes.locator_params(axis="x", nbins=4)
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_yticks(range(len(methods)), [look_of(method).label for method in methods])
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    seeds = len(results["seeds"])
    figure.suptitle(f"Task: {results['task']}, {seeds} seed{'s' * (seeds > 1)}", fontsize="medium")
    return figure


@redrawable
def parameter_bars(results: dict) -> Figure:
    """Trainable parameters of each method, with their share of all."""
    methods = methods_of(results)
    figure, (axes,) = new_figure(height=1 + 0.5 * len(methods))
    for place, (method, (row, *_)) in enumerate(methods.items()):
        trainable, total = row["trainable_parameters"], row["total_parameters"]
        axes.barh(place, trainable, color=look_of(method).colour)
        axes.text(trainable, place, f"  {trainable:,d} ({trainable / total:.1%})", va="center", fontsize=SMALL)
    rows_downward(axes, [look_of(method).label for method in methods], "", 0.5)
    axes.set(xlabel="trainable parameters", title="What is trained")
    return figure


@redrawable
def memory_bars(splits: dict[str, dict[str, int]], title: str = "Memory of a training step") -> Figure:
    """Bytes of tensors, a row a method and a panel a kind: each kind's own largest, and the peak of their sum.

    All panels have one scale, so that any two bars can be compared.
    """
    names = [*KINDS, "peak"]
    figure, panels = new_figure(7.2, 0.9 + 0.32 * len(splits), columns=len(names))
    number = EngFormatter("B", places=1)
    for axes, kind in zip(panels, names, strict=True):
        for place, (method, split) in enumerate(splits.items()):
            axes.barh(place, split[kind], 0.7, color=look_of(method).colour)
            axes.annotate(number(split[kind]), (split[kind], place), (3, 0), va="center", fontsize=SMALL, **BESIDE)
        axes.set_title(kind, fontsize="medium")
        axes.tick_params(axis="x", bottom=False, labelbottom=False)
        axes.tick_params(axis="y", left=False)
        axes.spines["bottom"].set_visible(False)
    most = max(split["peak"] for split in splits.values())
    panels[0].set_xlim(0, 1.9 * most)  # room for the number at the longest bar
    rows_downward(panels[0], [look_of(method).label for method in splits], None, 0)
    figure.suptitle(title)
    figure.supxlabel("bytes of tensors (k, M, G: powers of 1000)", fontsize=SMALL)
    return figure


@redrawable
def paired_losses(losses: dict[str, dict[int, float]], title: str) -> Figure:
    """The best validation loss of each arm, by seed; a line joins what one seed gave in all arms."""
    figure, (axes,) = new_figure(max(5, 1.2 + 0.6 * len(losses)))
    for seed in next(iter(losses.values())):
        axes.plot(list(losses), [arm.get(seed) for arm in losses.values()], color=LIGHT, linewidth=1, zorder=1)
    for place, (arm, by_seed) in enumerate(losses.items()):
        look = look_of(arm)
        style = dict(color=look.colour, marker=look.marker or "o", zorder=2)
        axes.scatter([place] * len(by_seed), list(by_seed.values()), **style)
    axes.margins(x=0.3 / len(losses))
    axes.set(ylabel="best validation loss\n(nats/token)")
    titled(axes, title)
    return figure
