"""The Gradient Bank: a Qdrant collection whose points carry knowledge atoms in their payload.

The bank owns one top-level payload key and nothing else. What it finds comes with text, score and atom; `writing`
fills it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.bank import upkeep
from regrad_qdrant.bank.documents import Hit, canonical_id, check_ids, check_unicode, filter_of
from regrad_qdrant.bank.relevance import DEPTH, from_candidates, from_zero
from regrad_qdrant.bank.stores.base import (
    TEXT_INDEX,
    PointId,
    Search,
    SparseVector,
    StoredPoint,
    Vector,
    Without,
    WithPayload,
    Words,
)
from regrad_qdrant.bank.stores.opening import open_store
from regrad_qdrant.bank.upkeep import BankStatus, RecodeReport
from regrad_qdrant.bank.writing import WritableCollection
from regrad_qdrant.errors import BankError, StoreUnavailableError

if TYPE_CHECKING:
    from qdrant_client.models import Filter


HYBRID_DEPTH = 50  # candidates of each vector that a fusion ranks


@dataclass(frozen=True)
class Asked:
    """What `search_many` looks for: fields as the arguments of `search`."""

    query: str | Vector | Mapping[str, Vector]
    query_filter: Filter | None = None
    with_records: bool = True

    def __post_init__(self) -> None:
        if self.query_filter is not None:
            object.__setattr__(self, "query_filter", filter_of(self.query_filter))


class GradientBank(WritableCollection):
    """Knowledge atoms of one space in one collection.

    Args:
        client: a `QdrantClient` (server or in process), or any `Store`.
        collection_name: the collection; it need not exist yet (`create`).
        space: fingerprint of the meta-initialization whose atoms this bank reads and writes.
        payload_key: the one top-level payload key that the bank owns.
        layout: where payloads keep the text; by itself what ingestion noted, or what the first points show.
        embedders: for each named vector, what makes it from text; by itself what ingestion noted, or BM25 for `bm25`.
        max_request_bytes: bound of one write request.
        sidecar: keep the atoms in a collection of this name beside the documents' (same ids, no vectors), so that no
            reader of the documents ever meets them. Costs a second request a search. By itself the one that ingestion
            noted; False keeps them in place in spite of that.
    """

    @classmethod
    def open(
        cls,
        path: str | Path,
        collection_name: str,
        space: str,
        **options: Any,
    ) -> Self:
        """A bank in an embedded Qdrant Edge shard below the folder `path`; options as the constructor's."""
        return cls(open_store(collection_name, path=path), collection_name, space, **options)

    def search(
        self,
        query: str | Vector | Mapping[str, Vector],
        k: int,
        *,
        using: str | Sequence[str] | None = None,
        query_filter: Filter | None = None,
        with_records: bool = True,
    ) -> list[Hit]:
        """The k best points with text, score and atom; exactly k payloads are read.

        With several vectors it is a hybrid search: the best of each are ranked together by reciprocal rank fusion,
        and the k that win are fetched. Their scores are the fusion's.

        Args:
            query: a text, embedded by the embedder of each vector in `using`; or a ready vector; or ready vectors by
                name.
            using: name of the vector, or names; by default the bank's only embedder, or `bm25` where there are several.
                `text:FIELD` is the text index of that field, which a server ranks by BM25 (Qdrant 1.20).
            query_filter: restricts every search, also those that a fusion begins with.

        Raises:
            BankError: if the collection has no such vector, or nothing embeds text for it.
        """
        [hits] = self.search_many([Asked(query, query_filter, with_records)], k, using=using)
        return hits

    def search_many(
        self, asked: Sequence[Asked], k: int, *, using: str | Sequence[str] | None = None
    ) -> list[list[Hit]]:
        """`search` for several questions, in as many requests as one takes."""
        if k < 1:
            raise BankError(f"k must be at least 1, found {k}")
        every = [self._vectors(one.query, using) for one in asked]
        try:
            found = self._found(asked, every, k)
        except StoreUnavailableError:
            raise
        except BankError as error:
            present = self.store.vectors()
            absent = [n for vectors in every for n in vectors if n not in present and not n.startswith(TEXT_INDEX)]
            raise (self._no_vector(absent[0], present) if absent else error) from error
        of_records = [points for one, (points, _) in zip(asked, found, strict=True) if one.with_records]
        joined = {point.id: point for point in self.with_atoms([point for points in of_records for point in points])}
        hits = []
        for one, (points, relevances) in zip(asked, found, strict=True):
            whole = [replace(joined[p.id], score=p.score) if one.with_records else p for p in points]
            ranked = [
                replace(self.hit(p, with_record=one.with_records), relevance=r)
                for p, r in zip(whole, relevances, strict=True)
            ]
            # Engines leave the order of equal scores open; among the k it is that of their ids.
            ties = itertools.groupby(ranked, key=lambda hit: hit.score)
            hits.append([hit for _, tied in ties for hit in sorted(tied, key=lambda hit: str(hit.id))])
        return hits

    def _found(
        self, asked: Sequence[Asked], every: Sequence[Mapping[str, Vector | Words]], k: int
    ) -> list[tuple[list[StoredPoint], list[float]]]:
        """The k best points of each question, and their relevances."""
        plans = [self._plan(one, vectors, k) for one, vectors in zip(asked, every, strict=True)]
        answers = iter(self.store.search([search for plan in plans for search in plan if search is not None]))
        ranked = [[next(answers) if search is not None else None for search in plan] for plan in plans]
        fused: dict[bool, dict[PointId, None]] = {}  # the winners of fusions, by whether their atoms are wanted
        for one, (best, deeper) in zip(asked, ranked, strict=True):
            if best is None and deeper:
                fused.setdefault(one.with_records, {}).update(dict.fromkeys(point.id for point in deeper[:k]))
        read = {way: {p.id: p for p in self.store.retrieve([*ids], self._read(way))} for way, ids in fused.items()}
        found = []
        for one, (best, deeper) in zip(asked, ranked, strict=True):
            if best is None:
                whole = read.get(one.with_records, {})
                best = [replace(whole[p.id], score=p.score) for p in (deeper or [])[:k] if p.id in whole]
            scores = [point.score for point in best]
            candidates = [point.score for point in (deeper or [])[: max(k, DEPTH)]]
            found.append((best, from_candidates(scores, candidates) if candidates else from_zero(scores)))
        return found

    def _plan(self, one: Asked, vectors: Mapping[str, Vector | Words], k: int) -> tuple[Search | None, Search | None]:
        """What is asked of the engine for a question: the k best with their payloads, of which a fusion ranks ids
        first; and where scores have no zero of their own, the ids of more, by which they are judged."""
        best = Search(vectors, k, one.query_filter, self._read(one.with_records)) if len(vectors) == 1 else None
        if len(vectors) == 1 and all(isinstance(vector, SparseVector | Words) for vector in vectors.values()):
            return best, None  # BM25's have
        depth, spare = max(HYBRID_DEPTH, 2 * k), max(DEPTH - k, 0)
        return best, Search(vectors, k + spare, one.query_filter, depth=depth, spare=spare)

    def _read(self, with_records: bool) -> WithPayload:
        """What is read of a payload."""
        return True if with_records else Without((self.payload_key,))

    def _vectors(
        self, query: str | Vector | Mapping[str, Vector], using: str | Sequence[str] | None
    ) -> dict[str, Vector | Words]:
        """What to search with, by the vector's name."""
        if isinstance(query, Mapping):
            return dict(query)
        names = list(dict.fromkeys([using] if isinstance(using, str) else using or [self._using()]))
        if not isinstance(query, str):
            return dict.fromkeys(names, query)
        return {name: self._embedded(name, query) for name in names}

    def _embedded(self, name: str, query: str) -> Vector | Words:
        check_unicode(query)
        if name.startswith(TEXT_INDEX):
            return Words(query)
        if name not in self.embedders:
            if name not in (present := self.store.vectors()):
                raise self._no_vector(name, present)
            raise BankError(
                f"nothing embeds text for the vector {name!r}: give a vector, or an embedder for it "
                f"(embedders={{{name!r}: DenseEmbedder(MODEL)}})"
            )
        return self.embedders[name].query(query)

    def fetch(
        self,
        ids: Sequence[PointId],
        scores: Sequence[float] | None = None,
        *,
        zero: float | None = None,
        with_records: bool = True,
    ) -> list[Hit]:
        """The points of these ids, best first as they are given, with their atoms; ids that are gone are left out, and
        of one that is given again all but the first.

        Args:
            scores: those of a retriever of your own. Without `zero` they are handed on, and to the merge rule the
                order alone counts.
            zero: the score that a document has which shares nothing with the question (0 for BM25), so that the
                merge rule knows how far the scores fall.
            with_records: read the atoms.
        """
        check_ids(ids)
        if scores is not None and len(scores) != len(ids):
            raise BankError(f"{len(scores)} scores for {len(ids)} ids")
        of_key: dict[PointId, float] = {}
        for key, score in zip(ids, [0.0] * len(ids) if scores is None else scores, strict=True):
            of_key.setdefault(canonical_id(key), score)
        keys = list(of_key)
        points = self.store.retrieve(keys, self._read(with_records))
        found = {point.id: point for point in (self.with_atoms(points) if with_records else points)}
        hits = [
            self.hit(replace(found[key], score=of_key[key]), with_record=with_records) for key in keys if key in found
        ]
        if zero is None or scores is None:
            return hits
        relevances = from_zero([hit.score - zero for hit in hits])
        return [replace(hit, relevance=r) for hit, r in zip(hits, relevances, strict=True)]

    def _using(self) -> str:
        """What to search where nothing is named."""
        if "bm25" in self.embedders or not self.embedders:
            return "bm25"
        return next(iter(self.embedders))

    def status(self) -> BankStatus:
        """Counts of points and atoms, and the atoms' sizes (of the first thousand)."""
        self.look_again()
        return upkeep.status(self)

    def recode(
        self, codec: str, layout: AtomLayout, on_progress: Callable[[int], None] = lambda _: None
    ) -> RecodeReport:
        """Bring this space's atoms to a coarser codec, in place and without the model; arguments as `upkeep.recode`."""
        self.look_again()
        return upkeep.recode(self, codec, layout, on_progress)

    def drop(self) -> int:
        """Remove this space's atoms, and nothing else; returns how many there were."""
        self.look_again()
        return upkeep.drop(self)
