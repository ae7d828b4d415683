"""Stores: the few operations that a bank needs, and what they take and return.

`client` has them over a Qdrant client (a running server, or in process), `edge` over an embedded Qdrant Edge
shard. Filters are `qdrant_client.models.Filter` everywhere. Payloads are written through filters on
ids, so that a point deleted in the meantime is passed over instead of failing its batch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from regrad_qdrant.bank.layouts import value_at
from regrad_qdrant.errors import BankError, RecordTooLargeError

if TYPE_CHECKING:
    from qdrant_client.models import Filter, IsEmptyCondition

PointId = int | str
Payload = dict[str, Any]
Item = TypeVar("Item")

MAX_REQUEST_BYTES = 16 * 2**20  # a server's REST limit is 32 MiB


@dataclass(frozen=True)
class Without:
    """What to read of a payload: all but these keys."""

    keys: tuple[str, ...]


WithPayload = bool | list[str] | Without  # all, nothing, these paths alone, or all but some keys


@dataclass(frozen=True)
class SparseVector:
    """Indices and values of the non-zero numbers."""

    indices: list[int]
    values: list[float]


@dataclass(frozen=True)
class Words:
    """What a server ranks a field's text index by: BM25 of its own, with no vector (Qdrant 1.20)."""

    text: str


TEXT_INDEX = "text:"  # what stands before a field's name where its text index is searched in place of a vector

Vector = list[float] | SparseVector


@dataclass(frozen=True)
class Point:
    """A point to write: its id, its named vectors and its payload."""

    id: PointId
    vectors: Mapping[str, Vector]
    payload: Payload


@dataclass(frozen=True)
class PayloadWrite:
    """Top-level keys to set on an existing point, as long as the values at some of its paths are still these.

    None stands for a path where there is nothing.
    """

    id: PointId
    payload: Payload
    unless_changed: Mapping[str, str | None] = field(default_factory=dict)
    atomic: bool = False  # check and write in one step on any store: it protects somebody else's atom

    def target(self) -> Filter:
        """The filter on that point in that state: engines check it in the same step as they write."""
        from qdrant_client import models

        same: list[Any] = [
            is_empty(path) if value is None else models.FieldCondition(key=path, match=models.MatchValue(value=value))
            for path, value in self.unless_changed.items()
        ]
        return models.Filter(must=[models.HasIdCondition(has_id=[self.id]), *same])

    def still_applies(self, payload: Payload) -> bool:
        """Whether a payload is in the state that the write wants, as `target` asks the engine."""
        return all(value_at(payload, path) == value for path, value in self.unless_changed.items())


@dataclass(frozen=True)
class StoredPoint:
    """A point read: without vectors; `score` is 0 where no search was made."""

    id: PointId
    payload: Payload
    score: float = 0.0


@dataclass(frozen=True)
class Search:
    """A search of the best points: by one vector, or by several, whose best reciprocal rank fusion ranks together.

    A fusion reads the payload of every candidate where any payload is asked for: ask for none, and fetch what wins.
    """

    vectors: Mapping[str, Vector | Words]  # by name; of words by `text:FIELD`
    limit: int
    query_filter: Filter | None = None  # of every vector's search
    with_payload: WithPayload = False
    depth: int = 0  # candidates of each of several vectors that the fusion ranks
    spare: int = 0  # of the limit, what may be left out where a server allows no more

    def within(self, most: int) -> Search:
        """The same search of at most so many points, as far as they can be spared."""
        least = self.limit - self.spare
        return replace(self, limit=max(least, min(self.limit, most)), depth=max(least, min(self.depth, most)))


@dataclass(frozen=True)
class VectorNames:
    """The vectors of a collection: dense ones with their size, sparse ones by name. The unnamed one is ''."""

    dense: dict[str, int] = field(default_factory=dict)
    sparse: tuple[str, ...] = ()
    distances: dict[str, str] = field(default_factory=dict)  # of dense ones, as Qdrant calls them, if not Cosine
    without_idf: tuple[str, ...] = ()  # sparse ones that lack the IDF modifier

    @property
    def names(self) -> list[str]:
        return [*self.dense, *self.sparse]

    def __contains__(self, name: str) -> bool:
        return name in self.names


