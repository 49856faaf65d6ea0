"""From lists of tokens to training data: whole documents packed into rows, long text cut, examples padded and masked.

`pack`, `cut` and `examples` each give `Batches` of N rows of T tokens. Labels follow the usual convention: labels[n, t]
is input_ids[n, t], or -100 (IGNORE) where the loss is not to count that token; the loss does the shift by one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.text.tokenizer import AnyTokenizer
from minilora.train_settings import IGNORE


@dataclass
class Batches:
    input_ids: Tensor  # (N, T) int64
    labels: Tensor  # (N, T) int64

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def counted_tokens(self) -> int:
        """How many tokens the loss counts. The first of a row is never among them: nothing stands before it."""
        return int((self.labels[:, 1:] != IGNORE).sum())


def pack(documents: Iterable[list[int]], length: int, tokenizer: AnyTokenizer) -> Batches:
    """Whole documents side by side in rows of `length` tokens, each framed: <bos> document <eos>.

    A document that does not fit the rest of a row starts the next row, so that no document is cut in two (a question
    cut off from its notes teaches guessing); only a document longer than a whole row is cut, into row-size pieces.
    The rest of a row is padding. The loss counts neither padding nor <bos>.
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
    """One long text as consecutive rows of `length` tokens, without an incomplete last row. ValueError for no row."""
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one sequence of {length}")
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)  # (N, T)
    return Batches(rows, rows.clone())


def examples(pairs: Iterable[tuple[str, str]], tokenizer: AnyTokenizer, max_length: int) -> Batches:
    """One (prompt, completion) a row: <bos> prompt completion <eos>. The loss counts only the completion and <eos>.

    Rows are padded to the longest. Prompt and completion are encoded apart, as generation has to encode a prompt.
    Raises ValueError for an example of more than `max_length` tokens.
    """
    rows, labels = [], []
    for prompt, completion in pairs:
        before = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        after = [*tokenizer.encode(completion), tokenizer.eos_id]
        size = len(before) + len(after)
        if size > max_length:
            raise ValueError(
                f"an example of {size} tokens is longer than the limit of {max_length}: {prompt[:40]!r}..."
            )
        rows.append(before + after)
        labels.append([IGNORE] * len(before) + after)
    length = max(len(row) for row in rows)
    return Batches(_padded(rows, length, tokenizer.eos_id), _padded(labels, length, IGNORE))


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
