"""ReGrad in a LangChain chain (needs langchain-core).

chain = regrad_runnable(regrad, mode="regrad+icl", top_k=3)
chain.invoke("Where was Ida born?")["answer"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableLambda

if TYPE_CHECKING:
    from regrad_qdrant.pipeline import ReGrad


def regrad_runnable(regrad: ReGrad, **options: Any) -> Runnable[str, dict[str, Any]]:
    """A Runnable from a question to `{"answer": str, "documents": [Document]}`.

    Args:
        options: of `ReGrad.answer`: mode, top_k, using, query_filter, …
    """

    def answer(question: str) -> dict[str, Any]:
        given = regrad.answer(question, **options)
        documents = [
            Document(
                page_content=hit.text,
                metadata=hit.payload.get("metadata") or {},
                id=str(hit.id),
            )
            for hit in given.hits
        ]
        return {"answer": given.text, "documents": documents}

    return RunnableLambda(answer, name="ReGrad")
