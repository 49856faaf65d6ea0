"""Which rows of the data a training step learns from, and how many of their columns.

All of it is a pure function of the data, the seed and the number of the step: a resumed run meets the batches that it
would have met, and nothing needs to be replayed.

Padding is work for nothing. A batch is cut behind its last counted token: attention is causal, so what stands there
changes nothing before it. With `group_by_length` a batch's rows are of like length, and more is cut off:

    shuffled       [ 9 2 7 3 ] [ 8 1 2 9 ] [ 3 8 1 7 ]      lengths; each batch is as wide as its longest row
    grouped        [ 7 8 8 9 ] [ 1 1 2 2 ] [ 3 3 7 9 ]      sorted within a window, its batches in a shuffled order

Letters in the shape comments: N rows, B of them a batch, T tokens.
"""

from functools import lru_cache

import torch
from torch import Tensor

from minilora.train_settings import IGNORE, Rows, TrainConfig

WINDOW = 16  # batches that are sorted together: enough for like lengths, few enough for an epoch's order to be random


def shuffled(count: int, seed: int, number: int) -> Tensor:
    """A permutation of `count` things that depends on seed and number alone, (count,)."""
    # The two are mixed into the low 32 bits, the only ones torch's CPU generator looks at.
    return torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + number))


epoch_order = lru_cache(maxsize=2)(shuffled)  # (rows, seed, epoch); a batch can span two epochs


def batch_rows(count: int, step: int, config: TrainConfig) -> Tensor:
    """The rows of step `step`'s batch, (B,): an endless deck, each epoch a fresh shuffle of all rows."""
    places = range(step * config.batch_size, (step + 1) * config.batch_size)
    return torch.stack([epoch_order(count, config.seed, place // count)[place % count] for place in places])


def batch_rows_by_length(labels: Tensor, step: int, config: TrainConfig) -> Tensor:
    """As `batch_rows`, (B,), with the rows of a window sorted by length and its batches dealt in a shuffled order.

    A window ends where the epoch does, and a batch that spans two epochs stays as it is: each row comes once an epoch.
    """
    count, size = len(labels), config.batch_size
    epoch = step * size // count
    first, end = -(-epoch * count // size), (epoch + 1) * count // size  # the epoch's whole batches
    if step >= end:
        return batch_rows(count, step, config)
    start = step - (step - first) % WINDOW
    window = range(start, min(start + WINDOW, end))
    rows = torch.cat([batch_rows(count, each, config) for each in window])
    by_length = rows[row_lengths(labels[rows]).argsort(stable=True)].view(-1, size)  # (batches, B)
    return by_length[shuffled(len(window), config.seed, start)[step - start]]


def row_lengths(labels: Tensor) -> Tensor:
    """labels (N, T) -> how many columns each row needs, (N,): up to its last counted token, and at least one."""
    columns = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != IGNORE) * columns).amax(1).clamp(min=1)


def trimmed(input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, T) without the trailing columns that no row needs."""
    longest = int(row_lengths(labels).max())
    return input_ids[:, :longest], labels[:, :longest]


def batch_of(data: Rows, step: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The batch of step `step`, input_ids and labels (B, T), as the loop sees it. Where the data lies, it is made."""
    if config.group_by_length:
        rows = batch_rows_by_length(data.labels, step, config)
    else:
        rows = batch_rows(len(data.labels), step, config)
    return trimmed(data.input_ids[rows], data.labels[rows])
