"""ReGrad as a LlamaIndex query engine (needs llama-index-core).

```python
engine = ReGradQueryEngine(regrad, mode="regrad+icl", top_k=3)
print(engine.query("Where was Ida born?"))  # or await engine.aquery(…)
print(engine.having(filters=of_this_tenant).query("Where was Ida born?"))
```
"""

from __future__ import annotations

from typing import Any

from llama_index.core.base.response.schema import Response
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.schema import BaseNode, NodeWithScore, TextNode
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilters
from llama_index.core.vector_stores.utils import metadata_dict_to_node
from pydantic import Field, SkipValidation
from qdrant_client.models import (
    FieldCondition,
    Filter,
    IsEmptyCondition,
    MatchAny,
    MatchExcept,
    MatchText,
    MatchValue,
    PayloadField,
    Range,
)

from regrad_qdrant.answer.pipeline import ReGrad
from regrad_qdrant.answer.query import Answer
from regrad_qdrant.bank.documents import Hit
from regrad_qdrant.bridges.options import checked, merged, source_of

OPERATORS = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}


class ReGradQueryEngine(CustomQueryEngine):
    """Answers with the retrieved documents' gradients; the response's source nodes are what was retrieved, and a
    grounded answer's place in them is its `metadata["source"]`.

    Args:
        regrad: what answers.
        filters: LlamaIndex's own metadata filters, for every question.
        options: of `ReGrad.answer`: mode, top_k, using, query_filter, …
    """

    regrad: SkipValidation[ReGrad]
    options: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, regrad: ReGrad, *, filters: MetadataFilters | None = None, **options: Any) -> None:
        # the base class is a pydantic model, whose fields mypy does not see
        super().__init__(regrad=regrad, options=merged(checked(options), _filter_of(filters)))  # type: ignore[call-arg]

    def having(self, *, filters: MetadataFilters | None = None, **options: Any) -> ReGradQueryEngine:
        """The same engine with further filters, all of which must pass, and other options."""
        return ReGradQueryEngine(self.regrad, **merged(self.options, checked(options), _filter_of(filters)))

    def custom_query(self, query_str: str) -> Response:
        return _response(self.regrad.answer(query_str, **self.options))

    async def acustom_query(self, query_str: str) -> Response:
        return _response(await self.regrad.aanswer(query_str, **self.options))


def _filter_of(filters: MetadataFilters | None) -> dict[str, Any]:
    return {} if filters is None else {"query_filter": qdrant_filter(filters)}


def qdrant_filter(filters: MetadataFilters) -> Filter:
    """LlamaIndex's metadata filters as its own Qdrant store asks them, on the fields where LlamaIndex keeps metadata.

    Raises:
        ValueError: for an operator that has no counterpart.
    """
    parts: list[Any] = [
        qdrant_filter(part) if isinstance(part, MetadataFilters) else _condition(part)
        for part in filters.filters
        if not (isinstance(part, MetadataFilters) and not part.filters)  # which would pass everything
    ]
    if filters.condition == FilterCondition.OR:
        return Filter(should=parts)
    return Filter(must_not=parts) if filters.condition == FilterCondition.NOT else Filter(must=parts)


def _condition(one: Any) -> FieldCondition | IsEmptyCondition | Filter:
    key, value, operator = one.key, one.value, FilterOperator(one.operator)
    values = value if isinstance(value, list) else str(value).split(",")
    if operator == FilterOperator.IS_EMPTY:
        return IsEmptyCondition(is_empty=PayloadField(key=key))
    if operator in (FilterOperator.EQ, FilterOperator.NE) and isinstance(value, float):
        equal = FieldCondition(key=key, range=Range(gte=value, lte=value))
        if operator == FilterOperator.EQ:
            return equal
        return Filter(must_not=[equal, IsEmptyCondition(is_empty=PayloadField(key=key))])
    if operator == FilterOperator.EQ:
        return FieldCondition(key=key, match=MatchValue(value=value))
    if operator == FilterOperator.NE:  # a point without the field does not pass
        return FieldCondition(key=key, match=MatchExcept(**{"except": [value]}))
    if operator.value in OPERATORS:
        return FieldCondition(key=key, range=Range(**{OPERATORS[operator.value]: value}))
    if operator in (FilterOperator.IN, FilterOperator.ANY):
        return FieldCondition(key=key, match=MatchAny(any=values))
    if operator == FilterOperator.NIN:
        return FieldCondition(key=key, match=MatchExcept(**{"except": values}))
    if operator in (FilterOperator.TEXT_MATCH, FilterOperator.TEXT_MATCH_INSENSITIVE):
        return FieldCondition(key=key, match=MatchText(text=value))
    raise ValueError(
        f"the operator {operator.value!r} of the filter on {key!r} can't be asked of Qdrant here: use query_filter"
    )


def _response(given: Answer) -> Response:
    nodes = [NodeWithScore(node=_node(hit), score=float(hit.score)) for hit in given.hits]
    return Response(response=given.text, source_nodes=nodes, metadata=source_of(given) or None)


def _node(hit: Hit) -> BaseNode:
    """The node as LlamaIndex stored it, with its metadata; of other collections the text and the payload."""
    if "_node_content" in hit.payload:
        return metadata_dict_to_node(hit.payload, text=hit.text)
    return TextNode(text=hit.text, id_=str(hit.id), metadata=hit.payload)
