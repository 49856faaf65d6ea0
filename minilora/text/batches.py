"""From token lists to training data: whole documents packed into rows, long text cut, examples padded and masked.

All give `Batches`: input_ids and labels, int64, (N rows, T tokens). Labels follow the usual convention: labels[n, t]
is the token at t, or -100 (IGNORE) where the model is not asked to predict it; the loss does the shift by one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.text.tokenizer import Tokenizer

IGNORE = -100


@dataclass
class Batches:
    """input_ids and labels, each (N, T) int64."""

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def counted_tokens(self) -> int:
        """How many tokens the loss counts (the first of a row has nothing before it and is never predicted)."""
        return int((self.labels[:, 1:] != IGNORE).sum())


def pack(documents: Iterable[list[int]], length: int, tokenizer: Tokenizer) -> Batches:
    """Whole documents side by side in rows of `length` tokens, each framed: <bos> document <eos>.

    A document that does not fit the rest of a row starts the next one, so that no document is ever cut in two (a
    question cut off from its notes teaches guessing); one that is longer than a whole row is cut into row-size pieces.
    The rest of a row is padding, which the loss does not count, and neither does it count <bos>.
    """
    rows: list[list[int]] = [[]]
    for document in documents:
        ids = [tokenizer.bos_id, *document, tokenizer.eos_id]
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            if len(rows[-1]) + len(piece) > length:
                rows.append([])
            rows[-1] += piece
    input_ids = _padded(rows, length, tokenizer.eos_id)
    labels = _padded(rows, length, IGNORE)
    labels[labels == tokenizer.bos_id] = IGNORE
    return Batches(input_ids, labels)


def cut(ids: list[int], length: int) -> Batches:
    """One long text as consecutive rows of `length` tokens, every token counted; an incomplete last row is dropped.

    Raises ValueError if the text is shorter than one row.
    """
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one sequence of {length}")
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)  # (N, T)
    return Batches(rows, rows.clone())


def examples(pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer, max_length: int) -> Batches:
    """One (prompt, completion) a row: <bos> prompt completion <eos>. Only completion and <eos> are counted.

    Rows are padded to the longest. Prompt and completion are encoded apart, exactly as in generation.
    Raises ValueError for an example of more than `max_length` tokens.
    """
    rows, labels = [], []
    for prompt, completion in pairs:
        before = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        after = [*tokenizer.encode(completion), tokenizer.eos_id]
        if len(before) + len(after) > max_length:
            raise ValueError(
                f"an example of {len(before) + len(after)} tokens is longer than the limit of {max_length}: "
                f"{prompt[:40]!r}..."
            )
        rows.append(before + after)
        labels.append([IGNORE] * len(before) + after)
    length = max(len(row) for row in rows)
    return Batches(_padded(rows, length, tokenizer.eos_id), _padded(labels, length, IGNORE))


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