@dataclass(frozen=True)
class Configuration:
    """A collection's settings, to make another one like it."""

    vectors: VectorNames
    settings: Mapping[str, Any] = field(default_factory=dict)  # of Qdrant's `create_collection`
    indexes: Mapping[str, Any] = field(default_factory=dict)  # payload field → schema, as Qdrant's client has it
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Store(Protocol):
    """One collection. Every method raises `StoreUnavailableError` if it can't be reached."""

    name: str

    @property
    def one_thread(self) -> bool:
        """Whether it may be used in the thread that made it alone."""

    @property
    def copies_points(self) -> bool:
        """Whether a payload write copies the whole point, vectors and all, to be indexed again."""

    @property
    def has_shard_keys(self) -> bool:
        """Whether points are distributed by shard keys of the user's, which every write would have to name."""

    def remarks(self) -> list[str]:
        """What the engine is, and what its settings mean for atoms: for people to read."""

    def sibling(self, name: str) -> Store:
        """The collection of another name in the same place."""

    def exists(self) -> bool: ...

    def create(self, vectors: VectorNames) -> None: ...

    def vectors(self) -> VectorNames: ...

    def configuration(self) -> Configuration: ...

    def create_as(self, configuration: Configuration) -> list[str]:
        """Make the collection with these settings, or what an empty one lacks of its indexes and metadata; returns the
        names of those that this engine does not hold."""

    def upsert(self, points: Sequence[Point], *, only_new: bool = False) -> None:
        """Write whole points; with `only_new` none that is there by then is replaced (a server from Qdrant 1.17)."""

    def update_vectors(self, points: Sequence[Point]) -> None:
        """Replace the vectors of existing points; their payloads stay."""

    def set_payload(self, writes: Sequence[PayloadWrite]) -> None:
        """Set top-level keys of existing points; points that are gone or have changed are passed over."""

    def delete_keys(self, keys: list[str], query_filter: Filter) -> None:
        """Remove payload keys of the points that pass; a nested key goes before its parent, in the order given."""

    def delete_points(self, ids: Sequence[PointId]) -> None: ...

    def search(self, searches: Sequence[Search]) -> list[list[StoredPoint]]:
        """The best points of each, best first: all in one request, where the engine has one for that."""

    def retrieve(self, ids: Sequence[PointId], with_payload: WithPayload) -> list[StoredPoint]: ...

    def scroll(
        self, query_filter: Filter | None, limit: int, offset: PointId | None, with_payload: WithPayload
    ) -> tuple[list[StoredPoint], PointId | None]: ...

    def read(self, limit: int, offset: PointId | None) -> tuple[list[Point], PointId | None]:
        """A page of whole points with their vectors, by rising ids."""

    def read_ids(self, ids: Sequence[PointId]) -> dict[PointId, Point]:
        """Whole points with their vectors; ids that are not there are left out."""

    def count(self, query_filter: Filter | None = None) -> int: ...

    def create_keyword_index(self, key: str) -> None: ...

    def delete_index(self, key: str) -> None:
        """Remove the index of a payload key; one that is not there is no error."""

    def read_metadata(self) -> dict[str, Any]: ...

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        """Merge into the collection's metadata; None takes a key away."""

    def optimize(self) -> None:
        """Let the engine put its segments in order after a bulk load, where it does not do so by itself."""

    def close(self) -> None: ...


def check_name(collection: str) -> None:
    """Refuse a collection's name that is no name of a folder, whichever engine it is for.

    Raises:
        BankError: for one with a path in it.
    """
    if not collection or Path(collection).name != collection or collection == "..":
        raise BankError(f"{collection!r} is no collection name: it must not contain a path")


def is_empty(path: str) -> IsEmptyCondition:
    """The condition that there is nothing at a path of the payload."""
    from qdrant_client import models

    return models.IsEmptyCondition(is_empty=models.PayloadField(key=path))


def plain_id(key: Any) -> PointId:
    return key if isinstance(key, int) else str(key)


def whole_point(point: Any) -> Point:
    """A point that an engine returned with its vectors."""
    vectors = point.vector if isinstance(point.vector, dict) else {"": point.vector}
    named = {name: _stored_vector(vector) for name, vector in vectors.items() if vector is not None}
    return Point(plain_id(point.id), named, point.payload or {})


def _stored_vector(vector: Any) -> Vector:
    """A vector as an engine returns it.

    Raises:
        BankError: for a multi-vector, which these stores do not copy.
    """
    if hasattr(vector, "indices"):
        return SparseVector(list(vector.indices), list(vector.values))
    if len(vector) and isinstance(vector[0], list):
        raise BankError("points with multi-vectors can't be copied: leave the vector out of the source collection")
    return [float(number) for number in vector]


def pages(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter; each is taken only when it is asked for."""
    iterator = iter(items)
    while page := list(itertools.islice(iterator, size)):
        yield page


def bounded(limit: int, items: Iterable[tuple[Item, int]], key_of: Callable[[Item], PointId]) -> Iterator[list[Item]]:
    """Batches of items whose bytes stay within the limit of a request.

    Raises:
        RecordTooLargeError: for an item that is larger by itself; what came before it is yielded first.
    """
    batch: list[Item] = []
    total = 0
    for item, size in items:
        size += 200  # the operation around it
        if size > limit:
            if batch:
                yield batch
            raise RecordTooLargeError(
                f"point {key_of(item)!r}: {size} bytes are more than one request may hold ({limit}): of an atom, use a "
                "coarser codec (--codec) or a smaller space; in Python raise max_request_bytes",
                key_of(item),
            )
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


def sized(points: Iterable[Point]) -> Iterator[tuple[Point, int]]:
    """Points with the bytes that they take in a request."""
    return ((point, json_bytes(point.payload) + _vector_bytes(point.vectors)) for point in points)


def json_bytes(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _vector_bytes(vectors: Mapping[str, Vector]) -> int:
    """About what the vectors take as JSON: a dozen characters a number."""
    return sum(12 * (len(v) if isinstance(v, list) else 2 * len(v.values)) for v in vectors.values())
