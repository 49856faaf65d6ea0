"""The figures that only notebooks draw, one function each, in the colours of the runs' figures."""

import statistics
from collections.abc import Sequence

from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from minilora.experiments.figures import methods_of
from minilora.experiments.looks import (
    BLACK,
    GREY,
    HATCHES,
    LIGHT,
    ORANGE,
    PINK,
    SKY,
    SMALL,
    Look,
    finished,
    legend_below,
    log_ticks,
    look_of,
    looks_of,
    new_figure,
    rows_downward,
    width_of,
)
from minilora.experiments.pictures import Figure, redrawable
from minilora.memory import KINDS

Numbers = Sequence[float]
Curve = tuple[Numbers, Numbers]  # x values, y values
# None of these colours is that of a method in the same figure.
SCHEMES = {
    "int4": Look("int4", ORANGE, "--", "s"),
    "fp4": Look("fp4", PINK, ":", "^"),
    "nf4": Look("nf4", BLACK),
}
KIND_COLOURS = {"weights": GREY, "gradients": ORANGE, "optimizer": PINK, "activations": SKY}


@redrawable
def seed_dots(results: dict, methods: Sequence[str]) -> Figure:
    """Best validation loss of every seed, a row for each of the methods and a bar at its mean."""
    figure, (axes,) = new_figure(height=1 + 0.25 * len(methods))
    for place, method in enumerate(methods):
        losses = [row["best_validation_loss"] for row in methods_of(results)[method]]
        look = look_of(method)
        axes.plot(losses, [place] * len(losses), look.marker, color=look.colour, markersize=5, alpha=0.8)
        axes.plot(statistics.mean(losses), place, "|", color=look.colour, markersize=14)
    rows_downward(axes, [look_of(method).label for method in methods], None, 0.05)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.locator_params(axis="x", nbins=5)
    axes.set(xlabel="best validation loss (nats/token)", title=f"Task: {results['task']}, a mark for each seed")
    return figure


@redrawable
def memory_stacks(splits: dict[str, dict[str, int]], title: str) -> Figure:
    """The split at the moment of the peak, stacked, one bar for each case: where the bytes go."""
    figure, (axes,) = new_figure(5.5, 1.3 + 0.4 * len(splits))
    left = [0.0] * len(splits)
    for kind, hatch in zip(KINDS, HATCHES, strict=False):
        values = [split[kind] for split in splits.values()]
        style = dict(color=KIND_COLOURS[kind], hatch=hatch, edgecolor="white", label=kind)
        axes.barh(range(len(splits)), values, left=left, **style)
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {EngFormatter('B', places=1)(total)}", va="center", fontsize=SMALL)
    rows_downward(axes, list(splits), "B", 0.15)
    return finished(figure, axes, xlabel="bytes at the peak (k, M, G: powers of 1000)", title=title)


@redrawable
def singular_values(spectra: dict[str, Numbers], title: str = "Singular values of ΔW") -> Figure:
    """Sorted singular values, each spectrum divided by its largest."""
    figure, (axes,) = new_figure()
    for name, look in looks_of(spectra).items():
        relative = [value / spectra[name][0] for value in spectra[name]]
        axes.plot(range(1, len(relative) + 1), relative, **look.style | {"marker": ""})
    axes.set_yscale("log")
    return finished(figure, axes, xlabel="number of the singular value", ylabel="relative to the largest", title=title)


@redrawable
def energy_curves(spectra: dict[str, Numbers], title: str = "How low is the rank of ΔW?") -> Figure:
    """The share of ‖ΔW‖² that the first r singular directions hold, against r."""
    figure, (axes,) = new_figure()
    for name, look in looks_of(spectra).items():
        squares = [value**2 for value in spectra[name]]
        shares = [sum(squares[:r]) / sum(squares) for r in range(1, len(squares) + 1)]
        axes.plot(range(1, len(shares) + 1), shares, **look.style | {"marker": ""})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="rank r", ylabel="share of ‖ΔW‖²", ylim=(0, 1.02), title=title)
    legend_below(figure, axes)  # all curves end in one point
    return figure


@redrawable
def lines(
    curves: dict[str, Curve], xlabel: str, ylabel: str, title: str, log_x: bool = False, log_y: bool | None = None
) -> Figure:
    """Named curves (x values, y values), in the methods' looks where a name is a method's.

    log_y: None for a logarithmic axis where the largest value is more than ten times the smallest.
    """
    figure, (axes,) = new_figure()
    for name, look in looks_of(curves).items():
        axes.plot(*curves[name], **look.style)
    if log_x:
        axes.set_xscale("log")
        places = sorted({x for values, _ in curves.values() for x in values})
        if len(places) < 10:
            names = [f"{x:.4g}" for x in places]
            crowded = sum(width_of(name) + 0.1 for name in names) > 0.8 * figure.get_figwidth()  # inches
            named = range(len(names) - 1, -1, -2 if crowded else -1)
            axes.set_xticks(places, [name if number in named else "" for number, name in enumerate(names)])
            axes.set_xticks([], minor=True)
        else:
            axes.xaxis.set_major_formatter("{x:g}")
    every = [value for _, values in curves.values() for value in values if value is not None]
    if log_y or log_y is None and 0 < 10 * min(every) < max(every):
        axes.set_yscale("log")
        log_ticks(axes.yaxis, every)
    return finished(figure, axes, xlabel=xlabel, ylabel=ylabel, title=title)


