"""Things timed in turn, A B A B, in one process: what else the machine does meets all of them alike."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from minilora.ranges import ROUNDS

Actions = dict[str, Callable]  # by name, what is timed


@dataclass
class Timing:
    """How a measurement is taken, whatever is measured. Raises ValueError for rounds out of range."""

    rounds: int = 5
    threads: int = 2
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        ROUNDS.check("rounds", self.rounds)


def wait_for_device():
    """Until a GPU in use has done all that it was told to: a call of torch returns when the work is merely queued."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_in_turn(
    actions: Actions, timing: Timing, description: str, warm_up: Callable[[str, Callable], Any] | None = None
) -> dict[str, list[float]]:
    """For every action its time in each round.

    A round before these warms up and does not count. warm_up: called in it with name and action, to run the action.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in tqdm(range(1 + timing.rounds), description, disable=not timing.progress):
        for name, action in actions.items():
            wait_for_device()
            began = time.perf_counter()
            if number == 0 and warm_up is not None:
                warm_up(name, action)
            else:
                action()
            wait_for_device()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def ratios_to_first(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """For every action but the first, the ratio of its time to the first's in each round."""
    first, *others = seconds
    pairs = {name: zip(seconds[name], seconds[first], strict=True) for name in others}
    return {name: [own / reference for own, reference in pair] for name, pair in pairs.items()}


def ratios_in_turn(
    actions: Actions, timing: Timing, description: str, warm_up: Callable[[str, Callable], Any] | None = None
) -> dict[str, list[float]]:
    """`ratios_to_first` of `seconds_in_turn`."""
    return ratios_to_first(seconds_in_turn(actions, timing, description, warm_up))


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Inside the block torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_a_fresh_process(function: Callable, *arguments: Any, **environment: str) -> Any:
    """function(*arguments), in a process that starts with these variables of its environment set."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            return fresh.submit(function, *arguments).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
