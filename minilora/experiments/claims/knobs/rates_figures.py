"""The figures of the claims about rates: curves, their lowest points, and what moves these."""

from collections.abc import Mapping, Sequence
from statistics import fmean, geometric_mean

from minilora.experiments.claims.knobs.rates_runs import best, share_needed
from minilora.experiments.looks import (
    DARK,
    LIGHT,
    LOOKS,
    OTHERS,
    SMALL,
    finished,
    legend_below,
    log_ticks,
    new_figure,
    titled,
)
from minilora.experiments.pictures import Figure, redrawable

Runs = Mapping[str, Mapping[int, Mapping]]  # by arm and by seed
RATE = "learning rate"


def looks(arms: Sequence[str]) -> dict[str, dict]:
    """Colour, marker and line: full fine-tuning's everywhere the same colour, and others in their order."""
    own: dict[str, dict] = {}
    full = iter(OTHERS)  # of these the lines alone
    others = [look for look in OTHERS if look.colour != LOOKS["full"].colour]
    for arm in arms:
        if arm.startswith("full"):
            own[arm] = dict(color=LOOKS["full"].colour, marker="o", linestyle=next(full).line)
        else:
            look = others[sum(not name.startswith("full") for name in own) % len(others)]
            own[arm] = dict(color=look.colour, marker=look.marker if look.marker != "o" else "s", linestyle=look.line)
    return own


@redrawable
def rate_curves(title: str, runs: Runs) -> Figure:
    """The last loss over the rate: a thin line a seed, a thick one through the means, and a mark on the axis at the
    best rate, the mean of the seeds'. What is far above the best of every arm is cut off."""
    figure, (axes,) = new_figure(5, 3.2)
    axes.set(xscale="log", yscale="log")
    base = max(record["validation_loss"][0][1] for by_seed in runs.values() for record in by_seed.values())
    lows, rates = [], []
    for arm, look in looks(list(runs)).items():
        curves = [{rate: loss for rate, loss in record["curve"] if loss} for record in runs[arm].values()]
        for each in curves:
            axes.plot(list(each), list(each.values()), color=look["color"], linewidth=0.5, alpha=0.6)
        shared = sorted(set.intersection(*map(set, curves)))
        means = [geometric_mean([each[rate] for each in curves]) for rate in shared]
        middle = geometric_mean([best(record) for record in runs[arm].values()])
        axes.plot(shared, means, **look, markersize=4, label=f"{arm}, best {middle:.2g}")
        axes.plot([middle], [0.03], look["marker"], color=look["color"], transform=axes.get_xaxis_transform())
        axes.axvline(middle, color=look["color"], linestyle=look["linestyle"], linewidth=0.6, zorder=0)
        lows += [min(each.values()) for each in curves]
        rates += [rate for each in curves for rate in each]
    axes.axhline(base, color=LOOKS["base"].colour, linestyle=":", linewidth=1, label=f"base, {base:.2g} nats/token")
    axes.set_ylim(0.7 * min(lows), min(1.2 * base, 4 * max(lows)))
    log_ticks(axes.xaxis, rates)
    log_ticks(axes.yaxis, axes.get_ylim())
    titled(axes, title)
    axes.set(xlabel=RATE, ylabel="last validation loss\n(nats/token)")
    legend_below(figure, axes)
    return figure


@redrawable
def best_rates(title: str, runs: Runs) -> Figure:
    """The best rate of each arm: a dot a seed, and a bar at their mean with its number."""
    figure, (axes,) = new_figure(5, max(3, 1 + 0.28 * len(runs)))
    middles = []
    for place, (arm, by_seed) in enumerate(runs.items()):
        rates, look = [best(record) for record in by_seed.values()], looks([arm])[arm]
        middles.append(geometric_mean(rates))
        axes.plot(rates, [place] * len(rates), look["marker"], color=look["color"], markersize=4, alpha=0.7)
        axes.plot([middles[-1]], [place], "|", color=look["color"], markersize=12, markeredgewidth=2)
        axes.annotate(f"{middles[-1]:.2g}", (max(rates), place), (8, 0), textcoords="offset points", va="center")
    axes.set(xscale="log", xlabel=f"best {RATE}")
    axes.set_yticks(range(len(runs)), [LOOKS["full"].label if arm == "full" else arm for arm in runs])
    axes.invert_yaxis()
    axes.set_xlim(min(middles) / 2, max(middles) * 4)
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    log_ticks(axes.xaxis, middles)
    titled(axes, title)
    return figure


