"""The figures of the studies of forgetting."""

from collections.abc import Mapping
from statistics import fmean, geometric_mean

from matplotlib.ticker import LogLocator, NullFormatter

from minilora.experiments.looks import (
    BLACK,
    BLUE,
    DARK,
    GREEN,
    GREY,
    OTHERS,
    PINK,
    SKY,
    SMALL,
    VERMILION,
    Look,
    finished,
    new_figure,
    titled,
)
from minilora.experiments.pictures import Figure, redrawable

Runs = Mapping[str, Mapping[int, Mapping]]  # by arm and by seed
LOOKS = {  # of an arm at its best rate; at a third of it the line is dashed, at a tenth dotted, and the marks hollow
    "full": Look("full fine-tuning", VERMILION),
    "r=8": Look("LoRA r=8", BLUE, marker="s"),
    "r=1": Look("LoRA r=1", SKY, marker="^"),
    "r=64": Look("LoRA r=64", BLACK, marker="D"),
    "q,v": Look("LoRA q,v", GREEN, marker="v"),
    "r=8 + old text": Look("LoRA r=8 + old text", PINK, marker="P"),
}


@redrawable
def frontier(title: str, runs: Runs) -> Figure:
    """What is forgotten over the loss on the task, along each arm's run from left to right: means over seeds.

    The axis is linear from -0.1 to 0.1 and logarithmic beyond.
    """
    figure, (axes,) = new_figure(5, 3.2)
    for arm, by_seed in runs.items():
        name, _, part = arm.partition(" /")  # of the best rate
        if name not in LOOKS or not by_seed:  # the base has no curve, and an arm that is changed at its end none to add
            continue
        curves = list(zip(*(record["curve"] for record in by_seed.values()), strict=True))
        task = [geometric_mean([loss for _, loss, _ in at]) for at in curves]
        forgotten = [fmean(loss for _, _, loss in at) for at in curves]
        forgotten = [loss - forgotten[0] for loss in forgotten]
        look = LOOKS[name]
        if part:
            look = look._replace(label=f"{look.label}, rate/{part}", line=":" if part == "10" else "--")
        axes.plot(task, forgotten, **look.style, markerfacecolor="white" if part else look.colour, linewidth=1.2)
    axes.axhline(0, color=GREY, linestyle=":", linewidth=1, zorder=0)
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
        color=DARK,
        va="bottom",
    )
    titled(axes, title)
    across, up = "task loss (nats/token): learned more to the right", "loss on old text,\nabove the base's (nats/token)"
    return finished(figure, axes, xlabel=across, ylabel=up)


@redrawable
def kinds_by_step(title: str, runs: Runs) -> Figure:
    """How far the loss on each kind of old text has risen along one arm's run, means over seeds: what goes first."""
    figure, (axes,) = new_figure(5, 3.2)
    (by_seed,) = runs.values()
    records = list(by_seed.values())
    steps = [step for step, _, _ in records[0]["curve"]]
    for number, kind in enumerate(records[0]["kinds"]):
        rises = [[loss - record["kinds"][kind][0] for loss in record["kinds"][kind]] for record in records]
        look = OTHERS[number % len(OTHERS)]._replace(label=kind, line="--" if kind.startswith("answer ") else "-")
        axes.plot(steps, list(map(fmean, zip(*rises, strict=True))), **look.style, linewidth=1.2)
    titled(axes, title)
    return finished(figure, axes, xlabel="optimizer steps", ylabel="rise of the loss\n(nats/token)")


def within(limits: tuple[float, float], value: float) -> bool:
    return limits[0] <= value <= limits[1]
