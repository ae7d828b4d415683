"""Writing to a collection: documents with their vectors, and the atoms that belong to them.

Atoms are attached with `set_payload` in requests bounded by bytes, and found again by an index on `<key>.space`.
`ingest` computes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from regrad_qdrant.atoms.record import Record
from regrad_qdrant.bank.collection import PAGE, AtomCollection
from regrad_qdrant.bank.documents import Document, Hit, as_json, canonical_id, check_ids, point_id
from regrad_qdrant.bank.place import MADE
from regrad_qdrant.bank.stores.base import (
    Payload,
    PayloadWrite,
    Point,
    PointId,
    VectorNames,
    Without,
    bounded,
    json_bytes,
    pages,
    sized,
)
from regrad_qdrant.errors import BankError

if TYPE_CHECKING:
    pass


class WritableCollection(AtomCollection):
    """A collection that documents and atoms of one space are written to; arguments as those of `GradientBank`."""

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
        added = 0
        for page in pages(map(as_json, documents), PAGE):
            for batch in self._batches(page):
                self.store.upsert(batch)
                added += len(batch)
        return added

    def sync(self, documents: Iterable[Document]) -> tuple[int, int]:
        """Add the documents that are new, and bring those that differ up to date; returns how many of each.

        A point that is there keeps every field that the document does not have, its atom among them; where the
        text has changed, its vectors are made anew and its atom is `stale` from then on.

        Raises:
            BankError: as `add`.
        """
        added, updated = 0, 0
        for given in pages(map(as_json, documents), PAGE):
            page = {point_id(document.id): document for document in given}  # of one id the last
            for document in page.values():
                self.check_fields(document)
            found = {p.id: p.payload for p in self.store.retrieve([*page], Without((self.payload_key,)))}
            late = self._add_new([document for key, document in page.items() if key not in found])
            counts = self.sync(late) if late else (0, 0)
            added += len(page) - len(found) - len(late) + counts[0]
            updated += self._update([(document, found[key]) for key, document in page.items() if key in found])
            updated += counts[1]
        return added, updated

    def _add_new(self, documents: Sequence[Document]) -> list[Document]:
        """Write the points of these documents, but of those that have come since they were looked for: these it gives
        back."""
        late: set[PointId] = set()
        for batch in self._batches(documents):
            there = self._there(batch)
            late |= there
            if batch := [point for point in batch if point.id not in there]:
                self.store.upsert(batch, only_new=True)
        return [document for document in documents if point_id(document.id) in late]

    def _update(self, there: Sequence[tuple[Document, Payload]]) -> int:
        """Bring points that differ from their documents up to date, given what they hold; returns how many did."""
        differing = [
            (document, payload, payload | dict(document.payload))
            for document, payload in there
            if any(payload.get(key) != value for key, value in document.payload.items())
        ]
        reworded = [
            replace(document, payload=merged)
            for document, payload, merged in differing
            if self.layout.text_of(payload) != self.layout.text_of(merged)
        ]
        for batch in self._batches(reworded):
            there_still = self._there(batch)
            if batch := [point for point in batch if point.id in there_still]:
                self.store.update_vectors(batch)
        writes = (PayloadWrite(point_id(document.id), document.payload) for document, _, _ in differing)
        of_size = ((write, json_bytes(write.payload)) for write in writes)
        for changes in bounded(self.max_request_bytes, of_size, lambda write: write.id):
            self.store.set_payload(changes)
        return len(differing)

    def _there(self, points: Sequence[Point]) -> set[PointId]:
        """Which of these points the collection has now."""
        return {point.id for point in self.store.retrieve([point.id for point in points], False)}

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

    def _batches(self, documents: Sequence[Document]) -> Iterator[list[Point]]:
        """The points of documents with their vectors, as many at a time as a request holds."""
        return bounded(self.max_request_bytes, sized(self._points(documents)), lambda point: point.id)

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

    def _text(self, document: Document) -> str:
        text = self.layout.text_of(document.payload)
        if text is None:
            fields = sorted(document.payload)
            raise BankError(
                f"document {document.id!r} has no text for the layout {self.layout}; its fields are {fields}"
            )
        self.check_fields(document)
        return text

    def _no_vector(self, name: str, present: VectorNames) -> BankError:
        names = present.names or "none"
        return BankError(
            f"collection {self.store.name!r} has no vector {name!r}; it has {names}: name one of these (using=NAME), "
            "with an embedder for one that is dense (embedders={NAME: DenseEmbedder(MODEL)})"
        )