@redrawable
def alpha_law(title: str, runs: Runs) -> Figure:
    """The best rate over alpha, and the two laws it might follow through the middle of the first alpha's seeds."""
    figure, (axes,) = new_figure()
    by_alpha = {next(iter(of.values()))["alpha"]: [best(record) for record in of.values()] for of in runs.values()}
    alphas = sorted(by_alpha)
    middles = [geometric_mean(by_alpha[alpha]) for alpha in alphas]
    for power, line, label in ((1, "--", "product alone: 1/alpha"), (0.5, ":", "1/√alpha")):
        law = [middles[0] * (alpha / alphas[0]) ** -power for alpha in alphas]
        axes.plot(alphas, law, line, color=DARK, linewidth=1, label=label)
    for alpha in alphas:
        axes.plot([alpha] * len(by_alpha[alpha]), by_alpha[alpha], "o", color=LOOKS["lora"].colour, markersize=3)
    axes.plot(alphas, middles, "-s", color=LOOKS["lora"].colour, markersize=5, markerfacecolor="white", label="LoRA")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    log_ticks(axes.yaxis, [rate for rates in by_alpha.values() for rate in rates])
    axes.set_xticks([], minor=True)
    titled(axes, title)
    return finished(figure, axes, xlabel="alpha, at rank 8", ylabel=f"best {RATE}")


@redrawable
def loss_curves(title: str, runs: Runs) -> Figure:
    """The validation loss along the run, means over seeds."""
    figure, (axes,) = new_figure()
    for arm, look in looks(list(runs)).items():
        steps = [step for step, _ in next(iter(runs[arm].values()))["validation_loss"]]
        losses = zip(*([loss for _, loss in record["validation_loss"]] for record in runs[arm].values()), strict=True)
        axes.plot(steps, list(map(geometric_mean, losses)), **look, markersize=4, markevery=2, label=arm)
    axes.set(yscale="log")
    log_ticks(axes.yaxis, axes.get_ylim())
    titled(axes, title)
    return finished(figure, axes, xlabel="optimizer steps", ylabel="validation loss\n(nats/token)")


@redrawable
def batches(title: str, runs: Runs) -> Figure:
    """The loss at the best rate over the batch; beside LoRA's, how much of full fine-tuning's run it takes to be there.

    Hollow: the smallest batch with no more steps than the largest has.
    """
    figure, (axes,) = new_figure()
    points: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for arm, by_seed in runs.items():
        method, batch, *few = arm.split(", ")
        size, other = int(batch.removeprefix("batch ")), arm.replace("lora", "full", 1)
        losses = [record["best_validation_loss"] for record in by_seed.values()]
        points.setdefault((method, bool(few)), []).append((size, geometric_mean(losses)))
        axes.plot([size] * len(losses), losses, ".", color=LOOKS[method].colour, markersize=3)
        if method == "lora" and other in runs:
            needed = fmean(
                share_needed(runs[other][seed], record["best_validation_loss"])
                for seed, record in by_seed.items()
                if seed in runs[other]
            )
            text = dict(textcoords="offset points", fontsize=SMALL, va="bottom", ha="right")
            axes.annotate(f"{needed:.0f} %", (size, max(losses)), (-4, 4), **text)
    for (method, fewer), at in points.items():
        colour, face = LOOKS[method].colour, "white" if fewer else LOOKS[method].colour
        label, style = f"{LOOKS[method].label}{', few steps' * fewer}", "o-" if method == "full" else "s--"
        axes.plot(*zip(*sorted(at), strict=True), style, color=colour, markerfacecolor=face, markersize=6, label=label)
    sizes = sorted({size for at in points.values() for size, _ in at})
    axes.set(xscale="log", yscale="log", xlim=(sizes[0] / 1.6, sizes[-1] * 1.6))
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.12)
    log_ticks(axes.yaxis, axes.get_ylim())
    titled(axes, f"{title} (%: of full fine-tuning's run, until it is where LoRA ends)")
    axes.set(xlabel="batch (rows), at equal examples", ylabel="last validation loss\n(nats/token)")
    legend_below(figure, axes)
    return figure
