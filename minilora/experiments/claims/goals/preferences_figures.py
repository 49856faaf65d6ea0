"""The figure of DPO over its steps: what the pairs' numbers say, and what the model says."""

from collections.abc import Mapping
from statistics import fmean

from minilora.experiments.figures import LEGEND, Figure, new_figure

Curve = dict[str, list[float]]  # by what is measured
RATES = (("#56B4E9", "v"), ("#0072B2", "o"), ("#009E73", "s"), ("#CC79A7", "D"))  # of DPO, from low to high


def what_is_said(title: str, runs: Mapping[str, Mapping[int, Mapping]]) -> Figure:
    """Means over seeds. Above, samples in the chosen style for each rate of DPO and for the best of supervised
    training, and the preference accuracy, which all rates of DPO share; below, the log-probabilities of both answers
    at the rate that comes to say the style most."""
    figure, (upper, lower) = new_figure(5.4, 4.6, rows=2)
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
            "#E69F00",
            ":^",
            100,
        )
    if dpo:
        looks = zip(*(curve["accuracy"] for curve in dpo.values()), strict=True)
        accuracy = {"step": next(iter(dpo.values()))["step"], "accuracy": list(map(fmean, looks))}
        line(upper, accuracy, "accuracy", "preference accuracy, DPO", "#000000", "--x", 100)
        name = max(dpo, key=lambda name: max(dpo[name]["said"]))
        rate = name.rpartition(" ")[2]
        line(lower, dpo[name], "chosen", f"chosen answer, DPO at {rate}", "#009E73", "-s", 1)
        line(lower, dpo[name], "rejected", "rejected answer", "#D55E00", "--x", 1)
        lower.legend(**LEGEND)
    upper.set(ylabel="share (%)", ylim=(-4, 104))
    lower.set(xlabel="optimizer steps", ylabel="log-probability\n(nats an answer)")
    upper.set_title(title, fontsize="small", wrap=True)
    figure.legend(*upper.get_legend_handles_labels(), **LEGEND, loc="outside upper center", ncols=2)
    return figure


def line(axes, curve: Curve, what: str, label: str, colour: str, style: str, factor: float):
    values = [factor * value for value in curve[what]]
    axes.plot(curve["step"], values, style, color=colour, label=label, markersize=4, linewidth=1.2)


def mean_curve(by_seed: Mapping[int, Mapping]) -> Curve:
    looks = list(zip(*(run["curve"] for run in by_seed.values()), strict=False))
    return {what: [fmean(point[what] for point in look) for look in looks] for what in looks[0][0]}
