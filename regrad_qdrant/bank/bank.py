"""The Gradient Bank: a Qdrant collection whose points carry knowledge atoms in their payload.

The bank owns one top-level payload key and nothing else. Atoms are attached with `set_payload` in requests
bounded by bytes, and found again by an index on `<key>.space`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.atoms.record import DEFAULT_KEY, Record
from regrad_qdrant.bank import upkeep
from regrad_qdrant.bank.collection import PAGE, AtomCollection
from regrad_qdrant.bank.documents import Document, Hit, as_json, canonical_id, check_ids, check_unicode, point_id
from regrad_qdrant.bank.embed import Bm25, Embedder, embedder_of, noted
from regrad_qdrant.bank.layouts import Layout
from regrad_qdrant.bank.place import MADE
from regrad_qdrant.bank.relevance import DEPTH, from_candidates, from_zero
from regrad_qdrant.bank.stores.base import (
    MAX_REQUEST_BYTES,
    TEXT_INDEX,
    PayloadWrite,
    Point,
    PointId,
    Search,
    SparseVector,
    Store,
    StoredPoint,
    Vector,
    VectorNames,
    Without,
    WithPayload,
    Words,
    bounded,
    json_bytes,
    pages,
    sized,
)
from regrad_qdrant.bank.stores.opening import open_store
from regrad_qdrant.bank.upkeep import BankStatus, RecodeReport
from regrad_qdrant.errors import BankError, StoreUnavailableError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import Filter

    from regrad_qdrant.model.space import AtomSpace


HYBRID_DEPTH = 50  # candidates of each vector that a fusion ranks


@dataclass(frozen=True)
class Asked:
    """What `search_many` looks for: fields as the arguments of `search`."""

    query: str | Vector | Mapping[str, Vector]
    query_filter: Filter | None = None
    with_records: bool = True


class GradientBank(AtomCollection):
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

    def __init__(
        self,
        client: QdrantClient | Store,
        collection_name: str,
        space: str,
        *,
        payload_key: str = DEFAULT_KEY,
        layout: Layout | None = None,
        embedders: Mapping[str, Embedder] | None = None,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        sidecar: str | Literal[False] | None = None,
    ) -> None:
        super().__init__(
            client,
            collection_name,
            space,
            payload_key=payload_key,
            layout=layout,
            max_request_bytes=max_request_bytes,
            sidecar=sidecar,
        )
        self._embedders = None if embedders is None else dict(embedders)

    @property
    def embedders(self) -> dict[str, Embedder]:
        """What makes each named vector from text."""
        if self._embedders is None:
            if not self.store.exists():
                return {"bm25": Bm25()}  # until there is something to look at
            found = {name: embedder_of(spec) for name, spec in (self.known("embedders") or {}).items()}
            self._embedders = found or {"bm25": Bm25()}
        return self._embedders

    def embed_with(self, name: str, embedder: Embedder) -> None:
        """Make one vector from text by this embedder, the others as before."""
        self._embedders = self.embedders | {name: embedder}

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

    # -- filling ----------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the collection with one vector for each embedder, if it is not there yet, and the index on the space.

        The metadata of one that is made says where its texts stand and what makes its vectors, for any later reader.

        Raises:
            BankError: if it exists without a vector that an embedder makes, or with one that none makes: documents
                added here would lack it; if its vectors are noted as another embedder's; or as `check_place`.
        """
        if not self.store.exists():
            self.check_place()
            dense = {name: size for name, embedder in self.embedders.items() if (size := embedder.size) is not None}
            sparse = tuple(name for name, embedder in self.embedders.items() if embedder.size is None)
            made = {"layout": self.layout.noted(), "embedders": self._specs()}
            self.store.create(VectorNames(dense, sparse))
            self.store.write_metadata({MADE: made})
        else:
            present = self.store.vectors()
            for name in self.embedders:
                if name not in present:
                    raise self._no_vector(name, present)
            unmade = [name for name in present.names if name not in self.embedders]
            if unmade:
                raise BankError(
                    f"collection {self.store.name!r} has a vector {unmade[0]!r} that nothing here makes, and documents "
                    "added now would lack it: give its model too (--dense)"
                )
            known = self.known("embedders") or {}
            for name, spec in self._specs().items():
                if name in known and known[name] != spec:
                    raise BankError(
                        f"the vectors {name!r} of collection {self.store.name!r} are noted as {known[name]}; beside "
                        f"them those of {spec} would not be found: leave --language and --dense out, or fill another "
                        "collection (ingest --from-collection NAME with them mends a note that is wrong)"
                    )
        self.index()

    def add(self, documents: Iterable[Document]) -> int:
        """Write new points with their vectors and payloads, without atoms; returns how many.

        An existing point of the same id is replaced, its atom included; `sync` keeps what is there.

        Raises:
            BankError: for a document without a text, with a field of the name of the bank's own key, or with something
                that has no JSON; dates, UUIDs and the like are written as their texts.
        """
        return sum(map(self._add, pages(map(as_json, documents), PAGE)))

    def _add(self, page: Sequence[Document]) -> int:
        points = self._points(page)
        for batch in bounded(self.max_request_bytes, sized(points), lambda point: point.id):
            self.store.upsert(batch)
        return len(points)

    def _add_new(self, page: Sequence[Document]) -> set[PointId]:
        """Write the points of these documents, but those that have come since they were looked for; which it wrote."""
        written: set[PointId] = set()
        for batch in bounded(self.max_request_bytes, sized(self._points(page)), lambda point: point.id):
            there = self._there(batch)
            if batch := [point for point in batch if point.id not in there]:
                self.store.upsert(batch, only_new=True)
            written |= {point.id for point in batch}
        return written

    def _there(self, points: Sequence[Point]) -> set[PointId]:
        """Which of these points the collection has now."""
        return {point.id for point in self.store.retrieve([point.id for point in points], False)}

    def sync(self, documents: Iterable[Document]) -> tuple[int, int]:
        """Add the documents that are new, and bring those that differ up to date; returns how many of each.

        A point that is there keeps every field that the document does not have, its atom among them; where the
        text has changed, its vectors are made anew and its atom is `stale` from then on.

        Raises:
            BankError: as `add`.
        """
        added, updated = 0, 0
        for given in pages(map(as_json, documents), PAGE):
            page = list({point_id(document.id): document for document in given}.values())  # of one id the last
            for document in page:
                self.check_fields(document)
            ids = [point_id(document.id) for document in page]
            found = {point.id: point.payload for point in self.store.retrieve(ids, Without((self.payload_key,)))}
            there = [(document, found.get(point_id(document.id))) for document in page]
            new = [document for document, payload in there if payload is None]
            written = self._add_new(new)
            added += len(written)
            if late := [document for document in new if point_id(document.id) not in written]:
                counts = self.sync(late)
                added, updated = added + counts[0], updated + counts[1]
            differing = [
                (document, payload, payload | dict(document.payload))
                for document, payload in there
                if payload is not None and any(payload.get(key) != value for key, value in document.payload.items())
            ]
            reworded = [
                replace(document, payload=merged)
                for document, payload, merged in differing
                if self.layout.text_of(payload) != self.layout.text_of(merged)
            ]
            for batch in bounded(self.max_request_bytes, sized(self._points(reworded)), lambda point: point.id):
                there_still = self._there(batch)
                if batch := [point for point in batch if point.id in there_still]:
                    self.store.update_vectors(batch)
            writes = (PayloadWrite(point_id(document.id), document.payload) for document, _, _ in differing)
            of_size = ((write, json_bytes(write.payload)) for write in writes)
            for changes in bounded(self.max_request_bytes, of_size, lambda write: write.id):
                self.store.set_payload(changes)
            updated += len(differing)
        return added, updated

    def remove(self, ids: Iterable[str | int]) -> int:
        """Take documents out of the collection, vectors, atoms and all, and out of every sidecar that ingestion noted
        of it, by the ids that `add` was given, or the points' own (`hit.id`); returns how many were there.

        Raises:
            BankError: for one id that is in no list.
        """
        check_ids(ids)
        removed = 0
        given = [self.atoms] if self.in_sidecar and self.atoms.exists() else []
        sidecars = {store.name: store for store in [*self._sidecars(), *given]}.values()
        for page in pages(map(point_id, ids), PAGE):
            for store in (self.store, *sidecars):
                if there := [point.id for point in store.retrieve(page, False)]:
                    store.delete_points(there)
                removed += len(there) if store is self.store else 0
        return removed

    def put(self, records: Iterable[tuple[PointId | Hit, Record]], *, replace: bool = True) -> int:
        """Attach atoms to existing points; returns how many were sent. Nothing but the bank's own key is written.

        A hit instead of an id makes it a compare-and-set: the atom is left out where the text that the hit was read
        from is no longer there. A point that is gone is passed over.

        Args:
            replace: write over atoms that stand under the bank's key, those of other spaces too; otherwise a point
                that has one is passed over.

        Raises:
            RecordTooLargeError: if one record is larger than a request may be; what came before it is written.
        """
        written = 0
        vacant: dict[str, str | None] = {} if replace else {self.space_path: None}
        writes = (self._write(target, record, vacant) for target, record in records)
        for batch in bounded(self.max_request_bytes, writes, lambda write: write.id):
            if self.in_sidecar:
                batch = self._made_room(batch, vacant)
            if batch:
                self.atoms.set_payload(batch)
            written += len(batch)
        return written

    def _made_room(self, writes: Sequence[PayloadWrite], vacant: Mapping[str, str | None]) -> list[PayloadWrite]:
        """Those of the writes whose documents are there as they were read, with a point in the sidecar for each.

        The check and the write are two requests: an atom whose text changes between them is stale by its own sha.
        """
        ids = [write.id for write in writes]
        states = {
            point.id: self.layout.state_of(point.payload) for point in self.store.retrieve(ids, self.layout.fields())
        }
        valid = [
            w for w in writes if w.id in states and w.unless_changed.items() - vacant.items() <= states[w.id].items()
        ]
        there = {point.id for point in self.atoms.retrieve([write.id for write in valid], False)}
        if new := [Point(write.id, {}, {}) for write in valid if write.id not in there]:
            self.atoms.upsert(new, only_new=True)  # another ingestion, under another key, may have been faster
        return [PayloadWrite(write.id, write.payload, vacant, bool(vacant)) for write in valid]

    def _write(
        self, target: PointId | Hit, record: Record, vacant: Mapping[str, str | None]
    ) -> tuple[PayloadWrite, int]:
        """The write of one record and its bytes."""
        state = self.layout.state_of(target.payload) if isinstance(target, Hit) else {}
        key = target.id if isinstance(target, Hit) else canonical_id(target)
        write = PayloadWrite(key, {self.payload_key: record.to_payload()}, {**state, **vacant}, bool(vacant))
        return write, json_bytes(write.payload) + json_bytes(state)

    # -- looking ----------------------------------------------------------------------------------------

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

    # -- upkeep -----------------------------------------------------------------------------------------

    def status(self) -> BankStatus:
        """Counts of points and atoms, and the atoms' sizes (of the first thousand)."""
        return upkeep.status(self)

    def recode(
        self, codec: str, layout: AtomLayout, on_progress: Callable[[int], None] = lambda _: None
    ) -> RecodeReport:
        """Bring this space's atoms to a coarser codec, in place and without the model; arguments as `upkeep.recode`."""
        return upkeep.recode(self, codec, layout, on_progress)

    def drop(self) -> int:
        """Remove this space's atoms, and nothing else; returns how many there were."""
        return upkeep.drop(self)

    def describe(self, space: AtomSpace, embedders: Mapping[str, Any] | None = None) -> None:
        """As `AtomCollection.describe`, with this bank's embedders."""
        super().describe(space, embedders or self._specs())

    # -- inside -----------------------------------------------------------------------------------------

    def _specs(self) -> dict[str, Any]:
        """What the metadata can say of each vector's embedder."""
        return {name: found for name, embedder in self.embedders.items() if (found := noted(embedder)) is not None}

    def _points(self, documents: Sequence[Document]) -> list[Point]:
        """The points of new documents with their vectors."""
        texts = [self._text(document) for document in documents]
        if documents:
            self._use(self.layout)  # of an empty collection the first documents' holds for those that follow
        vectors = {name: embedder.documents(texts) for name, embedder in self.embedders.items()} if texts else {}
        return [
            Point(point_id(document.id), {name: rows[i] for name, rows in vectors.items()}, document.payload)
            for i, document in enumerate(documents)
        ]

    def _using(self) -> str:
        """What to search where nothing is named."""
        if "bm25" in self.embedders or not self.embedders:
            return "bm25"
        return next(iter(self.embedders))

    def _no_vector(self, name: str, present: VectorNames) -> BankError:
        names = present.names or "none"
        return BankError(
            f"collection {self.store.name!r} has no vector {name!r}; it has {names}: name one of these (using=NAME), "
            "with an embedder for one that is dense (embedders={NAME: DenseEmbedder(MODEL)})"
        )

    def _text(self, document: Document) -> str:
        text = self.layout.text_of(document.payload)
        if text is None:
            fields = sorted(document.payload)
            raise BankError(
                f"document {document.id!r} has no text for the layout {self.layout}; its fields are {fields}"
            )
        self.check_fields(document)
        return text

    def check_document(self, document: Document) -> None:
        """Refuse a document that can't be added.

        Raises:
            BankError: where it has a field of the name of the bank's own key, something that has no JSON, or more than
                a request holds.
        """
        self.check_fields(document)
        size = json_bytes(as_json(document).payload)
        if size > self.max_request_bytes:
            raise BankError(
                f"document {document.id!r}: its fields take {size} bytes, more than one request may hold "
                f"({self.max_request_bytes}): leave some out, or in Python raise max_request_bytes"
            )

    def check_fields(self, document: Document) -> None:
        """Refuse a document that would write over atoms.

        Raises:
            BankError: where it has a field of the name of the bank's own key.
        """
        if self.payload_key in document.payload:
            raise BankError(
                f"document {document.id!r} has a field {self.payload_key!r}, where atoms stand: leave it out, or "
                "choose another key (--payload-key NAME)"
            )
