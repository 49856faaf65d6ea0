"""Continuous batching: when a row of the batch is done, a waiting request takes its place (Orca, Yu 2022).

`generate` runs a batch until its longest answer ends, and rows that finished early compute on for nothing. Here
finished rows leave the key/value cache at once, and new ones are let in:

    . . a b c            row 0 of 5 tokens, two of them padding
    p q r s t            row 1 is done: it leaves
    . . . . x            a new prompt, computed on its own, comes in at the right edge

All rows end at the right edge, so that the next token is one column for all. They differ in the padding at the left,
which attention never looks at and positions do not count. Columns that are padding in every row are cut off.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.inference.bank import AdapterBank
from minilora.inference.generate import check_prompts, choose_tokens, end_ids, left_pad, row_generators
from minilora.model import KVCache


@dataclass
class Request:
    """A prompt (token ids), the adapter that answers it (None: the base) and the most tokens it may take."""

    prompt: list[int]
    adapter: str | None = None
    max_new_tokens: int = 64


@dataclass
class Row:
    """A request on its way through the batch."""

    number: int  # of the request
    request: Request
    random: torch.Generator
    tokens: list[int]  # generated so far; the last one is not in the cache yet


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
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")
    for number, request in enumerate(requests):
        bank.check_known(request.adapter)
        how = request.max_new_tokens, temperature, top_k, top_p
        check_prompts(bank.model, [request.prompt], *how, number, [bank.virtual_tokens(request.adapter)])
    return _run(bank, requests, batch_size, temperature, top_k, top_p, seed, end_ids(eos_id), vocab_size)


@torch.no_grad()
def _run(bank: AdapterBank, requests, batch_size: int, temperature, top_k, top_p, seed: int, ends, vocab_size):
    if bank.running is not None:
        raise ValueError("a batch of this bank is under way; end it before the next one begins")
    generators = row_generators(len(requests), seed)
    waiting = [Row(number, request, generators[number], []) for number, request in enumerate(requests)][::-1]
    rows: list[Row] = []
    cache, selected = KVCache(), None

    def step(some: list[Row], ids: Tensor, own: KVCache):
        """One forward pass of ids (B, T) with each row's adapter, and one more token for each row."""
        nonlocal selected
        names = [row.request.adapter for row in some]
        if names != selected:  # as long as the rows stay, the A and B that were gathered for them serve
            bank.select(names)
            selected = names
        logits = bank.model.lm_head(bank.model.model(ids, own)[:, -1])  # (B, V)
        tokens = choose_tokens(logits[:, :vocab_size], temperature, top_k, top_p, [row.random for row in some])
        for row, token in zip(some, tokens.tolist(), strict=True):
            row.tokens.append(token)

    try:
        while rows or waiting:
            new: list[Row] = []
            present = {row.request.adapter for row in rows}
            while waiting and len(rows) + len(new) < batch_size:
                present |= {waiting[-1].request.adapter}
                if len(present - {None}) > bank.slots:
                    break
                new.append(waiting.pop())
            if rows:
                step(rows, torch.tensor([row.tokens[-1:] for row in rows], device=bank.device), cache)
            if new:
                ids, padding = left_pad([row.request.prompt for row in new], bank.device)
                own = bank.new_cache([row.request.adapter for row in new], padding)
                step(new, ids, own)
                rows, cache = rows + new, join(cache, own) if rows else own
            bank.running = [row.request.adapter for row in rows]  # in use, for those who ask between two answers
            running = []
            for place, row in enumerate(rows):
                ended = row.tokens[-1] in ends
                if ended or len(row.tokens) == row.request.max_new_tokens:
                    yield row.number, row.tokens[:-1] if ended else row.tokens
                else:
                    running.append(place)
            if len(running) < len(rows):
                rows, cache = [rows[place] for place in running], keep(cache, running)
    finally:
        bank.select(None)


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
