"""Continuous batching: when a row of the batch is done, a waiting request takes its place (Orca, Yu 2022).

`generate` runs a batch until its longest answer ends, and rows that finished early compute on for nothing. Here
finished rows leave the key/value cache at once, and new ones are let in:

    . . a b c            row 0 of 5 tokens, two of them padding
    p q r s t            row 1 is done: it leaves
    . . . . x            a new prompt, computed on its own, comes in at the right edge

All rows end at the right edge, so that the next token is one column for all. They differ in the padding at the left,
which attention never looks at and positions do not count. Columns that are padding in every row are cut off.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.inference.bank import AdapterBank
from minilora.inference.generate import BROKEN_LOGITS, check_prompts, choose_tokens, end_ids, left_pad, row_generators
from minilora.inference.prepared import Prepared
from minilora.model import KVCache


@dataclass
class Request:
    """A prompt (token ids), the adapter that answers it (None: the base) and the most tokens it may take."""

    prompt: list[int]
    adapter: str | None = None
    max_new_tokens: int = 64


@dataclass(eq=False)
class Row:
    """A request on its way through the batch."""

    number: int  # of the request
    request: Request
    random: torch.Generator
    how: tuple[float, int | None, float | None] = (0.0, None, None)  # temperature, top_k, top_p
    ends: Collection[int] = ()  # the tokens that end it
    tokens: list[int] = field(default_factory=list)  # generated so far; the last one is not in the cache yet
    broken: bool = False  # its logits were no numbers

    @property
    def ended(self) -> bool:
        return self.tokens[-1] in self.ends

    @property
    def done(self) -> bool:
        return self.broken or self.ended or len(self.tokens) == self.request.max_new_tokens


def serve(
    bank: AdapterBank,
    requests: Sequence[Request],
    batch_size: int = 16,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Answers the requests, at most `batch_size` at a time; yields (number of the request, new tokens) as they finish.

    A request's tokens are those that `bank.generate` gives for the whole list, whatever else is in the batch. A request
    whose adapter finds no slot beside those of the running rows waits until one is free.

    Raises ValueError, before anything runs, for what `generate` refuses, an unknown adapter and a batch_size below 1;
    and at the first answer, if another batch of the bank is under way then.
    """
    check_batch_size(batch_size)
    how = temperature, top_k, top_p
    for number, request in enumerate(requests):
        check_request(bank, request, *how, number=number)
    return _run(bank, requests, batch_size, how, seed, end_ids(eos_id), vocab_size)


def check_batch_size(batch_size: int):
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")


def check_request(bank: AdapterBank, request: Request, temperature, top_k=None, top_p=None, number: int = 0):
    """Raises ValueError for an unknown adapter, and for what `generate` refuses."""
    bank.check_known(request.adapter)
    how = request.max_new_tokens, temperature, top_k, top_p
    check_prompts(bank.model, [request.prompt], *how, number, [bank.virtual_tokens(request.adapter)])


def _run(bank: AdapterBank, requests: Sequence[Request], batch_size: int, how, seed: int, ends, vocab_size):
    generators = row_generators(len(requests), seed)
    waiting = deque(Row(number, request, generators[number], how, ends) for number, request in enumerate(requests))
    batch = RunningBatch(bank, batch_size, vocab_size)
    try:
        while batch.rows or waiting:
            for row in batch.step(waiting):
                if row.broken:
                    raise ValueError(BROKEN_LOGITS)
                yield row.number, row.tokens[:-1] if row.ended else row.tokens
            batch.leave([row for row in batch.rows if row.done])
    finally:
        batch.close()


