"""The figure of arms beside one of them: by how many percent their losses lie below it."""

from collections.abc import Mapping
from statistics import fmean

from matplotlib.ticker import NullFormatter

from minilora.experiments.claims.claim import interval
from minilora.experiments.claims.study import Draw
from minilora.experiments.figures import Figure, look_of, new_figure

BAR = 5  # percent, of the rules: what helps


def gains(measure: str, than: str, without: tuple[str, ...] = ("base",)) -> Draw:
    """A function that draws, for each arm, how far its loss lies below that of `than`, paired by seed: a dot a seed,
    the mean and its 90 % interval. Right of the dashed line it helps. The axis is linear to 10 %, logarithmic beyond.
    """

    def draw(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
        reference = runs.get(than, {})  # without runs before its turn has come
        arms = [arm for arm in runs if arm != than and arm not in without and set(runs[arm]) & set(reference)]
        figure, (axes,) = new_figure(height=1.2 + 0.24 * len(arms))
        for place, arm in enumerate(arms):
            colour = look_of(arm.partition(" r=")[0]).colour or "#666666"
            plain = {seed: reference[seed][measure] for seed in runs[arm] if seed in reference}
            values = [100 * (loss - runs[arm][seed][measure]) / loss for seed, loss in plain.items()]
            axes.scatter(values, [place] * len(values), s=14, color=colour, alpha=0.6)
            if len(values) > 1:
                low, mean, high = interval(values)
                axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color="black", capsize=3, fmt="D", ms=4)
            axes.annotate(
                f"{fmean(values):+.1f}",
                (1.02, place),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize="small",
            )
        axes.axvline(0, color="black", linewidth=1)
        axes.axvline(BAR, color="black", linestyle="--", linewidth=1)
        axes.set_xscale("symlog", linthresh=10)
        low, high = axes.get_xlim()
        fine = (-2, -1, 1, 2) if high < 10 else ()
        axes.set_xticks([tick for tick in (-300, -100, -30, -10, -5, *fine, 0, 5, 10, 30, 60) if low <= tick <= high])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(arms)), [look_of(arm).label for arm in arms])
        axes.invert_yaxis()
        axes.set(xlabel=f"loss below that of {look_of(than).label} (%): better to the right")
        axes.set_title(title, fontsize="small", wrap=True)
        return figure

    return draw
