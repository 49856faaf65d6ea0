"""Continuous batching, held against every request on a model of its own."""

import functools
from collections import deque

import pytest
import torch
from test_bank import ADAPTERS, EVERY, LIMIT, VOCABULARY, alone, base, logits

from minilora.inference.bank import AdapterBank
from minilora.inference.generate import generate, row_generators
from minilora.inference.serve import Request, Row, RunningBatch, join, keep, serve
from minilora.model import KVCache

RANDOM = torch.Generator().manual_seed(5)
REQUESTS = [
    Request(torch.randint(VOCABULARY, (length,), generator=RANDOM).tolist(), adapter, new)
    for length, adapter, new in (
        *[(3, "few", 9), (7, None, 2), (1, "all", 5), (5, "few", 1), (12, "stable", 12), (6, "patterns", 2)],
        *[(4, None, 7), (1, "one", 3), (20, "all", 12), (2, "head", 4), (2, "few", 9)],
    )
]
SKEWED = [Request([number + 1], "few", 2 if number % 4 else 12) for number in range(12)]  # one long in every four


@pytest.fixture
def bank() -> AdapterBank:
    return AdapterBank(base(), ADAPTERS)


@functools.cache
def expected(eos_id: int | None) -> list[list[int]]:
    models = [alone(ADAPTERS[request.adapter] if request.adapter else None) for request in REQUESTS]
    return [
        generate(model, [request.prompt], request.max_new_tokens, eos_id=eos_id)[0]
        for model, request in zip(models, REQUESTS, strict=True)
    ]


def watch_passes(bank: AdapterBank, monkeypatch) -> list[tuple[int, int, int]]:
    """Of every forward pass to come: rows, columns in the cache, and how many of those are padding in all rows."""
    passes, forward = [], bank.model.model.forward

    def watched(ids, cache=None):
        assert not torch.is_grad_enabled(), "a pass was made with gradients on"
        wasted = 0 if cache.padding is None or not len(cache) else int(cache.padding.int().sum(1).min())
        passes.append((len(ids), len(cache), wasted))
        return forward(ids, cache)

    monkeypatch.setattr(bank.model.model, "forward", watched)
    return passes


@pytest.mark.parametrize(("batch_size", "slots"), [(1, 1), (2, 2), (3, 64), (50, 64)])
@pytest.mark.parametrize("stops", [True, False])
def test_every_request_is_answered_once_as_if_alone(batch_size, slots, stops):
    eos_id = expected(None)[0][4] if stops else None
    answers = list(serve(AdapterBank(base(), ADAPTERS, slots), REQUESTS, batch_size, eos_id=eos_id))
    assert sorted(number for number, _ in answers) == list(range(len(REQUESTS)))
    early = sum(len(a) < len(b) for a, b in zip(expected(eos_id), expected(None), strict=True))
    assert early > 1 or not stops, "more than one answer must stop early"
    for number, tokens in answers:
        assert tokens == expected(eos_id)[number], f"request {number}, {REQUESTS[number]}"


def test_a_row_without_an_adapter_needs_no_slot_and_one_that_left_holds_no_adapter():
    bank = AdapterBank(base(), ADAPTERS, slots=1)
    (random,) = row_generators(1, 0)
    rows = [Row(number, Request([1], name, 5), random) for number, name in enumerate(("few", None))]
    batch = RunningBatch(bank, 4)
    batch.step(deque(rows))
    assert batch.rows == rows, f"{len(batch.rows)} of 2 rows came in"
    with pytest.raises(ValueError, match="in use"):
        bank.remove("few")
    batch.leave(rows[:1])
    bank.remove("few")
    batch.close()


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize(
    "settings", [dict(temperature=1.0, seed=1), dict(temperature=2.0, top_k=9, top_p=0.9, eos_id=5)]
)
def test_samples_are_those_of_one_batch_of_all(bank, settings, batch_size):
    requests = [Request(request.prompt, request.adapter, 10) for request in REQUESTS]
    want = bank.generate([r.prompt for r in requests], [r.adapter for r in requests], 10, **settings)
    found = dict(serve(bank, requests, batch_size, **settings))
    assert [found[number] for number in range(len(requests))] == want


PROMPTED = [
    Request(torch.randint(VOCABULARY, (length,), generator=RANDOM).tolist(), adapter, new)
    for length, adapter, new in (
        *[(3, "soft", 9), (7, None, 2), (1, "prefix", 12), (5, "few", 1), (12, "short", 2), (20, "dora", 12)],
        *[(1, "prefix", 5), (1, None, 12), (15, "prefix", 12), (20, "all", 12), (2, "soft", 4), (LIMIT - 4, None, 4)],
    )
]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_rows_with_prompts_come_and_go_among_others(batch_size):
    for number, tokens in serve(AdapterBank(base(), EVERY), PROMPTED, batch_size):
        request = PROMPTED[number]
        expected = generate(alone(EVERY.get(request.adapter or "")), [request.prompt], request.max_new_tokens)[0]
        assert tokens == expected, f"request {number}, {request}"


