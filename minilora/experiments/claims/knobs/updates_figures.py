"""The figures of what an update looks like."""

from collections.abc import Mapping
from statistics import fmean

from matplotlib.ticker import LogLocator, NullFormatter

from minilora.experiments.claims.knobs.updates_runs import NEAR, NEARS, SIZES
from minilora.experiments.looks import (
    BLACK,
    BLUE,
    DARK,
    GREY,
    SKY,
    VERMILION,
    finished,
    legend_below,
    new_figure,
    titled,
)
from minilora.experiments.pictures import Figure, redrawable

Runs = Mapping[str, Mapping[int, Mapping]]  # by arm and by seed
NEW = "new of the first 10\nsingular vectors"
LOOKS = {  # colour and marker; at a rate that is not its own the line is dashed and the marker hollow
    "full": (VERMILION, "o"),
    "r=8": (BLUE, "s"),
    "r=1": (SKY, "^"),
    "r=64": (BLACK, "D"),
}


def style_of(arm: str) -> dict:
    colour, marker = LOOKS[arm.partition(",")[0]]
    style = dict(color=colour, marker=marker, markersize=4, label="full fine-tuning" if arm == "full" else arm)
    return style if arm in LOOKS else {**style, "linestyle": "--", "markerfacecolor": "none", "markersize": 8}


@redrawable
def by_cosine(title: str, runs: Runs) -> Figure:
    """How many vectors count as new, over the cosine below which they do; means over seeds."""
    figure, (axes,) = new_figure(5, 3.2)
    for arm, by_seed in runs.items():
        counts = [run["by_cosine"] for run in by_seed.values() if "by_cosine" in run]  # not of a run that diverged
        if counts:
            axes.plot(NEARS, list(map(fmean, zip(*counts, strict=True))), **style_of(arm))
    axes.axvline(NEAR, color=GREY, linestyle=":", linewidth=1)
    titled(axes, title)
    return finished(figure, axes, xlabel="new: its largest cosine with W's is below", ylabel=NEW)


@redrawable
def along_the_run(title: str, runs: Runs) -> Figure:
    """New vectors over the task loss, along each run from left to right; a line for each seed."""
    figure, (axes,) = new_figure(5, 3.2)
    for arm, by_seed in runs.items():
        for number, run in enumerate(by_seed.values()):
            _, task, new = zip(*run["curve"], strict=True)
            axes.plot(task, new, **style_of(arm) | ({} if number == 0 else {"label": None}), linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_xaxis()
    titled(axes, title)
    return finished(figure, axes, xlabel="task loss (nats/token): learned more to the right", ylabel=NEW)


@redrawable
def by_size(title: str, runs: Runs) -> Figure:
    """What two runs share of their first i directions, over i; means over seeds, beside random directions."""
    figure, (axes,) = new_figure(5, 3.4)
    records = list(runs["r=64"].values())
    looks = {
        "seeds, ΔW": ("ΔW of two seeds, r=64", dict(color=BLACK, marker="D")),
        "seeds, A": ("A of two seeds, r=64", dict(color=BLACK, marker="D", linestyle="--", markerfacecolor="white")),
        "ranks, ΔW": ("ΔW of r=8 and r=64", dict(color=BLUE, marker="s")),
        "ranks, A": ("A of r=8 and r=64", dict(color=BLUE, marker="s", linestyle="--", markerfacecolor="white")),
    }
    for name, (label, style) in looks.items():
        shares = [100 * fmean(at) for at in zip(*(record["shared"][name] for record in records), strict=True)]
        axes.plot(SIZES[: len(shares)], shares, label=label, markersize=4, **style)
    chance = [100 * share for share in records[0]["chance"]]
    axes.plot(SIZES, chance, color=GREY, linestyle=":", label="random directions")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, SIZES)
    axes.set(xlabel="first directions compared", ylabel="share in common (%)", ylim=(0, None))
    titled(axes, title)
    legend_below(figure, axes)
    return figure


@redrawable
def by_length(title: str, runs: Runs) -> Figure:
    """The rank of ΔW over the steps of a run, a line for each seed, beside LoRA's 8 and what the matrices allow."""
    figure, (axes,) = new_figure(5, 3.4)
    for number, run in enumerate(runs["full"].values()):
        steps, ranks = zip(*run["ranks"], strict=True)
        axes.plot(steps, ranks, **style_of("full") | ({} if number == 0 else {"label": None}))
    possible = run["scores"]["possible"]
    for height, line, label in (
        (8, "--", "LoRA's r=8"),
        (80, ":", "ten times that"),
        (possible, "-", "the most there is"),
    ):
        axes.axhline(height, color=DARK, linestyle=line, linewidth=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="directions with 90 % of ‖ΔW‖²")
    titled(axes, title)
    axes.set_xticks(steps, steps)
    ticks = [tick for tick in (8, 16, 40, 80, 160, 320) if tick < 2 * possible]
    axes.set_yticks(ticks, ticks)
    axes.minorticks_off()
    legend_below(figure, axes)
    return figure
