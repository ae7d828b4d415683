"""ReGrad as a LlamaIndex query engine (needs llama-index-core).

```python
engine = ReGradQueryEngine(regrad=regrad, options={"mode": "regrad+icl", "top_k": 3})
print(engine.query("Where was Ida born?"))  # or await engine.aquery(…)
```
"""

from __future__ import annotations

from typing import Any

from llama_index.core.base.response.schema import Response
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.schema import BaseNode, NodeWithScore, TextNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node
from pydantic import Field, SkipValidation

from regrad_qdrant.answer.pipeline import Answer, ReGrad
from regrad_qdrant.bank.documents import Hit


class ReGradQueryEngine(CustomQueryEngine):
    """Answers with the retrieved documents' gradients; the response's source nodes are what was retrieved."""

    regrad: SkipValidation[ReGrad]
    options: dict[str, Any] = Field(default_factory=dict, description="Of ReGrad.answer: mode, top_k, using, …")

    def custom_query(self, query_str: str) -> Response:
        return _response(self.regrad.answer(query_str, **self.options))

    async def acustom_query(self, query_str: str) -> Response:
        return _response(await self.regrad.aanswer(query_str, **self.options))


def _response(given: Answer) -> Response:
    nodes = [NodeWithScore(node=_node(hit), score=float(hit.score)) for hit in given.hits]
    return Response(response=given.text, source_nodes=nodes)


def _node(hit: Hit) -> BaseNode:
    """The node as LlamaIndex stored it, with its metadata; of other collections the text and the payload."""
    if "_node_content" in hit.payload:
        return metadata_dict_to_node(hit.payload, text=hit.text)
    return TextNode(text=hit.text, id_=str(hit.id), metadata=hit.payload)
