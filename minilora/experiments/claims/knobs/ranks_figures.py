"""The figure of the claims about ranks and layers: the loss of every arm on one axis."""

import statistics
import textwrap
from collections.abc import Mapping

from minilora.experiments.claims.claim import interval
from minilora.experiments.looks import BLUE, DARK, SMALL, VERMILION, legend_below, look_of, new_figure, titled
from minilora.experiments.pictures import Figure, redrawable

WITHIN = 5  # percent of the loss with rank 8: the claims' bar
LOOKS = {"rank, on all linears": ("o", BLUE), "elsewhere, as many numbers": ("s", VERMILION), "": ("D", DARK)}


def group_of(arm: str, method: str) -> str:
    if method == "full" or "times" in arm:
        return ""
    ranks, elsewhere, _ = LOOKS
    return ranks if arm.startswith("r=") else elsewhere


@redrawable
def ladder(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
    """A mean with its 90 % interval and a dot for each seed; under it the right answers. The untuned base is named."""
    trained = {arm: list(by_seed.values()) for arm, by_seed in runs.items() if arm != "base"}
    figure, (axes,) = new_figure(max(5, 1.2 + 0.53 * len(trained)), 3.4)
    lines: dict[str, list[tuple[int, float]]] = {label: [] for label in LOOKS}
    ticks = []
    for place, (arm, records) in enumerate(trained.items()):
        values = [record["best_validation_loss"] for record in records]
        mean, group = statistics.mean(values), group_of(arm, records[0]["method"])
        lines[group].append((place, mean))
        colour = LOOKS[group][1]
        axes.scatter([place] * len(values), values, color=colour, s=6, alpha=0.6)
        if len(values) > 1:
            low, _, high = interval(values)
            axes.errorbar(place, mean, [[mean - low], [high - mean]], color=colour, capsize=4)
        ticks.append(textwrap.fill(look_of(arm).label, 10))
        if "scores" in records[0]:
            ticks[-1] += f"\n{statistics.mean(record['scores']['task'] for record in records):.0%}"
        if arm == "r=8":
            near = {"color": BLUE, "alpha": 0.12, "linewidth": 0, "label": f"within {WITHIN} % of r=8"}
            axes.axhspan(mean * (1 - WITHIN / 100), mean * (1 + WITHIN / 100), **near)
    for label, points in lines.items():
        marker, colour = LOOKS[label]
        style = f"-{marker}" if label.startswith("rank") else marker
        axes.plot(*zip(*points, strict=True), style, color=colour, markersize=5, label=label) if points else None
    axes.set_xticks(range(len(ticks)), ticks, fontsize=SMALL - 1)
    if any("%" in tick for tick in ticks):
        axes.set_xlabel("percent: right answers", fontsize=SMALL)
    before = [record["best_validation_loss"] for record in runs.get("base", {}).values()]
    untuned = f"; untuned base {statistics.mean(before):.3g}" if before else ""
    axes.set(ylabel="best validation loss (nats/token)")
    titled(axes, f"{title}{untuned}")
    legend_below(figure, axes)
    return figure
