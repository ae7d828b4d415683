"""The engine: one thread has the model, and many requests wait for it, run together and leave when they are done.

A request that writes freely joins the running batch of its initialization at the next token (`RunningBatch`). Those
that are answered otherwise, with a span or the likeliest option, are answered in between, all that wait together.
Nothing that goes wrong with one request is another's: each is merged and read by itself where that fails for several.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from regrad_qdrant.answer.generation import Generated, check_length, read
from regrad_qdrant.answer.pipeline import answer_of
from regrad_qdrant.answer.query import BARE, Answer, Timings
from regrad_qdrant.answer.running import Row, RunningBatch
from regrad_qdrant.errors import RegradError
from regrad_qdrant.model.plugin import base_of
from regrad_qdrant.serve.job import DeadlineError, Job, Outcome, QueueFullError, StoppedError

if TYPE_CHECKING:
    from regrad_qdrant.answer.pipeline import Merged, ReGrad

log = logging.getLogger(__name__)
READ_TOKENS = 4096  # of prompts that are read at once: a long one alone
GRACE = 5.0  # seconds after a request's deadline in which the engine itself may say so
STEPS = 8  # tokens that one running batch says before another's turn


class Place:
    """A request's place: in the queue, and then in a batch."""

    def __init__(self, job: Job[ReGrad]) -> None:
        self.regrad, self.found, self.sampling, self.streams = job.regrad, job.found, job.sampling, job.streams
        self.search, self.deadline = job.search, job.deadline
        self.cancelled = False
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[str | Outcome | Exception] = asyncio.Queue()
        self.context = contextvars.copy_context()  # an async bank finds the caller's loop in it
        self.asked_at = self.started_at = self.first_at = time.perf_counter()
        self.decode = 0.0
        self.merged: Merged | None = None
        self.row: Row | None = None
        self.shown = ""

    def put(self, event: str | Outcome | BaseException) -> None:
        """Hand on a piece of the answer, the whole one, or why there is none: a panic below us is no `Exception`."""
        if isinstance(event, BaseException) and not isinstance(event, Exception):
            event = RegradError(f"the answer failed: {event!r}")
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    def at_once(self) -> bool:
        """Whether it is answered otherwise than token by token: with a span, or with the likeliest option."""
        return bool(self.found.asked.grounded) or self.found.asked.type != "open"

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more; one that is late is told so."""
        if not self.cancelled and time.monotonic() > self.deadline:
            self.cancelled = True
            self.put(DeadlineError("the answer was not done in time"))
        return self.cancelled

    def outcome(self, answer: Answer, tokens: int) -> Outcome:
        return Outcome(answer, tokens, self.started_at - self.asked_at, self.first_at - self.started_at)


class Engine:
    """Answers requests with models of one process.

    Args:
        batch: rows of one running batch, at most.
        queue: requests that wait, at most.
        on_batch: called with the number of rows of every forward pass.
    """

    def __init__(self, *, batch: int = 16, queue: int = 256, on_batch: Callable[[int], None] = lambda _: None) -> None:
        self.batch, self.limit = batch, queue
        self._on_batch = on_batch
        self._arrived: deque[Place] = deque()
        self._waiting: list[Place] = []
        self._running: dict[tuple[int, bool], _Lane] = {}  # by the ReGrad, and whether without its plug-in
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="regrad-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._arrived) + len(self._waiting)

    @property
    def running(self) -> int:
        return sum(len(lane.places) for lane in list(self._running.values()))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def check_room(self, coming: int = 0) -> None:
        """Refuse a request that would have to wait behind too many.

        Args:
            coming: requests that will wait soon.

        Raises:
            QueueFullError, StoppedError: if it is refused.
        """
        if self._stopping:
            raise StoppedError("the server is stopping")
        if self.waiting + coming >= self.limit:
            raise QueueFullError(f"{self.limit} requests are waiting already")

    async def answer(self, job: Job[ReGrad]) -> AsyncIterator[str | Outcome]:
        """The pieces of a request's answer, and the whole of it at the end. Whoever leaves early frees its row.

        Raises:
            QueueFullError, StoppedError: at once.
            DeadlineError: if it is not done in time.
            RegradError: as `ReGrad.answer`.
        """
        place = Place(job)
        with self._wake:
            self.check_room()
            self._arrived.append(place)
            self._wake.notify()
        try:
            while True:
                try:
                    left = place.deadline - time.monotonic() + GRACE
                    event = await asyncio.wait_for(place.events.get(), max(left, 0))
                except TimeoutError as error:  # the engine has not even said so
                    raise DeadlineError("the answer was not done in time") from error
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Outcome):
                    return
        finally:
            place.cancelled = True

    def close(self) -> None:
        """Answer what was accepted, and end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._take():
            try:
                self._answer_at_once()
                self._join()
                self._step()
            except BaseException as error:  # a fault of ours: nobody may wait for ever
                log.exception("the engine begins anew")
                self._fail(RegradError(f"the engine had to begin anew: {error!r}"))

    def _take(self) -> bool:
        """Wait for something to do; False where nothing is left and nothing will come."""
        with self._wake:
            while not (self._arrived or self._waiting or self.running):
                if self._stopping:
                    return False
                self._wake.wait()
            while self._arrived:
                self._waiting.append(self._arrived.popleft())
        self._waiting = [place for place in self._waiting if not place.over]
        return True

    def _answer_at_once(self) -> None:
        """Those of the waiting that are no rows of a running batch: of each ReGrad as many as fit together."""
        groups: dict[int, list[Place]] = {}
        for place in self._waiting:
            if place.at_once:
                groups.setdefault(id(place.regrad), []).append(place)
        for group in groups.values():
            part = group[: self.batch]
            self._waiting = [place for place in self._waiting if place not in part]
            if fitting := [place for place in part if _fits(place)]:
                self._answered(fitting)

    def _answered(self, places: Sequence[Place]) -> None:
        started = time.perf_counter()
        for place in places:
            place.started_at = started
        try:
            answers = places[0].context.run(places[0].regrad.answered, [place.found for place in places], 0.0)
        except BaseException as error:  # whatever it is, its caller gets it
            if len(places) == 1:
                places[0].put(error)
            else:
                for place in places:
                    self._answered([place])
            return
        self._on_batch(len(places))
        for place, answer in zip(places, answers, strict=True):
            if place.over:
                continue
            place.first_at = time.perf_counter()
            timed = replace(answer, timings=replace(answer.timings, search=place.search))
            tokens = len(place.regrad.tokenizer(answer.text, add_special_tokens=False).input_ids)
            place.put(answer.text)
            place.put(place.outcome(timed, tokens))

    def _join(self) -> None:
        """Give rows to those that wait, as far as there is room."""
        ready: dict[tuple[int, bool], list[Place]] = {}
        left = []
        for place in self._waiting:
            if place.at_once:  # more of them than are answered together
                left.append(place)
                continue
            key = (id(place.regrad), place.found.asked.mode in BARE)
            if key not in self._running:
                self._running[key] = _Lane(place.regrad)
            lane, part = self._running[key], ready.setdefault(key, [])
            if len(lane.places) + len(part) >= self.batch or not lane.batch.is_open:
                left.append(place)
            elif self._prepared(place):
                part.append(place)
        self._waiting = left
        for key, places in ready.items():
            for part in _short_enough(places):
                if self._running[key].batch.is_open:
                    self._running[key].join(part)
                else:
                    self._waiting += part

    def _prepared(self, place: Place) -> bool:
        """Sum a request's atoms and read its prompt's tokens; False where that fails, for this one alone."""
        place.started_at = time.perf_counter()
        try:
            [place.merged] = place.context.run(place.regrad.merged, [place.found])
            place.decode = time.perf_counter() - place.started_at
            asked, regrad = place.found.asked, place.regrad
            bare = asked.mode in BARE
            prompt = asked.prompt(place.found.hits)
            place.row = Row(prompt, regrad.tokenizer, regrad.asking, place.merged.total, bare, place.sampling)
            check_length(base_of(regrad.adapter.model), len(place.row.prompt_ids), place.row.length)
        except BaseException as error:  # whatever it is, its caller gets it
            place.put(error)
            return False
        return True

    def _step(self) -> None:
        """Let every running batch say some tokens, or one where others wait to join."""
        for lane in self._running.values():
            for _ in range(STEPS):
                if not lane.places:
                    break
                self._on_batch(len(lane.places))
                left = lane.step()
                if self._arrived or (left and self._waiting):
                    break

    def _fail(self, error: Exception) -> None:
        """Tell everyone, and begin anew."""
        for place in (*self._waiting, *(place for lane in self._running.values() for place in lane.places)):
            place.put(error)
        self._waiting = []
        self._running = {}