@redrawable
def scatter(points: dict[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, title: str) -> Figure:
    """Clouds of points (x, y) side by side, one for each method, on the same logarithmic axes."""
    figure, panels = new_figure(1 + 2.2 * len(points), 2.8, columns=len(points))
    for axes, (method, pairs) in zip(panels, points.items(), strict=True):
        axes.plot(*zip(*pairs, strict=True), ".", color=look_of(method).colour, markersize=3)
        axes.set(xscale="log", yscale="log", title=look_of(method).label)
        for number, axis in enumerate((axes.xaxis, axes.yaxis)):
            values = [pair[number] for each in points.values() for pair in each]
            axis.set_major_locator(LogLocator(subs=(1,) if max(values) > 30 * min(values) else (1, 3)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    figure.supxlabel(xlabel, fontsize="medium")
    panels[0].set_ylabel(ylabel)
    figure.suptitle(title, fontsize="large")
    return figure


@redrawable
def learning_rate_grids(tuned: dict[str, dict], title: str) -> Figure:
    """Best validation loss over learning rate; the chosen rate of each method is ringed.

    tuned: by method {"grid": [{"learning_rate", "validation_loss"}, ...], "chosen"}, as in data/learning_rates.json.
    A loss of None (the run diverged) leaves a gap.
    """
    figure, (axes,) = new_figure()
    for method, look in looks_of(tuned).items():
        choice = tuned[method]
        tried = {point["learning_rate"]: point["validation_loss"] for point in choice["grid"]}
        losses = [float("nan") if loss is None else loss for loss in tried.values()]
        axes.plot(list(tried), losses, **look.style)
        place = choice["chosen"], tried[choice["chosen"]]
        axes.plot(*place, color=look.colour, marker="o", markersize=12, markerfacecolor="none")
    low, high = axes.get_ylim()
    if low < high / 5:  # losses on a task differ by factors, on real text by tenths
        axes.set_yscale("log")
    loss = "best validation loss\n(nats/token)"
    return finished(figure, axes, xscale="log", xlabel="learning rate", ylabel=loss, title=title)


@redrawable
def level_lines(curves: dict[str, Curve], levels: dict[str, float], xlabel: str, title: str) -> Figure:
    """Named curves (x values, y values) on two logarithmic axes, beside levels that do not depend on x, dashed."""
    figure, (axes,) = new_figure()
    looks = looks_of([*levels, *curves])
    for name, (x, y) in curves.items():
        axes.plot(x, y, **looks[name].style)
    for name, level in levels.items():
        axes.axhline(level, color=looks[name].colour, linestyle="--", linewidth=1, label=looks[name].label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    log_ticks(axes.yaxis, [*levels.values(), *(value for _, values in curves.values() for value in values)])
    return finished(figure, axes, xlabel=xlabel, ylabel="validation loss (nats/token)", title=title)


@redrawable
def error_over_block_size(errors: dict[str, Numbers], sizes: Numbers, bits: Numbers, title: str) -> Figure:
    """Relative error of rounding over the block size, a curve for each name; under each size its bits per weight."""
    figure, (axes,) = new_figure()
    for name, values in errors.items():
        axes.plot(sizes, values, **SCHEMES.get(name, look_of(name)).style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size}\n{price:.2f}" for size, price in zip(sizes, bits, strict=True)], fontsize="small")
    axes.set_ylim(bottom=0)
    below, error = "weights in a block, and bits per weight", "‖w - w'‖ / ‖w‖"
    return finished(figure, axes, xlabel=below, ylabel=error, title=title)


@redrawable
def levels_over_weights(scaled: Numbers, levels: dict[str, Numbers], title: str) -> Figure:
    """For each scheme the histogram of weights over their block's absmax, and its levels as lines through it."""
    figure, panels = new_figure(5, 1 + 1.1 * len(levels), rows=len(levels))
    for axes, (name, values) in zip(panels, levels.items(), strict=True):
        axes.hist(scaled, bins=101, range=(-1, 1), density=True, color=LIGHT)
        colour = SCHEMES.get(name, look_of(name)).colour
        axes.vlines(values, 0, 1, transform=axes.get_xaxis_transform(), color=colour, linewidth=1.2)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    panels[0].set_title(title)
    panels[-1].set_xlabel("weight over its block's absmax")
    return figure


@redrawable
def histograms(counts: dict[str, Sequence[int]], xlabel: str, ylabel: str, title: str) -> Figure:
    """How often each whole number occurs under each name."""
    figure, (axes,) = new_figure()
    every = [count for values in counts.values() for count in values]
    bins = [number - 0.5 for number in range(min(every), max(every) + 2)]
    for (name, values), hatch in zip(counts.items(), HATCHES, strict=False):
        axes.hist(values, bins=bins, color=looks_of(counts)[name].colour, hatch=hatch, edgecolor="white", label=name)
    return finished(figure, axes, xlabel=xlabel, ylabel=ylabel, title=title)
