"""The figures of the studies of ranks chosen by a program."""

from collections.abc import Mapping
from statistics import fmean

from matplotlib.ticker import LogLocator, NullFormatter

from minilora.experiments.looks import BLUE, DARK, LEGEND, VERMILION, new_figure, titled
from minilora.experiments.pictures import Figure, redrawable

Runs = Mapping[str, Mapping[int, Mapping]]  # by arm and by seed
KINDS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn")  # of a matrix, and where it stands
KINDS |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp")
NAMES = {"gradient": "from the gradient", "adalora": "AdaLoRA", "third": "steepest third"}
ALIKE = {"one alpha": "gradient, one alpha", "shuffled": "gradient, shuffled", "gradient /3": "gradient, rate/3"}
LOOKS = {"hand": (BLUE, "o"), "program": (VERMILION, "s"), "chance": (DARK, "^")}


@redrawable
def losses_by_arm(title: str, runs: Runs) -> Figure:
    """A dot for each seed's loss, a line for the mean; choices by hand, by a program and by chance look different."""
    runs = {arm: by_seed for arm, by_seed in runs.items() if arm != "base"}  # its loss is many times as high
    figure, (axes,) = new_figure(height=1 + 0.3 * len(runs))
    for place, (arm, by_seed) in enumerate(runs.items()):
        values = [record["best_validation_loss"] for record in by_seed.values()]
        kind = "chance" if arm == "shuffled" else "program" if arm in NAMES | ALIKE else "hand"
        colour, marker = LOOKS[kind]
        axes.plot(values, [place] * len(values), marker, color=colour, markersize=5, markerfacecolor="none", label=kind)
        axes.plot([fmean(values)] * 2, [place - 0.35, place + 0.35], color=colour, linewidth=2)
    if "uniform" in runs:
        mean = fmean(record["best_validation_loss"] for record in runs["uniform"].values())
        axes.axvline(mean, color=BLUE, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(runs)), [(NAMES | ALIKE).get(arm, arm.replace(" /", ", rate/")) for arm in runs])
    axes.invert_yaxis()
    axes.set(xlabel="best validation loss (nats/token)", xscale="log")  # rules are on percents
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    titled(axes, title)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, **LEGEND, loc="outside lower center", ncols=3)
    return figure


@redrawable
def rank_maps(title: str, runs: Runs) -> Figure:
    """Which layers get ranks: mean over seeds by layer and by kind of matrix, one map for each program."""
    arms = [arm for arm in NAMES if arm in runs]
    figure, panels = new_figure(2.4 * len(arms), 3.2, columns=len(arms))
    for axes, arm in zip(panels, arms, strict=True):
        ranks = [record["ranks"] for record in runs[arm].values()]
        means = [[fmean(at) for at in zip(*(each[kind] for each in ranks), strict=True)] for kind in KINDS]
        axes.imshow(means, cmap="Blues", vmin=0, vmax=30, aspect="auto")
        for row, values in enumerate(means):
            for column, r in enumerate(values):
                colour = "white" if r > 18 else "black"
                axes.annotate(f"{r:.0f}", (column, row), ha="center", va="center", fontsize=7, color=colour)
        axes.set_yticks(range(len(KINDS)), [kind.removesuffix("_proj") for kind in KINDS])
        axes.set_xticks(range(len(means[0])))
        axes.set_title(NAMES[arm], fontsize="small")
        axes.set_xlabel("layer")
    figure.suptitle(title, fontsize="small")
    return figure
