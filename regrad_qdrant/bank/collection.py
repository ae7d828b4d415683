"""One collection seen as a bank sees it: which points have an atom of a space, which lack one, which are stale.

Nothing here embeds text or writes an atom; `bank` does, and `upkeep` counts, recodes and drops.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from regrad_qdrant.atoms.record import DEFAULT_KEY, VERSIONS, Record, text_sha
from regrad_qdrant.bank.documents import Hit
from regrad_qdrant.bank.layouts import CORPUS, SUSPECTS, Layout, detect, json_path, keys_of, value_at
from regrad_qdrant.bank.stores.base import (
    MAX_REQUEST_BYTES,
    Configuration,
    PointId,
    Store,
    StoredPoint,
    VectorNames,
    Without,
    WithPayload,
    check_name,
    is_empty,
    pages,
)
from regrad_qdrant.bank.stores.client import ClientStore
from regrad_qdrant.errors import BankError, RecordError, UnindexedFilterError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import FieldCondition, Filter

    from regrad_qdrant.bank.shard import Shard
    from regrad_qdrant.model.space import AtomSpace

PAGE = 256
IDS = 4096  # ids read at a time, where nothing else of a point is
SAMPLE = 64  # points that show the layout
LOOKED_THROUGH = 100_000  # points up to which all are looked through for a field of the bank's own name
LOOK_AGAIN = 10.0  # seconds after which a bank without an atom looks for a sidecar again
OF_SIDECAR = ("shard_number", "replication_factor", "write_consistency_factor", "on_disk_payload")  # as documents have
EXAMINED = ("v", "space", "sha", "codec")  # of a record, what says what it is worth
AtomState = Literal["current", "stale", "damaged", "gone", "missing"]


class AtomCollection:
    """A collection and the atoms of one space in it; arguments as those of `GradientBank`."""

    def __init__(
        self,
        client: QdrantClient | Store,
        collection_name: str,
        space: str,
        *,
        payload_key: str = DEFAULT_KEY,
        layout: Layout | None = None,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        sidecar: str | Literal[False] | None = None,
    ) -> None:
        if inspect.iscoroutinefunction(getattr(client, "query_points", None)):
            raise BankError("an AsyncQdrantClient goes into an AsyncGradientBank, whose methods are awaited")
        self.store: Store = ClientStore(client, collection_name) if hasattr(client, "query_points") else client  # type: ignore[arg-type,assignment] # told apart by the client's own method
        self._atoms: Store | None = None
        self._looked: float | None = None  # when no sidecar was noted, of a bank that was told of none
        if sidecar is not None:
            self.keep_atoms_in(sidecar or None)
        self.space = space
        if not payload_key or json_path([payload_key]) != payload_key or payload_key in ("id", *SUSPECTS):
            raise BankError(
                f"payload key {payload_key!r}: needs a name of letters, digits, _ and - that no document has, "
                f"so none of id, {', '.join(SUSPECTS)}"
            )
        self.payload_key = payload_key
        self._layout: Layout | None = None
        if layout is not None:
            self._use(layout)
        self.max_request_bytes = max_request_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the store; an embedded shard can then be opened by another process."""
        self.store.close()
        if self._atoms is not None and self._atoms is not self.store:
            self._atoms.close()

    @property
    def atoms(self) -> Store:
        """Where the atoms are: the documents' own collection, or the sidecar that was given or that ingestion noted."""
        if self._atoms is None:
            if not self.store.exists():
                return self.store  # until there is something to see
            self.keep_atoms_in(self._entry(self.store).get("sidecar"))
            self._looked = time.monotonic()
        assert self._atoms is not None
        return self._atoms

    def keep_atoms_in(self, sidecar: str | None) -> None:
        """Read and write atoms in the collection of this name beside the documents', or in place.

        Raises:
            BankError: if it is the documents' own, or no name of a collection.
        """
        if sidecar == self.store.name:
            raise BankError(f"the sidecar {sidecar!r} is the documents' own collection: give it another name")
        if sidecar is not None:
            check_name(sidecar)
        self._atoms = self.store if sidecar is None else self.store.sibling(sidecar)

    @property
    def in_sidecar(self) -> bool:
        """Whether the atoms have a collection of their own."""
        return self.atoms is not self.store

    @property
    def layout(self) -> Layout:
        """Where payloads keep the text: as given, as ingestion noted it in the metadata, or as the first points show.

        Raises:
            BankError: if it can't be told; the error lists the candidates.
        """
        if self._layout is None:
            if not self.store.exists():
                return CORPUS  # until there is something to see
            noted = self.noted().get("layout")
            if noted is None:
                return self.detect_layout()
            try:
                self._use(Layout(**noted))
            except TypeError as error:
                raise BankError(
                    f"the collection notes a layout {noted} under {self.metadata_key!r} of its metadata: a newer "
                    "regrad-qdrant may know it; or name the field with the text (--text-path PATH, in Python "
                    "layout=Layout('mine', 'PATH'))"
                ) from error
        assert self._layout is not None
        return self._layout

    def detect_layout(self) -> Layout:
        """Find out where the collection's payloads keep the text, from its first points, and read it there.

        Raises:
            BankError: if it can't be told; the error lists the candidates.
        """
        points, _ = self.store.scroll(None, SAMPLE, None, Without((self.payload_key,)))
        found = detect([point.payload for point in points])
        if points:
            self._use(found)
        return found

    def name_documents_by(self, path: str) -> None:
        """Take the documents' own ids from another field than the layout's."""
        self._use(replace(self.layout, id=path))

    def _use(self, layout: Layout) -> None:
        own = [*layout.fields(), "id"]
        if self.payload_key in own:
            raise BankError(f"payload key {self.payload_key!r}: the layout {layout} reads {own}; choose another key")
        self._layout = layout

    def noted(self) -> dict[str, Any]:
        """What ingestion wrote down about this space in the collection's metadata; nothing where there is none."""
        if self.in_sidecar and not self.atoms.exists():
            return {}
        return self._entry(self.atoms)

    def _entry(self, store: Store) -> dict[str, Any]:
        """What stands about this space in the metadata of the documents' collection, or of the sidecar."""
        value = store.read_metadata().get(self.metadata_key)
        return dict(value) if isinstance(value, Mapping) else {}

    @property
    def metadata_key(self) -> str:
        """The key of the collection's metadata under which ingestion notes what it did."""
        return f"{self.payload_key}.{self.space}"

    # -- which points -----------------------------------------------------------------------------------

    @property
    def space_path(self) -> str:
        """Where a point says which space its atom is of."""
        return f"{self.payload_key}.space"

    @property
    def has_atom(self) -> Filter:
        """The filter on points that carry an atom of this space."""
        from qdrant_client import models

        return models.Filter(must=[self.in_space()])

    @property
    def lacks_atom(self) -> Filter:
        """The filter on points that carry none."""
        from qdrant_client import models

        return models.Filter(must_not=[self.in_space()])

    def in_space(self) -> FieldCondition:
        from qdrant_client import models

        return models.FieldCondition(key=self.space_path, match=models.MatchValue(value=self.space))

    def index(self) -> None:
        """Index `<key>.space`, which `missing` and `stale` filter on, and make the sidecar, on as many shards and
        replicas as the documents have. Again changes nothing.

        Raises:
            BankError: as `check_place`, before anything is changed.
        """
        self.check_place()
        if self.in_sidecar and not self.atoms.exists():
            kept = {name: value for name, value in self.store.configuration().settings.items() if name in OF_SIDECAR}
            self.atoms.create_as(Configuration(VectorNames(), {"vectors_config": {}, **kept}))
        self.atoms.create_keyword_index(self.space_path)

    def check_place(self) -> None:
        """Refuse to write atoms where something else stands, before anything is written.

        Before the first ingestion under the bank's key every point of a collection is looked at up to 100,000; of a
        larger one, and where strict mode refuses the filter, the first ones. After it the key is the bank's, and what
        is no atom is damage.

        Raises:
            BankError: if points have a field of the bank's name that is no atom, if the sidecar is a collection with
                vectors, or if the server distributes the points by shard keys of the user's, which a write must name.
        """
        if self.in_sidecar and self.atoms.exists() and (vectors := self.atoms.vectors()).names:
            raise BankError(
                f"collection {self.atoms.name!r} has vectors ({', '.join(vectors.names)}), so it is no sidecar: choose "
                "a name that no collection has (--sidecar NAME)"
            )
        if not self.atoms.exists():
            return
        if self.atoms.has_shard_keys:
            raise BankError(
                f"collection {self.atoms.name!r} is sharded by keys of its own, which every write would have to name: "
                "keep the atoms in a sidecar (--sidecar NAME)"
            )
        key_is_ours = self.noted() or self.notes_other_spaces()
        if not key_is_ours and (foreign := self._foreign()):
            raise BankError(
                f"point {foreign[0].id!r} has a field {self.payload_key!r} that is no atom, and it would be written "
                "over: choose another key (--payload-key NAME)"
            )

    def _foreign(self) -> list[StoredPoint]:
        """Points that have something else than an atom under the bank's key."""
        from qdrant_client import models

        if self.atoms.count() <= LOOKED_THROUGH:
            theirs = models.Filter(must=[is_empty(self.space_path)], must_not=[is_empty(self.payload_key)])
            with contextlib.suppress(UnindexedFilterError):
                return self.atoms.scroll(theirs, 1, None, False)[0]
        first, _ = self.atoms.scroll(None, SAMPLE, None, [self.payload_key])
        values = [(point, point.payload.get(self.payload_key)) for point in first]
        return [p for p, v in values if v not in (None, []) and not (isinstance(v, Mapping) and "space" in v)]

    def describe(self, space: AtomSpace, embedders: Mapping[str, Any] | None = None) -> None:
        """Note in the collection's metadata what readers need to know (Qdrant 1.16 and later; older ones ignore it):
        the shapes of the space's tensors, the layout, and what embeds each vector. With a sidecar all of it stands
        there, and its name in the documents' collection.

        Args:
            embedders: by the vector's name, what `Embedder.noted` says.
        """
        noted = {
            "space": space.kind,
            "shapes": {name: list(shape) for name, shape in space.shapes.items()},
            "layout": self.layout.noted(),
            "embedders": dict(embedders or {}),
        }
        noted = {name: value for name, value in noted.items() if value is not None}
        if self.noted() != noted:
            self.atoms.write_metadata({self.metadata_key: noted})
        if self.in_sidecar:
            self.note_sidecar()

    def note_sidecar(self) -> bool:
        """Note in the documents' collection where the atoms are; False where the server keeps no metadata."""
        found = {"sidecar": self.atoms.name}
        if self._entry(self.store) != found:
            self.store.write_metadata({self.metadata_key: found})
        return self._entry(self.store) == found

    def optimize(self) -> None:
        """Let an embedded engine put its segments in order, after a bulk load; a server does so by itself."""
        self.store.optimize()
        if self.in_sidecar:
            self.atoms.optimize()

    def points(self, query_filter: Filter | None = None) -> Iterator[Hit]:
        """Every point that passes the filter, page by page, without its atom."""
        for point in self.scroll(query_filter, self._fields):
            yield self.hit(point)

    def missing(self, shard: Shard | None = None) -> Iterator[Hit]:
        """The points, of a shard or all, that lack an atom of this space, page by page, without reading any atom.

        Points may be given their atoms while this iterates. A point without text has an empty `text`.
        """
        if not self.in_sidecar:
            found = self._with_atom(False, self._fields, shard)
        else:
            found = (point for point in self.joined(self._fields, "space", shard=shard) if not self.belongs(point))
        for point in found:
            yield self.hit(point)

    def stale(self) -> Iterator[Hit]:
        """The points whose text has changed since their atom was computed, without reading any atom."""
        return (hit for state, hit in self.examined() if state == "stale")

    def examined(self, shard: Shard | None = None) -> Iterator[tuple[AtomState, Hit]]:
        """The points, of a shard or all, that have an atom of this space, and what it is worth, without reading any.

        A server finds them by its index, which can say what the payload no longer holds: those are `gone`.
        """
        points: Iterator[StoredPoint]
        if self.in_sidecar:
            points = filter(self.belongs, self.joined(self._fields, *EXAMINED, shard=shard))
        else:
            points = self._with_atom(True, [*self._fields, *self._of_record(*EXAMINED)], shard)
        for point in points:
            hit = self.hit(point)
            yield self._state_of(point, hit.text), hit

    def count_current(self, ids: Sequence[PointId]) -> int:
        """How many of these points carry an atom of this space and of their present text; none is read."""
        of_record = self._of_record(*EXAMINED)
        points = self.store.retrieve(ids, [*self.layout.fields(), *([] if self.in_sidecar else of_record)])
        joined = self._joined(points, of_record) if self.in_sidecar else points
        return sum(self._state_of(point, self.layout.text_of(point.payload) or "") == "current" for point in joined)

    def surveyed(self) -> Iterator[tuple[AtomState, Hit]]:
        """Every point with what its atom is worth, without reading any atom; every text is read once."""
        if not self.in_sidecar:
            yield from self.examined()
            yield from (("missing", hit) for hit in self.missing())
            return
        for point in self.joined(self._fields, *EXAMINED):
            hit = self.hit(point)
            yield self._state_of(point, hit.text) if self.belongs(point) else "missing", hit

    def _with_atom(self, has: bool, fields: list[str], shard: Shard | None = None) -> Iterator[StoredPoint]:
        """The points that have an atom of this space, or lack one. Where strict mode refuses the filter for want of an
        index, as before the first ingestion, all points are looked at."""
        try:
            yield from self._of_shard(shard, self.has_atom if has else self.lacks_atom, fields)
        except UnindexedFilterError:
            found = self._of_shard(shard, None, [*fields, self.space_path])
            yield from (point for point in found if self.belongs(point) == has)

    def _of_shard(self, shard: Shard | None, query_filter: Filter | None, fields: list[str]) -> Iterator[StoredPoint]:
        """The points of a shard, or all, that pass; of the others nothing but their ids is read."""
        if shard is None:
            yield from self.scroll(query_filter, fields)
            return
        ids = (point.id for point in self.scroll(query_filter, [], IDS) if shard.has(point.id))
        for page in pages(ids, PAGE):
            yield from self.store.retrieve(page, fields or False)

    def _state_of(self, point: StoredPoint, text: str) -> AtomState:
        if not self.belongs(point):
            return "gone"
        value = point.payload[self.payload_key]
        if (
            value.get("v") not in VERSIONS
            or not isinstance(value.get("sha"), str)
            or not isinstance(value.get("codec"), str)
        ):
            return "damaged"
        return "current" if value["sha"] == text_sha(text) else "stale"

    @property
    def _fields(self) -> list[str]:
        """What is read of a payload where its text is wanted and its atom is not."""
        return [*self.layout.fields(), json_path(keys_of(self.layout.id)[:1])]

    def _of_record(self, *names: str) -> list[str]:
        """The payload's paths of a record's fields."""
        return [f"{self.payload_key}.{name}" for name in names]

    def count_atoms(self) -> int:
        """Points that carry an atom of this space, stale ones among them; of a server, as its index has it."""
        if not self.in_sidecar:
            try:
                return self.store.count(self.has_atom)
            except UnindexedFilterError:
                return sum(1 for _ in self._with_atom(True, []))
        if not self.atoms.exists():
            return 0
        return sum(self.belongs(point) for point in self.joined([], "space"))

    def count_with_atoms(self, ids: Sequence[PointId]) -> int:
        """How many of these points carry an atom of this space."""
        return sum(map(self.belongs, self.atoms.retrieve(ids, [self.space_path])))

    def absent_fields(self, query_filter: Filter) -> list[str]:
        """The fields of a filter's conditions that no point has, as far as the engine says so."""
        from qdrant_client import models

        absent = []
        for key in _keys_of_filter(query_filter):
            try:
                found, _ = self.store.scroll(models.Filter(must_not=[is_empty(key)]), 1, None, False)
            except BankError:
                continue  # strict mode, and no index on it
            if not found:
                absent.append(key)
        return absent

    def orphans(self) -> Iterator[PointId]:
        """The points of the sidecar that have an atom of this space, and whose document is gone."""
        if not self.in_sidecar or not self.atoms.exists():
            return
        for page in pages(self.scroll(self.has_atom, [], store=self.atoms), PAGE):
            there = {point.id for point in self.store.retrieve([point.id for point in page], False)}
            yield from (point.id for point in page if point.id not in there)

    def notes_other_spaces(self) -> bool:
        """Whether ingestion noted another space whose atoms are in the documents' own points under the bank's key."""
        entries = self.store.read_metadata().items()
        return any(
            key.startswith(f"{self.payload_key}.") and key != self.metadata_key and "sidecar" not in entry
            for key, entry in entries
            if isinstance(entry, Mapping)
        )

    def has_other_spaces(self) -> bool:
        """Whether a point carries an atom of another space under the bank's key, as its payload says."""
        if self.in_sidecar and not self.atoms.exists():
            return False
        found = self.scroll(self._of_other_spaces, [self.space_path], store=self.atoms)
        return any(self.payload_key in point.payload and not self.belongs(point) for point in found)

    def count_of_other_spaces(self) -> int:
        """Points that carry an atom of another space under the bank's key; an estimate where a server in strict mode
        counts no other way."""
        if self.in_sidecar and not self.atoms.exists():
            return 0
        return self.atoms.count(self._of_other_spaces)

    @property
    def _of_other_spaces(self) -> Filter:
        from qdrant_client import models

        return models.Filter(must_not=[self.in_space(), is_empty(self.space_path)])

    # -- as they are read -------------------------------------------------------------------------------

    def scroll(
        self,
        query_filter: Filter | None,
        fields: WithPayload,
        page: int = PAGE,
        store: Store | None = None,
    ) -> Iterator[StoredPoint]:
        """The points that pass, page by page, with these fields of their payload."""
        wanted = fields or False  # no fields are nothing, not all
        offset: PointId | None = None
        while True:
            points, offset = (store or self.store).scroll(query_filter, page, offset, wanted)
            yield from points
            if offset is None:
                return

    def joined(self, fields: list[str], *of_record: str, shard: Shard | None = None) -> Iterator[StoredPoint]:
        """Every point, of a shard or all, with some fields of its record in the sidecar."""
        points = self._of_shard(shard, None, fields)
        if not self.atoms.exists():
            yield from points
            return
        for page in pages(points, PAGE):
            yield from self._joined(page, self._of_record(*of_record))

    def _joined(self, points: Sequence[StoredPoint], fields: list[str]) -> list[StoredPoint]:
        """The points with these fields of the sidecar's."""
        atoms = {point.id: point.payload for point in self.atoms.retrieve([point.id for point in points], fields)}
        return [replace(point, payload=point.payload | atoms.get(point.id, {})) for point in points]

    def with_atoms(self, points: Sequence[StoredPoint]) -> list[StoredPoint]:
        """The points with what the sidecar holds for them, as if it stood in their payload."""
        if not self.in_sidecar and not any(map(self.belongs, points)):
            self._look_again()
        if not self.in_sidecar or not points:
            return list(points)
        try:
            return self._joined(points, [self.payload_key])
        except BankError:
            if self.atoms.exists():
                raise
            return list(points)  # nothing was ingested yet: none has an atom

    def _look_again(self) -> None:
        """Find the sidecar of an ingestion that came after this bank was opened."""
        if self._looked is not None and time.monotonic() - self._looked > LOOK_AGAIN:
            self._looked = time.monotonic()
            if (sidecar := self._entry(self.store).get("sidecar")) is not None:
                self.keep_atoms_in(sidecar)

    def belongs(self, point: StoredPoint) -> bool:
        value = point.payload.get(self.payload_key)
        return isinstance(value, Mapping) and value.get("space") == self.space

    def hit(self, point: StoredPoint, *, with_record: bool = False) -> Hit:
        """The point as a document; with its atom where its payload was read to the full."""
        payload = dict(point.payload)
        value = payload.pop(self.payload_key, None)
        record, damaged = None, None
        if with_record and isinstance(value, Mapping) and value.get("space") == self.space:
            try:
                record = Record.from_payload(value)
            except RecordError as error:
                damaged = str(error)
        key = value_at(payload, self.layout.id)
        return Hit(
            point.id,
            point.score,
            self.layout.text_of(payload) or "",
            payload,
            record,
            damaged=damaged,
            key=key if isinstance(key, str | int) else None,
        )


def _keys_of_filter(query_filter: Filter) -> list[str]:
    """The payload fields that a filter's conditions look at, of nested ones too."""
    keys: dict[str, None] = {}
    for part in ("must", "should", "must_not"):
        found = getattr(query_filter, part, None) or []
        for condition in found if isinstance(found, list) else [found]:
            if isinstance(key := getattr(condition, "key", None), str):
                keys[key] = None
            elif hasattr(condition, "must"):
                keys |= dict.fromkeys(_keys_of_filter(condition))
    return list(keys)
