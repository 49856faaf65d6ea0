"""The figures of the studies of forgetting."""

from collections.abc import Mapping, Sequence
from statistics import fmean, geometric_mean

from matplotlib.ticker import LogLocator, NullFormatter

from minilora.experiments.figures import Figure, Look, new_figure

Runs = Mapping[str, Mapping[int, Mapping]]  # by arm and by seed
LOOKS = {  # of an arm at its best rate; at a third of it the line is dashed, at a tenth dotted
    "full": Look("full fine-tuning", "#D55E00", "o"),
    "r=8": Look("LoRA r=8", "#0072B2", "s"),
    "r=1": Look("LoRA r=1", "#56B4E9", "^"),
    "r=64": Look("LoRA r=64", "#000000", "D"),
    "q,v": Look("LoRA q,v", "#009E73", "v"),
    "r=8 + old text": Look("LoRA r=8 + old text", "#CC79A7", "P"),
}
KIND_COLOURS = ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#000000", "#666666")
MARKERS = "os^Dv<>P"
SMALL = 7  # points
Ends = dict[str, tuple[float, float, str | None]]  # by name, where a line ends and its colour


def frontier(title: str, runs: Runs) -> Figure:
    """What is forgotten over the loss on the task, along each arm's run from left to right: means over seeds.

    The axis is linear from -0.1 to 0.1 and logarithmic beyond.
    """
    figure, (axes,) = new_figure(5, 3.2)
    ends: Ends = {}
    for arm, by_seed in runs.items():
        name, _, part = arm.partition(" /")  # of the best rate
        if name not in LOOKS or not by_seed:  # the base has no curve, and an arm that is changed at its end none to add
            continue
        curves = list(zip(*(record["curve"] for record in by_seed.values()), strict=True))
        task = [geometric_mean([loss for _, loss, _ in at]) for at in curves]
        forgotten = [fmean(loss for _, _, loss in at) for at in curves]
        forgotten = [loss - forgotten[0] for loss in forgotten]
        label, colour, marker = LOOKS[name]
        line, face = (":" if part == "10" else "--", "white") if part else ("-", colour)
        axes.plot(task, forgotten, line, color=colour, marker=marker, markersize=3, markerfacecolor=face, linewidth=1)
        ends[f"{label}, rate/{part}" if part else label] = (task[-1], forgotten[-1], colour)
    axes.axhline(0, color="#999999", linestyle=":", linewidth=1, zorder=0)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 1000 * low else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_xaxis()
    axes.set_yscale("symlog", linthresh=0.1)
    heights = [height for line in axes.lines for height in line.get_ydata()]
    axes.set_ylim(min(1.3 * min(heights), -0.02), 1.3 * max(heights))
    axes.set_yticks([tick for tick in (-1, -0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10) if within(axes.get_ylim(), tick)])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.annotate(
        "base",
        (0.99, 0),
        ha="right",
        xycoords=("axes fraction", "data"),
        fontsize=SMALL,
        color="#666666",
        va="bottom",
    )
    axes.set(
        xlabel="task loss (nats/token): learned more to the right",
        ylabel="loss on old text,\nabove the base's (nats/token)",
    )
    axes.set_title(title, fontsize="small", wrap=True)
    name_ends(axes, ends)
    return figure


def kinds_by_step(title: str, runs: Runs) -> Figure:
    """How far the loss on each kind of old text has risen along one arm's run, means over seeds: what goes first."""
    figure, (axes,) = new_figure(5, 3.2)
    (by_seed,) = runs.values()
    records = list(by_seed.values())
    ends: Ends = {}
    steps = [step for step, _, _ in records[0]["curve"]]
    for number, kind in enumerate(records[0]["kinds"]):
        rises = [[loss - record["kinds"][kind][0] for loss in record["kinds"][kind]] for record in records]
        mean, colour = list(map(fmean, zip(*rises, strict=True))), KIND_COLOURS[number % len(KIND_COLOURS)]
        line = "--" if kind.startswith("answer ") else "-"
        axes.plot(steps, mean, line, color=colour, marker=MARKERS[number % 8], markersize=3, linewidth=1)
        ends[kind] = (steps[-1], mean[-1], colour)
    axes.set(xlabel="optimizer steps", ylabel="rise of the loss\n(nats/token)")
    axes.set_title(title, fontsize="small", wrap=True)
    name_ends(axes, ends)
    return figure


def name_ends(axes, ends: Ends):
    """Writes each line's name to the right of the axes, joined to the line's end (x, y), in its colour."""
    names = sorted(ends, key=lambda name: ends[name][1])
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform(ends[name][:2])[1] for name in names]
    for name, height in zip(names, apart(heights), strict=True):
        x, y, colour = ends[name]
        join = dict(arrowstyle="-", color=colour, linewidth=0.5, shrinkA=0, shrinkB=2)
        text = dict(color=colour, fontsize=SMALL, va="center", annotation_clip=False)
        axes.annotate(
            name, (x, y), (1.04, height), xycoords="data", textcoords="axes fraction", arrowprops=join, **text
        )


def within(limits: tuple[float, float], value: float) -> bool:
    return limits[0] <= value <= limits[1]


def apart(heights: Sequence[float], least: float = 0.065) -> list[float]:
    """Rising heights from 0 to 1, moved as little as a pass up and a pass down allow, so that names do not overlap."""
    places = list(heights)
    for here in range(1, len(places)):
        places[here] = max(places[here], places[here - 1] + least)
    for here in range(len(places) - 1, -1, -1):
        above = places[here + 1] - least if here + 1 < len(places) else 1.0
        places[here] = min(places[here], above)
    return places
