"""One collection seen as a bank sees it: which points have an atom of a space, which lack one, which are stale.

Nothing here embeds text or writes an atom; `bank` does, and `upkeep` counts, recodes and drops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from regrad_qdrant.atoms.record import VERSIONS, Record, text_sha
from regrad_qdrant.bank.documents import Hit
from regrad_qdrant.bank.layouts import json_path, keys_of, value_at
from regrad_qdrant.bank.place import AtomPlace
from regrad_qdrant.bank.stores.base import (
    PointId,
    Store,
    StoredPoint,
    WithPayload,
    is_empty,
    pages,
)
from regrad_qdrant.errors import BankError, RecordError, UnindexedFilterError

if TYPE_CHECKING:
    from qdrant_client.models import FieldCondition, Filter

    from regrad_qdrant.bank.shard import Shard

PAGE = 256
LOOK_AGAIN = 10.0  # seconds after which a bank that finds no atom looks for a sidecar again
IDS = 4096  # ids read at a time, where nothing else of a point is
EXAMINED = ("v", "space", "sha", "codec")  # of a record, what says what it is worth
AtomState = Literal["current", "stale", "damaged", "gone", "missing"]


class AtomCollection(AtomPlace):
    """A collection and the atoms of one space in it; arguments as those of `GradientBank`."""

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

    def points(self, query_filter: Filter | None = None) -> Iterator[Hit]:
        """Every point that passes the filter, page by page, without its atom."""
        for point in self.scroll(query_filter, self._fields):
            yield self.hit(point)

    def missing(self, shard: Shard | None = None) -> Iterator[Hit]:
        """The points, of a shard or all, that lack an atom of this space, page by page, without reading any atom.

        Points may be given their atoms while this iterates. A point without text has an empty `text`.
        """
        for point in self._with_atom(False, self._fields, shard=shard):
            yield self.hit(point)

    def stale(self) -> Iterator[Hit]:
        """The points whose text has changed since their atom was computed, without reading any atom."""
        return (hit for state, hit in self.examined() if state == "stale")

    def examined(self, shard: Shard | None = None) -> Iterator[tuple[AtomState, Hit]]:
        """The points, of a shard or all, that have an atom of this space, and what it is worth, without reading any.

        A server finds them by its index, which can say what the payload no longer holds: those are `gone`.
        """
        for point in self._with_atom(True, self._fields, *EXAMINED, shard=shard):
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

    def _with_atom(
        self, has: bool, fields: list[str], *of_record: str, shard: Shard | None = None
    ) -> Iterator[StoredPoint]:
        """The points that have an atom of this space, or lack one, with some fields of its record. All are looked at
        where the atoms are in a sidecar, and where strict mode refuses the filter for want of an index, as before the
        first ingestion."""
        if self.in_sidecar:
            found = self.joined(fields, *dict.fromkeys(("space", *of_record)), shard=shard)
            yield from (point for point in found if self.belongs(point) == has)
            return
        wanted = [*fields, *self._of_record(*of_record)]
        try:
            yield from self._of_shard(shard, self.has_atom if has else self.lacks_atom, wanted)
        except UnindexedFilterError:
            found = self._of_shard(shard, None, [*wanted, self.space_path])
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
        if self.in_sidecar and not self.atoms.exists():
            return 0
        if not self.in_sidecar:
            with contextlib.suppress(UnindexedFilterError):
                return self.store.count(self.has_atom)
        return sum(1 for _ in self._with_atom(True, []))

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
        for page in pages(self.in_this_space([self.space_path]), PAGE):
            there = {point.id for point in self.store.retrieve([point.id for point in page], False)}
            yield from (point.id for point in page if point.id not in there)

    def has_other_spaces(self) -> bool:
        """Whether a point carries an atom of another space under the bank's key, as its payload says."""
        if self.in_sidecar and not self.atoms.exists():
            return False
        return any(True for _ in self._in_other_spaces())

    def count_of_other_spaces(self) -> int:
        """Points that carry an atom of another space under the bank's key; an estimate where a server in strict mode
        counts no other way."""
        if self.in_sidecar and not self.atoms.exists():
            return 0
        try:
            return self.atoms.count(self._of_other_spaces)
        except UnindexedFilterError:
            return sum(1 for _ in self._in_other_spaces())

    def in_this_space(self, fields: list[str], page: int = PAGE) -> Iterator[StoredPoint]:
        """Where the atoms are, the points that have one of this space, with these fields, its space among them."""
        return filter(self.belongs, self._where_atoms_are(self.has_atom, fields, page))

    def _in_other_spaces(self) -> Iterator[StoredPoint]:
        for point in self._where_atoms_are(self._of_other_spaces, [self.space_path]):
            value = point.payload.get(self.payload_key)
            if isinstance(value, Mapping) and "space" in value and not self.belongs(point):
                yield point

    def _where_atoms_are(self, query_filter: Filter, fields: list[str], page: int = PAGE) -> Iterator[StoredPoint]:
        """Where the atoms are, the points that pass; all of them where strict mode refuses the filter for want of an
        index, as before the first ingestion."""
        try:
            yield from self.scroll(query_filter, fields, page, self.atoms)
        except UnindexedFilterError:
            yield from self.scroll(None, fields, page, self.atoms)

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
        found = self._with_atoms_here(points)
        if not any(map(self.belongs, found)) and self.look_again(LOOK_AGAIN):
            return self._with_atoms_here(points)
        return found

    def _with_atoms_here(self, points: Sequence[StoredPoint]) -> list[StoredPoint]:
        if not self.in_sidecar or not points:
            return list(points)
        try:
            return self._joined(points, [self.payload_key])
        except BankError:
            if self.atoms.exists():
                raise
            return list(points)  # nothing was ingested yet: none has an atom

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
