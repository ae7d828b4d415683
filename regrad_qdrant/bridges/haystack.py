"""ReGrad as a Haystack component (needs haystack-ai).

```python
pipeline = Pipeline()
pipeline.add_component("regrad", ReGradAnswerer(regrad, mode="regrad+icl", top_k=3))
pipeline.run({"regrad": {"query": "Where was Ida born?"}})["regrad"]["replies"]
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from haystack import Document, component

from regrad_qdrant.bridges.options import checked, fields_of, merged, source_of
from regrad_qdrant.errors import MissingExtraError

if TYPE_CHECKING:
    from regrad_qdrant.answer.pipeline import ReGrad
    from regrad_qdrant.answer.query import Answer


@component
class ReGradAnswerer:
    """From a query to `replies` and the `documents` that were retrieved; of a grounded answer also the `source`, the
    characters of a document's text.

    Args:
        options: of `ReGrad.answer`: mode, top_k, using, query_filter, …
    """

    def __init__(self, regrad: ReGrad, **options: Any) -> None:
        self.regrad = regrad
        self.options = checked(options)

    @component.output_types(replies=list[str], documents=list[Document], source=dict[str, Any])
    def run(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None, mode: str | None = None
    ) -> dict[str, Any]:
        """Answer one query.

        Args:
            query: the question.
            filters: Haystack's own, for this query.
            top_k: how many documents to retrieve, instead of what it was made with.
            mode: one of `ReGrad.answer`'s, instead of what it was made with.
        """
        return _output(self.regrad.answer(query, **self._options(filters, top_k, mode)))

    @component.output_types(replies=list[str], documents=list[Document], source=dict[str, Any])
    async def run_async(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None, mode: str | None = None
    ) -> dict[str, Any]:
        return _output(await self.regrad.aanswer(query, **self._options(filters, top_k, mode)))

    def _options(self, filters: dict[str, Any] | None, top_k: int | None, mode: str | None) -> dict[str, Any]:
        return merged(self.options, {"top_k": top_k, "mode": mode}, _filter_of(filters))


def _filter_of(filters: dict[str, Any] | None) -> dict[str, Any]:
    """Haystack's filters as one of Qdrant's, by Haystack's own integration."""
    if not filters:
        return {}
    try:
        from haystack_integrations.document_stores.qdrant.filters import convert_filters_to_qdrant
    except ImportError as error:
        raise MissingExtraError(
            "Haystack's filters need its Qdrant integration: pip install qdrant-haystack"
        ) from error
    return {"query_filter": convert_filters_to_qdrant(filters)}


def _output(given: Answer) -> dict[str, Any]:
    """Documents as Haystack's own store returns them: `meta` of its collections, the whole payload of others."""
    documents = [
        Document(
            id=str(hit.document_id),
            content=hit.text,
            meta=fields_of(hit.payload, "meta"),
            score=float(hit.score),
        )
        for hit in given.hits
    ]
    return {"replies": [given.text], "documents": documents, **source_of(given)}