def test_a_prompt_s_virtual_tokens_count_among_the_positions():
    bank = AdapterBank(base(), EVERY)
    list(serve(bank, [Request([1] * (LIMIT - 5 - 3), "prefix", 3)]))
    with pytest.raises(ValueError, match=f"prompt 1 has {LIMIT - 7} tokens and 3 .* sequences end at {LIMIT - 5}"):
        serve(bank, [Request([1], "prefix", 3), Request([1] * (LIMIT - 7), "prefix", 3)])


@pytest.mark.parametrize(("requests", "batch_size"), [(REQUESTS, 3), (REQUESTS, 50), (SKEWED, 4)])
def test_no_row_and_no_column_is_computed_for_nothing(bank, monkeypatch, requests, batch_size):
    passes = watch_passes(bank, monkeypatch)
    list(serve(bank, requests, batch_size))
    prompts, decoded = (sum(rows for rows, past, _ in passes if (past == 0) == new) for new in (True, False))
    assert prompts == len(requests), f"{len(requests)} rows of prompts, not {prompts}"
    assert decoded == sum(request.max_new_tokens - 1 for request in requests), (
        f"{sum(request.max_new_tokens - 1 for request in requests)} rows decoded, not {decoded}"
    )
    assert max(rows for rows, *_ in passes) <= batch_size and passes[0][0] == min(batch_size, len(requests))
    for (rows, past, _), (new, new_past, _) in zip(passes, passes[1:], strict=False):
        assert rows + new <= batch_size or not past or new_past, f"{rows} rows run and {new} are let in"
    assert max(past for _, past, _ in passes) < max(len(r.prompt) + r.max_new_tokens for r in requests)
    assert not any(wasted for *_, wasted in passes), "columns that are padding in every row"


def test_short_requests_overtake_long_ones_and_passes_are_fewer_than_in_fixed_batches(bank, monkeypatch):
    passes = watch_passes(bank, monkeypatch)
    order = [number for number, _ in serve(bank, SKEWED, 4)]
    assert order.index(0) > order.index(7), f"0 takes 12 tokens, 7 takes 2 and was not in the first batch: {order}"
    continuous = len(passes)
    for start in range(0, len(SKEWED), 4):
        bank.generate([r.prompt for r in SKEWED[start : start + 4]], ["few"] * 4, 12)
    assert continuous < len(passes) - continuous == 36, f"{continuous} passes, {len(passes) - continuous} in batches"


@pytest.mark.parametrize("end", ["close", "error"])
def test_the_bank_is_free_again_after_half_the_answers(bank, end):
    answers = serve(bank, REQUESTS, 3)
    next(answers)
    assert torch.is_grad_enabled(), "between two answers the mode is the caller's"
    with pytest.raises(ValueError, match="a batch is under way"):
        bank.generate([[1]], [None], 1)
    if end == "close":
        answers.close()
    else:
        head = bank.model.get_submodule("lm_head.base_layer").weight
        kept = head.clone()
        head.fill_(float("nan"))
        with pytest.raises(ValueError, match="logits hold NaN"):
            next(answers)
        head.copy_(kept)
    assert torch.equal(logits(bank.model), logits(base())), "the bank's model should be the base again"
    assert dict(serve(bank, REQUESTS, 3)) == dict(enumerate(expected(None)))


def test_an_adapter_of_a_running_row_stays_until_the_row_is_done(bank):
    """Also when the last pass was that of a newcomer with another adapter."""
    answers = serve(bank, [Request([1, 2], "few", 6), Request([3], "all", 1), Request([4], "all", 1)], 2)
    for _ in range(2):
        next(answers)
        for change in (lambda: bank.remove("few"), lambda: bank.add("few", ADAPTERS["one"])):
            with pytest.raises(ValueError, match="'few' is in use"):
                change()
    assert next(answers)[1] == generate(alone(ADAPTERS["few"]), [[1, 2]], 6)[0]


def test_no_requests_give_no_answers(bank):
    assert list(serve(bank, [])) == []


