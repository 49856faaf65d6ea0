"""Rows of the bench: the ratio of an action's time to another's, beside its bar and the ratio of what they multiply."""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from minilora.experiments.timing import Actions, Timing, ratios_in_turn


@dataclass
class BenchRow:
    """One claim: `ratio` is to be at most `bar`; without a bar it is a measurement and nothing is claimed."""

    claim: str
    ratio: float  # median over the rounds
    lowest: float
    highest: float
    bar: float | None
    arithmetic: float | None  # ratio of the matrix products' floating-point operations, where there are any


def interleave(actions: Actions, timing: Timing, description: str) -> tuple[dict, dict]:
    """Runs the actions in turn, and holds the others against the first.

    Returns, for each of the others, the ratio of its time to the first's in each round, and the ratio of its
    floating-point operations. Operations are counted in a first run of each, which also warms up and is not timed.
    """
    operations: dict[str, int] = {}

    def count(name: str, action: Callable):
        with FlopCounterMode(display=False) as counter:
            action()
        operations[name] = counter.get_total_flops()

    ratios, first = ratios_in_turn(actions, timing, description, count), next(iter(actions))
    return ratios, {name: operations[name] / operations[first] if operations[first] else None for name in ratios}


def measure(actions: Actions, timing: Timing, bars: dict[str, float], counted=True) -> list[BenchRow]:
    """A row for each action but the first, `interleave`d. counted: False where the operations say nothing."""
    last = list(actions)[-1]
    ratios, arithmetic = interleave(actions, timing, last) if counted else (ratios_in_turn(actions, timing, last), {})
    rows = []
    for claim, values in ratios.items():
        summary = statistics.median(values), min(values), max(values)
        rows.append(BenchRow(claim, *summary, bars.get(claim), arithmetic.get(claim)))
    return rows


def format_rows(rows: list[BenchRow], timing: Timing, shape: str) -> str:
    """The rows as a table, under the conditions of the measurement. Call it at once: it reads the load."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"  # Windows has none
    width = max(36, *(len(row.claim) for row in rows))
    lines = [
        f"torch {torch.__version__}, {timing.threads} threads, load over the last minute {load}, about "
        f"{timing.threads} of it our own (much more: something else was running, do not trust the ratios)",
        shape,
        f"\n{'':{width}}{'ratio':>7}{'lowest':>9}{'highest':>9}{'bar':>7}  {'':6}{'arithmetic':>12}",
    ]
    for row in rows:
        bar, verdict = ("-", "") if row.bar is None else (f"{row.bar:.2f}", "met" if row.ratio <= row.bar else "MISSED")
        arithmetic = "-" if row.arithmetic is None else f"{row.arithmetic:.3f}"
        numbers = f"{row.ratio:7.2f}{row.lowest:9.2f}{row.highest:9.2f}{bar:>7}"
        lines.append(f"{row.claim:{width}}{numbers}  {verdict:6}{arithmetic:>12}")
    lines.append("\nLimit of a LoRA step: 2/3 of the full step's products of weights (arithmetic 0.667).")
    return "\n".join(lines)
