"""Every figure of the project, one function each: numbers in, a matplotlib `Figure` out.

About 5 by 3 inches, axes with units, and one colour for each method wherever it appears. The colours are those of
Okabe and Ito, which remain apart for colour-blind readers.
"""

import io
import statistics
from collections.abc import Sequence

import matplotlib.figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from PIL import Image

COLOURS = {
    "full": "#D55E00",
    "lora": "#0072B2",
    "qlora": "#009E73",
    "loftq": "#009E73",
    "dora": "#CC79A7",
    "rslora": "#56B4E9",
    "lora+": "#E69F00",
    "lora-fa": "#56B4E9",
    "pissa": "#000000",
    "olora": "#000000",
    "eva": "#000000",
    "adalora": "#0072B2",
    "soft-prompt": "#999999",
    "prefix": "#999999",
    "base": "#666666",
    "limit": "#000000",
    "weights": "#999999",
    "gradients": "#E69F00",
    "optimizer": "#CC79A7",
    "activations": "#56B4E9",
}
LABELS = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA", "loftq": "LoftQ", "dora": "DoRA"}
LABELS |= {"rslora": "rsLoRA", "lora+": "LoRA+", "lora-fa": "LoRA-FA", "pissa": "PiSSA", "olora": "OLoRA", "eva": "EVA"}
LABELS |= {"adalora": "AdaLoRA-style", "soft-prompt": "soft prompt", "prefix": "prefix tuning"}
# There are more methods than colours that stay apart: of those that share one, the second is dashed, the third dotted.
STYLES = {"loftq": "--", "lora-fa": "--", "adalora": "--", "olora": "--", "eva": ":", "prefix": "--"}
KINDS = ("weights", "gradients", "optimizer", "activations")


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows as a picture when it is the last value of a cell. It needs no display."""

    def _repr_png_(self) -> bytes:
        picture, small = io.BytesIO(), io.BytesIO()
        self.savefig(picture, format="png", dpi=110)
        # 128 colours are enough for a drawing and take a third of the bytes, which a notebook stores.
        Image.open(picture).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
        return small.getvalue()


def new_figure(width: float = 5, height: float = 3):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def methods_of(results: dict) -> dict[str, list[dict]]:
    """method -> its rows of results.json, one for each seed, in the order of the results."""
    methods = list(dict.fromkeys(row["method"] for row in results["runs"]))
    return {method: [row for row in results["runs"] if row["method"] == method] for method in methods}


def comparison_figures(results: dict) -> dict[str, Figure]:
    """The figures of `compare`, by the name of their file."""
    return {
        "loss": loss_curves(results),
        "parameters": parameter_bars(results),
        "tradeoff": loss_over_parameters(results),
        "memory": memory_bars({method: rows[0]["bytes"] for method, rows in methods_of(results).items()}),
    }


def loss_curves(results: dict) -> Figure:
    """Validation loss over steps: the mean of the seeds, a band from lowest to highest, and the entropy floor.

    The axis is logarithmic where the floor is zero: there each factor of ten is as much worth seeing as the last.
    """
    methods = methods_of(results)
    figure, axes = new_figure(height=max(3, 1 + 0.25 * len(methods)))
    for method, rows in methods.items():
        steps = [step for step, _ in rows[0]["validation_loss"]]
        losses = list(zip(*[[loss for _, loss in row["validation_loss"]] for row in rows], strict=True))
        mean = [statistics.mean(values) for values in losses]
        colour, style = COLOURS.get(method), STYLES.get(method, "-")
        axes.plot(steps, mean, style, color=colour, label=LABELS.get(method, method), marker="o", markersize=3)
        if len(rows) > 1:
            low, high = [min(values) for values in losses], [max(values) for values in losses]
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    floor = results["loss_floor"]
    if floor is not None and floor > 0:
        axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="entropy floor")
    elif floor is not None:
        axes.set_yscale("log")
        axes.plot([], [], " ", label="entropy floor: 0")
    axes.set(xlabel="optimizer steps", ylabel="validation loss (nats/token)", title=f"Task: {results['task']}")
    if len(methods) <= 4:
        axes.legend(frameon=False, fontsize="small")
    else:
        figure.legend(frameon=False, fontsize="small", loc="outside right upper")
    return figure


def loss_over_parameters(results: dict) -> Figure:
    """Best validation loss, and the score where there is one, against trainable parameters: one point a method, the
    mean of its seeds, with a bar from lowest to highest."""
    methods = methods_of(results)
    keys = {"best_validation_loss": "best validation loss\n(nats/token)"}
    if results["score_before"] is not None:
        keys["score"] = "score (share of answers right)"
    figure = Figure(figsize=(6, 0.6 + 2.6 * len(keys)), layout="constrained")
    panels = figure.subplots(len(keys), sharex=True, squeeze=False)[:, 0]
    markers = {"-": "o", "--": "s", ":": "^"}
    for axes, (key, title) in zip(panels, keys.items(), strict=True):
        for method, rows in methods.items():
            values = [row[key] for row in rows]
            mean, marker = statistics.mean(values), markers[STYLES.get(method, "-")]
            spread = [[mean - min(values)], [max(values) - mean]]
            style = dict(
                color=COLOURS.get(method), fmt=marker, markersize=5, capsize=3, label=LABELS.get(method, method)
            )
            axes.errorbar(rows[0]["trainable_parameters"], mean, spread, **style)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xscale="log", ylabel=title)
    if results["loss_floor"] == 0:
        panels[0].set_yscale("log")
    panels[0].set_title(f"Task: {results['task']}, {len(results['seeds'])} seeds")
    panels[-1].set_xlabel("trainable parameters")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside right upper")
    return figure


def seed_dots(results: dict, methods: Sequence[str]) -> Figure:
    """Best validation loss of every seed, a line for each of the methods and a bar at its mean: what differs, and what
    only the seeds do."""
    rows = {method: methods_of(results)[method] for method in methods}
    figure, axes = new_figure(height=1 + 0.25 * len(rows))
    for place, (method, some) in enumerate(rows.items()):
        losses = [row["best_validation_loss"] for row in some]
        axes.plot(losses, [place] * len(losses), "o", color=COLOURS.get(method), markersize=4, alpha=0.7)
        axes.plot(statistics.mean(losses), place, "|", color=COLOURS.get(method), markersize=14)
    axes.set_yticks(range(len(rows)), [LABELS.get(method, method) for method in rows])
    axes.invert_yaxis()
    axes.set(xlabel="best validation loss (nats/token)", title=f"Task: {results['task']}, every seed a dot")
    return figure


def parameter_bars(results: dict) -> Figure:
    """Trainable parameters of each method, with their share of all."""
    figure, axes = new_figure(height=1 + 0.5 * len(methods_of(results)))
    for place, (method, rows) in enumerate(methods_of(results).items()):
        trainable, total = rows[0]["trainable_parameters"], rows[0]["total_parameters"]
        axes.barh(place, trainable, color=COLOURS.get(method))
        axes.text(trainable, place, f"  {trainable:,d} ({trainable / total:.1%})", va="center", fontsize="small")
    axes.set_yticks(range(len(methods_of(results))), [LABELS.get(method, method) for method in methods_of(results)])
    axes.invert_yaxis()
    axes.margins(x=0.5)  # room for the numbers
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set(xlabel="trainable parameters", title="What is trained")
    return figure


def memory_bars(splits: dict[str, dict[str, int]], title: str = "Memory of a training step") -> Figure:
    """Bytes of tensors by kind for each method; each kind's own largest, and the peak of their sum."""
    figure, axes = new_figure(height=max(3, 0.8 * len(splits)))
    names = [*KINDS, "peak"]
    height = 0.8 / len(splits)
    for number, (method, split) in enumerate(splits.items()):
        places = [place + number * height for place in range(len(names))]
        values, label = [split[name] for name in names], LABELS.get(method, method)
        bars = axes.barh(places, values, height, color=COLOURS.get(method), label=label)
        axes.bar_label(bars, [EngFormatter("B", places=1)(split[name]) for name in names], padding=3, fontsize=7)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.set(xlabel="bytes of tensors (k, M, G: powers of 1000)", title=title)
    axes.legend(frameon=False, fontsize="small")
    return figure


