"""The figures of the claims about data: the score over size and noise, and training and validation loss apart."""

import statistics
from collections.abc import Mapping

from minilora.experiments.looks import LEGEND, SMALL, VERMILION, look_of, new_figure
from minilora.experiments.pictures import Figure, redrawable

Runs = Mapping[str, Mapping[int, Mapping]]  # by arm and by seed
EQUAL = (50, 90)  # percent of right answers, each joined by a line
LINE = VERMILION  # seen on the dark and on the light end of the map


def cells(runs: Runs) -> dict[str, dict[tuple[int, float], float]]:
    """By method, by examples and share of wrong labels: percent of right answers, the mean of the seeds."""
    found: dict[str, dict[tuple[int, float], float]] = {}
    for arm, by_seed in runs.items():
        records = list(by_seed.values())
        method = records[0]["method"]
        if arm.startswith(f"{method} ") and records[0]["how"] == "another":  # no other rank, no other mistake
            place = records[0]["examples"], records[0]["wrong"]
            found.setdefault(method, {})[place] = 100 * statistics.mean(each["scores"]["task"] for each in records)
    return found


@redrawable
def score_map(title: str, runs: Runs) -> Figure:
    """Percent of right answers in every cell, dark to light, and lines of equal score from cell to cell."""
    methods = cells(runs)
    figure, panels = new_figure(2.2 + 2.4 * len(methods), 3, columns=len(methods))
    sizes = sorted({size for by_place in methods.values() for size, _ in by_place})
    shares = sorted({share for by_place in methods.values() for _, share in by_place})
    for axes, (method, by_place) in zip(panels, methods.items(), strict=True):
        rows = [[by_place.get((size, share), float("nan")) for size in sizes] for share in shares]
        image = axes.imshow(rows, cmap="cividis", vmin=0, vmax=100, origin="lower", aspect="auto")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if value == value:  # not NaN, which stands where nothing was run
                    colour, face = "black" if value > 55 else "white", image.cmap(image.norm(value))
                    clear = dict(facecolor=face, edgecolor="none", pad=1)  # of the lines
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, bbox=clear)
        whole = [y for y, row in enumerate(rows) if all(value == value for value in row)]  # lines need all neighbours
        if len(whole) > 1 and len(sizes) > 1:
            values = [rows[y] for y in whole]
            axes.contour(range(len(sizes)), whole, values, EQUAL, colors=LINE, linestyles=["--", "-"], zorder=1)
        axes.set(title=look_of(method).label, xlabel="training examples")
        axes.set_xticks(range(len(sizes)), [f"{size:,d}" for size in sizes])
    panels[0].set(ylabel="wrong labels")
    panels[0].set_yticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    figure.colorbar(image, ax=panels, label="right answers (%)\nlines: 50 (dashed) and 90")
    figure.suptitle(title, fontsize=SMALL + 1, wrap=True)
    return figure


@redrawable
def loss_curves(title: str, runs: Runs) -> Figure:
    """A panel an arm: the mean of the seeds, training loss dashed and validation loss solid, its lowest marked, and how
    far the last lies above it."""
    trained = {
        arm: list(by_seed.values()) for arm, by_seed in runs.items() if "train_loss" in next(iter(by_seed.values()))
    }
    figure, panels = new_figure(max(5, 1 + 1.5 * len(trained)), 3, columns=len(trained))
    for axes, (arm, records) in zip(panels, trained.items(), strict=True):
        colour = look_of(records[0]["method"]).colour
        for kind, line, label in (("train_loss", "--", "training"), ("validation_loss", "-", "validation")):
            steps = [step for step, _ in records[0][kind]]
            means = [
                statistics.mean(points)
                for points in zip(*[[y for _, y in each[kind]] for each in records], strict=True)
            ]
            axes.plot(steps, means, line, color=colour, label=label)
        lowest = min(range(len(means)), key=lambda place: means[place])
        axes.plot(steps[lowest], means[lowest], "o", color=colour, markersize=5)
        rise = statistics.mean(each["last_validation_loss"] / each["best_validation_loss"] - 1 for each in records)
        axes.set(yscale="log", xlabel="steps")
        axes.set_title(f"{arm.removesuffix(' 0%')}\nrises {rise:.0%}", fontsize=SMALL)
    panels[0].set(ylabel="loss (nats/token)")
    figure.legend(*panels[0].get_legend_handles_labels(), **LEGEND, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=SMALL + 1, wrap=True)
    return figure
