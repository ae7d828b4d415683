"""Searches, selectors and vectors as the client's models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrad_qdrant.bank.stores.base import TEXT_INDEX, Search, SparseVector, Vector, Without, WithPayload, Words
from regrad_qdrant.errors import BankError


def selector(with_payload: WithPayload) -> Any:
    """What of a payload is read."""
    from qdrant_client import models

    if isinstance(with_payload, Without):
        return models.PayloadSelectorExclude(exclude=list(with_payload.keys))
    return with_payload


def query_of(search: Search) -> dict[str, Any]:
    """The fields of a query request."""
    from qdrant_client import models

    rest = {"limit": search.limit, "with_payload": selector(search.with_payload)}
    if len(search.vectors) == 1:
        [(name, vector)] = search.vectors.items()
        return {**_asked(name, vector), "filter": search.query_filter, **rest}
    prefetch = [
        models.Prefetch(**_asked(name, vector), limit=search.depth, filter=search.query_filter)
        for name, vector in search.vectors.items()
    ]
    return {"prefetch": prefetch, "query": models.FusionQuery(fusion=models.Fusion.RRF), "filter": None, **rest}


def _asked(name: str, vector: Vector | Words) -> dict[str, Any]:
    from qdrant_client import models

    if not isinstance(vector, Words):
        return {"query": _client_vector(vector), "using": name or None}
    if not hasattr(models, "TextQuery"):
        raise BankError(f"{name!r} needs qdrant-client 1.20 or newer, and a server as new")
    return {"query": models.TextQuery(text=vector.text), "using": name.removeprefix(TEXT_INDEX)}


def client_vectors(vectors: Mapping[str, Vector]) -> Any:
    """A point's vectors; the one without a name as it is."""
    named = {name: _client_vector(vector) for name, vector in vectors.items()}
    return named[""] if set(named) == {""} else named


def _client_vector(vector: Vector) -> Any:
    from qdrant_client import models

    if isinstance(vector, SparseVector):
        return models.SparseVector(indices=vector.indices, values=vector.values)
    return vector
