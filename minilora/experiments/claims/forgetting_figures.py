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
    """The loss on old text over the loss on the task, along each arm's run from left to right: means over seeds."""
    figure, (axes,) = new_figure(5, 3.2)
    ends: Ends = {}
    start = 0.0
    for arm, by_seed in runs.items():
        curves = list(zip(*(record["curve"] for record in by_seed.values()), strict=True))
        task = [geometric_mean([loss for _, loss, _ in at]) for at in curves]
        old = [fmean(loss for _, _, loss in at) for at in curves]
        start = old[0]
        name, _, part = arm.partition(" /")  # of the best rate
        if name not in LOOKS:  # the base, and what is another arm's run until its end
            continue
        label, colour, marker = LOOKS[name]
        line, face = (":" if part == "10" else "--", "white") if part else ("-", colour)
        axes.plot(task, old, line, color=colour, marker=marker, markersize=3, markerfacecolor=face, linewidth=1)
        ends[f"{label}, rate/{part}" if part else label] = (task[-1], old[-1], colour)
    axes.axhline(start, color="#999999", linestyle=":", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_xaxis()
    axes.annotate(
        "base",
        (0.99, start),
        ha="right",
        xycoords=("axes fraction", "data"),
        fontsize=SMALL,
        color="#666666",
        va="bottom",
    )
    axes.set(xlabel="task loss (nats/token): learned more to the right", ylabel="loss on old text\n(nats/token)")
    axes.set_title(title, fontsize="small", wrap=True)
    name_ends(axes, ends)
    return figure


def kinds_by_step(title: str, by_seed: Mapping[int, Mapping]) -> Figure:
    """How far the loss on each kind of old text has risen along one arm's run, means over seeds: what goes first."""
    figure, (axes,) = new_figure(5, 3.2)
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
    low, high = axes.get_ylim()
    names = sorted(ends, key=lambda name: ends[name][1])
    for name, height in zip(names, apart([(ends[name][1] - low) / (high - low) for name in names]), strict=True):
        x, y, colour = ends[name]
        join = dict(arrowstyle="-", color=colour, linewidth=0.5, shrinkA=0, shrinkB=2)
        text = dict(color=colour, fontsize=SMALL, va="center", annotation_clip=False)
        axes.annotate(
            name, (x, y), (1.04, height), xycoords="data", textcoords="axes fraction", arrowprops=join, **text
        )


def apart(heights: Sequence[float], least: float = 0.075) -> list[float]:
    """Rising heights from 0 to 1, moved as little as a pass up and a pass down allow, so that names do not overlap."""
    places = list(heights)
    for here in range(1, len(places)):
        places[here] = max(places[here], places[here - 1] + least)
    for here in range(len(places) - 1, -1, -1):
        above = places[here + 1] - least if here + 1 < len(places) else 1.0
        places[here] = min(places[here], above)
    return places