def memory_stacks(splits: dict[str, dict[str, int]], title: str) -> Figure:
    """The split at the moment of the peak, stacked, one bar for each case: where the bytes go."""
    figure, axes = new_figure(height=1.2 + 0.4 * len(splits))
    left = [0.0] * len(splits)
    for kind in KINDS:
        values = [split[kind] for split in splits.values()]
        axes.barh(range(len(splits)), values, left=left, color=COLOURS[kind], label=kind)
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {EngFormatter('B', places=1)(total)}", va="center", fontsize="small")
    axes.set_yticks(range(len(splits)), list(splits))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.set(xlabel="bytes at the peak (k, M, G: powers of 1000)", title=title)
    figure.legend(frameon=False, fontsize="small", ncols=4, loc="outside lower center")
    return figure


def singular_values(spectra: dict[str, Sequence[float]], title: str = "Singular values of ΔW") -> Figure:
    """Sorted singular values, each spectrum divided by its largest."""
    figure, axes = new_figure()
    for name, values in spectra.items():
        axes.plot(
            range(1, len(values) + 1), [value / values[0] for value in values], label=name, color=COLOURS.get(name)
        )
    axes.set_yscale("log")
    axes.set(xlabel="number of the singular value", ylabel="relative to the largest", title=title)
    axes.legend(frameon=False, fontsize="small")
    return figure


def energy_curves(spectra: dict[str, Sequence[float]], title: str = "How low is the rank of ΔW?") -> Figure:
    """The share of ‖ΔW‖² that the first r singular directions hold, against r."""
    figure, axes = new_figure()
    for name, values in spectra.items():
        squares = [value**2 for value in values]
        shares = [sum(squares[: r + 1]) / sum(squares) for r in range(len(squares))]
        axes.plot(range(1, len(shares) + 1), shares, label=name, color=COLOURS.get(name))
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rank r", ylabel="share of ‖ΔW‖²", ylim=(0, 1.02), title=title)
    axes.legend(frameon=False, fontsize="small")
    return figure


