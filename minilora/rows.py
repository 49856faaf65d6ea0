"""Which rows of the data a training step learns from, how many of their columns, and which places in them count.

All of it is a pure function of the data, the seed and the number of the step: a resumed run meets the batches that it
would have met, and nothing needs to be replayed.

Padding is work for nothing. A batch is cut behind its last counted token: attention is causal, so what stands there
changes nothing before it. With `group_by_length` a batch's rows are of like length, and more is cut off:

    shuffled       [ 9 2 7 3 ] [ 8 1 2 9 ] [ 3 8 1 7 ]      lengths; each batch is as wide as its longest row
    grouped        [ 7 8 8 9 ] [ 1 1 2 2 ] [ 3 3 7 9 ]      sorted within a window, its batches in a shuffled order

Letters in the shape comments: N rows, B of them a batch, T tokens.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from minilora.train_settings import IGNORE, Piece, Rows, TrainConfig

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
    """labels (N, T) -> how many columns each row needs, (N,): up to its last counted token, and at least one.

    Of pairs, labels (N, 2, T), the longer row decides."""
    columns = torch.arange(1, labels.shape[-1] + 1, device=labels.device)
    return ((labels != IGNORE) * columns).flatten(1).amax(1).clamp(min=1)


def trimmed(input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, T) without the trailing columns that no row needs."""
    longest = int(row_lengths(labels).max())
    return input_ids[..., :longest], labels[..., :longest]


def taken(data: Rows, rows: Tensor) -> tuple[Tensor, ...]:
    """These rows of the data, input_ids and labels (B, T), trimmed, and of whatever else it has for each row."""
    input_ids, labels = trimmed(data.input_ids[rows], data.labels[rows])
    return input_ids, labels, *(tensor[rows] for tensor in getattr(data, "more", ()))


def batch_of(data: Any, step: int, config: TrainConfig, model: Any = None) -> tuple[Tensor, ...]:
    """The batch of step `step`, as `taken` gives it and the loop sees it. Where the data lies, it is made.

    Data with a `draw` makes its batches itself, of the model as it is at that step, and needs nothing else."""
    if hasattr(data, "draw"):
        return data.draw(model, step, config)
    if config.group_by_length:
        rows = batch_rows_by_length(data.labels, step, config)
    else:
        rows = batch_rows(len(data.labels), step, config)
    return taken(data, rows)


def counted_places(targets: Tensor, counted_tokens: int | None = None) -> tuple[Tensor, ...]:
    """Rows and columns of the targets (b, T) that count, each (N,). counted_tokens: as in `training_step`."""
    counts = targets != IGNORE
    if not isinstance(targets, FakeTensor):
        return counts.nonzero(as_tuple=True)
    each = targets.shape[1] - 1 if counted_tokens is None else counted_tokens
    return torch.nonzero_static(counts, size=len(targets) * each).unbind(1)


def pieces_of(count: int, counted_tokens: int | None, *batch: Tensor) -> list[Piece]:
    """A batch as `count` micro-batches, which differ by one row at most: input_ids and targets (B, T), or of pairs
    (B, 2, T), and what there is more of each. counted_tokens: as in `training_step`."""
    pieces = []
    for ids, targets, *more in zip(*(part.tensor_split(count) for part in batch), strict=True):
        ids, targets = ids.flatten(0, -2), targets.flatten(0, -2)  # (b, T): a pair is two rows
        pieces.append(Piece(ids, targets, counted_places(targets, counted_tokens), tuple(more)))
    return pieces
