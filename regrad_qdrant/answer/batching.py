"""Questions that wait at the same time are answered together, on one thread.

A thread of the batcher's own takes what was asked, waits a moment for more, and hands all of it on at once. Callers
await their own part on whatever event loop they run in.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

IDLE = 5.0  # seconds without a question after which the thread ends; the next question starts another
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    future: asyncio.Future[Result]
    loop: asyncio.AbstractEventLoop
    context: contextvars.Context  # an async bank finds the caller's loop in it

    def settle(self, result: Result | None, error: BaseException | None) -> None:
        """Hand the outcome to the caller, unless it has gone away."""

        def set_on_loop() -> None:
            if self.future.done():
                return
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)  # type: ignore[arg-type] # one of the two is there

        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(set_on_loop)


class Batcher(Generic[Item, Result]):
    """Hands items on to `work` in batches.

    Args:
        work: from items to their results, in order; it runs on one thread, one batch at a time. Where it fails for a
            batch, every item of it is tried alone, so that one that can't be done fails by itself.
        size: items of one batch, at most.
        wait: seconds that the first item of a batch waits for others.
    """

    def __init__(self, work: Callable[[list[Item]], list[Result]], size: int, wait: float) -> None:
        self._work, self._size, self._wait = work, size, wait
        self._queue: queue.Queue[_Waiting[Item, Result] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    async def ask(self, item: Item) -> Result:
        """The item's result; what `work` raises for it is raised here."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting[Item, Result](item, loop.create_future(), loop, contextvars.copy_context())
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="regrad-answer", daemon=True)
                self._thread.start()
            self._queue.put(waiting)
        return await waiting.future

    def close(self) -> None:
        """End the thread when it has answered what was asked before; a later `ask` starts it anew."""
        with self._starting:
            if self._thread is not None:
                self._queue.put(None)
                self._thread = None

    def _next(self) -> _Waiting[Item, Result] | None:
        """What was asked next; None where the thread is to end: at `close`, or when nothing was asked for long, so that
        what nobody uses any more is not kept by its thread."""
        while True:
            try:
                return self._queue.get(timeout=IDLE)
            except queue.Empty:
                with self._starting:
                    if self._queue.empty():
                        self._thread = None
                        return None

    def _run(self) -> None:
        while (first := self._next()) is not None:
            batch, ends = [first], False
            until = time.monotonic() + self._wait
            while len(batch) < self._size and not ends:
                try:
                    following = self._queue.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if following is None:
                    ends = True
                else:
                    batch.append(following)
            self._answer([waiting for waiting in batch if not waiting.future.cancelled()])
            if ends:
                return

    def _answer(self, batch: list[_Waiting[Item, Result]]) -> None:
        if not batch:
            return
        try:
            results = batch[0].context.run(self._work, [waiting.item for waiting in batch])
        except BaseException as error:  # whatever it is, its caller gets it
            if len(batch) == 1:
                batch[0].settle(None, error)
            else:
                for waiting in batch:
                    self._answer([waiting])
            return
        for waiting, result in zip(batch, results, strict=True):
            waiting.settle(result, None)