def lines(
    curves: dict[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    log_x: bool = False,
) -> Figure:
    """Named curves (x values, y values), in the methods' colours where a name is a method's."""
    figure, axes = new_figure()
    axes.set_prop_cycle(color=["#999999", "#000000", "#F0E442", "#CC79A7"])  # of other names
    for name, (x, y) in curves.items():
        style = dict(color=COLOURS.get(name), marker="o", markersize=3)
        axes.plot(x, y, STYLES.get(name, "-"), label=LABELS.get(name, name), **style)
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.legend(frameon=False, fontsize="small")
    return figure


def scatter(points: dict[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, title: str) -> Figure:
    """Clouds of points (x, y) side by side, one for each method, on the same logarithmic axes."""
    figure = Figure(figsize=(1 + 2.2 * len(points), 2.8), layout="constrained")
    panels = figure.subplots(1, len(points), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (method, pairs) in zip(panels, points.items(), strict=True):
        x, y = zip(*pairs, strict=True)
        axes.plot(x, y, ".", color=COLOURS.get(method), markersize=3)
        axes.set(xscale="log", yscale="log", title=LABELS.get(method, method))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(xlabel, fontsize="medium")
    panels[0].set_ylabel(ylabel)
    figure.suptitle(title, fontsize="large")
    return figure


def learning_rate_grids(tuned: dict[str, dict], title: str) -> Figure:
    """Best validation loss over learning rate; the chosen rate of each method is ringed.

    tuned: by method {"grid": [{"learning_rate", "validation_loss"}, ...], "chosen"}, as in data/learning_rates.json.
    A loss of None (the run diverged) leaves a gap.
    """
    figure, axes = new_figure()
    for method, choice in tuned.items():
        tried = {point["learning_rate"]: point["validation_loss"] for point in choice["grid"]}
        losses = [float("nan") if loss is None else loss for loss in tried.values()]
        label, colour = LABELS.get(method, method), COLOURS.get(method)
        axes.plot(list(tried), losses, color=colour, label=label, marker="o", markersize=3)
        ring = dict(markersize=11, markerfacecolor="none")
        axes.plot(choice["chosen"], tried[choice["chosen"]], color=colour, marker="o", **ring)
    low, high = axes.get_ylim()
    if low < high / 5:  # losses on a task differ by factors, on real text by tenths
        axes.set_yscale("log")
    axes.set(xscale="log", xlabel="learning rate", ylabel="best validation loss (nats/token)", title=title)
    axes.legend(frameon=False, fontsize="small")
    return figure


def level_lines(
    curves: dict[str, tuple[Sequence[float], Sequence[float]]],
    levels: dict[str, float],
    xlabel: str,
    title: str,
    ylabel: str = "validation loss (nats/token)",
) -> Figure:
    """Named curves (x values, y values) on two logarithmic axes, beside levels that do not depend on x, dashed."""
    figure, axes = new_figure()
    axes.set_prop_cycle(color=["#000000", "#56B4E9", "#CC79A7", "#E69F00"])  # none of them a method's
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, marker="o", markersize=3)
    for name, level in levels.items():
        axes.axhline(level, color=COLOURS.get(name), linestyle="--", linewidth=1, label=LABELS.get(name, name))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.legend(frameon=False, fontsize="small")
    return figure


SCHEME_COLOURS = {"int4": "#E69F00", "fp4": "#CC79A7", "nf4": "#000000"}  # none of them a method's


def error_over_block_size(
    errors: dict[str, Sequence[float]], sizes: Sequence[int], bits: Sequence[float], title: str
) -> Figure:
    """Relative error of rounding over the block size, a curve for each name; under each size its bits per weight."""
    figure, axes = new_figure()
    for name, values in errors.items():
        axes.plot(sizes, values, label=name, color=SCHEME_COLOURS.get(name), marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size}\n{price:.2f}" for size, price in zip(sizes, bits, strict=True)], fontsize="small")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="weights in a block, and bits per weight", ylabel="‖w - w'‖ / ‖w‖", title=title)
    axes.legend(frameon=False, fontsize="small")
    return figure


def levels_over_weights(scaled: Sequence[float], levels: dict[str, Sequence[float]], title: str) -> Figure:
    """For each scheme the histogram of weights over their block's absmax, and its levels as lines through it."""
    figure = Figure(figsize=(5, 1 + 1.1 * len(levels)), layout="constrained")
    panels = figure.subplots(len(levels), sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(panels, levels.items(), strict=True):
        axes.hist(scaled, bins=101, range=(-1, 1), density=True, color="#CCCCCC")
        axes.vlines(values, 0, 1, transform=axes.get_xaxis_transform(), color=SCHEME_COLOURS.get(name), linewidth=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_title(title)
    panels[-1].set_xlabel("weight over its block's absmax")
    return figure
