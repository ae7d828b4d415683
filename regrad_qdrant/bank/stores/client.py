"""A collection behind a `QdrantClient`: a running server, or the client's own in-process engine."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from regrad_qdrant.bank.stores.base import (
    Configuration,
    PayloadWrite,
    Point,
    PointId,
    Search,
    StoredPoint,
    VectorNames,
    WithPayload,
    plain_id,
    whole_point,
)
from regrad_qdrant.bank.stores.failures import ATTEMPTS, BATCH, TOO_LARGE, allowed, client_errors, retrying
from regrad_qdrant.bank.stores.queries import client_vectors, query_of, selector
from regrad_qdrant.errors import BankError, UnindexedFilterError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import Filter


class ClientStore:
    """A collection behind a `QdrantClient`: a running server, or the client's own in-process engine."""

    def __init__(self, client: QdrantClient, name: str, *, owns_client: bool = False) -> None:
        self.client = client
        self.name = name
        self.owns_client = owns_client  # whether `close` closes it
        # What a server in strict mode allows, as far as it has refused more: points of one read, points of one write,
        # searches of one request, and points of one search where some can be spared.
        self._most = dict.fromkeys(("read", "write", "searches", "candidates"), sys.maxsize)

    @property
    def in_process(self) -> bool:
        """Whether the client's own engine holds the collection, and no server."""
        from qdrant_client.local.async_qdrant_local import AsyncQdrantLocal
        from qdrant_client.local.qdrant_local import QdrantLocal

        return isinstance(self.client._client, QdrantLocal | AsyncQdrantLocal)

    @property
    def one_thread(self) -> bool:
        return self.in_process  # whose files SQLite keeps

    @property
    def copies_points(self) -> bool:
        return not self.in_process  # from 1.17, and earlier where a segment is immutable

    @property
    def has_shard_keys(self) -> bool:
        return bool(self._request("get_collection").config.params.sharding_method == "custom")

    def remarks(self) -> list[str]:
        if self.in_process:
            return []
        config = self._request("get_collection").config
        version = server_version(self.method("info"))
        said = [] if version is None else [f"Qdrant {version}"]
        if (shards := config.params.shard_number or 1) > 1:
            said.append(f"{shards} shards: atoms are written by id after a look")
        strict = getattr(config, "strict_mode_config", None)
        if strict is not None and strict.enabled:
            limits = strict.model_dump(exclude_none=True, exclude={"enabled"})
            named = ", ".join(f"{name} {value}" for name, value in limits.items())
            said.append(f"strict mode ({named or 'no limits'}): pages, counts and filters keep to it")
        if config.params.on_disk_payload is False:
            said.append("payloads stay in memory, atoms too: on_disk_payload=true keeps them on disk")
        return said

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
        self._create({"vectors_config": dense[""] if unnamed else dense, "sparse_vectors_config": sparse})

    def _create(self, settings: Mapping[str, Any]) -> None:
        if self.exists():
            return
        try:
            self._request("create_collection", **settings)
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

    def configuration(self) -> Configuration:
        from qdrant_client import models

        info = self._request("get_collection")
        parameters, config = info.config.params, info.config
        settings: dict[str, Any] = {
            "vectors_config": parameters.vectors or {},
            "sparse_vectors_config": parameters.sparse_vectors,
            "on_disk_payload": parameters.on_disk_payload,
            "quantization_config": config.quantization_config,
        }
        if not self.in_process:
            settings |= {
                "shard_number": None if parameters.sharding_method == "custom" else parameters.shard_number,
                "replication_factor": parameters.replication_factor,
                "write_consistency_factor": parameters.write_consistency_factor,
                "hnsw_config": models.HnswConfigDiff(**config.hnsw_config.model_dump()),
                "optimizers_config": models.OptimizersConfigDiff(**config.optimizer_config.model_dump()),
                "strict_mode_config": _strict_mode(config),
            }
        indexes = {name: index.params or index.data_type for name, index in (info.payload_schema or {}).items()}
        kept = {name: value for name, value in settings.items() if value is not None}
        return Configuration(self.vectors(), kept, indexes, self.read_metadata())

    def create_as(self, configuration: Configuration) -> list[str]:
        if configuration.settings:
            self._create(configuration.settings)
        else:
            self.create(configuration.vectors)
        left_out = []
        if self.in_process:
            left_out = [f"the payload index on {name}" for name in configuration.indexes]
        else:
            for name, schema in configuration.indexes.items():
                self._request("create_payload_index", name, schema, wait=True)
        if configuration.metadata:
            self.write_metadata(dict(configuration.metadata))
        return left_out

    def upsert(self, points: Sequence[Point], *, only_new: bool = False) -> None:
        from qdrant_client import models

        options: dict[str, Any] = {"wait": True}
        if only_new and hasattr(models, "UpdateMode"):  # from qdrant-client 1.17
            options["update_mode"] = models.UpdateMode.INSERT_ONLY
        structs = [
            models.PointStruct(
                id=point.id,
                vector=client_vectors(point.vectors),
                payload=point.payload,
            )
            for point in points
        ]
        self._in_parts("write", structs, lambda part: self._request("upsert", part, **options))

    def _in_parts(self, kind: str, items: Sequence[Any], send: Callable[[Sequence[Any]], Any]) -> list[Any]:
        """What is answered to all of these, in as many requests as the server's limit makes of them."""
        answers: list[Any] = []
        left = items
        while left:
            part = left[: self._most[kind]]
            try:
                answers.append(send(part))
            except BankError as error:
                self._learn(kind, len(part), error)
            else:
                left = left[len(part) :]
        return answers

    def _learn(self, kind: str, size: int, refusal: BankError) -> None:
        """Ask for fewer at a time from now on; raises the refusal where it is of something else."""
        if (fewer := allowed(str(refusal), size)) is None:
            raise refusal
        self._most[kind] = fewer

    def update_vectors(self, points: Sequence[Point]) -> None:
        from qdrant_client import models

        rows = [models.PointVectors(id=point.id, vector=client_vectors(point.vectors)) for point in points]
        self._in_parts("write", rows, lambda part: self._request("update_vectors", part, wait=True))

    def set_payload(self, writes: Sequence[PayloadWrite]) -> None:
        """By a filter on id and state, which one shard checks in the same step as it writes; by id after a look where
        several shards would each log and run every filter, or where the engine has no index to filter by.

        A write that must find a place empty keeps its filter: it protects somebody else's atom.
        """
        if not writes:
            return
        guarded = [write for write in writes if write.atomic]
        if self.in_process or (len(guarded) < len(writes) and self._has_several_shards):
            by_id = [write for write in writes if self.in_process or not write.atomic]
            self._write_by_id(by_id)
            writes = [] if self.in_process else guarded
        if writes:
            self._write_by_filter(writes)

    def _write_by_filter(self, writes: Sequence[PayloadWrite]) -> None:
        from qdrant_client import models

        payloads = [models.SetPayload(payload=write.payload, filter=write.target()) for write in writes]
        try:
            operations = [models.SetPayloadOperation(set_payload=payload) for payload in payloads]
            self._in_parts("write", operations, lambda part: self._request("batch_update_points", part, wait=True))
        except UnindexedFilterError:
            self._write_by_id(writes)

    def _write_by_id(self, writes: Sequence[PayloadWrite]) -> None:
        """Write those that still apply; a point that is deleted between the look and the write is passed over."""
        from qdrant_client import models

        for attempt in range(ATTEMPTS):
            payloads = [models.SetPayload(payload=w.payload, points=[w.id]) for w in self._applicable(writes)]
            if not payloads:
                return
            try:
                operations = [models.SetPayloadOperation(set_payload=payload) for payload in payloads]
                self._in_parts("write", operations, lambda part: self._request("batch_update_points", part, wait=True))
                return
            except BankError as error:
                if "No point with id" not in str(error) or attempt == ATTEMPTS - 1:
                    raise

    @cached_property
    def _has_several_shards(self) -> bool:
        return (self._request("get_collection").config.params.shard_number or 1) > 1

    def _applicable(self, writes: Sequence[PayloadWrite]) -> list[PayloadWrite]:
        """Those of the writes whose points are there, in the state that they want; nothing else is read."""
        paths = sorted({path for write in writes for path in write.unless_changed})
        there = {point.id: point.payload for point in self.retrieve([write.id for write in writes], paths or False)}
        return [write for write in writes if write.id in there and write.still_applies(there[write.id])]

    def delete_keys(self, keys: list[str], query_filter: Filter) -> None:
        self._request("delete_payload", keys, points=query_filter, wait=True)

    def delete_points(self, ids: Sequence[PointId]) -> None:
        self._request("delete", list(ids), wait=True)

    def search(self, searches: Sequence[Search]) -> list[list[StoredPoint]]:
        found: list[list[StoredPoint]] = []
        while left := searches[len(found) :]:
            part = left[: self._most["searches"]]
            asked = [search.within(self._most["candidates"]) for search in part]
            try:
                found += self._search(asked)
            except BankError as error:
                said = str(error)
                deepest = max(max(search.limit, search.depth) for search in asked)
                fewer, shallower = allowed(said, len(asked)), allowed(said, deepest)
                if fewer and (TOO_LARGE in said or BATCH in said):
                    self._most["searches"] = fewer
                elif shallower and asked != [search.within(shallower) for search in part]:
                    self._most["candidates"] = shallower
                else:
                    raise
        return found

    def _search(self, searches: Sequence[Search]) -> list[list[StoredPoint]]:
        if len(searches) == 1:
            request = query_of(searches[0])
            found = [self._request("query_points", query_filter=request.pop("filter"), **request)]
        else:
            from qdrant_client import models

            requests = [models.QueryRequest(**query_of(search)) for search in searches]
            found = self._request("query_batch_points", requests)
        return [
            [StoredPoint(plain_id(point.id), point.payload or {}, point.score) for point in answer.points]
            for answer in found
        ]

    def retrieve(self, ids: Sequence[PointId], with_payload: WithPayload) -> list[StoredPoint]:
        found = self._retrieved(ids, with_payload=selector(with_payload))
        return [StoredPoint(plain_id(point.id), point.payload or {}) for point in found]

    def _retrieved(self, ids: Sequence[PointId], **options: Any) -> list[Any]:
        """The points of these ids, in as many pages as the server's limit makes of them."""
        found = self._in_parts("read", list(ids), lambda part: self._request("retrieve", part, **options))
        return [point for page in found for point in page]

    def scroll(
        self, query_filter: Filter | None, limit: int, offset: PointId | None, with_payload: WithPayload
    ) -> tuple[list[StoredPoint], PointId | None]:
        found, following = self._scrolled(
            limit, scroll_filter=query_filter, offset=offset, with_payload=selector(with_payload)
        )
        return [StoredPoint(plain_id(point.id), point.payload or {}) for point in found], following

    def _scrolled(self, limit: int, **options: Any) -> tuple[list[Any], PointId | None]:
        """A page of at most so many points, as many as the server allows, and where the next one begins."""
        while True:
            size = min(limit, self._most["read"])
            try:
                found, following = self._request("scroll", limit=size, **options)
            except BankError as error:
                self._learn("read", size, error)
            else:
                return found, None if following is None else plain_id(following)

    def read(self, limit: int, offset: PointId | None) -> tuple[list[Point], PointId | None]:
        found, following = self._scrolled(limit, offset=offset, with_payload=True, with_vectors=True)
        return [whole_point(point) for point in found], following

    def read_ids(self, ids: Sequence[PointId]) -> dict[PointId, Point]:
        found = self._retrieved(ids, with_payload=True, with_vectors=True)
        return {point.id: point for point in map(whole_point, found)}

    def count(self, query_filter: Filter | None = None) -> int:
        try:
            return int(self._request("count", count_filter=query_filter, exact=True).count)
        except BankError as error:
            if "exact" not in str(error).lower():
                raise
            return int(self._request("count", count_filter=query_filter, exact=False).count)  # strict mode

    def create_keyword_index(self, key: str) -> None:
        from qdrant_client import models

        if self.in_process:
            return  # that engine has no payload indexes, and warns about it
        self._request("create_payload_index", key, models.PayloadSchemaType.KEYWORD, wait=True)

    def delete_index(self, key: str) -> None:
        if not self.in_process:
            self._request("delete_payload_index", key, wait=True)

    def read_metadata(self) -> dict[str, Any]:
        metadata = getattr(self._request("get_collection").config, "metadata", None) or {}
        return {key: value for key, value in metadata.items() if value is not None}

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        """Merge into the collection's metadata (Qdrant 1.16 and later; an older server ignores it)."""
        self._request("update_collection", metadata=metadata)

    def optimize(self) -> None:
        """A server's own optimizers run by themselves; the in-process engine has none."""

    def close(self) -> None:
        if self.owns_client:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # that the server had gone before
                self.client.close()


def server_version(info: Callable[[], Any]) -> str | None:
    """What a client's `info` says; None for a server that does not tell."""
    try:
        return str(info().version)
    except Exception:  # noqa: BLE001 (an old server, a proxy, or a key that may not ask)
        return None


def _strict_mode(config: Any) -> Any:
    """A collection's limits as they are set, from what it says of them; None where it says nothing."""
    from qdrant_client import models

    told = getattr(config, "strict_mode_config", None)
    return None if told is None else models.StrictModeConfig(**told.model_dump(exclude_none=True))
