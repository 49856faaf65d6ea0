"""The engine that never ends, held against every request on a model of its own."""

import queue
import threading
import time

import pytest
from test_bank import ADAPTERS, EVERY, LIMIT, alone, base
from test_serve import PROMPTED, REQUESTS, expected

from minilora.inference.bank import AdapterBank
from minilora.inference.engine import Busy, Closed, End, Engine, InUse
from minilora.inference.generate import generate
from minilora.inference.serve import Request

LONG = Request([1, 2], "few", LIMIT - 2)


class Slow:
    """A bank whose steps wait for `go`, so that a test decides what happens between two of them."""

    def __init__(self, bank: AdapterBank):
        self.steps, self.go = queue.SimpleQueue(), queue.SimpleQueue()
        forward = bank.model.model.forward

        def waiting(ids, cache=None):
            if threading.current_thread().name == "engine":
                self.steps.put(len(ids))
                self.go.get(timeout=20)
            return forward(ids, cache)

        bank.model.model.forward = waiting

    def pass_(self) -> int:
        """Lets one forward pass happen; its rows."""
        rows = self.steps.get(timeout=20)
        self.go.put(None)
        return rows

    def release(self):
        """From now on no pass waits."""
        for _ in range(1000):
            self.go.put(None)


@pytest.fixture
def bank() -> AdapterBank:
    return AdapterBank(base(), EVERY)


@pytest.fixture
def start(bank):
    engines = []

    def begin(**settings) -> Engine:
        engines.append(Engine(bank, **settings))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.close()
        assert not engine.thread.is_alive()


def submit(engine: Engine, request: Request, **more):
    """The job and its events to come."""
    events = queue.SimpleQueue()
    return engine.submit(request, events.put, **more), events


def answer(events) -> tuple[list[int], End]:
    tokens = []
    while not isinstance(event := events.get(timeout=20), End):
        tokens.append(event)
    return tokens, event


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_each_answer_is_the_one_it_has_alone_whoever_comes_and_goes(start, batch_size):
    engine, eos_id = start(batch_size=batch_size), expected(None)[0][4]
    waiting = []
    for number in range(3 * len(REQUESTS)):
        waiting.append(submit(engine, REQUESTS[number % len(REQUESTS)], ends=[eos_id])[1])
        time.sleep(0.001 * (number % 3))  # some come together, some into a running batch
    for number, events in enumerate(waiting):
        want, request = expected(eos_id)[number % len(REQUESTS)], REQUESTS[number % len(REQUESTS)]
        reason = "length" if len(want) == request.max_new_tokens else "stop"
        assert answer(events) == (want, End(reason)), f"request {number}, {request}"
        assert events.empty(), "something came after the end"


def test_rows_with_prompts_and_samples_of_their_own_settings(start):
    engine = start(batch_size=4)
    settings = [dict(), dict(temperature=1.0, seed=3), dict(temperature=2.0, top_p=0.8, seed=4), dict(seed=2**63)]
    settings[3] |= dict(temperature=0.7, top_k=5)
    jobs = [submit(engine, request, **settings[number % 4])[1] for number, request in enumerate(PROMPTED)]
    for number, (request, events) in enumerate(zip(PROMPTED, jobs, strict=True)):
        model = alone(EVERY.get(request.adapter or ""))
        want = generate(model, [request.prompt], request.max_new_tokens, **settings[number % 4])[0]
        assert answer(events)[0] == want, f"request {number}, {request}, {settings[number % 4]}"


def test_tokens_go_out_as_they_are_made_and_a_cancelled_row_leaves_before_the_next_step(bank, start):
    slow, engine = Slow(bank), start(batch_size=2)
    job, events = submit(engine, LONG)
    assert slow.pass_() == 1
    assert isinstance(events.get(timeout=20), int), "the first token goes out after the first pass"
    assert slow.steps.get(timeout=20) == 1  # in the middle of the second step
    other, others = submit(engine, Request([3], None, 2))
    third, thirds = submit(engine, Request([4], "all", 1))
    engine.cancel(job)
    slow.go.put(None)
    assert slow.pass_() == 2, "the cancelled row's place and the free one are taken by the two that wait"
    assert slow.pass_() == 1
    tokens, end = answer(events)
    assert end == End("cancelled") and len(tokens) == 1, f"one more token, of the step under way: {tokens}"
    assert answer(others)[0] == generate(alone(None), [[3]], 2)[0]
    assert answer(thirds)[0] == generate(alone(ADAPTERS["all"]), [[4]], 1)[0]


def test_the_queue_is_full_at_its_limit_and_those_who_leave_it_make_room(bank, start):
    slow, engine = Slow(bank), start(batch_size=1, max_queue=2)
    submit(engine, LONG)
    assert slow.steps.get(timeout=20) == 1
    (job, events), _ = submit(engine, LONG), submit(engine, LONG)
    with pytest.raises(Busy, match="2 requests wait already"):
        submit(engine, LONG)
    engine.cancel(job)
    slow.go.put(None)
    assert answer(events) == ([], End("cancelled"))
    submit(engine, LONG)
    slow.release()


@pytest.mark.parametrize(
    ("request_", "settings", "message"),
    [
        (Request([1], "fw", 1), {}, "no adapter 'fw'"),
        (Request([], "few", 1), {}, "is empty"),
        (Request([1] * 30, None, 3), {}, f"30 tokens and 3 new ones are asked for.* {LIMIT}"),
        (Request([1], None, 1), dict(temperature=-1.0), "temperature is -1.0"),
        (Request([1], None, 1), dict(seed=-(2**63) - 1), "seed is"),
    ],
)
def test_what_generate_refuses_is_refused_and_the_engine_goes_on(start, request_, settings, message):
    engine = start()
    with pytest.raises(ValueError, match=message):
        submit(engine, request_, **settings)
    assert answer(submit(engine, REQUESTS[0])[1])[0] == expected(None)[0]


