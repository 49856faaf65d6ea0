"""The figures that runs draw, one function each: numbers in, a matplotlib `Figure` out.

About 5 by 3 inches, axes with units, and one look for each method wherever it appears. The colours are those of Okabe
and Ito, which remain apart for colour-blind readers. There are more methods than such colours: of those that share one,
the second has a dashed line, the third a dotted one.
"""

import io
import statistics
from typing import Any, NamedTuple

import matplotlib.figure
from matplotlib.ticker import EngFormatter
from PIL import Image

from minilora.memory import KINDS


class Look(NamedTuple):
    label: str
    colour: str | None  # None: the next one of the axes
    line: str = "-"


LOOKS = {
    "full": Look("full fine-tuning", "#D55E00"),
    "lora": Look("LoRA", "#0072B2"),
    "qlora": Look("QLoRA", "#009E73"),
    "loftq": Look("LoftQ", "#009E73", "--"),
    "dora": Look("DoRA", "#CC79A7"),
    "rslora": Look("rsLoRA", "#56B4E9"),
    "lora+": Look("LoRA+", "#E69F00"),
    "lora-fa": Look("LoRA-FA", "#56B4E9", "--"),
    "pissa": Look("PiSSA", "#000000"),
    "olora": Look("OLoRA", "#000000", "--"),
    "eva": Look("EVA", "#000000", ":"),
    "adalora": Look("AdaLoRA-style", "#0072B2", "--"),
    "soft-prompt": Look("soft prompt", "#999999"),
    "prefix": Look("prefix tuning", "#999999", "--"),
    "base": Look("base", "#666666"),
    "limit": Look("limit", "#000000"),
}
MARKERS = {"-": "o", "--": "s", ":": "^"}  # by line, where there is a point and no line
LEGEND: dict[str, Any] = dict(frameon=False, fontsize="small")


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows as a picture when it is the last value of a cell. It needs no display."""

    alt = ""  # what the picture shows, in words, for those who do not see it

    def _repr_png_(self) -> bytes:
        picture, small = io.BytesIO(), io.BytesIO()
        self.savefig(picture, format="png", dpi=110)
        # 128 colours are enough for a drawing and take a third of the bytes, which a notebook stores.
        Image.open(picture).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
        return small.getvalue()


def look_of(name: str) -> Look:
    return LOOKS.get(name, Look(name, None))


def new_figure(width: float = 5, height: float = 3, rows: int = 1, columns: int = 1):
    """A figure of so many inches and its panels, which share the x axis, and in one row also the y axis."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def rows_downward(axes, names, unit: str | None, room: float, places=None):
    """Names the rows from the top down. room: for numbers to the right of bars; places: if not 0, 1, 2 ..."""
    axes.set_yticks(places or range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=room)
    if unit is not None:
        axes.xaxis.set_major_formatter(EngFormatter(unit))


def finished(figure: Figure, axes, **settings) -> Figure:
    """The figure, with its labels and its legend."""
    axes.set(**settings)
    axes.legend(**LEGEND)
    return figure


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


def loss_curves(results: dict) -> Figure:
    """Validation loss over steps: the mean of the seeds, a band from lowest to highest, and the entropy floor.

    The axis is logarithmic where the floor is zero: there each factor of ten is as much worth seeing as the last.
    """
    methods, floor = methods_of(results), results["loss_floor"]
    figure, (axes,) = new_figure(height=max(3, 1 + 0.25 * len(methods)))
    for method, rows in methods.items():
        steps = [step for step, _ in rows[0]["validation_loss"]]
        losses = list(zip(*[[loss for _, loss in row["validation_loss"]] for row in rows], strict=True))
        label, colour, line = look_of(method)
        axes.plot(steps, list(map(statistics.mean, losses)), line, color=colour, label=label, marker="o", markersize=3)
        if len(rows) > 1:
            low, high = list(map(min, losses)), list(map(max, losses))
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    if floor == 0:
        axes.set_yscale("log")
        axes.plot([], [], " ", label="entropy floor: 0")
    elif floor is not None:
        axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="entropy floor")
    axes.set(xlabel="optimizer steps", ylabel="validation loss (nats/token)", title=f"Task: {results['task']}")
    if len(methods) <= 4:
        axes.legend(**LEGEND)
    else:
        figure.legend(**LEGEND, loc="outside right upper")
    return figure


