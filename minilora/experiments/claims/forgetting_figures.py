"""The figures of the studies of forgetting."""

from collections.abc import Mapping

from minilora.experiments.figures import Figure, new_figure

Runs = Mapping[str, Mapping[int, Mapping]]  # by arm and by seed


def frontier(title: str, runs: Runs) -> Figure:
    figure, (axes,) = new_figure()
    for arm, by_seed in runs.items():
        for record in by_seed.values():
            axes.plot([p[1] for p in record["curve"]], [p[2] for p in record["curve"]], label=arm)
    axes.set_xscale("log")
    return figure
