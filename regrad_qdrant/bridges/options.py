"""What of `ReGrad.answer` a framework may give for one call, and how a grounded answer's source is handed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrad_qdrant.answer.query import Answer

PER_CALL = (
    "mode", "top_k", "type", "choices", "query_filter", "query", "using", "hits", "seed", "max_new_tokens", "grounded",
    "style",
)  # fmt: skip


def merged(*given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of these mappings that are `ReGrad.answer`'s, later ones before earlier ones; None is not given. Of
    filters all hold: what one call asks for never widens what was fixed for all, such as a tenant's own documents."""
    options: dict[str, Any] = {}
    for one in given:
        options |= {name: value for name, value in (one or {}).items() if name in PER_CALL and value is not None}
    filters = [one["query_filter"] for one in given if one and one.get("query_filter") is not None]
    if len(filters) > 1:
        from qdrant_client.models import Filter

        options["query_filter"] = Filter(must=filters)
    return options


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options given to a bridge when it is made.

    Raises:
        TypeError: for one that `ReGrad.answer` does not have.
    """
    if unknown := [name for name in options if name not in PER_CALL]:
        raise TypeError(f"{unknown[0]!r} is no option of ReGrad.answer; it has {', '.join(PER_CALL)}")
    return dict(options)


def fields_of(payload: dict[str, Any], key: str) -> dict[str, Any]:
    """The metadata that a framework keeps under its key of a payload; of other collections the whole payload."""
    own = payload.get(key, payload)
    return own if isinstance(own, dict) else {} if own is None else payload


def source_of(answer: Answer) -> dict[str, Any]:
    """`{"source": {"document_id", "point_id", "start", "end"}}` of a grounded answer, nothing of another: frameworks
    name documents by the point."""
    if answer.source is None:
        return {}
    points = {hit.document_id: str(hit.id) for hit in answer.hits}
    return {"source": asdict(answer.source) | {"point_id": points.get(answer.source.document_id)}}
