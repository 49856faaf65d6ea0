"""Continuous batching: when a row of the batch is done, a waiting request takes its place (Orca, Yu 2022).

`generate` runs a batch until its longest answer ends; rows that finished early compute on for nothing. Here finished
rows leave the key/value cache at once and new ones are let in:

    . . a b c            row 0 of 5 tokens, two of them padding
    p q r s t            row 1 is done: it leaves
    . . . . x            a new prompt, computed on its own, comes in at the right edge

All rows end at the right edge, so that the next token is one column for all. What differs is the padding at the left,
which attention never looks at and positions do not count; where every row has padding, it is cut off.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.inference.bank import AdapterBank
from minilora.inference.generate import check_prompts, left_pad, next_tokens, row_generators
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
    eos_id: int | None = None,
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
        check_prompts(bank.model, [request.prompt], request.max_new_tokens, temperature, top_k, top_p, number)
        bank.check_known(request.adapter)
    return _run(bank, requests, batch_size, (temperature, top_k, top_p), seed, eos_id)


@torch.no_grad()
def _run(bank: AdapterBank, requests: Sequence[Request], batch_size: int, sampling: tuple, seed: int, eos_id):
    if bank.running is not None:
        raise ValueError("a batch of this bank is under way; end it before the next one begins")
    generators = row_generators(len(requests), seed)
    waiting = [Row(number, request, generators[number], []) for number, request in enumerate(requests)][::-1]
    rows, cache, selected = [], KVCache(), None

    def step(some: list[Row], ids: Tensor, own: KVCache):
        """One forward pass of ids (B, T) with each row's adapter, and one more token for each row."""
        nonlocal selected
        names = [row.request.adapter for row in some]
        if names != selected:  # as long as the rows stay, what was gathered for them serves
            bank.select(names)
            selected = names
        logits = bank.model.lm_head(bank.model.model(ids, own)[:, -1])  # (B, V)
        for row, token in zip(some, next_tokens(logits, *sampling, [row.random for row in some]).tolist(), strict=True):
            row.tokens.append(token)

    try:
        while rows or waiting:
            new, present = [], {row.request.adapter for row in rows} - {None}
            while waiting and len(rows) + len(new) < batch_size:
                present |= {waiting[-1].request.adapter} - {None}
                if len(present) > bank.slots:
                    break
                new.append(waiting.pop())
            if rows:
                step(rows, torch.tensor([row.tokens[-1:] for row in rows], device=bank.device), cache)
            if new:
                ids, padding = left_pad([row.request.prompt for row in new], bank.device)
                own = KVCache(padding)
                step(new, ids, own)
                rows, cache = rows + new, join(cache, own) if rows else own
            bank.running = [row.request.adapter for row in rows]  # whoever asks between two answers
            running = []
            for place, row in enumerate(rows):
                ended = row.tokens[-1] == eos_id
                if ended or len(row.tokens) == row.request.max_new_tokens:
                    yield row.number, row.tokens[:-1] if ended else row.tokens
                else:
                    running.append(place)
            if len(running) < len(rows):
                rows, cache = [rows[place] for place in running], keep(cache, running)
    finally:
        bank.select(None)


def join(first: KVCache, second: KVCache) -> KVCache:
    """The rows of both caches in one, the shorter one padded at the left."""
    length = max(len(first), len(second))
    both = KVCache(torch.cat([cache.padding + length - len(cache) for cache in (first, second)]))
    for layer in first.layers:
        pairs = [[F.pad(x, (0, 0, length - len(cache), 0)) for x in cache.layers[layer]] for cache in (first, second)]
        both.layers[layer] = tuple(torch.cat(kind) for kind in zip(*pairs, strict=True))
    return both


def keep(cache: KVCache, rows: list[int]) -> KVCache:
    """Those rows of the cache alone, without the columns that are padding in all of them."""
    padding = cache.padding[rows]
    cut = int(padding.min()) if rows else len(cache)
    kept = KVCache(padding - cut)
    kept.layers = {layer: tuple(x[rows, :, cut:] for x in pair) for layer, pair in cache.layers.items()}
    return kept
