"""A collection behind a `QdrantClient`: a running server, or the client's own in-process engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from regrad_qdrant.bank.stores.base import (
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
    plain_id,
    whole_point,
)
from regrad_qdrant.errors import BankError, StoreUnavailableError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import Filter


ATTEMPTS = 8
FIRST_WAIT, LONGEST_WAIT = 0.25, 20.0  # seconds; doubled after each attempt: half a minute in all
LONGEST_RETRY_AFTER = 120.0  # seconds that a server's Retry-After is followed for


class ClientStore:
    """A collection behind a `QdrantClient`: a running server, or the client's own in-process engine."""

    def __init__(self, client: QdrantClient, name: str, *, owns_client: bool = False) -> None:
        self.client = client
        self.name = name
        self.owns_client = owns_client  # whether `close` closes it

    @property
    def in_process(self) -> bool:
        """Whether the client's own engine holds the collection, and no server."""
        from qdrant_client.local.async_qdrant_local import AsyncQdrantLocal
        from qdrant_client.local.qdrant_local import QdrantLocal

        return isinstance(self.client._client, QdrantLocal | AsyncQdrantLocal)

    @property
    def one_thread(self) -> bool:
        return self.in_process  # whose files SQLite keeps

    def sibling(self, name: str) -> ClientStore:
        return ClientStore(self.client, name)

    def _request(self, method: str, *arguments: Any, **options: Any) -> Any:
        """One request on the collection, repeated while its failures are transient. All of them are idempotent."""
        with client_errors(self.name):
            return retrying(self.method(method), self.name, *arguments, **options)

    def method(self, name: str) -> Callable[..., Any]:
        """The client's method of that name, as a function that returns its result."""
        return getattr(self.client, name)  # type: ignore[no-any-return] # the client has many

    def exists(self) -> bool:
        return bool(self._request("collection_exists"))

    def create(self, vectors: VectorNames) -> None:
        from qdrant_client import models

        dense = {
            name: models.VectorParams(size=size, distance=models.Distance(vectors.distances.get(name, "Cosine")))
            for name, size in vectors.dense.items()
        }
        sparse = {
            name: models.SparseVectorParams(modifier=None if name in vectors.without_idf else models.Modifier.IDF)
            for name in vectors.sparse
        }
        unnamed = set(dense) == {""}
        configs = {"vectors_config": dense[""] if unnamed else dense, "sparse_vectors_config": sparse}
        try:
            self._request("create_collection", **configs)
        except BankError:
            if not self.exists():  # it may be there from an attempt whose answer was lost
                raise

    def vectors(self) -> VectorNames:
        parameters = self._request("get_collection").config.params
        dense = parameters.vectors or {}
        named = dense if isinstance(dense, dict) else {"": dense}
        sparse = parameters.sparse_vectors or {}
        return VectorNames(
            {name: vector.size for name, vector in named.items()},
            tuple(sorted(sparse)),
            {name: vector.distance.value for name, vector in named.items() if vector.distance.value != "Cosine"},
            tuple(sorted(name for name, vector in sparse.items() if vector.modifier != "idf")),
        )

    def upsert(self, points: Sequence[Point]) -> None:
        from qdrant_client import models

        structs = [
            models.PointStruct(
                id=point.id,
                vector=_client_vectors(point.vectors),
                payload=point.payload,
            )
            for point in points
        ]
        self._request("upsert", structs, wait=True)

    def update_vectors(self, points: Sequence[Point]) -> None:
        from qdrant_client import models

        rows = [models.PointVectors(id=point.id, vector=_client_vectors(point.vectors)) for point in points]
        self._request("update_vectors", rows, wait=True)

    def set_payload(self, writes: Sequence[PayloadWrite]) -> None:
        from qdrant_client import models

        if self.in_process:  # a filter would scan every point, for every write
            writes = self._applicable(writes)
            payloads = [models.SetPayload(payload=write.payload, points=[write.id]) for write in writes]
        else:
            payloads = [models.SetPayload(payload=write.payload, filter=write.target()) for write in writes]
        if not payloads:
            return
        try:
            operations = [models.SetPayloadOperation(set_payload=payload) for payload in payloads]
            self._request("batch_update_points", operations, wait=True)
        except BankError as error:
            if "ndex required" not in str(error) or not any(write.unless_changed for write in writes):
                raise
            # strict mode refuses a filter on a field without an index: look, then write by id
            self.set_payload([replace(write, unless_changed={}) for write in self._applicable(writes)])

    def _applicable(self, writes: Sequence[PayloadWrite]) -> list[PayloadWrite]:
        """Those of the writes whose points are there, in the state that they want."""
        there = {point.id: point.payload for point in self.retrieve([write.id for write in writes], True)}
        return [write for write in writes if write.id in there and write.still_applies(there[write.id])]

    def delete_keys(self, keys: list[str], query_filter: Filter) -> None:
        self._request("delete_payload", keys, points=query_filter, wait=True)

    def search(self, searches: Sequence[Search]) -> list[list[StoredPoint]]:
        if len(searches) == 1:
            request = _query(searches[0])
            found = [self._request("query_points", query_filter=request.pop("filter"), **request)]
        else:
            from qdrant_client import models

            requests = [models.QueryRequest(**_query(search)) for search in searches]
            found = self._request("query_batch_points", requests) if requests else []
        return [
            [StoredPoint(plain_id(point.id), point.payload or {}, point.score) for point in answer.points]
            for answer in found
        ]

    def retrieve(self, ids: Sequence[PointId], with_payload: WithPayload) -> list[StoredPoint]:
        found = self._request("retrieve", list(ids), with_payload=_selector(with_payload))
        return [StoredPoint(plain_id(point.id), point.payload or {}) for point in found]

    def scroll(
        self, query_filter: Filter | None, limit: int, offset: PointId | None, with_payload: WithPayload
    ) -> tuple[list[StoredPoint], PointId | None]:
        found, following = self._request(
            "scroll", scroll_filter=query_filter, limit=limit, offset=offset, with_payload=_selector(with_payload)
        )
        points = [StoredPoint(plain_id(point.id), point.payload or {}) for point in found]
        return points, None if following is None else plain_id(following)

    def read(self, limit: int, offset: PointId | None) -> tuple[list[Point], PointId | None]:
        found, following = self._request("scroll", limit=limit, offset=offset, with_payload=True, with_vectors=True)
        return [whole_point(point) for point in found], None if following is None else plain_id(following)

    def read_ids(self, ids: Sequence[PointId]) -> dict[PointId, Point]:
        found = self._request("retrieve", list(ids), with_payload=True, with_vectors=True)
        return {point.id: point for point in map(whole_point, found)}

    def count(self, query_filter: Filter | None = None) -> int:
        return int(self._request("count", count_filter=query_filter, exact=True).count)

    def create_keyword_index(self, key: str) -> None:
        from qdrant_client import models

        if self.in_process:
            return  # that engine has no payload indexes, and warns about it
        self._request("create_payload_index", key, models.PayloadSchemaType.KEYWORD, wait=True)

    def read_metadata(self) -> dict[str, Any]:
        return dict(getattr(self._request("get_collection").config, "metadata", None) or {})

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        """Merge into the collection's metadata (Qdrant 1.16 and later; an older server ignores it)."""
        self._request("update_collection", metadata=metadata)

    def optimize(self) -> None:
        """A server's own optimizers run by themselves; the in-process engine has none."""

    def close(self) -> None:
        if self.owns_client:
            self.client.close()


