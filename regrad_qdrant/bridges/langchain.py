"""ReGrad in a LangChain chain (needs langchain-core).

```python
chain = regrad_runnable(regrad, mode="regrad+icl", top_k=3)
chain.invoke("Where was Ida born?")["answer"]  # or await chain.ainvoke(…)
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableLambda

if TYPE_CHECKING:
    from regrad_qdrant.answer.pipeline import Answer, ReGrad


def regrad_runnable(regrad: ReGrad, **options: Any) -> Runnable[str, dict[str, Any]]:
    """A Runnable from a question to `{"answer": str, "documents": [Document]}`.

    Args:
        options: of `ReGrad.answer`: mode, top_k, using, query_filter, …
    """

    def answer(question: str) -> dict[str, Any]:
        return _output(regrad.answer(question, **options))

    async def aanswer(question: str) -> dict[str, Any]:
        return _output(await regrad.aanswer(question, **options))

    return RunnableLambda(answer, aanswer, name="ReGrad")


def _output(given: Answer) -> dict[str, Any]:
    """Documents as LangChain's own store returns them: `metadata` of its collections, the whole payload of others."""
    documents = [
        Document(page_content=hit.text, metadata=hit.payload.get("metadata", hit.payload) or {}, id=str(hit.id))
        for hit in given.hits
    ]
    return {"answer": given.text, "documents": documents}
