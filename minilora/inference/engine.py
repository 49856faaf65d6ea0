"""Continuous batching that never ends: requests come at any time, and their tokens go out as they are made.

One thread owns the model and does nothing but step its batch (serve.py). All others talk to it through a queue:

    submit -> waiting . . .   ->   the batch, a token for each row and step   ->   job.send(token), job.send(End)
              at most max_queue    cancelled rows leave before the next step

A request's tokens are those that `generate` gives for it alone: greedy ones, and sampled ones with its own seed.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.inference.bank import AdapterBank
from minilora.inference.generate import BROKEN_LOGITS, row_generators
from minilora.inference.serve import Request, Row, RunningBatch, check_batch_size, check_request
from minilora.ranges import BATCH_SIZE


class Busy(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The engine takes no more requests."""


class InUse(Exception):
    """An adapter that running or waiting requests need."""


@dataclass(frozen=True)
class End:
    """The last thing that is sent for a request. reason: "stop" for an end token, "length" for max_new_tokens,
    "cancelled", "closed", or "error" with a message."""

    reason: str
    message: str = ""


Event = int | End  # a token, or the end


@dataclass(eq=False)
class Job(Row):
    """A request with the one who waits for it: `send` gets every event, on the engine's thread, and must not block."""

    send: Callable[[Event], Any] = field(kw_only=True)
    cancelled: bool = False


class Engine:
    """Answers requests with the adapters of a bank, which is the engine's alone until `close`.

    max_queue: requests that may wait while the batch is full.

    Raises ValueError for sizes out of range, and where a batch of the bank is under way.
    """

    def __init__(self, bank: AdapterBank, batch_size: int = 16, max_queue: int = 64, vocab_size: int | None = None):
        check_batch_size(batch_size)
        BATCH_SIZE.check("max_queue", max_queue)
        self.bank, self.max_queue = bank, max_queue
        self.batch = RunningBatch(bank, batch_size, vocab_size)
        self.waiting: deque[Job] = deque()  # others only append; the engine's thread alone takes away
        self.calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self.refusing = self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(
        self,
        request: Request,
        send: Callable[[Event], Any],
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        ends: Collection[int] = (),
    ) -> Job:
        """Queues a request. `send` gets its tokens, without the end token, and then one `End`.

        Raises Busy where the queue is full, Closed after `refuse`, and ValueError for an unknown adapter and for what
        `generate` refuses.
        """
        (random,) = row_generators(1, seed)
        job = Job(0, request, random, (temperature, top_k, top_p), ends, send=send)
        with self.changed:
            if self.refusing:
                raise Closed("the server is shutting down")
            check_request(self.bank, request, *job.how)
            if len(self.waiting) >= self.max_queue:
                raise Busy(f"{len(self.waiting)} requests wait already, as many as may; try again later")
            self.waiting.append(job)
            self.changed.notify()
        return job

    def cancel(self, job: Job):
        """The request's row, or its place in the queue, is free from the next step on."""
        with self.changed:
            job.cancelled = True
            self.changed.notify()

    def add(self, name: str, folder: Path, force: bool = False) -> Future:
        """Adds a saved adapter between two steps. The future raises as `AdapterBank.add` does, and ValueError for a
        name that is there: requests that wait mean the adapter that they found."""

        def add():
            if name in self.bank.adapters:
                raise ValueError(f"there is an adapter {name!r} already; remove it first")
            self.bank.add(name, folder, force)

        return self._call(add)

    def remove(self, name: str) -> Future:
        """Removes an adapter between two steps. The future raises InUse, and ValueError for an unknown name."""

        def remove():
            with self.changed:  # no request comes in between the look and the removal
                if any(job.request.adapter == name for job in (*self.batch.rows, *self.waiting)):
                    raise InUse(f"adapter {name!r} is in use by a request; try again when that has ended")
                self.bank.remove(name)

        return self._call(remove)

    def refuse(self):
        """From now on nothing comes in, and what waits is sent away; rows that run go on to their ends."""
        with self.changed:
            self.refusing = True
            self.changed.notify()

    def close(self):
        """Ends everything, running rows too, and gives the bank back. Waits for the step under way."""
        with self.changed:
            self.refusing = self.closed = True
            self.changed.notify()
        self.thread.join()

    def _call(self, function: Callable[[], Any]) -> Future:
        future: Future = Future()
        with self.changed:
            if self.refusing:
                raise Closed("the server is shutting down")
            self.calls.append((function, future))
            self.changed.notify()
        return future

    # The engine's thread

    def _run(self):
        closed = False
        while not closed:
            with self.changed:
                self.changed.wait_for(lambda: self.batch.rows or self.waiting or self.calls or self.closed)
                closed = self.closed
                gone = [job for job in self.waiting if job.cancelled or self.refusing]
                for job in gone:
                    self.waiting.remove(job)
            leaving = [job for job in self.batch.rows if job.cancelled or closed]
            self.batch.leave(leaving)
            for job in gone + leaving:
                self._send(job, End("cancelled" if job.cancelled else "closed"))
            while self.calls:
                function, future = self.calls.popleft()
                if not future.set_running_or_notify_cancel():  # whoever asked has gone
                    continue
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            if self.batch.rows or self.waiting:
                self._step()

    def _step(self):
        with self.changed:
            before = [*self.batch.rows, *self.waiting]
        try:
            done = self.batch.step(self.waiting)
        except Exception as error:  # the memory was full, perhaps; whoever was in this step is told, and none is lost
            self.batch.close()
            with self.changed:
                failed = [job for job in before if job not in self.waiting]
            for job in failed:
                self._send(job, End("error", f"this step of the model failed: {error}"))
            return
        for job in self.batch.rows:
            if job.broken:
                self._send(job, End("error", BROKEN_LOGITS))
            elif not job.ended:
                self._send(job, job.tokens[-1])
        for job in done:
            if not job.broken:
                self._send(job, End("stop" if job.ended else "length"))
        self.batch.leave(done)

    def _send(self, job: Job, event: Event):
        try:
            job.send(event)
        except Exception:  # nobody is there any more
            job.cancelled = True