def _selector(with_payload: WithPayload) -> Any:
    from qdrant_client import models

    if isinstance(with_payload, Without):
        return models.PayloadSelectorExclude(exclude=list(with_payload.keys))
    return with_payload


def _query(search: Search) -> dict[str, Any]:
    """The fields of a query request."""
    from qdrant_client import models

    rest = {"limit": search.limit, "with_payload": _selector(search.with_payload)}
    if len(search.vectors) == 1:
        [(name, vector)] = search.vectors.items()
        return {"query": _client_vector(vector), "using": name or None, "filter": search.query_filter, **rest}
    prefetch = [
        models.Prefetch(
            query=_client_vector(vector), using=name or None, limit=search.depth, filter=search.query_filter
        )
        for name, vector in search.vectors.items()
    ]
    return {"prefetch": prefetch, "query": models.FusionQuery(fusion=models.Fusion.RRF), "filter": None, **rest}


def _client_vectors(vectors: Mapping[str, Vector]) -> Any:
    named = {name: _client_vector(vector) for name, vector in vectors.items()}
    return named[""] if set(named) == {""} else named


def _client_vector(vector: Vector) -> Any:
    from qdrant_client import models

    if isinstance(vector, SparseVector):
        return models.SparseVector(indices=vector.indices, values=vector.values)
    return vector


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: lost connections, time-outs, 429 and 5xx; no other 4xx."""
    import grpc
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    if isinstance(error, UnexpectedResponse):
        return error.status_code == 429 or (error.status_code or 0) >= 500
    if isinstance(error, grpc.RpcError):
        codes = grpc.StatusCode
        passing = (codes.UNAVAILABLE, codes.DEADLINE_EXCEEDED, codes.RESOURCE_EXHAUSTED, codes.ABORTED, codes.INTERNAL)
        return getattr(error, "code", lambda: None)() in passing
    return isinstance(error, ResponseHandlingException | ResourceExhaustedResponse | ConnectionError)


def retrying(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call with exponential back-off and jitter between attempts, or after as long as the server asks for; the last
    error is raised as it is."""
    from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

    back_off = wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(back_off(state), min(float(getattr(error, "retry_after_s", 0.0)), LONGEST_RETRY_AFTER))

    attempts = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait,
        stop=stop_after_attempt(ATTEMPTS),
        reraise=True,
    )
    return attempts(function, *arguments, **options)


@contextlib.contextmanager
def client_errors(collection: str) -> Iterator[None]:
    """Sort what the client raises into ours; the message keeps what the server said."""
    import grpc
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    refused = StoreUnavailableError("the Qdrant server refused the API key: set QDRANT_API_KEY")
    try:
        yield
    except ResourceExhaustedResponse as error:
        raise StoreUnavailableError(
            f"the Qdrant server is over its rate limit, still after retries: {error}"
        ) from error
    except grpc.RpcError as error:
        code = getattr(error, "code", lambda: None)()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise refused from error
        if is_transient(error):
            raise StoreUnavailableError(f"can't reach the Qdrant server, still after retries: {error}") from error
        said = getattr(error, "details", lambda: None)() or error
        raise BankError(f"collection {collection!r}: the server answered {code}: {said}") from error
    except (ResponseHandlingException, ConnectionError) as error:
        raise StoreUnavailableError(
            f"can't reach the Qdrant server: {error}. Is it running, and is the URL right?"
        ) from error
    except UnexpectedResponse as error:
        if error.status_code in (401, 403):
            raise refused from error
        raise BankError(
            f"collection {collection!r}: the server answered {error.status_code}: "
            f"{error.content.decode(errors='replace')[:300]}"
        ) from error
    except (ValueError, KeyError) as error:  # what the in-process engine raises
        raise BankError(f"collection {collection!r}: {error}") from error