def loss_over_parameters(results: dict) -> Figure:
    """Best validation loss, and the score where there is one, against trainable parameters.

    One point a method, the mean of its seeds, with a bar from lowest to highest.
    """
    keys = {"best_validation_loss": "best validation loss\n(nats/token)"}
    if results["score_before"] is not None:
        keys["score"] = "score (share of answers right)"
    figure, panels = new_figure(6, 0.6 + 2.6 * len(keys), rows=len(keys))
    for axes, (key, title) in zip(panels, keys.items(), strict=True):
        axes.set(xscale="log", ylabel=title)
        for method, rows in methods_of(results).items():
            values, (label, colour, line) = [row[key] for row in rows], look_of(method)
            mean, style = statistics.mean(values), dict(fmt=MARKERS[line], markersize=5, capsize=3)
            spread = [[mean - min(values)], [max(values) - mean]]
            axes.errorbar(rows[0]["trainable_parameters"], mean, spread, color=colour, label=label, **style)
    if results["loss_floor"] == 0:
        panels[0].set_yscale("log")
    panels[0].set_title(f"Task: {results['task']}, {len(results['seeds'])} seeds")
    panels[-1].set_xlabel("trainable parameters")
    figure.legend(*panels[0].get_legend_handles_labels(), **LEGEND, loc="outside right upper")
    return figure


def parameter_bars(results: dict) -> Figure:
    """Trainable parameters of each method, with their share of all."""
    methods = methods_of(results)
    figure, (axes,) = new_figure(height=1 + 0.5 * len(methods))
    for place, (method, (row, *_)) in enumerate(methods.items()):
        trainable, total = row["trainable_parameters"], row["total_parameters"]
        axes.barh(place, trainable, color=look_of(method).colour)
        axes.text(trainable, place, f"  {trainable:,d} ({trainable / total:.1%})", va="center", fontsize="small")
    rows_downward(axes, [look_of(method).label for method in methods], "", 0.5)
    axes.set(xlabel="trainable parameters", title="What is trained")
    return figure


def memory_bars(splits: dict[str, dict[str, int]], title: str = "Memory of a training step") -> Figure:
    """Bytes of tensors by kind for each method; each kind's own largest, and the peak of their sum."""
    figure, (axes,) = new_figure(height=max(3, 0.8 * len(splits)))
    names, height = [*KINDS, "peak"], 0.8 / len(splits)
    for number, (method, split) in enumerate(splits.items()):
        values = [split[name] for name in names]
        places = [place + number * height for place in range(len(names))]
        bars = axes.barh(places, values, height, color=look_of(method).colour, label=look_of(method).label)
        axes.bar_label(bars, list(map(EngFormatter("B", places=1), values)), padding=3, fontsize=7)
    rows_downward(axes, names, "B", 0.15, [place + 0.4 - height / 2 for place in range(len(names))])
    return finished(figure, axes, xlabel="bytes of tensors (k, M, G: powers of 1000)", title=title)


def paired_losses(losses: dict[str, dict[int, float]], title: str) -> Figure:
    """The best validation loss of each arm, by seed; a line joins what one seed gave in all arms."""
    figure, (axes,) = new_figure()
    for seed in next(iter(losses.values())):
        axes.plot(list(losses), [arm.get(seed) for arm in losses.values()], color="#BBBBBB", linewidth=1, zorder=1)
    for place, (arm, by_seed) in enumerate(losses.items()):
        axes.scatter([place] * len(by_seed), list(by_seed.values()), color=look_of(arm).colour, zorder=2)
    axes.margins(x=0.3)
    axes.set(ylabel="best validation loss (nats/token)", title=title)
    return figure
