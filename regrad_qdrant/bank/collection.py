"""One collection seen as a bank sees it: which points have an atom of a space, which lack one, which are stale.

Nothing here embeds text or writes an atom; `bank` does, and `upkeep` counts, recodes and drops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from regrad_qdrant.atoms.record import DEFAULT_KEY, Record, text_sha
from regrad_qdrant.bank.documents import Hit
from regrad_qdrant.bank.layouts import CORPUS, Layout, detect, json_path
from regrad_qdrant.bank.stores.base import (
    MAX_REQUEST_BYTES,
    PointId,
    Store,
    StoredPoint,
    VectorNames,
    pages,
)
from regrad_qdrant.bank.stores.client import ClientStore
from regrad_qdrant.errors import BankError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import FieldCondition, Filter

    from regrad_qdrant.model.space import AtomSpace

PAGE = 256
SAMPLE = 64  # points that show the layout


class AtomCollection:
    """A collection and the atoms of one space in it; arguments as those of `GradientBank`."""

    def __init__(
        self,
        client: QdrantClient | Store,
        collection_name: str,
        space: str,
        *,
        payload_key: str = DEFAULT_KEY,
        layout: Layout = CORPUS,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        sidecar: str | None = None,
    ) -> None:
        self.store: Store = ClientStore(client, collection_name) if hasattr(client, "query_points") else client  # type: ignore[arg-type,assignment] # told apart by the client's own method
        self.atoms: Store = self.store if sidecar is None else self.store.sibling(sidecar)
        self.space = space
        self.payload_key = payload_key
        self._use(layout)
        self.max_request_bytes = max_request_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the store; an embedded shard can then be opened by another process."""
        self.store.close()
        if self.in_sidecar:
            self.atoms.close()

    @property
    def in_sidecar(self) -> bool:
        """Whether the atoms have a collection of their own."""
        return self.atoms is not self.store

    def detect_layout(self) -> Layout:
        """Find out where the collection's payloads keep the text, from its first points, and read it there.

        Raises:
            BankError: if it can't be told; the error lists the candidates.
        """
        points, _ = self.store.scroll(None, SAMPLE, None, True)
        payloads = [{key: v for key, v in point.payload.items() if key != self.payload_key} for point in points]
        self._use(detect(payloads))
        return self.layout

    def _use(self, layout: Layout) -> None:
        own = [*layout.fields(), "id"]
        if not self.payload_key or json_path([self.payload_key]) != self.payload_key or self.payload_key in own:
            raise BankError(
                f"payload key {self.payload_key!r}: needs a name of letters, digits, _ and - that is none of {own}"
            )
        self.layout = layout

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
        """Index `<key>.space`, which `missing` and `stale` filter on, and make the sidecar. Again changes nothing."""
        if self.in_sidecar and not self.atoms.exists():
            self.atoms.create(VectorNames())
        self.atoms.create_keyword_index(self.space_path)

    def describe(self, space: AtomSpace) -> None:
        """Note the shapes of the space's tensors once, in the collection's metadata (Qdrant 1.16 and later)."""
        key = f"{self.payload_key}.{self.space}"
        if key not in self.atoms.read_metadata():
            shapes = {name: list(shape) for name, shape in space.shapes.items()}
            self.atoms.write_metadata({key: {"space": space.kind, "shapes": shapes}})

    def optimize(self) -> None:
        """Let an embedded engine put its segments in order, after a bulk load; a server does so by itself."""
        self.store.optimize()
        if self.in_sidecar:
            self.atoms.optimize()

    def points(self) -> Iterator[Hit]:
        """Every point, page by page, without its atom."""
        return (self.hit(point) for point in self.scroll(None, [*self.layout.fields(), "id"]))

    def missing(self) -> Iterator[Hit]:
        """The points that lack an atom of this space, page by page, without reading any atom.

        Points may be given their atoms while this iterates. A point without text has an empty `text`.
        """
        fields = [*self.layout.fields(), "id"]
        if not self.in_sidecar:
            return (self.hit(point) for point in self.scroll(self.lacks_atom, fields))
        return (self.hit(point) for point in self.joined(fields, "space") if not self.belongs(point))

    def stale(self) -> Iterator[Hit]:
        """The points whose text has changed since their atom was computed, without reading any atom."""
        fields = [*self.layout.fields(), "id"]
        points: Iterator[StoredPoint]
        if self.in_sidecar:
            points = filter(self.belongs, self.joined(fields, "space", "sha"))
        else:
            points = self.scroll(self.has_atom, [*fields, f"{self.payload_key}.sha"])
        for point in points:
            text = self.layout.text_of(point.payload)
            if point.payload.get(self.payload_key, {}).get("sha") != text_sha(text or ""):
                yield self.hit(point)

    def count_atoms(self) -> int:
        """Points that carry an atom of this space, stale ones among them."""
        if not self.in_sidecar:
            return self.store.count(self.has_atom)
        if not self.atoms.exists():
            return 0
        return sum(self.belongs(point) for point in self.joined(["id"], "space"))

    def count_of_other_spaces(self) -> int:
        """Points that carry an atom of another space under the bank's key."""
        from qdrant_client import models

        if self.in_sidecar and not self.atoms.exists():
            return 0
        empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=self.space_path))
        return self.atoms.count(models.Filter(must_not=[self.in_space(), empty]))

    # -- as they are read -------------------------------------------------------------------------------

    def scroll(
        self, query_filter: Filter | None, fields: list[str], page: int = PAGE, store: Store | None = None
    ) -> Iterator[StoredPoint]:
        offset: PointId | None = None
        while True:
            points, offset = (store or self.store).scroll(query_filter, page, offset, fields)
            yield from points
            if offset is None:
                return

    def joined(self, fields: list[str], *of_record: str) -> Iterator[StoredPoint]:
        """Every point with some fields of its record in the sidecar."""
        names = [f"{self.payload_key}.{name}" for name in of_record]
        for page in pages(self.scroll(None, fields), PAGE):
            atoms = {point.id: point.payload for point in self.atoms.retrieve([point.id for point in page], names)}
            for point in page:
                yield replace(point, payload=point.payload | atoms.get(point.id, {}))

    def with_atoms(self, points: Sequence[StoredPoint]) -> list[StoredPoint]:
        """The points with what the sidecar holds for them, as if it stood in their payload."""
        if not self.in_sidecar or not points:
            return list(points)
        atoms = {point.id: point.payload for point in self.atoms.retrieve([p.id for p in points], [self.payload_key])}
        return [replace(point, payload=point.payload | atoms.get(point.id, {})) for point in points]

    def belongs(self, point: StoredPoint) -> bool:
        value = point.payload.get(self.payload_key)
        return isinstance(value, Mapping) and value.get("space") == self.space

    def hit(self, point: StoredPoint) -> Hit:
        payload = dict(point.payload)
        value = payload.pop(self.payload_key, None)
        record = None
        if isinstance(value, Mapping) and value.get("space") == self.space and "atom" in value:
            record = Record.from_payload(value)
        return Hit(point.id, point.score, self.layout.text_of(payload) or "", payload, record)
