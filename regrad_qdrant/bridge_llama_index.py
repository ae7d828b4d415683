"""ReGrad as a LlamaIndex query engine (needs llama-index-core).

engine = ReGradQueryEngine(regrad=regrad, options={"mode": "regrad+icl", "top_k": 3})
print(engine.query("Where was Ida born?"))
"""

from __future__ import annotations

from typing import Any

from llama_index.core.base.response.schema import Response
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import Field, SkipValidation

from regrad_qdrant.pipeline import ReGrad


class ReGradQueryEngine(CustomQueryEngine):
    """Answers with the retrieved documents' gradients; the response's source nodes are what was retrieved."""

    regrad: SkipValidation[ReGrad]
    options: dict[str, Any] = Field(default_factory=dict, description="Of ReGrad.answer: mode, top_k, using, …")

    def custom_query(self, query_str: str) -> Response:
        given = self.regrad.answer(query_str, **self.options)
        nodes = [
            NodeWithScore(node=TextNode(text=hit.text, id_=str(hit.id)), score=float(hit.score)) for hit in given.hits
        ]
        return Response(response=given.text, source_nodes=nodes)
