"""A collection behind a `QdrantClient`: a running server, or the client's own in-process engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regrad_qdrant.errors import BankError, StoreUnavailableError
from regrad_qdrant.store import (
    PayloadWrite,
    Point,
    PointId,
    SparseVector,
    StoredPoint,
    Vector,
    VectorNames,
    WithPayload,
    plain_id,
)

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import Filter


class ClientStore:
    """A collection behind a `QdrantClient`: a running server, or the client's own in-process engine."""

    def __init__(self, client: QdrantClient, name: str, *, owns_client: bool = False) -> None:
        self.client = client
        self.name = name
        self.owns_client = owns_client  # whether `close` closes it

    def exists(self) -> bool:
        with client_errors(self.name):
            return self.client.collection_exists(self.name)

    def create(self, vectors: VectorNames) -> None:
        from qdrant_client import models

        with client_errors(self.name):
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
        with client_errors(self.name):
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
        with client_errors(self.name):
            self.client.upsert(self.name, structs, wait=True)

    def update_vectors(self, points: Sequence[Point]) -> None:
        from qdrant_client import models

        rows = [
            models.PointVectors(id=point.id, vector={name: _client_vector(v) for name, v in point.vectors.items()})
            for point in points
        ]
        with client_errors(self.name):
            self.client.update_vectors(self.name, rows, wait=True)

    def set_payload(self, writes: Sequence[PayloadWrite]) -> None:
        from qdrant_client import models

        operations = [
            models.SetPayloadOperation(set_payload=models.SetPayload(payload=write.payload, filter=write.target()))
            for write in writes
        ]
        with client_errors(self.name):
            self.client.batch_update_points(self.name, operations, wait=True)

    def delete_keys(self, keys: list[str], query_filter: Filter) -> None:
        with client_errors(self.name):
            self.client.delete_payload(self.name, keys, points=query_filter, wait=True)

    def search(
        self, vector: Vector, using: str, limit: int, query_filter: Filter | None, with_payload: WithPayload
    ) -> list[StoredPoint]:
        with client_errors(self.name):
            found = self.client.query_points(
                self.name,
                query=_client_vector(vector),
                using=using or None,
                limit=limit,
                query_filter=query_filter,
                with_payload=with_payload,
            )
        return [StoredPoint(plain_id(point.id), point.payload or {}, point.score) for point in found.points]

    def fuse(
        self, vectors: Mapping[str, Vector], limit: int, depth: int, query_filter: Filter | None
    ) -> list[StoredPoint]:
        from qdrant_client import models

        prefetch = [
            models.Prefetch(query=_client_vector(vector), using=name or None, limit=depth, filter=query_filter)
            for name, vector in vectors.items()
        ]
        with client_errors(self.name):
            found = self.client.query_points(
                self.name,
                prefetch=prefetch,
                query=models.FusionQuery(fusion=models.Fusion.RRF),
                limit=limit,
                with_payload=False,
            )
        return [StoredPoint(plain_id(point.id), {}, point.score) for point in found.points]

    def retrieve(self, ids: Sequence[PointId], with_payload: WithPayload) -> list[StoredPoint]:
        with client_errors(self.name):
            found = self.client.retrieve(self.name, list(ids), with_payload=with_payload)
        return [StoredPoint(plain_id(point.id), point.payload or {}) for point in found]

    def scroll(
        self, query_filter: Filter | None, limit: int, offset: PointId | None, with_payload: WithPayload
    ) -> tuple[list[StoredPoint], PointId | None]:
        with client_errors(self.name):
            found, following = self.client.scroll(
                self.name, scroll_filter=query_filter, limit=limit, offset=offset, with_payload=with_payload
            )
        points = [StoredPoint(plain_id(point.id), point.payload or {}) for point in found]
        return points, None if following is None else plain_id(following)

    def count(self, query_filter: Filter | None = None) -> int:
        with client_errors(self.name):
            return self.client.count(self.name, count_filter=query_filter, exact=True).count

    def create_keyword_index(self, key: str) -> None:
        from qdrant_client import models
        from qdrant_client.local.qdrant_local import QdrantLocal

        if isinstance(self.client._client, QdrantLocal):
            return  # the in-process engine has no payload indexes, and warns about it
        with client_errors(self.name):
            self.client.create_payload_index(self.name, key, models.PayloadSchemaType.KEYWORD, wait=True)

    def read_metadata(self) -> dict[str, Any]:
        with client_errors(self.name):
            return dict(getattr(self.client.get_collection(self.name).config, "metadata", None) or {})

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        """Merge into the collection's metadata (Qdrant 1.16 and later; an older server ignores it)."""
        with client_errors(self.name):
            self.client.update_collection(self.name, metadata=metadata)

    def close(self) -> None:
        if self.owns_client:
            self.client.close()


def _client_vector(vector: Vector) -> Any:
    from qdrant_client import models

    if isinstance(vector, SparseVector):
        return models.SparseVector(indices=vector.indices, values=vector.values)
    return vector


@contextlib.contextmanager
def client_errors(collection: str) -> Iterator[None]:
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