def test_adapters_come_and_go_between_steps_and_stay_as_long_as_a_request_needs_them(bank, start):
    slow, engine = Slow(bank), start(batch_size=1)
    job, events = submit(engine, LONG)
    slow.steps.get(timeout=20)
    waiting, _ = submit(engine, Request([1], "stable", 1))
    removals = [engine.remove(name) for name in ("few", "stable", "one", "nobody")]
    slow.go.put(None)
    for name, future in zip(("few", "stable"), removals, strict=False):  # one runs, one waits
        error = future.exception(timeout=20)
        assert isinstance(error, InUse), f"{name}: {error!r}"
    engine.cancel(waiting)
    assert removals[2].result(timeout=20) is None and "one" not in bank.names
    assert "no adapter 'nobody'" in str(removals[3].exception(timeout=20))
    engine.cancel(job)
    slow.pass_()
    answer(events)
    assert engine.remove("few").result(timeout=20) is None
    with pytest.raises(ValueError, match="no adapter 'few'"):
        submit(engine, LONG)


def test_a_change_that_nobody_waits_for_any_more_is_not_made(bank, start):
    slow, engine = Slow(bank), start()
    submit(engine, LONG)
    slow.steps.get(timeout=20)
    assert engine.remove("one").cancel(), "it waits for the step under way"
    slow.release()
    assert answer(submit(engine, REQUESTS[0])[1])[0] == expected(None)[0] and "one" in bank.names


def test_a_name_that_comes_back_with_other_weights_answers_with_these(bank, start):
    engine = start(batch_size=2)
    for adapter in (ADAPTERS["few"], ADAPTERS["all"], ADAPTERS["dora"]):
        engine.remove("few").result(timeout=20)
        engine._call(lambda adapter=adapter: bank.add("few", adapter)).result(timeout=20)
        assert answer(submit(engine, LONG)[1])[0] == generate(alone(adapter), [LONG.prompt], LONG.max_new_tokens)[0]


def test_one_adapter_s_broken_numbers_end_its_own_rows_and_no_others(bank, start):
    broken = ADAPTERS["one"]
    huge = {name: B * float("inf") for name, B in broken.B.items()}
    bank.add("broken", type(broken)(broken.config, broken.A, huge))
    engine = start(batch_size=4)
    jobs = [submit(engine, Request([1, 2], name, 6))[1] for name in ("few", "broken", None)]
    ends = [answer(events) for events in jobs]
    assert ends[1][0] == [] and ends[1][1].reason == "error" and "NaN or infinity" in ends[1][1].message
    for (tokens, end), name in ((ends[0], "few"), (ends[2], None)):
        want = generate(alone(EVERY.get(name or "")), [[1, 2]], 6)[0]
        assert (tokens, end) == (want, End("length")), f"{name} suffers from another's adapter"


def test_a_step_that_fails_is_told_to_those_in_it_and_the_next_request_is_answered(bank, start, monkeypatch):
    engine = start(batch_size=2)

    def full(ids, cache=None):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(bank.model.model, "forward", full)
        tokens, end = answer(submit(engine, LONG)[1])
    assert (tokens, end.reason) == ([], "error") and "out of memory" in end.message
    assert answer(submit(engine, REQUESTS[0])[1])[0] == expected(None)[0]


def test_a_receiver_that_fails_is_taken_for_one_that_went_away(start):
    engine = start(batch_size=1)

    def gone(event):
        raise RuntimeError("the loop is closed")

    engine.submit(LONG, gone)
    assert answer(submit(engine, REQUESTS[0])[1])[0] == expected(None)[0]


def test_refusing_lets_running_rows_end_and_sends_away_those_that_wait(bank, start):
    slow, engine = Slow(bank), start(batch_size=1)
    running, waiting = submit(engine, Request([1, 2], "few", 2))[1], None
    slow.steps.get(timeout=20)
    waiting = submit(engine, LONG)[1]
    engine.refuse()
    for change in (lambda: submit(engine, LONG), lambda: engine.remove("few")):
        with pytest.raises(Closed, match="shutting down"):
            change()
    slow.go.put(None)
    assert answer(waiting) == ([], End("closed"))
    slow.pass_()
    assert answer(running) == (generate(alone(ADAPTERS["few"]), [[1, 2]], 2)[0], End("length"))


def test_closing_ends_running_and_waiting_requests_and_gives_the_bank_back(bank):
    slow, engine = Slow(bank), Engine(bank, batch_size=1)
    running = submit(engine, LONG)[1]
    slow.steps.get(timeout=20)
    waiting = submit(engine, LONG)[1]
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine.closed:
        time.sleep(0.001)
    slow.go.put(None)
    closing.join(timeout=20)
    assert [end for _, end in map(answer, (running, waiting))] == [End("closed")] * 2
    assert bank.running is None
    assert bank.generate([[1]], [None], 1) == generate(alone(None), [[1]], 1)


@pytest.mark.parametrize("sizes", [dict(batch_size=0), dict(max_queue=0), dict(max_queue=True)])
def test_sizes_out_of_range_are_named(bank, sizes):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} is"):
        Engine(bank, **sizes)
