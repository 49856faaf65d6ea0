"""The figure of DPO over its steps: what the pairs' numbers say, and what the model says."""

from collections.abc import Mapping
from statistics import fmean

from minilora.experiments.figures import LEGEND, Figure, new_figure


def what_is_said(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
    """Of DPO at the rate that says the chosen style most, means over seeds. Above preference accuracy and samples in
    the chosen style, also of supervised training; below the log-probabilities of both answers."""
    figure, (upper, lower) = new_figure(5, 4.4, rows=2)
    best: dict[str, tuple[float, str]] = {}
    for name, by_seed in runs.items():
        goal = name.rpartition(" ")[0]
        if goal in ("dpo", "sft") and by_seed:
            said = fmean(run["scores"]["said"] for run in by_seed.values())
            if goal not in best or said > best[goal][0]:
                best[goal] = said, name
    curves = {goal: mean_curve(runs[name]) for goal, (_, name) in best.items()}
    lines = [
        (upper, "dpo", "accuracy", "preference accuracy, DPO", "#000000", "--s", 100),
        (upper, "dpo", "said", "samples in the chosen style, DPO", "#0072B2", "-o", 100),
        (upper, "sft", "said", "the same, SFT on the chosen", "#E69F00", ":^", 100),
        (lower, "dpo", "chosen", "chosen answer, DPO", "#0072B2", "-o", 1),
        (lower, "dpo", "rejected", "rejected answer, DPO", "#D55E00", "--x", 1),
    ]
    for axes, goal, what, label, colour, line, factor in lines:
        if goal in curves:
            values = [factor * value for value in curves[goal][what]]
            axes.plot(curves[goal]["step"], values, line, color=colour, label=label, markersize=4, linewidth=1.2)
    upper.set(ylabel="share (%)", ylim=(-4, 104))
    lower.set(xlabel="optimizer steps", ylabel="log-probability\n(nats an answer)")
    rate = f"; DPO at {best['dpo'][1].rpartition(' ')[2]}" if "dpo" in best else ""
    upper.set_title(title + rate, fontsize="small", wrap=True)
    for axes in (upper, lower):
        axes.legend(**LEGEND)
    return figure


def mean_curve(by_seed: Mapping[int, Mapping]) -> dict[str, list[float]]:
    looks = list(zip(*(run["curve"] for run in by_seed.values()), strict=False))
    return {what: [fmean(point[what] for point in look) for look in looks] for what in looks[0][0]}
