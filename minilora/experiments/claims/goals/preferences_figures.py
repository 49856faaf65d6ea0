"""The figure of DPO over its steps: what the pairs' numbers say, and what the model says."""

from collections.abc import Mapping
from statistics import fmean

from minilora.experiments.looks import (
    BLACK,
    BLUE,
    GREEN,
    LEGEND,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    finished,
    new_figure,
    titled,
)
from minilora.experiments.pictures import Figure, redrawable

Curve = dict[str, list[float]]  # by what is measured
RATES = ((SKY, "v"), (BLUE, "o"), (GREEN, "s"), (PINK, "D"))  # of DPO, from low to high


@redrawable
def what_is_said(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
    """Means over seeds. Above, samples in the chosen style for each rate of DPO and for the best of supervised
    training, and the preference accuracy, which all rates of DPO share; below, the log-probabilities of both answers
    at the rate that comes to say the style most."""
    figure, (upper, lower) = new_figure(6, 4.8, rows=2)
    curves = {name: mean_curve(by_seed) for name, by_seed in runs.items() if by_seed}
    dpo = {name: curve for name, curve in curves.items() if name.rpartition(" ")[0] == "dpo"}
    sft = [curve for name, curve in curves.items() if name.rpartition(" ")[0] == "sft"]
    for (name, curve), (colour, marker) in zip(dpo.items(), RATES, strict=False):
        line(upper, curve, "said", f"said, DPO at {name.rpartition(' ')[2]}", colour, f"-{marker}", 100)
    if sft:
        line(
            upper,
            max(sft, key=lambda curve: curve["said"][-1]),
            "said",
            "said, SFT on the chosen",
            ORANGE,
            ":^",
            100,
        )
    if dpo:
        looks = zip(*(curve["accuracy"] for curve in dpo.values()), strict=True)
        accuracy = {"step": next(iter(dpo.values()))["step"], "accuracy": list(map(fmean, looks))}
        line(upper, accuracy, "accuracy", "preference accuracy, DPO", BLACK, "--x", 100)
        name = max(dpo, key=lambda name: max(dpo[name]["said"]))
        rate = name.rpartition(" ")[2]
        line(lower, dpo[name], "chosen", "chosen answer", GREEN, "-s", 1)
        line(lower, dpo[name], "rejected", "rejected answer", VERMILION, "--x", 1)
        finished(figure, lower, xlabel="optimizer steps", ylabel=f"log-probability at {rate}\n(nats an answer)")
    upper.set(ylabel="share (%)", ylim=(-4, 104))
    titled(upper, title)
    figure.legend(*upper.get_legend_handles_labels(), **LEGEND, loc="outside upper center", ncols=2)
    return figure


def line(axes, curve: Curve, what: str, label: str, colour: str, style: str, factor: float):
    values = [factor * value for value in curve[what]]
    axes.plot(curve["step"], values, style, color=colour, label=label, markersize=4, linewidth=1.2)


def mean_curve(by_seed: Mapping[int, Mapping]) -> Curve:
    looks = list(zip(*(run["curve"] for run in by_seed.values()), strict=False))
    return {what: [fmean(point[what] for point in look) for look in looks] for what in looks[0][0]}
