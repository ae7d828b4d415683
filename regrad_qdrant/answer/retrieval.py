"""The documents that questions are answered from, and what to say where there are none."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from regrad_qdrant.answer.query import WITHOUT_DOCUMENTS, Query
from regrad_qdrant.bank.bank import Asked, GradientBank
from regrad_qdrant.bank.place import SAMPLE
from regrad_qdrant.errors import AdapterError, BankError

if TYPE_CHECKING:
    from regrad_qdrant.bank.async_bank import AsyncGradientBank
    from regrad_qdrant.bank.documents import Hit
    from regrad_qdrant.bank.stores.base import PointId

WITH_RECORDS = ("regrad", "regrad+icl")  # modes that apply stored atoms of what was found
SEARCHERS = 8  # threads that search for asyncio, over a bank that has no asyncio of its own
NONE_GIVEN = "no document was handed over: the answer comes from the model alone"
NO_TEXT = "there is no text to take the answer from: it is the model's own"


@dataclass(frozen=True)
class Found:
    """What one question is answered from."""

    asked: Query
    hits: list[Hit]
    notes: list[str]
    sources: list[Hit] = field(default_factory=list)  # of a grounded answer: the documents that it is a span of


class Retrieval:
    """Searches a bank for the questions that need it, as their modes say.

    Args:
        explains: whether a filter that finds nothing is looked into: its fields are sought in the whole collection, and
            the note says which no point has.
    """

    def __init__(self, bank: GradientBank | AsyncGradientBank, *, explains: bool = True) -> None:
        self._async_bank = None if isinstance(bank, GradientBank) else bank
        self.bank = bank if isinstance(bank, GradientBank) else bank.blocking
        self.explains = explains
        self._all_ids: tuple[int, list[PointId]] = (-1, [])  # as of how many points
        self._searchers = ThreadPoolExecutor(SEARCHERS, "regrad-search")
        self._closed = False

    def close(self) -> None:
        """End the threads. The bank stays open."""
        self._closed = True
        self._searchers.shutdown(wait=False)

    async def aretrieve(
        self, asked: Sequence[Query], top_k: int, using: str | Sequence[str] | None, seed: int
    ) -> list[Found]:
        """`retrieve` for asyncio: the search is awaited on the event loop with an `AsyncGradientBank`, and made by a
        thread of this object's own with any other bank; never by the loop's executor, whose threads a client may need
        to resolve a host's name. Questions that read no document wait for no thread."""
        if not any(map(_reads, asked)):
            return self.retrieve(asked, top_k, using, seed)
        if self._async_bank is not None:
            return await self._async_bank.run(self.retrieve, asked, top_k, using, seed)
        if self._closed:
            raise AdapterError("this ReGrad is closed: make a new one")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._searchers, self.retrieve, asked, top_k, using, seed)

    def retrieve(self, asked: Sequence[Query], top_k: int, using: str | Sequence[str] | None, seed: int) -> list[Found]:
        """The documents that each question is answered from: all searches in as few requests as they take."""
        if top_k < 1:
            raise BankError(f"top_k must be at least 1, found {top_k}")
        reading = [one for one in asked if _reads(one)]
        if reading:
            _ = self.bank.embedders  # read where an async bank's requests can be awaited, for what follows elsewhere
        searching = [one for one in reading if one.hits is None]
        wanted = [
            Asked(one.question if one.query is None else one.query, one.query_filter, one.mode in WITH_RECORDS)
            for one in searching
        ]
        results = iter(self.bank.search_many(wanted, top_k, using=using) if wanted else [])
        found = []
        for one in asked:
            if not _reads(one):
                found.append(Found(one, [], []))
                continue
            hits = next(results) if one.hits is None else self._with_atoms(one, _first(one.hits, top_k))
            sources = hits if one.sources is None else _first(one.sources, top_k)
            if one.mode == "random":
                hits = self._random_hits(one, hits, top_k, f"{seed}-{one.question}")
            notes = [] if hits else [NONE_GIVEN if one.hits is not None else self._nothing_found(one)]
            if one.grounded and not any(hit.text.strip() for hit in sources):
                notes.append(NO_TEXT)
            if hits and not any(hit.text for hit in hits):
                self._check_layout(hits)
                notes.append("no document that was retrieved has a text: nothing of them is in the answer")
            found.append(Found(one, hits, notes, sources))
        return found

    def _with_atoms(self, asked: Query, hits: list[Hit]) -> list[Hit]:
        """Documents that were handed over, with the atoms of those that were read without one."""
        lacking = [hit.id for hit in hits if hit.record is None and hit.damaged is None]
        if asked.mode not in WITH_RECORDS or not lacking or not self.bank.store.exists():
            return hits
        read = {hit.id: hit for hit in self.bank.fetch(lacking)}  # those of another collection are not there
        return [
            replace(hit, record=again.record, damaged=again.damaged) if (again := read.get(hit.id)) else hit
            for hit in hits
        ]

    def _check_layout(self, hits: Sequence[Hit]) -> None:
        """Refuse a layout that finds no text in the collection's first points either."""
        if not any(hit.text for hit in itertools.islice(self.bank.points(), SAMPLE)):
            fields = sorted({key for hit in hits for key in hit.payload})
            raise BankError(
                f"none of the retrieved points has a text for the layout {self.bank.layout}; their fields are "
                f"{fields}: name the one with the text (--text-path PATH, in Python layout=Layout('mine', 'PATH'))"
            )

    def _nothing_found(self, asked: Query) -> str:
        """What to say where a question has found no document; names the filter's fields that no point has."""
        said = "nothing was retrieved: the answer comes from the model alone"
        if asked.query_filter is None or not self.explains:
            return said
        absent = self.bank.absent_fields(asked.query_filter)
        why = f"no point has the filter's field {', '.join(absent)}" if absent else "no document passes the filter"
        return f"{said}; {why}"

    def _random_hits(self, asked: Query, hits: Sequence[Hit], count: int, seed: str) -> list[Hit]:
        """Other documents' points under the scores of the retrieved ones, of those that pass the question's filter."""
        if asked.query_filter is not None:
            everything = [hit.id for hit in self.bank.points(asked.query_filter)]
        else:
            if (points := self.bank.store.count()) != self._all_ids[0]:
                self._all_ids = (points, [hit.id for hit in self.bank.points()])
            everything = self._all_ids[1]
        retrieved = {hit.id for hit in hits}
        others = [key for key in everything if key not in retrieved]
        drawn = random.Random(seed).sample(others, min(count, len(others)))
        like = [(hit.score, hit.relevance) for hit in hits] + [(1.0, None)] * count
        drawn_hits = self.bank.fetch(drawn)
        return [replace(hit, score=s, relevance=r) for hit, (s, r) in zip(drawn_hits, like, strict=False)]


def _first(hits: Sequence[Hit], count: int) -> list[Hit]:
    """The first of these documents, each once: a retriever that asks in several ways may name one again."""
    once: dict[PointId, Hit] = {}
    for hit in hits:
        once.setdefault(hit.id, hit)
    return list(once.values())[:count]


def _reads(asked: Query) -> bool:
    """Whether documents are needed for a question."""
    return asked.mode not in WITHOUT_DOCUMENTS or bool(asked.grounded)
