"""The figure of arms beside one of them: by how many percent their losses lie below it."""

from collections.abc import Mapping
from functools import partial
from statistics import fmean

from matplotlib.ticker import NullFormatter

from minilora.experiments.claims.claim import interval
from minilora.experiments.claims.study import Draw
from minilora.experiments.looks import BLACK, SMALL, look_of, new_figure, titled
from minilora.experiments.pictures import Figure, redrawable

BAR = 5  # percent, of the rules: what helps


def gains(measure: str, than: str, without: tuple[str, ...] = ("base",)) -> Draw:
    """A function that draws, for each arm, how far its loss lies below that of `than`, paired by seed: a dot a seed,
    the mean and its 90 % interval. Right of the dashed line it helps. The axis is linear to 10 %, logarithmic beyond.
    """
    return partial(draw_gains, measure=measure, than=than, without=without)


@redrawable
def draw_gains(
    title: str, runs: Mapping[str, Mapping[int, Mapping]], measure: str, than: str, without: tuple[str, ...]
) -> Figure:
    reference = runs.get(than, {})  # without runs before its turn has come
    arms = [arm for arm in runs if arm != than and arm not in without and set(runs[arm]) & set(reference)]
    figure, (axes,) = new_figure(height=1.2 + 0.28 * len(arms))
    for place, arm in enumerate(arms):
        colour = look_of(arm.partition(" r=")[0]).colour
        plain = {seed: reference[seed][measure] for seed in runs[arm] if seed in reference}
        values = [100 * (loss - runs[arm][seed][measure]) / loss for seed, loss in plain.items()]
        axes.scatter(values, [place] * len(values), s=14, color=colour, alpha=0.6)
        if len(values) > 1:
            low, mean, high = interval(values)
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color=BLACK, capsize=3, fmt="D", ms=4)
        axes.annotate(
            f"{fmean(values):+.1f}",
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=SMALL,
        )
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.axvline(BAR, color=BLACK, linestyle="--", linewidth=1)
    axes.set_xscale("symlog", linthresh=10)
    low, high = axes.get_xlim()
    fine = (-2, -1, 1, 2) if high < 10 else ()
    axes.set_xticks([tick for tick in (-300, -100, -30, -10, -5, *fine, 0, 5, 10, 30, 60) if low <= tick <= high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(arms)), [look_of(arm).label for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set(xlabel=f"loss below that of {look_of(than).label} (%): better to the right")
    titled(axes, title)
    return figure
