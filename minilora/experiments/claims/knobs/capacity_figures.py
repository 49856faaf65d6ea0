"""The figures of the studies of capacity."""

import re
from collections.abc import Mapping
from statistics import fmean

from matplotlib.ticker import FixedLocator, NullFormatter

from minilora.experiments.claims.knobs.capacity_runs import ROUNDED
from minilora.experiments.figures import Figure, finished, new_figure

Runs = Mapping[str, Mapping[int, Mapping]]  # by arm and by seed
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^DvP"
SMALL = {"textcoords": "offset points", "fontsize": 7}
TICKS = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
THIN = {"color": "#999999", "linestyle": ":", "linewidth": 1, "zorder": 0}


def mean_of(by_seed: Mapping[int, Mapping], name: str) -> float:
    return fmean(run["scores"][name] for run in by_seed.values())


def by_parameters(title: str, runs: Runs) -> Figure:
    """Bits stored over trained parameters, both logarithmic, of adapters that have more to learn than they can hold."""
    figure, (axes,) = new_figure(5.5, 3.2)
    full = [arm for arm, by_seed in runs.items() if by_seed and arm != "base" and not re.search("facts|pairs", arm)]
    sizes = [next(iter(runs[arm].values()))["parameters"] for arm in full]
    ends = [0.8 * min(sizes), 1.6 * max(sizes)]
    for bits in (2, 1, 0.5):
        axes.plot(ends, [bits * end for end in ends], **THIN)
        axes.annotate(f"{bits:g} a parameter", (ends[0], bits * ends[0]), (4, 14), **SMALL, rotation=34)
    for arm, size, colour, marker in zip(full, sizes, COLOURS, MARKERS, strict=False):
        stored = [run["scores"]["stored"] for run in runs[arm].values()]
        spread = [[fmean(stored) - min(stored)], [max(stored) - fmean(stored)]]
        label = f"{arm}: {mean_of(runs[arm], 'per parameter'):.2f}"
        axes.errorbar(size, fmean(stored), spread, linestyle="", color=colour, marker=marker, capsize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="trained parameters", ylabel="bits stored", xlim=ends)
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(FixedLocator([tick for tick in TICKS if low < tick < high]))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize="small", wrap=True)
    figure.legend(frameon=False, fontsize=7, loc="outside right upper", title="bits a parameter", title_fontsize=7)
    return figure


def by_load(title: str, runs: Runs) -> Figure:
    """Bits stored over bits to learn, of one adapter: a point for each seed, a line through their means."""
    figure, (axes,) = new_figure()
    loads = sorted((next(iter(by_seed.values()))["bits"], by_seed) for by_seed in runs.values() if by_seed)
    ((parameters),) = {run["parameters"] for _, by_seed in loads for run in by_seed.values()}
    bits = [load for load, _ in loads]
    for load, by_seed in loads:
        axes.plot([load] * len(by_seed), [run["scores"]["stored"] for run in by_seed.values()], "o", color="#0072B2")
    axes.plot(bits, [mean_of(by_seed, "stored") for _, by_seed in loads], "-", color="#0072B2")
    most = 1.1 * max(2 * parameters, *(run["scores"]["stored"] for _, by_seed in loads for run in by_seed.values()))
    axes.plot([0, most], [0, most], **THIN)
    axes.annotate("all that there is", (0.8 * most, 0.8 * most), (-4, 0), **SMALL, ha="right")
    axes.axhline(2 * parameters, **THIN | {"linestyle": "--"})
    axes.annotate("two bits a parameter", (max(bits), 2 * parameters), (0, 3), **SMALL, ha="right")
    axes.set(xlabel="bits to learn", ylabel="bits stored", ylim=(0, most), xlim=(0, None))
    axes.set_title(f"{title}: {parameters:,} parameters", fontsize="small")
    return figure


def by_rounding(title: str, runs: Runs) -> Figure:
    """What is left of the bits stored over the bits of a number of the adapter, means over seeds."""
    figure, (axes,) = new_figure()
    digits = ["32", *(str(number) for number in ROUNDED.values())]
    for place, (arm, by_seed) in enumerate(runs.items()):
        left = [[run["rounded"][name] / run["scores"]["stored"] for name in ROUNDED] for run in by_seed.values()]
        shares = [100.0, *(100 * fmean(at) for at in zip(*left, strict=True))]
        axes.plot(digits, shares, f"-{MARKERS[place]}", color=COLOURS[place], markersize=4, label=arm)
    axes.axhline(0, **THIN)
    axes.set_ylim(max(-60, axes.get_ylim()[0]), 105)
    axes.set_title(title, fontsize="small", wrap=True)
    what = "bits of each number of the adapter (16: bfloat16)"
    return finished(figure, axes, xlabel=what, ylabel="bits that are left (%)")


def by_need(title: str, runs: Runs) -> Figure:
    """Bits stored of facts, beside what random pairs say that the adapter can hold, and beside what there is."""
    figure, (axes,) = new_figure()
    arms = [arm for arm in runs if arm.startswith("facts")]
    density = mean_of(runs["r=1"], "per parameter")
    for place, arm in enumerate(arms):
        records = list(runs[arm].values())
        room, stored = density * records[0]["parameters"], [run["scores"]["stored"] for run in records]
        axes.bar(
            place - 0.2, room, 0.38, color="#999999", hatch="///", edgecolor="white", label="room" if not place else ""
        )
        axes.bar(place + 0.2, fmean(stored), 0.38, color="#0072B2", label="stored" if not place else "")
        axes.plot([place + 0.2] * len(stored), stored, "o", color="white", markeredgecolor="black", markersize=4)
        right = f"{100 * mean_of(runs[arm], 'right'):.0f} % right"
        axes.annotate(right, (place + 0.2, max(stored)), (0, 5), **SMALL, ha="center")
    axes.axhline(records[0]["bits"], color="black", linestyle="--", linewidth=1, label="bits of all facts")
    axes.set_xticks(range(len(arms)), arms)
    axes.margins(y=0.15)
    axes.set_title(title, fontsize="small", wrap=True)
    return finished(figure, axes, ylabel="bits")
