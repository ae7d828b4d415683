"""The Gradient Bank for asyncio, over an `AsyncQdrantClient`.

There is one bank, and it is written once: here its methods run in worker threads, and every request that they make
is awaited on the event loop by the async client. The loop is never blocked; what is shared needs no mirror.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.collection import PAGE
from regrad_qdrant.bank.documents import Document, Hit
from regrad_qdrant.bank.stores.base import pages
from regrad_qdrant.bank.stores.client import ClientStore
from regrad_qdrant.bank.upkeep import BankStatus, RecodeReport
from regrad_qdrant.errors import BankError

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient
    from qdrant_client.models import Filter

    from regrad_qdrant.atoms.codec import AtomLayout
    from regrad_qdrant.atoms.record import Record
    from regrad_qdrant.bank.layouts import Layout
    from regrad_qdrant.bank.shard import Shard
    from regrad_qdrant.bank.stores.base import PointId

Result = TypeVar("Result")
THREADS = 8  # methods of one bank that run at a time


_LOOP: contextvars.ContextVar[asyncio.AbstractEventLoop | None] = contextvars.ContextVar("loop", default=None)


def _wait_for(method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Await a coroutine function on the caller's event loop, from a worker thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise BankError("an async bank was used without await: call its own methods, or ReGrad.aanswer")
    loop = _LOOP.get()
    if loop is None or not loop.is_running():
        raise BankError("an async bank was used where no event loop runs: await its methods, or ReGrad.aanswer")
    return asyncio.run_coroutine_threadsafe(method(*arguments, **options), loop).result()


class _LoopStore(ClientStore):
    """The store of a worker thread whose requests an async client makes on the event loop."""

    def sibling(self, name: str) -> _LoopStore:
        return _LoopStore(self.client, name)

    def method(self, name: str) -> Callable[..., Any]:
        return functools.partial(_wait_for, super().method(name))


class AsyncGradientBank:
    """`GradientBank` for asyncio; arguments, results and errors are those of its methods of the same name.

    Args:
        client: an `AsyncQdrantClient`.
        options: of `GradientBank`: payload_key, layout, embedders, max_request_bytes, sidecar.
    """

    def __init__(self, client: AsyncQdrantClient, collection_name: str, space: str, **options: Any) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="regrad-bank")
        self._closed = False
        # For worker threads alone, while a loop runs: `ReGrad.aanswer` answers from it.
        store = _LoopStore(client, collection_name)  # type: ignore[arg-type] # its methods are awaited
        self.blocking = GradientBank(store, collection_name, space, **options)

    @property
    def space(self) -> str:
        return self.blocking.space

    async def run(self, method: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Run what blocks in a thread of the bank's own; the requests that it makes are awaited on the event loop."""
        loop = self.bind()
        if self._closed:
            raise BankError("this bank is closed: make a new one")
        call = functools.partial(contextvars.copy_context().run, method, *arguments, **options)
        return await loop.run_in_executor(self._threads, call)

    def bind(self) -> asyncio.AbstractEventLoop:
        """Let requests of this task, and of the threads that it starts, run on its event loop."""
        loop = asyncio.get_running_loop()
        _LOOP.set(loop)
        return loop

    async def _stream(self, iterator: Iterator[Hit]) -> AsyncIterator[Hit]:
        found = pages(iterator, PAGE)
        while page := await self.run(next, found, None):
            for hit in page:
                yield hit

    async def __aenter__(self) -> AsyncGradientBank:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the bank's threads end. The client stays open: it is the caller's."""
        self._closed = True
        self._threads.shutdown(wait=False)

    async def detect_layout(self) -> Layout:
        return await self.run(self.blocking.detect_layout)

    async def create(self) -> None:
        await self.run(self.blocking.create)

    async def optimize(self) -> None:
        await self.run(self.blocking.optimize)

    async def add(self, documents: Iterable[Document]) -> int:
        return await self.run(self.blocking.add, documents)

    async def sync(self, documents: Iterable[Document]) -> tuple[int, int]:
        return await self.run(self.blocking.sync, documents)

    async def remove(self, ids: Iterable[str | int]) -> int:
        return await self.run(self.blocking.remove, ids)

    async def put(self, records: Iterable[tuple[PointId | Hit, Record]], *, replace: bool = True) -> int:
        return await self.run(self.blocking.put, records, replace=replace)

    async def search(self, query: Any, k: int, **options: Any) -> list[Hit]:
        return await self.run(self.blocking.search, query, k, **options)

    async def search_many(self, asked: Any, k: int, **options: Any) -> list[list[Hit]]:
        return await self.run(self.blocking.search_many, asked, k, **options)

    async def fetch(self, ids: Any, scores: Any = None, **options: Any) -> list[Hit]:
        return await self.run(self.blocking.fetch, ids, scores, **options)

    def points(self, query_filter: Filter | None = None) -> AsyncIterator[Hit]:
        return self._stream(self.blocking.points(query_filter))

    def missing(self, shard: Shard | None = None) -> AsyncIterator[Hit]:
        return self._stream(self.blocking.missing(shard))

    def stale(self) -> AsyncIterator[Hit]:
        return self._stream(self.blocking.stale())

    async def status(self) -> BankStatus:
        return await self.run(self.blocking.status)

    async def recode(
        self, codec: str, layout: AtomLayout, on_progress: Callable[[int], None] = lambda _: None
    ) -> RecodeReport:
        return await self.run(self.blocking.recode, codec, layout, on_progress)

    async def drop(self) -> int:
        return await self.run(self.blocking.drop)