class _Lane:
    """The running batch of one ReGrad, and whose its rows are."""

    def __init__(self, regrad: ReGrad) -> None:
        self.places: list[Place] = []
        self.batch = RunningBatch(regrad.adapter, regrad.tokenizer)

    def join(self, places: Sequence[Place]) -> None:
        try:
            self.batch.join([place.row for place in places if place.row is not None])
        except BaseException as error:  # memory that is short, say: of several, each is tried by itself
            if not self.batch.rows:
                self._lost(error)
            if len(places) == 1:
                places[0].put(error)
            else:
                for place in places:
                    self.join([place])
            return
        for place in places:
            place.first_at = time.perf_counter()
        self.places += places
        self._hand_on()

    def step(self) -> bool:
        """Let every row say a token; returns whether one has left."""
        try:
            self.batch.step()
        except BaseException as error:  # whatever it is, its callers get it
            self._lost(error)
            return True
        return self._hand_on()

    def _lost(self, error: BaseException) -> None:
        """Tell those that have rows that they have none any more."""
        for place in self.places:
            place.put(error)
        self.batch.leave(self.batch.rows)
        self.places = []

    def _hand_on(self) -> bool:
        """Give what was said to whoever waits for it, and let those leave that are done or gone."""
        gone = [place for place in self.places if place.over or _handed_on(place)]
        if gone:
            self.places = [place for place in self.places if place not in gone]
            try:
                self.batch.leave([place.row for place in gone if place.row is not None])
            except BaseException as error:  # those that are left can't go on
                self._lost(error)
        return bool(gone)


