"""The figures that only notebooks draw, one function each, in the colours of the runs' figures."""

import statistics
from collections.abc import Sequence

from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from minilora.experiments.figures import LEGEND, Figure, finished, look_of, methods_of, new_figure, rows_downward
from minilora.memory import KINDS

Numbers = Sequence[float]
Curve = tuple[Numbers, Numbers]  # x values, y values
# None of these colours is that of a method in the same figure.
SCHEME_COLOURS = {"int4": "#E69F00", "fp4": "#CC79A7", "nf4": "#000000"}
KIND_COLOURS = {"weights": "#999999", "gradients": "#E69F00", "optimizer": "#CC79A7", "activations": "#56B4E9"}
DOTS = dict(marker="o", markersize=3)


def seed_dots(results: dict, methods: Sequence[str]) -> Figure:
    """Best validation loss of every seed, a row for each of the methods and a bar at its mean."""
    figure, (axes,) = new_figure(height=1 + 0.25 * len(methods))
    for place, method in enumerate(methods):
        losses = [row["best_validation_loss"] for row in methods_of(results)[method]]
        colour = look_of(method).colour
        axes.plot(losses, [place] * len(losses), "o", color=colour, markersize=4, alpha=0.7)
        axes.plot(statistics.mean(losses), place, "|", color=colour, markersize=14)
    rows_downward(axes, [look_of(method).label for method in methods], None, 0.05)
    axes.set(xlabel="best validation loss (nats/token)", title=f"Task: {results['task']}, every seed a dot")
    return figure


def memory_stacks(splits: dict[str, dict[str, int]], title: str) -> Figure:
    """The split at the moment of the peak, stacked, one bar for each case: where the bytes go."""
    figure, (axes,) = new_figure(height=1.2 + 0.4 * len(splits))
    left = [0.0] * len(splits)
    for kind in KINDS:
        values = [split[kind] for split in splits.values()]
        axes.barh(range(len(splits)), values, left=left, color=KIND_COLOURS[kind], label=kind)
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {EngFormatter('B', places=1)(total)}", va="center", fontsize="small")
    rows_downward(axes, list(splits), "B", 0.15)
    axes.set(xlabel="bytes at the peak (k, M, G: powers of 1000)", title=title)
    figure.legend(**LEGEND, ncols=4, loc="outside lower center")
    return figure


def singular_values(spectra: dict[str, Numbers], title: str = "Singular values of ΔW") -> Figure:
    """Sorted singular values, each spectrum divided by its largest."""
    figure, (axes,) = new_figure()
    for name, values in spectra.items():
        relative = [value / values[0] for value in values]
        axes.plot(range(1, len(values) + 1), relative, label=name, color=look_of(name).colour)
    axes.set_yscale("log")
    return finished(figure, axes, xlabel="number of the singular value", ylabel="relative to the largest", title=title)


def energy_curves(spectra: dict[str, Numbers], title: str = "How low is the rank of ΔW?") -> Figure:
    """The share of ‖ΔW‖² that the first r singular directions hold, against r."""
    figure, (axes,) = new_figure()
    for name, values in spectra.items():
        squares = [value**2 for value in values]
        shares = [sum(squares[:r]) / sum(squares) for r in range(1, len(squares) + 1)]
        axes.plot(range(1, len(shares) + 1), shares, label=name, color=look_of(name).colour)
    axes.set_xscale("log", base=2)
    return finished(figure, axes, xlabel="rank r", ylabel="share of ‖ΔW‖²", ylim=(0, 1.02), title=title)


def lines(curves: dict[str, Curve], xlabel: str, ylabel: str, title: str, log_x: bool = False) -> Figure:
    """Named curves (x values, y values), in the methods' colours where a name is a method's."""
    figure, (axes,) = new_figure()
    axes.set_prop_cycle(color=["#999999", "#000000", "#F0E442", "#CC79A7"])  # of other names
    for name, (x, y) in curves.items():
        label, colour, line = look_of(name)
        axes.plot(x, y, line, label=label, color=colour, **DOTS)
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    return finished(figure, axes, xlabel=xlabel, ylabel=ylabel, title=title)


