"""ReGrad in a LangChain chain (needs langchain-core).

```python
chain = regrad_runnable(regrad, mode="regrad+icl", top_k=3)
chain.invoke("Where was Ida born?")["answer"]  # or await chain.ainvoke(…)
chain.invoke({"question": "Where was Ida born?"}, query_filter=of_this_tenant)
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

from regrad_qdrant.bridges.options import checked, fields_of, merged, source_of

if TYPE_CHECKING:
    from regrad_qdrant.answer.pipeline import ReGrad
    from regrad_qdrant.answer.query import Answer


QUESTION_KEYS = ("question", "input", "query")  # of a dict that a chain hands on


def regrad_runnable(regrad: ReGrad, **options: Any) -> Runnable[str | dict[str, Any], dict[str, Any]]:
    """A Runnable from a question to `{"answer": str, "documents": [Document]}`; a grounded answer also has its
    `"source": {"document_id", "point_id", "start", "end"}`, the characters of the text of the document whose id is that
    point's.

    The question is a text, or a dict with it under "question", "input" or "query". Options can be given when it is
    made, and for one call by LangChain's own ways, the later before the earlier: `config={"configurable": {"top_k":
    5}}`, in the dict, `.bind(top_k=5)`, `invoke(question, top_k=5)`.

    Args:
        options: of `ReGrad.answer`: mode, top_k, using, query_filter, …

    Raises:
        TypeError: for an option that `ReGrad.answer` does not have.
        ValueError: at a call, for a dict without a question.
    """
    fixed = checked(options)

    def asked(given: str | dict[str, Any], config: RunnableConfig, call: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        of_input: dict[str, Any] = {}
        if isinstance(given, dict):
            place = next((key for key in QUESTION_KEYS if isinstance(given.get(key), str)), None)
            if place is None:
                raise ValueError(
                    f"no question under {', '.join(QUESTION_KEYS)}; the input has {', '.join(given) or 'nothing'}"
                )
            of_input = {name: value for name, value in given.items() if name != place}
            given = str(given[place])
        return given, merged(fixed, config.get("configurable"), of_input, checked(call))

    def answer(given: str | dict[str, Any], config: RunnableConfig, **call: Any) -> dict[str, Any]:
        question, chosen = asked(given, config, call)
        return _output(regrad.answer(question, **chosen), regrad.bank.store.name)

    async def aanswer(given: str | dict[str, Any], config: RunnableConfig, **call: Any) -> dict[str, Any]:
        question, chosen = asked(given, config, call)
        return _output(await regrad.aanswer(question, **chosen), regrad.bank.store.name)

    return RunnableLambda(answer, aanswer, name="ReGrad")


def _output(given: Answer, collection: str) -> dict[str, Any]:
    """Documents as LangChain's own store returns them: `metadata` of its collections, the whole payload of others."""
    documents = [
        Document(
            page_content=hit.text,
            metadata=fields_of(hit.payload, "metadata") | {"_id": hit.id, "_collection_name": collection},
            id=str(hit.id),
        )
        for hit in given.hits
    ]
    return {"answer": given.text, "documents": documents, **source_of(given)}
