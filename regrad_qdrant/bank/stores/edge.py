"""A collection as an embedded Qdrant Edge shard on disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_qdrant.bank.stores.base import (
    Configuration,
    PayloadWrite,
    Point,
    PointId,
    Search,
    SparseVector,
    StoredPoint,
    Vector,
    VectorNames,
    Without,
    WithPayload,
    Words,
    plain_id,
    whole_point,
)
from regrad_qdrant.bank.stores.edge_filter import edge_filter
from regrad_qdrant.errors import BankError, StoreUnavailableError

if TYPE_CHECKING:
    from qdrant_client.models import Filter

RRF_K = 2  # the constant of reciprocal rank fusion, as a server has it
UNUSED = "regrad-unused"  # a vector for the shards that need none
METADATA_FILE = "regrad_metadata.json"
BUSY = (
    "is open already, here or in another process: end that ingest or serve, or close() that bank; a second bank here "
    "is GradientBank(bank.store, …), several processes at once need a server (--url)"
)


class EdgeStore:
    """A collection as an embedded Qdrant Edge shard in a folder of its own. One process opens it at a time."""

    one_thread = False
    copies_points = False
    has_shard_keys = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self._shard: Any = None
        self._closed = False
        self._opening = threading.Lock()
        self._siblings: dict[str, EdgeStore] = {}  # a folder can be opened once only

    @property
    def shard(self) -> Any:
        """The open shard."""
        with self._opening:
            if self._shard is None:
                from qdrant_edge import EdgeShard

                if self._closed:
                    raise BankError(f"the bank {self.name!r} in {self.folder.parent} is closed: open it anew")
                if not self.exists():
                    raise BankError(
                        f"there is no collection {self.name!r} in {self.folder.parent}: ingest a corpus first"
                    )
                with self._errors():
                    self._shard = EdgeShard.load(str(self.folder))
            return self._shard

    def remarks(self) -> list[str]:
        return []

    def sibling(self, name: str) -> EdgeStore:
        return self._siblings.setdefault(name, EdgeStore(self.folder.parent / name))

    def exists(self) -> bool:
        return (self.folder / "edge_config.json").is_file()

    def create(self, vectors: VectorNames) -> None:
        import qdrant_edge as edge

        sparse = vectors.sparse or (() if vectors.dense else (UNUSED,))  # a shard needs one vector at least
        config = edge.EdgeConfig(
            vectors={
                name: edge.EdgeVectorParams(size, getattr(edge.Distance, vectors.distances.get(name, "Cosine")))
                for name, size in vectors.dense.items()
            },
            sparse_vectors={
                name: edge.EdgeSparseVectorParams(modifier=None if name in vectors.without_idf else edge.Modifier.Idf)
                for name in sparse
            },
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
        sparse = {name: vector for name, vector in (config.get("sparse_vectors") or {}).items() if name != UNUSED}
        return VectorNames(
            {name: vector["size"] for name, vector in named.items()},
            tuple(sorted(sparse)),
            {name: vector["distance"] for name, vector in named.items() if vector["distance"] != "Cosine"},
            tuple(sorted(name for name, vector in sparse.items() if vector.get("modifier") != "idf")),
        )

    def configuration(self) -> Configuration:
        return Configuration(self.vectors(), metadata=self.read_metadata())

    def create_as(self, configuration: Configuration) -> list[str]:
        if not self.exists():
            self.create(configuration.vectors)
        if configuration.metadata:
            self.write_metadata(dict(configuration.metadata))
        left_out = [f"the payload index on {name}" for name in configuration.indexes]
        kept = ("vectors_config", "sparse_vectors_config")  # names, sizes, distances and IDF; not how they are stored
        settings = [name for name in configuration.settings if name not in kept]
        if any(_stored_apart(vector) for vector in _each(configuration.settings.get("vectors_config"))):
            settings.append("the vectors' on_disk, hnsw_config or quantization_config")
        return left_out + settings

    def upsert(self, points: Sequence[Point], *, only_new: bool = False) -> None:  # nobody else writes a shard
        import qdrant_edge as edge

        with self._errors():
            rows = [
                edge.Point(point.id, {n: _edge_vector(vector) for n, vector in point.vectors.items()}, point.payload)
                for point in points
            ]
            self.shard.update(edge.UpdateOperation.upsert_points(rows))

    def update_vectors(self, points: Sequence[Point]) -> None:
        import qdrant_edge as edge

        with self._errors():
            rows = [
                edge.PointVectors(point.id, {name: _edge_vector(vector) for name, vector in point.vectors.items()})
                for point in points
            ]
            self.shard.update(edge.UpdateOperation.update_vectors(rows))

    def set_payload(self, writes: Sequence[PayloadWrite]) -> None:
        import qdrant_edge as edge

        with self._errors():
            for write in writes:
                only = edge_filter(write.target())
                self.shard.update(edge.UpdateOperation.set_payload_by_filter(only, write.payload))
            self.shard.flush()

    def delete_keys(self, keys: list[str], query_filter: Filter) -> None:
        import qdrant_edge as edge

        with self._errors():
            self.shard.update(edge.UpdateOperation.delete_payload_by_filter(edge_filter(query_filter), keys))
            self.shard.flush()

    def delete_points(self, ids: Sequence[PointId]) -> None:
        import qdrant_edge as edge

        with self._errors():
            self.shard.update(edge.UpdateOperation.delete_points(list(ids)))
            self.shard.flush()

    def search(self, searches: Sequence[Search]) -> list[list[StoredPoint]]:
        with self._errors():
            found = [self.shard.query(_query(search)) for search in searches]
        return [
            [StoredPoint(plain_id(point.id), point.payload or {}, point.score) for point in points] for points in found
        ]

    def retrieve(self, ids: Sequence[PointId], with_payload: WithPayload) -> list[StoredPoint]:
        with self._errors():
            found = self.shard.retrieve(list(ids), _selector(with_payload), False)
        return [StoredPoint(plain_id(point.id), point.payload or {}) for point in found]

    def scroll(
        self, query_filter: Filter | None, limit: int, offset: PointId | None, with_payload: WithPayload
    ) -> tuple[list[StoredPoint], PointId | None]:
        import qdrant_edge as edge

        with self._errors():
            request = edge.ScrollRequest(
                offset=offset,
                limit=limit,
                filter=None if query_filter is None else edge_filter(query_filter),
                with_payload=_selector(with_payload),
            )
            found, following = self.shard.scroll(request)
        points = [StoredPoint(plain_id(point.id), point.payload or {}) for point in found]
        return points, None if following is None else plain_id(following)

    def read(self, limit: int, offset: PointId | None) -> tuple[list[Point], PointId | None]:
        import qdrant_edge as edge

        request = edge.ScrollRequest(offset=offset, limit=limit, with_payload=True, with_vector=True)
        with self._errors():
            found, following = self.shard.scroll(request)
        return [whole_point(point) for point in found], None if following is None else plain_id(following)

    def read_ids(self, ids: Sequence[PointId]) -> dict[PointId, Point]:
        with self._errors():
            found = self.shard.retrieve(list(ids), True, True)
        return {point.id: point for point in map(whole_point, found)}

    def count(self, query_filter: Filter | None = None) -> int:
        import qdrant_edge as edge

        with self._errors():
            return int(
                self.shard.count(
                    edge.CountRequest(exact=True, filter=None if query_filter is None else edge_filter(query_filter))
                )
            )

    def create_keyword_index(self, key: str) -> None:
        import qdrant_edge as edge

        with self._errors():
            self.shard.update(edge.UpdateOperation.create_field_index(key, edge.PayloadSchemaType.Keyword))

    def delete_index(self, key: str) -> None:
        import qdrant_edge as edge

        with self._errors():
            self.shard.update(edge.UpdateOperation.delete_field_index(key))

    def read_metadata(self) -> dict[str, Any]:
        path = self.folder / METADATA_FILE
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        partial = self.folder / f"{METADATA_FILE}.partial"
        partial.write_text(
            json.dumps({k: v for k, v in (self.read_metadata() | metadata).items() if v is not None}), encoding="utf-8"
        )
        os.replace(partial, self.folder / METADATA_FILE)

    def optimize(self) -> None:
        with self._errors():
            self.shard.optimize()

    def close(self) -> None:
        self._closed = True
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
            if "WouldBlock" in message or re.search(r"\block(ed)?\b", message, re.IGNORECASE):
                raise StoreUnavailableError(f"the folder {self.folder} {BUSY}") from error
            raise BankError(f"collection {self.name!r} in {self.folder.parent}: {message}") from error


def _query(search: Search) -> Any:
    import qdrant_edge as edge

    only = None if search.query_filter is None else edge_filter(search.query_filter)
    rest = {"limit": search.limit, "with_payload": _selector(search.with_payload)}
    nearest = {name: edge.Query.Nearest(_edge_vector(v), using=name or None) for name, v in search.vectors.items()}
    if len(nearest) == 1:
        return edge.QueryRequest(query=next(iter(nearest.values())), filter=only, **rest)
    prefetches = [edge.Prefetch(search.depth, query=query, filter=only) for query in nearest.values()]
    # the stub has the fusion as no Fusion
    return edge.QueryRequest(query=edge.Fusion.Rrf(RRF_K), prefetches=prefetches, **rest)  # type: ignore[arg-type]


def _selector(with_payload: WithPayload) -> Any:
    import qdrant_edge as edge

    if isinstance(with_payload, Without):
        return edge.PayloadSelector.Exclude(list(with_payload.keys))  # type: ignore[attr-defined] # not in the stub
    return with_payload


def _each(vectors: Any) -> list[Any]:
    return list(vectors.values()) if isinstance(vectors, dict) else [vectors] if vectors else []


def _stored_apart(vector: Any) -> bool:
    """Whether a vector's parameters say how it is stored."""
    return any(getattr(vector, name, None) for name in ("on_disk", "hnsw_config", "quantization_config"))


def _edge_vector(vector: Vector | Words) -> Any:
    import qdrant_edge as edge

    if isinstance(vector, Words):
        raise BankError("the embedded engine ranks no text index: search a vector, such as bm25, or use a server")
    return edge.SparseVector(vector.indices, vector.values) if isinstance(vector, SparseVector) else vector
