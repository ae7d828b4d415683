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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from regrad_qdrant.answer.generation import Generated, token_ids
from regrad_qdrant.answer.pipeline import answer_of
from regrad_qdrant.answer.query import BARE, Answer, Timings
from regrad_qdrant.answer.running import Finish, Row, RunningBatch, Sampling
from regrad_qdrant.errors import DataError, RegradError

if TYPE_CHECKING:
    from regrad_qdrant.answer.pipeline import Merged, ReGrad
    from regrad_qdrant.answer.retrieval import Found

log = logging.getLogger(__name__)
READ_TOKENS = 4096  # of prompts that are read at once: a long one alone
GRACE = 5.0  # seconds after a request's deadline in which the engine itself may say so
STEPS = 8  # tokens that one running batch says before another's turn


class QueueFullError(RegradError):
    """As many requests wait as may."""


class DeadlineError(RegradError):
    """A request was not done in time."""


class StoppedError(RegradError):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Outcome:
    """A whole answer, and how it came about."""

    answer: Answer
    finish: Finish
    completion_tokens: int
    queued: float  # seconds that it waited
    first_token: float  # seconds from there to its first token

    @property
    def seconds(self) -> dict[str, float]:
        """Of each part."""
        timings = self.answer.timings
        return {
            "search": timings.search,
            "queue": self.queued,
            "decode": timings.decode,
            "first_token": self.first_token,
            "generate": timings.generate,
        }


class Job:
    """One request: what it is answered from, and whoever waits for it.

    Args:
        search: the seconds that its search took.
        deadline: of `time.monotonic`.
        streams: whether its client reads the answer piece by piece.
    """

    def __init__(
        self, regrad: ReGrad, found: Found, sampling: Sampling, search: float, deadline: float, *, streams: bool
    ) -> None:
        self.regrad, self.found, self.sampling, self.streams = regrad, found, sampling, streams
        self.search, self.deadline = search, deadline
        self.cancelled = False
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[str | Outcome | Exception] = asyncio.Queue()
        self.context = contextvars.copy_context()  # an async bank finds the caller's loop in it
        self.asked_at = self.started_at = self.first_at = time.perf_counter()
        self.decode = 0.0
        self.merged: Merged | None = None
        self.row: Row | None = None
        self.shown = ""

    def put(self, event: str | Outcome | Exception) -> None:
        """Hand on a piece of the answer, the whole one, or why there is none."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more; one that is late is told so."""
        if not self.cancelled and time.monotonic() > self.deadline:
            self.cancelled = True
            self.put(DeadlineError("the answer was not done in time"))
        return self.cancelled

    def outcome(self, answer: Answer, finish: Finish, tokens: int) -> Outcome:
        return Outcome(answer, finish, tokens, self.started_at - self.asked_at, self.first_at - self.started_at)


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
        self._arrived: deque[Job] = deque()
        self._waiting: list[Job] = []
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
        return sum(len(lane.jobs) for lane in list(self._running.values()))

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

    async def answer(self, job: Job) -> AsyncIterator[str | Outcome]:
        """The pieces of a request's answer, and the whole of it at the end. Whoever leaves early frees its row.

        Raises:
            QueueFullError, StoppedError: at once.
            DeadlineError: if it is not done in time.
            RegradError: as `ReGrad.answer`.
        """
        with self._wake:
            self.check_room()
            self._arrived.append(job)
            self._wake.notify()
        try:
            while True:
                try:
                    left = job.deadline - time.monotonic() + GRACE
                    event = await asyncio.wait_for(job.events.get(), max(left, 0))
                except TimeoutError as error:  # the engine has not even said so
                    raise DeadlineError("the answer was not done in time") from error
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Outcome):
                    return
        finally:
            job.cancelled = True

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
            except BaseException as error:  # a fault of ours, or a panic below us: nobody may wait for ever
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
        self._waiting = [job for job in self._waiting if not job.over]
        return True

    def _answer_at_once(self) -> None:
        """Those of the waiting that are no rows of a running batch: of each ReGrad as many as fit together."""
        groups: dict[int, list[Job]] = {}
        for job in self._waiting:
            if job.found.asked.grounded or job.found.asked.type != "open":
                groups.setdefault(id(job.regrad), []).append(job)
        for group in groups.values():
            part = group[: self.batch]
            self._waiting = [job for job in self._waiting if job not in part]
            if fitting := [job for job in part if _fits(job)]:
                self._answered(fitting)

    def _answered(self, jobs: Sequence[Job]) -> None:
        started = time.perf_counter()
        for job in jobs:
            job.started_at = started
        try:
            answers = jobs[0].context.run(jobs[0].regrad.answered, [job.found for job in jobs], 0.0)
        except Exception as error:  # whatever it is, its caller gets it
            if len(jobs) == 1:
                jobs[0].put(error)
            else:
                for job in jobs:
                    self._answered([job])
            return
        self._on_batch(len(jobs))
        for job, answer in zip(jobs, answers, strict=True):
            if job.over:
                continue
            job.first_at = time.perf_counter()
            timed = replace(answer, timings=replace(answer.timings, search=job.search))
            tokens = len(job.regrad.tokenizer(answer.text, add_special_tokens=False).input_ids)
            job.put(answer.text)
            most = job.regrad.asking.length(job.found.asked.prompt([]))
            cut = answer.source is None and job.found.asked.type == "open" and tokens >= most
            job.put(job.outcome(timed, "length" if cut else "stop", tokens))

    def _join(self) -> None:
        """Give rows to those that wait, as far as there is room."""
        ready: dict[tuple[int, bool], list[Job]] = {}
        left = []
        for job in self._waiting:
            key = (id(job.regrad), job.found.asked.mode in BARE)
            if key not in self._running:
                self._running[key] = _Lane(job.regrad)
            lane, part = self._running[key], ready.setdefault(key, [])
            if len(lane.jobs) + len(part) >= self.batch or not lane.batch.is_open:
                left.append(job)
            elif self._prepared(job):
                part.append(job)
        self._waiting = left
        for key, jobs in ready.items():
            for part in _short_enough(jobs):
                if self._running[key].batch.is_open:
                    self._running[key].join(part)
                else:
                    self._waiting += part

    def _prepared(self, job: Job) -> bool:
        """Sum a request's atoms and read its prompt's tokens; False where that fails, for this one alone."""
        job.started_at = time.perf_counter()
        try:
            [job.merged] = job.context.run(job.regrad.merged, [job.found])
            job.decode = time.perf_counter() - job.started_at
            asked, regrad = job.found.asked, job.regrad
            bare = asked.mode in BARE
            prompt = asked.prompt(job.found.hits)
            job.row = Row(prompt, regrad.tokenizer, regrad.asking, job.merged.total, bare, job.sampling)
            _check_length(regrad, len(job.row.prompt_ids), job.row.most_tokens)
        except Exception as error:  # whatever it is, its caller gets it
            job.put(error)
            return False
        return True

    def _step(self) -> None:
        """Let every running batch say some tokens, or one where others wait to join."""
        for lane in self._running.values():
            for _ in range(STEPS):
                if not lane.jobs:
                    break
                self._on_batch(len(lane.jobs))
                left = lane.step()
                if self._arrived or (left and self._waiting):
                    break

    def _fail(self, error: Exception) -> None:
        """Tell everyone, and begin anew."""
        for job in (*self._waiting, *(job for lane in self._running.values() for job in lane.jobs)):
            job.put(error)
        self._waiting = []
        self._running = {}