class RunningBatch:
    """The rows that run at the moment. Whoever holds it steps, hands out what is done and lets it leave, until none is
    left; and closes it.

    Raises ValueError where another batch of the bank is under way.
    """

    def __init__(self, bank: AdapterBank, batch_size: int, vocab_size: int | None = None):
        if bank.running is not None:
            raise ValueError("a batch of this bank is under way; end it before the next one begins")
        self.bank, self.batch_size, self.vocab_size = bank, batch_size, vocab_size
        self.rows: list[Row] = []
        self.cache = KVCache()
        self.selected: list[str | None] | None = None
        self.prepared = Prepared(bank.model)

    def step(self, waiting: deque[Row]) -> list[Row]:
        """One token more for each row, and the first one for those that come in from the front of `waiting`; returns
        the rows that are done, which are in the batch until they `leave`."""
        new = self._admitted(waiting)
        if self.rows:
            ids = torch.tensor([row.tokens[-1:] for row in self.rows], device=self.bank.device)
            self._forward(self.rows, ids, self.cache)
        if new:
            ids, padding = left_pad([row.request.prompt for row in new], self.bank.device)
            own = self.bank.new_cache([row.request.adapter for row in new], padding)
            self._forward(new, ids, own)
            self.rows, self.cache = self.rows + new, join(self.cache, own) if self.rows else own
        # In use, for those who ask between two steps.
        self.bank.running = [row.request.adapter for row in self.rows]
        return [row for row in self.rows if row.done]

    def _admitted(self, waiting: deque[Row]) -> list[Row]:
        """Takes from `waiting` the rows for which there is a place, and a slot for their adapter."""
        new: list[Row] = []
        present = {row.request.adapter for row in self.rows}
        while waiting and len(self.rows) + len(new) < self.batch_size:
            present |= {waiting[0].request.adapter}
            if len(present - {None}) > self.bank.slots:
                break
            new.append(waiting.popleft())
        return new

    @torch.no_grad()
    def _forward(self, rows: list[Row], ids: Tensor, cache: KVCache):
        """One forward pass of ids (B, T) with each row's adapter, and one more token for each row."""
        names = [row.request.adapter for row in rows]
        if names != self.selected:  # as long as the rows stay, the A and B that were gathered for them serve
            self.bank.select(names)
            self.selected = names
        with self.prepared:
            hidden = self.bank.model.model(ids, cache)  # (B, T, C)
            logits = self.bank.model.lm_head(hidden[:, -1])[:, : self.vocab_size]  # (B, V)
        for row, finite in zip(rows, logits.isfinite().all(1).tolist(), strict=True):
            row.broken = not finite
        for how in dict.fromkeys(row.how for row in rows if not row.broken):
            places = [place for place, row in enumerate(rows) if row.how == how and not row.broken]
            tokens = choose_tokens(logits[places], *how, [rows[place].random for place in places])
            for place, token in zip(places, tokens.tolist(), strict=True):
                rows[place].tokens.append(token)

    def leave(self, rows: Collection[Row]):
        """These rows leave the batch, done or not."""
        staying = [place for place, row in enumerate(self.rows) if row not in rows]
        if len(staying) < len(self.rows):
            self.rows, self.cache = [self.rows[place] for place in staying], keep(self.cache, staying)
            self.bank.running = [row.request.adapter for row in self.rows]
        if not self.rows:
            self.close()

    def close(self):
        """Ends the batch: all rows are gone, and the model is the base. It can begin again."""
        self.rows, self.cache, self.selected = [], KVCache(), None
        self.bank.select(None)


def pad_left(cache: KVCache, length: int) -> KVCache:
    """The cache with padding in front, `length` columns in all."""
    missing = length - len(cache)
    layers = {n: (F.pad(k, (0, 0, missing, 0)), F.pad(v, (0, 0, missing, 0))) for n, (k, v) in cache.layers.items()}
    return KVCache(F.pad(padding_of(cache), (missing, 0), value=True), layers)


def join(first: KVCache, second: KVCache) -> KVCache:
    """The rows of both caches in one, the shorter one padded at the left."""
    length = max(len(first), len(second))
    one, two = pad_left(first, length), pad_left(second, length)
    layers = {}
    for n, (k, v) in one.layers.items():
        layers[n] = torch.cat([k, two.layers[n][0]]), torch.cat([v, two.layers[n][1]])
    return KVCache(torch.cat([padding_of(one), padding_of(two)]), layers)


def keep(cache: KVCache, rows: list[int]) -> KVCache:
    """These rows of the cache alone, without the columns that are padding in all of them."""
    padding = padding_of(cache)[rows]
    used = ~padding.all(0)  # not the first columns alone: padding also stands between a prompt of the bank and a text
    return KVCache(
        padding[:, used], {n: (k[rows][:, :, used], v[rows][:, :, used]) for n, (k, v) in cache.layers.items()}
    )


def padding_of(cache: KVCache) -> Tensor:
    """True where a column of a row is padding, (rows, S)."""
    k = cache.layers[0][0]
    padding = cache.padding_of(len(cache))
    return torch.zeros(len(k), len(cache), dtype=torch.bool, device=k.device) if padding is None else padding
