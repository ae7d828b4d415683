"""The Gradient Bank for asyncio, over an `AsyncQdrantClient`.

There is one bank, and it is written once: here its methods run in worker threads, and every request that they make
is awaited on the event loop by the async client. The loop is never blocked; what is shared needs no mirror.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from regrad_qdrant.bank import PAGE, BankStatus, GradientBank, RecodeReport
from regrad_qdrant.client_store import ClientStore
from regrad_qdrant.documents import Document, Hit
from regrad_qdrant.errors import BankError

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient

    from regrad_qdrant.layouts import Layout
    from regrad_qdrant.record import Record
    from regrad_qdrant.store import PointId

Result = TypeVar("Result")
THREADS = 8  # methods of one bank that run at a time


class _Loop:
    """The event loop that a bank's requests run on: the one of its last caller."""

    def __init__(self) -> None:
        self.running: asyncio.AbstractEventLoop | None = None

    def wait_for(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Await a coroutine function on the loop, from another thread."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise BankError("an async bank was used without await: call its own methods, or ReGrad.aanswer")
        if self.running is None:
            raise BankError("an async bank was used before any of its methods was awaited: await bank.status(), say")
        return asyncio.run_coroutine_threadsafe(method(*arguments, **options), self.running).result()


class _LoopStore(ClientStore):
    """The store of a worker thread whose requests an async client makes on the event loop."""

    def __init__(self, client: Any, name: str, loop: _Loop) -> None:
        super().__init__(client, name)
        self._loop = loop

    def sibling(self, name: str) -> _LoopStore:
        return _LoopStore(self.client, name, self._loop)

    def method(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._loop.wait_for, super().method(name))


class AsyncGradientBank:
    """`GradientBank` for asyncio; arguments, results and errors are those of its methods of the same name.

    Args:
        client: an `AsyncQdrantClient`.
        options: of `GradientBank`: payload_key, layout, embedders, max_request_bytes, sidecar.
    """

    def __init__(self, client: AsyncQdrantClient, collection_name: str, space: str, **options: Any) -> None:
        self._loop = _Loop()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="regrad-bank")
        # For worker threads alone, while a loop runs: `ReGrad.aanswer` answers from it.
        self.blocking = GradientBank(_LoopStore(client, collection_name, self._loop), collection_name, space, **options)

    @property
    def space(self) -> str:
        return self.blocking.space

    async def _run(self, method: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        loop = self.bind()
        return await loop.run_in_executor(self._threads, functools.partial(method, *arguments, **options))

    def bind(self) -> asyncio.AbstractEventLoop:
        """Let requests run on the caller's event loop."""
        self._loop.running = asyncio.get_running_loop()
        return self._loop.running

    async def _stream(self, iterator: Iterator[Hit]) -> AsyncIterator[Hit]:
        while page := await self._run(lambda: list(itertools.islice(iterator, PAGE))):
            for hit in page:
                yield hit

    async def __aenter__(self) -> AsyncGradientBank:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the bank's threads end. The client stays open: it is the caller's."""
        self._threads.shutdown(wait=False)

    async def detect_layout(self) -> Layout:
        return await self._run(self.blocking.detect_layout)

    async def create(self) -> None:
        await self._run(self.blocking.create)

    async def add(self, documents: Iterable[Document]) -> int:
        return await self._run(self.blocking.add, documents)

    async def sync(self, documents: Iterable[Document]) -> tuple[int, int]:
        return await self._run(self.blocking.sync, documents)

    async def put(self, records: Iterable[tuple[PointId | Hit, Record]]) -> int:
        return await self._run(self.blocking.put, records)

    async def search(self, query: Any, k: int, **options: Any) -> list[Hit]:
        return await self._run(self.blocking.search, query, k, **options)

    async def fetch(self, ids: Any, scores: Any = None) -> list[Hit]:
        return await self._run(self.blocking.fetch, ids, scores)

    def points(self) -> AsyncIterator[Hit]:
        return self._stream(self.blocking.points())

    def missing(self) -> AsyncIterator[Hit]:
        return self._stream(self.blocking.missing())

    def stale(self) -> AsyncIterator[Hit]:
        return self._stream(self.blocking.stale())

    async def status(self) -> BankStatus:
        return await self._run(self.blocking.status)

    async def recode(self, codec: str, numel: int) -> RecodeReport:
        return await self._run(self.blocking.recode, codec, numel)

    async def drop(self) -> int:
        return await self._run(self.blocking.drop)