def _handed_on(place: Place) -> bool:
    """Give what is new of an answer to whoever waits for it; returns whether that was all."""
    row, merged = place.row, place.merged
    assert row is not None and merged is not None
    shown = row.shown
    if shown != place.shown and shown.startswith(place.shown):
        place.put(shown[len(place.shown) :])
        place.shown = shown
    if row.finish is None:
        return False
    if place.streams and row.text != place.shown:
        place.put(RegradError("the answer turned out otherwise than it had begun"))
        return True
    generate = time.perf_counter() - place.started_at - place.decode
    answer = answer_of(
        Generated(row.text, len(row.prompt_ids), finish=row.finish),
        place.found,
        merged,
        Timings(place.search, place.decode, generate=generate),
    )
    place.put(place.outcome(answer, len(row.tokens)))
    return True


def _short_enough(places: Sequence[Place]) -> list[list[Place]]:
    """In parts whose prompts, padded to the longest, have `READ_TOKENS` tokens at most, or that are one alone."""
    parts: list[list[Place]] = []
    for place in sorted(places, key=lambda place: _tokens(place)):
        part = parts[-1] if parts else []
        if part and _tokens(place) * (len(part) + 1) <= READ_TOKENS:
            part.append(place)
        else:
            parts.append([place])
    return parts


def _tokens(place: Place) -> int:
    return len(place.row.prompt_ids) if place.row is not None else 0


def _fits(place: Place) -> bool:
    """Whether a request that is answered at once is short enough for the model; one that is not is told."""
    asked, regrad = place.found.asked, place.regrad
    try:
        prompt = asked.prompt(place.found.hits)
        read(base_of(regrad.adapter.model), regrad.tokenizer, [prompt], regrad.asking)
    except BaseException as error:  # whatever it is, its caller gets it
        place.put(error)
        return False
    return True