def scatter(points: dict[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, title: str) -> Figure:
    """Clouds of points (x, y) side by side, one for each method, on the same logarithmic axes."""
    figure, panels = new_figure(1 + 2.2 * len(points), 2.8, columns=len(points))
    for axes, (method, pairs) in zip(panels, points.items(), strict=True):
        axes.plot(*zip(*pairs, strict=True), ".", color=look_of(method).colour, markersize=3)
        axes.set(xscale="log", yscale="log", title=look_of(method).label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    figure.supxlabel(xlabel, fontsize="medium")
    panels[0].set_ylabel(ylabel)
    figure.suptitle(title, fontsize="large")
    return figure


def learning_rate_grids(tuned: dict[str, dict], title: str) -> Figure:
    """Best validation loss over learning rate; the chosen rate of each method is ringed.

    tuned: by method {"grid": [{"learning_rate", "validation_loss"}, ...], "chosen"}, as in data/learning_rates.json.
    A loss of None (the run diverged) leaves a gap.
    """
    figure, (axes,) = new_figure()
    for method, choice in tuned.items():
        tried = {point["learning_rate"]: point["validation_loss"] for point in choice["grid"]}
        losses = [float("nan") if loss is None else loss for loss in tried.values()]
        label, colour, _ = look_of(method)
        axes.plot(list(tried), losses, color=colour, label=label, **DOTS)
        place = choice["chosen"], tried[choice["chosen"]]
        axes.plot(*place, color=colour, marker="o", markersize=11, markerfacecolor="none")
    low, high = axes.get_ylim()
    if low < high / 5:  # losses on a task differ by factors, on real text by tenths
        axes.set_yscale("log")
    loss = "best validation loss (nats/token)"
    return finished(figure, axes, xscale="log", xlabel="learning rate", ylabel=loss, title=title)


def level_lines(curves: dict[str, Curve], levels: dict[str, float], xlabel: str, title: str) -> Figure:
    """Named curves (x values, y values) on two logarithmic axes, beside levels that do not depend on x, dashed."""
    figure, (axes,) = new_figure()
    axes.set_prop_cycle(color=["#000000", "#56B4E9", "#CC79A7", "#E69F00"])  # no method's curve is here
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, **DOTS)
    for name, level in levels.items():
        axes.axhline(level, color=look_of(name).colour, linestyle="--", linewidth=1, label=look_of(name).label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    return finished(figure, axes, yscale="log", xlabel=xlabel, ylabel="validation loss (nats/token)", title=title)


def error_over_block_size(errors: dict[str, Numbers], sizes: Numbers, bits: Numbers, title: str) -> Figure:
    """Relative error of rounding over the block size, a curve for each name; under each size its bits per weight."""
    figure, (axes,) = new_figure()
    for name, values in errors.items():
        axes.plot(sizes, values, label=name, color=SCHEME_COLOURS.get(name), **DOTS)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size}\n{price:.2f}" for size, price in zip(sizes, bits, strict=True)], fontsize="small")
    axes.set_ylim(bottom=0)
    below, error = "weights in a block, and bits per weight", "‖w - w'‖ / ‖w‖"
    return finished(figure, axes, xlabel=below, ylabel=error, title=title)


def levels_over_weights(scaled: Numbers, levels: dict[str, Numbers], title: str) -> Figure:
    """For each scheme the histogram of weights over their block's absmax, and its levels as lines through it."""
    figure, panels = new_figure(5, 1 + 1.1 * len(levels), rows=len(levels))
    for axes, (name, values) in zip(panels, levels.items(), strict=True):
        axes.hist(scaled, bins=101, range=(-1, 1), density=True, color="#CCCCCC")
        axes.vlines(values, 0, 1, transform=axes.get_xaxis_transform(), color=SCHEME_COLOURS.get(name), linewidth=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    panels[0].set_title(title)
    panels[-1].set_xlabel("weight over its block's absmax")
    return figure