class _Lane:
    """The running batch of one ReGrad, and whose its rows are."""

    def __init__(self, regrad: ReGrad) -> None:
        self.jobs: list[Job] = []
        self.batch = RunningBatch(regrad.adapter, regrad.tokenizer)

    def join(self, jobs: Sequence[Job]) -> None:
        try:
            self.batch.join([job.row for job in jobs if job.row is not None])
        except Exception as error:  # memory that is short, say: of several, each is tried by itself
            if not self.batch.rows:
                self._lost(error)
            if len(jobs) == 1:
                jobs[0].put(error)
            else:
                for job in jobs:
                    self.join([job])
            return
        for job in jobs:
            job.first_at = time.perf_counter()
        self.jobs += jobs
        self._hand_on()

    def step(self) -> bool:
        """Let every row say a token; returns whether one has left."""
        try:
            self.batch.step()
        except Exception as error:  # whatever it is, its callers get it
            self._lost(error)
            return True
        return self._hand_on()

    def _lost(self, error: Exception) -> None:
        """Tell those that have rows that they have none any more."""
        for job in self.jobs:
            job.put(error)
        self.batch.leave(self.batch.rows)
        self.jobs = []

    def _hand_on(self) -> bool:
        """Give what was said to whoever waits for it, and let those leave that are done or gone."""
        gone = [job for job in self.jobs if job.over or _handed_on(job)]
        if gone:
            self.batch.leave([job.row for job in gone if job.row is not None])
            self.jobs = [job for job in self.jobs if job not in gone]
        return bool(gone)


def _handed_on(job: Job) -> bool:
    """Give what is new of an answer to whoever waits for it; returns whether that was all."""
    row, merged = job.row, job.merged
    assert row is not None and merged is not None
    shown = row.shown
    if shown != job.shown and shown.startswith(job.shown):
        job.put(shown[len(job.shown) :])
        job.shown = shown
    if row.finish is None:
        return False
    if job.streams and row.text != job.shown:
        job.put(RegradError("the answer turned out otherwise than it had begun"))
        return True
    generate = time.perf_counter() - job.started_at - job.decode
    answer = answer_of(
        Generated(row.text, len(row.prompt_ids)), job.found, merged, Timings(job.search, job.decode, generate=generate)
    )
    job.put(job.outcome(answer, row.finish, len(row.tokens)))
    return True


def _short_enough(jobs: Sequence[Job]) -> list[list[Job]]:
    """In parts whose prompts, padded to the longest, have `READ_TOKENS` tokens at most, or that are one alone."""
    parts: list[list[Job]] = []
    for job in sorted(jobs, key=lambda job: _tokens(job)):
        part = parts[-1] if parts else []
        if part and _tokens(job) * (len(part) + 1) <= READ_TOKENS:
            part.append(job)
        else:
            parts.append([job])
    return parts


def _tokens(job: Job) -> int:
    return len(job.row.prompt_ids) if job.row is not None else 0


def _fits(job: Job) -> bool:
    """Whether a request that is answered at once is short enough for the model; one that is not is told."""
    asked, regrad = job.found.asked, job.regrad
    try:
        prompt = asked.prompt(job.found.hits)
        [ids] = token_ids(regrad.tokenizer, [prompt], regrad.asking)
        _check_length(regrad, len(ids), len(ids) + regrad.asking.length(prompt))
    except Exception as error:  # whatever it is, its caller gets it
        job.put(error)
        return False
    return True


def _check_length(regrad: ReGrad, prompt: int, most: int) -> None:
    """Refuse what is longer than the model's context."""
    context = getattr(regrad.adapter.model.config, "max_position_embeddings", None)
    if context is not None and most > context:
        raise DataError(
            f"the prompt has {prompt} tokens and the answer may have {most - prompt}: more than the {context} of the "
            "model's context"
        )
