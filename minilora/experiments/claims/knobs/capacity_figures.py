"""The figures of the studies of capacity."""

import re
from collections.abc import Mapping
from statistics import fmean

from matplotlib.ticker import FixedLocator, NullFormatter

from minilora.experiments.claims.knobs.capacity_runs import ROUNDED
from minilora.experiments.looks import BLACK, BLUE, GREY, LEGEND, OTHERS, SMALL, finished, new_figure, titled
from minilora.experiments.pictures import Figure, redrawable

Runs = Mapping[str, Mapping[int, Mapping]]  # by arm and by seed
NOTE = {"textcoords": "offset points", "fontsize": SMALL}
TICKS = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
THIN = {"color": GREY, "linestyle": ":", "linewidth": 1, "zorder": 0}


def mean_of(by_seed: Mapping[int, Mapping], name: str) -> float:
    return fmean(run["scores"][name] for run in by_seed.values())


@redrawable
def by_parameters(title: str, runs: Runs) -> Figure:
    """Bits stored over trained parameters, both logarithmic, of adapters that have more to learn than they can hold."""
    figure, (axes,) = new_figure(5.5, 3.2)
    full = [arm for arm, by_seed in runs.items() if by_seed and arm != "base" and not re.search("facts|pairs", arm)]
    sizes = [next(iter(runs[arm].values()))["parameters"] for arm in full]
    ends = [0.8 * min(sizes), 1.6 * max(sizes)]
    for bits in (2, 1, 0.5):
        axes.plot(ends, [bits * end for end in ends], **THIN)
        axes.annotate(f"{bits:g} a parameter", (ends[0], bits * ends[0]), (4, 14), **NOTE, rotation=34)
    for arm, size, look in zip(full, sizes, OTHERS, strict=False):
        stored = [run["scores"]["stored"] for run in runs[arm].values()]
        spread = [[fmean(stored) - min(stored)], [max(stored) - fmean(stored)]]
        label = f"{arm}: {mean_of(runs[arm], 'per parameter'):.2f}"
        axes.errorbar(
            size, fmean(stored), spread, linestyle="", color=look.colour, marker=look.marker, capsize=3, label=label
        )
    axes.set(xscale="log", yscale="log", xlabel="trained parameters", ylabel="bits stored", xlim=ends)
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(FixedLocator([tick for tick in TICKS if low < tick < high]))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(NullFormatter())
    titled(axes, title)
    figure.legend(**LEGEND, loc="outside right upper", title="bits a parameter", title_fontsize=SMALL)
    return figure


@redrawable
def by_load(title: str, runs: Runs) -> Figure:
    """Bits stored over bits to learn, of one adapter: a point for each seed, a line through their means."""
    figure, (axes,) = new_figure()
    loads = sorted((next(iter(by_seed.values()))["bits"], by_seed) for by_seed in runs.values() if by_seed)
    ((parameters),) = {run["parameters"] for _, by_seed in loads for run in by_seed.values()}
    bits = [load for load, _ in loads]
    for load, by_seed in loads:
        axes.plot([load] * len(by_seed), [run["scores"]["stored"] for run in by_seed.values()], "o", color=BLUE)
    axes.plot(bits, [mean_of(by_seed, "stored") for _, by_seed in loads], "-", color=BLUE)
    most = 1.1 * max(2 * parameters, *(run["scores"]["stored"] for _, by_seed in loads for run in by_seed.values()))
    axes.plot([0, most], [0, most], **THIN)
    axes.annotate("all that there is", (0.8 * most, 0.8 * most), (-4, 0), **NOTE, ha="right")
    axes.axhline(2 * parameters, **THIN | {"linestyle": "--"})
    axes.annotate("two bits a parameter", (max(bits), 2 * parameters), (0, 3), **NOTE, ha="right")
    axes.set(xlabel="bits to learn", ylabel="bits stored", ylim=(0, most), xlim=(0, None))
    titled(axes, f"{title}: {parameters:,} parameters")
    return figure


@redrawable
def by_rounding(title: str, runs: Runs) -> Figure:
    """What is left of the bits stored over the bits of a number of the adapter, means over seeds."""
    figure, (axes,) = new_figure()
    digits = ["32", *(str(number) for number in ROUNDED.values())]
    for place, (arm, by_seed) in enumerate(runs.items()):
        left = [[run["rounded"][name] / run["scores"]["stored"] for name in ROUNDED] for run in by_seed.values()]
        shares = [100.0, *(100 * fmean(at) for at in zip(*left, strict=True))]
        axes.plot(digits, shares, **OTHERS[place]._replace(label=arm).style)
    axes.axhline(0, **THIN)
    axes.set_ylim(max(-60, axes.get_ylim()[0]), 105)
    titled(axes, title)
    what = "bits of each number of the adapter (16: bfloat16)"
    return finished(figure, axes, xlabel=what, ylabel="bits that are left (%)")


@redrawable
def by_need(title: str, runs: Runs) -> Figure:
    """Bits stored of facts, beside what random pairs say that the adapter can hold, and beside what there is."""
    figure, (axes,) = new_figure()
    arms = [arm for arm in runs if arm.startswith("facts")]
    density = mean_of(runs["r=1"], "per parameter")
    for place, arm in enumerate(arms):
        records = list(runs[arm].values())
        room, stored = density * records[0]["parameters"], [run["scores"]["stored"] for run in records]
        axes.bar(place - 0.2, room, 0.38, color=GREY, hatch="///", edgecolor="white", label="room" if not place else "")
        axes.bar(place + 0.2, fmean(stored), 0.38, color=BLUE, label="stored" if not place else "")
        axes.plot([place + 0.2] * len(stored), stored, "o", color="white", markeredgecolor=BLACK, markersize=4)
    axes.axhline(records[0]["bits"], color=BLACK, linestyle="--", linewidth=1, label="bits of all facts")
    axes.set_xticks(range(len(arms)), [f"{arm}\n{100 * mean_of(runs[arm], 'right'):.0f} % right" for arm in arms])
    axes.margins(y=0.15)
    titled(axes, title)
    return finished(figure, axes, ylabel="bits")
