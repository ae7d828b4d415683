"""Stores: the few operations that a bank needs, over a Qdrant client or an embedded Qdrant Edge shard.

Filters are `qdrant_client.models.Filter` everywhere; the Edge store translates them. Payloads are written
through filters on ids, so that a point deleted in the meantime is passed over instead of failing its batch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from regrad_qdrant.errors import BankError, StoreUnavailableError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import Filter

PointId = int | str
Payload = dict[str, Any]
WithPayload = bool | list[str]

CLIENT_TIMEOUT = 120  # seconds; the client's own default of 5 s is too short for atoms
METADATA_FILE = "regrad_metadata.json"


@dataclass(frozen=True)
class SparseVector:
    """Indices and values of the non-zero numbers."""

    indices: list[int]
    values: list[float]


Vector = list[float] | SparseVector


@dataclass(frozen=True)
class Point:
    """A point to write: its id, its named vectors and its payload."""

    id: PointId
    vectors: Mapping[str, Vector]
    payload: Payload


@dataclass(frozen=True)
class StoredPoint:
    """A point read: without vectors; `score` is 0 where no search was made."""

    id: PointId
    payload: Payload
    score: float = 0.0


@dataclass(frozen=True)
class VectorNames:
    """The vectors of a collection: dense ones with their size, sparse ones by name. The unnamed one is ''."""

    dense: dict[str, int] = field(default_factory=dict)
    sparse: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return name in self.dense or name in self.sparse


class Store(Protocol):
    """One collection. Every method raises `StoreUnavailableError` if it can't be reached."""

    name: str

    def exists(self) -> bool: ...

    def create(self, vectors: VectorNames) -> None: ...

    def vectors(self) -> VectorNames: ...

    def upsert(self, points: Sequence[Point]) -> None: ...

    def set_payload(self, values: Sequence[tuple[PointId, Payload]]) -> None:
        """Set top-level keys of existing points; ids that are gone are passed over."""

    def delete_keys(self, keys: list[str], query_filter: Filter) -> None: ...

    def search(
        self, vector: Vector, using: str, limit: int, query_filter: Filter | None, with_payload: WithPayload
    ) -> list[StoredPoint]: ...

    def retrieve(self, ids: Sequence[PointId], with_payload: WithPayload) -> list[StoredPoint]: ...

    def scroll(
        self, query_filter: Filter | None, limit: int, offset: PointId | None, with_payload: WithPayload
    ) -> tuple[list[StoredPoint], PointId | None]: ...

    def count(self, query_filter: Filter | None = None) -> int: ...

    def create_keyword_index(self, key: str) -> None: ...

    def read_metadata(self) -> dict[str, Any]: ...

    def write_metadata(self, metadata: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class ClientStore:
    """A collection behind a `QdrantClient`: a running server, or the client's own in-process engine."""

    def __init__(self, client: QdrantClient, name: str) -> None:
        self.client = client
        self.name = name

    def exists(self) -> bool:
        with _client_errors(self.name):
            return self.client.collection_exists(self.name)

    def create(self, vectors: VectorNames) -> None:
        from qdrant_client import models

        with _client_errors(self.name):
            self.client.create_collection(
                self.name,
                vectors_config={
                    name: models.VectorParams(size=size, distance=models.Distance.COSINE)
                    for name, size in vectors.dense.items()
                },
                sparse_vectors_config={
                    name: models.SparseVectorParams(modifier=models.Modifier.IDF) for name in vectors.sparse
                },
            )

    def vectors(self) -> VectorNames:
        with _client_errors(self.name):
            parameters = self.client.get_collection(self.name).config.params
        dense = parameters.vectors or {}
        named = dense if isinstance(dense, dict) else {"": dense}
        return VectorNames(
            {name: vector.size for name, vector in named.items()}, tuple(parameters.sparse_vectors or ())
        )

    def upsert(self, points: Sequence[Point]) -> None:
        from qdrant_client import models

        structs = [
            models.PointStruct(
                id=point.id,
                vector={name: _client_vector(vector) for name, vector in point.vectors.items()},
                payload=point.payload,
            )
            for point in points
        ]
        with _client_errors(self.name):
            self.client.upsert(self.name, structs, wait=True)

    def set_payload(self, values: Sequence[tuple[PointId, Payload]]) -> None:
        from qdrant_client import models

        operations = [
            models.SetPayloadOperation(
                set_payload=models.SetPayload(
                    payload=payload, filter=models.Filter(must=[models.HasIdCondition(has_id=[key])])
                )
            )
            for key, payload in values
        ]
        with _client_errors(self.name):
            self.client.batch_update_points(self.name, operations, wait=True)

    def delete_keys(self, keys: list[str], query_filter: Filter) -> None:
        with _client_errors(self.name):
            self.client.delete_payload(self.name, keys, points=query_filter, wait=True)

    def search(
        self, vector: Vector, using: str, limit: int, query_filter: Filter | None, with_payload: WithPayload
    ) -> list[StoredPoint]:
        with _client_errors(self.name):
            found = self.client.query_points(
                self.name,
                query=_client_vector(vector),
                using=using or None,
                limit=limit,
                query_filter=query_filter,
                with_payload=with_payload,
            )
        return [StoredPoint(_plain_id(point.id), point.payload or {}, point.score) for point in found.points]

    def retrieve(self, ids: Sequence[PointId], with_payload: WithPayload) -> list[StoredPoint]:
        with _client_errors(self.name):
            found = self.client.retrieve(self.name, list(ids), with_payload=with_payload)
        return [StoredPoint(_plain_id(point.id), point.payload or {}) for point in found]

    def scroll(
        self, query_filter: Filter | None, limit: int, offset: PointId | None, with_payload: WithPayload
    ) -> tuple[list[StoredPoint], PointId | None]:
        with _client_errors(self.name):
            found, following = self.client.scroll(
                self.name, scroll_filter=query_filter, limit=limit, offset=offset, with_payload=with_payload
            )
        points = [StoredPoint(_plain_id(point.id), point.payload or {}) for point in found]
        return points, None if following is None else _plain_id(following)

    def count(self, query_filter: Filter | None = None) -> int:
        with _client_errors(self.name):
            return self.client.count(self.name, count_filter=query_filter, exact=True).count

    def create_keyword_index(self, key: str) -> None:
        from qdrant_client import models
        from qdrant_client.local.qdrant_local import QdrantLocal

        if isinstance(self.client._client, QdrantLocal):
            return  # the in-process engine has no payload indexes, and warns about it
        with _client_errors(self.name):
            self.client.create_payload_index(self.name, key, models.PayloadSchemaType.KEYWORD, wait=True)

    def read_metadata(self) -> dict[str, Any]:
        with _client_errors(self.name):
            return dict(getattr(self.client.get_collection(self.name).config, "metadata", None) or {})

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        """Merge into the collection's metadata (Qdrant 1.16 and later; an older server ignores it)."""
        with _client_errors(self.name):
            self.client.update_collection(self.name, metadata=metadata)

    def close(self) -> None:
        self.client.close()


class EdgeStore:
    """A collection as an embedded Qdrant Edge shard in a folder of its own. One process opens it at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self._shard: Any = None

    @property
    def shard(self) -> Any:
        """The open shard."""
        if self._shard is None:
            from qdrant_edge import EdgeShard

            if not self.exists():
                raise BankError(f"there is no collection {self.name!r} in {self.folder.parent}: ingest a corpus first")
            with self._errors():
                self._shard = EdgeShard.load(str(self.folder))
        return self._shard

    def exists(self) -> bool:
        return (self.folder / "edge_config.json").is_file()

    def create(self, vectors: VectorNames) -> None:
        import qdrant_edge as edge

        config = edge.EdgeConfig(
            vectors={name: edge.EdgeVectorParams(size, edge.Distance.Cosine) for name, size in vectors.dense.items()},
            sparse_vectors={name: edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf) for name in vectors.sparse},
        )
        with self._errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._shard = edge.EdgeShard.create(str(self.folder), config)
            self._shard.flush()

    def vectors(self) -> VectorNames:
        _ = self.shard  # exists, and its configuration is on disk
        config = json.loads((self.folder / "edge_config.json").read_text(encoding="utf-8"))
        dense = config.get("vectors") or {}
        named = {"": dense} if "size" in dense else dense
        return VectorNames(
            {name: vector["size"] for name, vector in named.items()}, tuple(config.get("sparse_vectors") or ())
        )

    def upsert(self, points: Sequence[Point]) -> None:
        import qdrant_edge as edge

        rows = [
            edge.Point(point.id, {name: _edge_vector(vector) for name, vector in point.vectors.items()}, point.payload)
            for point in points
        ]
        with self._errors():
            self.shard.update(edge.UpdateOperation.upsert_points(rows))

    def set_payload(self, values: Sequence[tuple[PointId, Payload]]) -> None:
        import qdrant_edge as edge

        with self._errors():
            for key, payload in values:
                only = edge.Filter(must=[edge.HasIdCondition({key})])
                self.shard.update(edge.UpdateOperation.set_payload_by_filter(only, payload))
            self.shard.flush()

    def delete_keys(self, keys: list[str], query_filter: Filter) -> None:
        import qdrant_edge as edge

        with self._errors():
            self.shard.update(edge.UpdateOperation.delete_payload_by_filter(_edge_filter(query_filter), keys))
            self.shard.flush()

    def search(
        self, vector: Vector, using: str, limit: int, query_filter: Filter | None, with_payload: WithPayload
    ) -> list[StoredPoint]:
        import qdrant_edge as edge

        request = edge.QueryRequest(
            limit=limit,
            query=edge.Query.Nearest(_edge_vector(vector), using=using or None),
            filter=None if query_filter is None else _edge_filter(query_filter),
            with_payload=with_payload,
        )
        with self._errors():
            found = self.shard.query(request)
        return [StoredPoint(_plain_id(point.id), point.payload or {}, point.score) for point in found]

    def retrieve(self, ids: Sequence[PointId], with_payload: WithPayload) -> list[StoredPoint]:
        with self._errors():
            found = self.shard.retrieve(list(ids), with_payload, False)
        return [StoredPoint(_plain_id(point.id), point.payload or {}) for point in found]

    def scroll(
        self, query_filter: Filter | None, limit: int, offset: PointId | None, with_payload: WithPayload
    ) -> tuple[list[StoredPoint], PointId | None]:
        import qdrant_edge as edge

        request = edge.ScrollRequest(
            offset=offset,
            limit=limit,
            filter=None if query_filter is None else _edge_filter(query_filter),
            with_payload=with_payload,
        )
        with self._errors():
            found, following = self.shard.scroll(request)
        points = [StoredPoint(_plain_id(point.id), point.payload or {}) for point in found]
        return points, None if following is None else _plain_id(following)

    def count(self, query_filter: Filter | None = None) -> int:
        import qdrant_edge as edge

        with self._errors():
            return int(
                self.shard.count(
                    edge.CountRequest(exact=True, filter=None if query_filter is None else _edge_filter(query_filter))
                )
            )

    def create_keyword_index(self, key: str) -> None:
        import qdrant_edge as edge

        with self._errors():
            self.shard.update(edge.UpdateOperation.create_field_index(key, edge.PayloadSchemaType.Keyword))

    def read_metadata(self) -> dict[str, Any]:
        path = self.folder / METADATA_FILE
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        partial = self.folder / f"{METADATA_FILE}.partial"
        partial.write_text(json.dumps(self.read_metadata() | metadata), encoding="utf-8")
        os.replace(partial, self.folder / METADATA_FILE)

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """The engine raises plain `Exception` with a message; sort it into ours."""
        try:
            yield
        except BankError:
            raise
        except Exception as error:  # noqa: BLE001 (qdrant_edge has no exception type of its own)
            message = str(error)
            if "WouldBlock" in message or "lock" in message.lower():
                raise StoreUnavailableError(
                    f"the collection folder {self.folder} is open in another process: wait for it or stop it"
                ) from error
            raise BankError(f"collection {self.name!r} in {self.folder.parent}: {message}") from error


def open_store(
    collection: str, *, url: str | None = None, api_key: str | None = None, path: str | Path | None = None
) -> Store:
    """The store of a collection: a running server for `url`; for `path` an embedded folder.

    A folder that `QdrantClient(path=…)` made is opened by that client, any other one holds Edge shards.
    """
    if url is not None:
        from qdrant_client import QdrantClient

        with _client_errors(collection):
            client = QdrantClient(url=url, api_key=api_key, timeout=CLIENT_TIMEOUT, check_compatibility=False)
            client.get_collections()
        return ClientStore(client, collection)
    folder = Path(path or "regrad_bank")
    if not collection or Path(collection).name != collection:
        raise BankError(f"{collection!r} is no collection name for a folder: it must not contain a path")
    if (folder / "meta.json").is_file():
        from qdrant_client import QdrantClient

        try:
            return ClientStore(QdrantClient(path=str(folder)), collection)
        except RuntimeError as error:
            raise StoreUnavailableError(f"the folder {folder} is open in another process: {error}") from error
    if folder.exists() and not folder.is_dir():
        raise BankError(f"{folder} is a file; --path wants a folder")
    return EdgeStore(folder / collection)


def _plain_id(key: Any) -> PointId:
    return key if isinstance(key, int) else str(key)


def _client_vector(vector: Vector) -> Any:
    from qdrant_client import models

    if isinstance(vector, SparseVector):
        return models.SparseVector(indices=vector.indices, values=vector.values)
    return vector


def _edge_vector(vector: Vector) -> Any:
    import qdrant_edge as edge

    return edge.SparseVector(vector.indices, vector.values) if isinstance(vector, SparseVector) else vector


@contextlib.contextmanager
def _client_errors(collection: str) -> Iterator[None]:
    """Sort what the client raises into ours; the message keeps what the server said."""
    from grpc import RpcError
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    try:
        yield
    except (ResponseHandlingException, RpcError, ConnectionError) as error:
        raise StoreUnavailableError(
            f"can't reach the Qdrant server: {error}. Is it running, and is the URL right?"
        ) from error
    except UnexpectedResponse as error:
        if error.status_code in (401, 403):
            raise StoreUnavailableError("the Qdrant server refused the API key: set QDRANT_API_KEY") from error
        raise BankError(
            f"collection {collection!r}: the server answered {error.status_code}: "
            f"{error.content.decode(errors='replace')[:300]}"
        ) from error
    except (ValueError, KeyError) as error:  # what the in-process engine raises
        raise BankError(f"collection {collection!r}: {error}") from error


# -- filters: qdrant_client.models to qdrant_edge ------------------------------------------------------


def _edge_filter(query_filter: Filter) -> Any:
    import qdrant_edge as edge

    def conditions(group: Any) -> list[Any] | None:
        if group is None:
            return None
        return [_edge_condition(condition) for condition in (group if isinstance(group, list) else [group])]

    minimum = query_filter.min_should
    return edge.Filter(
        must=conditions(query_filter.must),
        should=conditions(query_filter.should),
        must_not=conditions(query_filter.must_not),
        min_should=None
        if minimum is None
        else edge.MinShould([_edge_condition(condition) for condition in minimum.conditions], minimum.min_count),
    )


def _edge_condition(condition: Any) -> Any:
    import qdrant_edge as edge
    from qdrant_client import models

    if isinstance(condition, models.Filter):
        return _edge_filter(condition)
    if isinstance(condition, models.HasIdCondition):
        return edge.HasIdCondition(set(condition.has_id))
    if isinstance(condition, models.IsEmptyCondition):
        return edge.IsEmptyCondition(condition.is_empty.key)
    if isinstance(condition, models.IsNullCondition):
        return edge.IsNullCondition(condition.is_null.key)
    if isinstance(condition, models.NestedCondition):
        return edge.NestedCondition(condition.nested.key, _edge_filter(condition.nested.filter))
    if isinstance(condition, models.FieldCondition):
        parts = {name: value for name, value in condition if name != "key" and value is not None}
        if set(parts) <= {"match", "range"}:
            return edge.FieldCondition(
                condition.key,
                match=_edge_match(parts["match"]) if "match" in parts else None,
                range=_edge_range(parts["range"]) if "range" in parts else None,
            )
    raise BankError(f"this filter condition is not supported on an embedded Edge shard: {condition!r}")


def _edge_match(match: Any) -> Any:
    import qdrant_edge as edge
    from qdrant_client import models

    makers: dict[type, Callable[[Any], Any]] = {
        models.MatchValue: lambda m: edge.MatchValue(m.value),
        models.MatchAny: lambda m: edge.MatchAny(m.any),
        models.MatchExcept: lambda m: edge.MatchExcept(m.except_),
        models.MatchText: lambda m: edge.MatchText(m.text),
    }
    if type(match) not in makers:
        raise BankError(f"this match is not supported on an embedded Edge shard: {match!r}")
    return makers[type(match)](match)


def _edge_range(bounds: Any) -> Any:
    import qdrant_edge as edge
    from qdrant_client import models

    limits = {name: getattr(bounds, name) for name in ("gte", "gt", "lte", "lt")}
    if isinstance(bounds, models.DatetimeRange):
        return edge.RangeDateTime(
            **{name: None if value is None else value.isoformat() for name, value in limits.items()}
        )
    return edge.RangeFloat(**limits)
