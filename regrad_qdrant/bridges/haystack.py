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

if TYPE_CHECKING:
    from regrad_qdrant.answer.pipeline import Answer, ReGrad


@component
class ReGradAnswerer:
    """From a query to `replies` and the `documents` that were retrieved.

    Args:
        options: of `ReGrad.answer`: mode, top_k, using, query_filter, …
    """

    def __init__(self, regrad: ReGrad, **options: Any) -> None:
        self.regrad = regrad
        self.options = options

    @component.output_types(replies=list[str], documents=list[Document])
    def run(self, query: str) -> dict[str, Any]:
        return _output(self.regrad.answer(query, **self.options))

    @component.output_types(replies=list[str], documents=list[Document])
    async def run_async(self, query: str) -> dict[str, Any]:
        return _output(await self.regrad.aanswer(query, **self.options))


def _output(given: Answer) -> dict[str, Any]:
    """Documents as Haystack's own store returns them: `meta` of its collections, the whole payload of others."""
    documents = [
        Document(
            id=str(hit.document_id),
            content=hit.text,
            meta=hit.payload.get("meta", hit.payload) or {},
            score=float(hit.score),
        )
        for hit in given.hits
    ]
    return {"replies": [given.text], "documents": documents}
