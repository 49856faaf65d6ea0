"""The figure of hard and soft labels over the number of examples."""

from collections.abc import Mapping
from statistics import fmean

from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

from minilora.experiments.looks import BLACK, BLUE, ORANGE, VERMILION, legend_below, new_figure, titled
from minilora.experiments.pictures import Figure, redrawable

LINES = {
    "hard": ("right answers of the data", VERMILION, "-o"),
    "written": ("answers that the teacher writes", ORANGE, ":^"),
    "soft": ("the teacher's probabilities", BLUE, "--s"),
}


@redrawable
def loss_over_examples(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
    """Means of the best validation loss with a bar from lowest to highest seed, both axes logarithmic."""
    figure, (axes,) = new_figure(5, 3.2)
    sizes = set()
    for kind, (label, colour, line) in LINES.items():
        points = {
            int(name.split()[1]): [run["best_validation_loss"] for run in by_seed.values()]
            for name, by_seed in runs.items()
            if name.split()[0] == kind and len(name.split()) == 2 and by_seed
        }
        if points:
            sizes |= set(points)
            means = [fmean(losses) for losses in points.values()]
            spread = [[mean - min(losses) for mean, losses in zip(means, points.values(), strict=True)],
                      [max(losses) - mean for mean, losses in zip(means, points.values(), strict=True)]]  # fmt: skip
            style = dict(color=colour, label=label, capsize=2, markersize=5, linewidth=1.2)
            axes.errorbar(list(points), means, spread, fmt=line, **style)
    for name, label in (("teacher", "the teacher itself"), ("base", "")):
        if label and runs.get(name):
            loss = fmean(run["best_validation_loss"] for run in runs[name].values())
            axes.axhline(loss, color=BLACK, linestyle="-.", linewidth=1, label=f"{label}, {loss:.3f}")
    axes.set(xscale="log", yscale="log", xlabel="examples", ylabel="best validation loss\n(nats/token)")
    axes.xaxis.set_major_locator(FixedLocator(sorted(sizes)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    titled(axes, title)
    legend_below(figure, axes)
    return figure