@pytest.mark.parametrize(
    ("request_", "settings", "message"),
    [
        (Request([1], "fw", 1), {}, "no adapter 'fw'; known: few"),
        (Request([], "few", 1), {}, "is empty"),
        (Request([VOCABULARY], None, 1), {}, f"token id {VOCABULARY}, outside the vocabulary"),
        (Request([1] * 30, None, 3), {}, f"30 tokens and 3 new ones are asked for.* {LIMIT}"),
        (Request([1], None, 0), {}, "max_new_tokens is 0"),
        (Request([1], None, 1), dict(temperature=-1.0), "temperature is -1.0"),
        (Request([1], None, 1), dict(top_k=0), "top_k is 0"),
        (Request([1], None, 1), dict(top_p=1.5), "top_p is 1.5"),
        *[(Request([1], None, 1), dict(batch_size=size), f"batch_size is {size}") for size in (0, -1, 2.0, None)],
    ],
)
def test_bad_input_is_named_before_anything_runs(bank, monkeypatch, request_, settings, message):
    passes = watch_passes(bank, monkeypatch)
    with pytest.raises(ValueError, match=message):
        serve(bank, [Request([1], "few", 1), request_], **settings)  # not iterated
    assert not passes and bank.running is None and not bank.resident


# Caches


def random_cache(lengths: list[int], columns: int) -> KVCache:
    cache = KVCache(torch.arange(columns) < columns - torch.tensor(lengths)[:, None])
    for layer in range(2):
        cache.layers[layer] = tuple(torch.randn(2, len(lengths), 2, columns, 3, generator=RANDOM))
    return cache


def contents(cache: KVCache) -> list[list]:
    """Of every row the keys and values of its own tokens, layer by layer, without the padding."""
    assert all(x.shape[2] == len(cache) for pair in cache.layers.values() for x in pair)
    rows = enumerate(cache.padding.sum(1).tolist())
    return [[x[row, :, pad:].tolist() for pair in cache.layers.values() for x in pair] for row, pad in rows]


@pytest.mark.parametrize(("first", "second"), [([2, 5], [3, 1]), ([3, 1], [2, 5]), ([4], [2, 4])])
def test_join_puts_the_rows_of_both_at_the_right_edge(first, second):
    caches = [random_cache(lengths, max(lengths)) for lengths in (first, second)]
    both = join(*caches)
    assert (~both.padding).sum(1).tolist() == first + second, f"tokens of each row: {both.padding}"
    assert len(both) == max(first + second) and contents(both) == contents(caches[0]) + contents(caches[1])


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 3], [2], [3, 0], []])
def test_keep_takes_rows_and_cuts_what_is_padding_in_all(rows):
    cache = random_cache([2, 4, 7, 3], 8)
    before = contents(cache)
    kept = keep(cache, rows)
    assert contents(kept) == [before[row] for row in rows]
    assert len(kept) == max([[2, 4, 7, 3][row] for row in rows], default=0)
    assert contents(cache) == before and len(cache) == 8, "the cache itself was changed"


def test_keep_cuts_between_a_prompt_and_a_text():
    cache = random_cache([5, 3, 6], 6)
    cache.padding[0, 2:4] = cache.padding[2, 3] = cache.padding[2, 0] = True  # . p . . x x | . . . x x x | . p p . x x
    kept = keep(cache, [0, 2])
    assert (~kept.padding).int().tolist() == [[1, 0, 1, 1], [1, 1, 1, 1]], f"padding: {kept.padding}"
    assert torch.equal(kept.layers[1][0], cache.layers[1][0][[0, 2]][:, :, [1, 2, 4, 5]])


def test_more_adapters_than_slots_wait_for_one():
    """Slots for two adapters, five of them asked for in one batch: nobody is refused and every answer is right."""
    bank = AdapterBank(base(), ADAPTERS, slots=2)
    answers = dict(serve(bank, REQUESTS, batch_size=8))
    assert [answers[number] for number in range(len(REQUESTS))] == expected(None)


def test_two_batches_at_a_time_are_refused(bank):
    with bank.rows(["few"]) as model:
        inside = logits(model, torch.tensor([[1, 2, 3]]))
        with pytest.raises(ValueError, match="under way"):
            next(serve(bank, REQUESTS))
        assert torch.equal(logits(model, torch.tensor([[1, 2, 3]])), inside), "the batch under way goes on"
    first = serve(bank, REQUESTS, batch_size=2)
    next(first)
    with pytest.raises(ValueError, match="under way"):
        next(serve(bank, REQUESTS))


def test_a_bad_request_is_named_by_its_number(bank):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        serve(bank, [Request([1], None, 2), Request([], None, 2)])
    with pytest.raises(ValueError, match="max_new_tokens is 2.5"):
        serve(bank, [Request([1], None, 2.5)])
