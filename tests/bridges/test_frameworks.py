"""Collections made by LangChain, LlamaIndex and Haystack: atoms go in, nothing else changes, the framework reads on."""

import asyncio
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from qdrant_client import QdrantClient, models

from regrad_qdrant import Adapter, GradientBank, ReGrad
from regrad_qdrant.answer.query import Answer, Timings
from regrad_qdrant.bank.ingest import attach_atoms

pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own, about their own dependencies

SIZE = 16


def texts_of(count: int) -> list[str]:
    return [f"Person {i} works as a {('baker', 'diver')[i % 2]} since {1900 + i % 90}." for i in range(count)]


def vector(text: str) -> list[float]:
    rng = random.Random(text)
    return [rng.uniform(-1, 1) for _ in range(SIZE)]


@dataclass
class Framework:
    """A collection as a framework made it: where it is, how it is called, and the framework's own search."""

    client: QdrantClient
    name: str
    layout: str
    search: Any  # text → what the framework returns, comparable


def langchain(texts: list[str]) -> Framework:
    from langchain_core.embeddings import Embeddings
    from langchain_qdrant import QdrantVectorStore

    class Letters(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [vector(text) for text in texts]

        def embed_query(self, text: str) -> list[float]:
            return vector(text)

    client = QdrantClient(":memory:")
    parameters = models.VectorParams(size=SIZE, distance=models.Distance.COSINE)
    client.create_collection("langchain", vectors_config=parameters)
    store = QdrantVectorStore(client, "langchain", embedding=Letters())
    store.add_texts(texts, metadatas=[{"source": f"s{i}"} for i in range(len(texts))])
    return Framework(client, "langchain", "LangChain", lambda text: store.similarity_search_with_score(text, k=5))


def llama_index(texts: list[str]) -> Framework:
    from llama_index.core.schema import TextNode
    from llama_index.core.vector_stores import VectorStoreQuery
    from llama_index.vector_stores.qdrant import QdrantVectorStore

    client = QdrantClient(":memory:")
    store = QdrantVectorStore(collection_name="llama", client=client)
    nodes = [TextNode(text=text, metadata={"source": f"s{i}"}, embedding=vector(text)) for i, text in enumerate(texts)]
    store.add(nodes)

    def search(text: str) -> list[Any]:
        found = store.query(VectorStoreQuery(query_embedding=vector(text), similarity_top_k=5))
        return [(node.get_content(), node.metadata, node.node_id) for node in found.nodes] + list(found.similarities)

    return Framework(client, "llama", "LlamaIndex", search)


def haystack(texts: list[str]) -> Framework:
    from haystack import Document
    from haystack_integrations.components.retrievers.qdrant import QdrantEmbeddingRetriever
    from haystack_integrations.document_stores.qdrant import QdrantDocumentStore

    store = QdrantDocumentStore(":memory:", index="haystack", embedding_dim=SIZE)
    store.write_documents(
        [Document(content=text, meta={"source": f"s{i}"}, embedding=vector(text)) for i, text in enumerate(texts)]
    )
    retriever = QdrantEmbeddingRetriever(store, top_k=5)

    def search(text: str) -> list[Any]:
        found = retriever.run(query_embedding=vector(text))["documents"]
        return [(document.id, document.content, document.meta, document.score) for document in found]

    return Framework(store._client, "haystack", "Haystack", search)


@pytest.fixture(params=[langchain, llama_index, haystack], ids=lambda make: make.__name__)
def make(request):
    return request.param


def everything(framework, without="regrad"):
    points, _ = framework.client.scroll(framework.name, limit=10_000, with_payload=True, with_vectors=True)
    return {point.id: ({k: v for k, v in point.payload.items() if k != without}, point.vector) for point in points}


@pytest.mark.parametrize(("sidecar", "count"), [(None, 2000), ("atoms", 500)])
def test_atoms_go_in_and_nothing_else_changes(make, model, tokenizer, initialization, sidecar, count):
    texts = texts_of(count)
    framework = make(texts)
    found = framework.search(texts[7])  # the in-process engine normalizes vectors anew at the first query
    before = everything(framework)
    assert len(before) == count and found
    bank = GradientBank(framework.client, framework.name, initialization.fingerprint, embedders={}, sidecar=sidecar)
    assert bank.detect_layout().name == framework.layout
    adapter = Adapter(model, initialization)
    gradients = adapter.gradients(tokenizer)
    report = attach_atoms(bank, gradients, "sign")
    assert (report.atoms_written, report.skipped, bank.status().missing) == (count, {}, 0)
    assert everything(framework) == before
    assert {hit.text for hit in bank.points()} == set(texts)
    again = framework.search(texts[7])
    if sidecar is None and framework.layout == "Haystack":  # hands fields that it does not know on as meta
        again = [(*rest, {k: v for k, v in meta.items() if k != "regrad"}, score) for *rest, meta, score in again]
        found = [tuple(row) for row in found]
    assert again == found


TEXTS = texts_of(100)


@pytest.fixture
def asked(make, model, tokenizer, initialization):
    """ReGrad over a framework's collection, with the options that find person 7."""
    framework = make(TEXTS)
    bank = GradientBank(
        framework.client, framework.name, initialization.fingerprint, embedders={}
    )  # no word of a layout
    regrad = ReGrad(model, tokenizer, bank, initialization)
    attach_atoms(bank, regrad.gradients, "sign")
    return framework.layout, regrad, {"query": vector(TEXTS[7]), "using": "", "top_k": 2}


def test_questions_are_answered_from_a_frameworks_collection_and_by_its_bridge(asked):
    layout, regrad, options = asked
    question = "What does person 7 do?"
    expected = regrad.answer(question, **options)
    assert expected.hits[0].text == TEXTS[7] and expected.hits[0].record is not None
    if layout == "LangChain":
        from regrad_qdrant.bridges.langchain import regrad_runnable

        chain = regrad_runnable(regrad, **options)
        given, again = chain.invoke(question), asyncio.run(chain.ainvoke(question))
        assert again == given
        assert given["documents"][0].page_content == TEXTS[7] and given["documents"][0].metadata == {
            "source": "s7", "_id": expected.hits[0].id, "_collection_name": "langchain"
        }  # fmt: skip
        found = given["answer"]
    elif layout == "LlamaIndex":
        from regrad_qdrant.bridges.llama_index import ReGradQueryEngine

        engine = ReGradQueryEngine(regrad, **options)
        response, again = engine.query(question), asyncio.run(engine.aquery(question))
        assert again == response and response.source_nodes[0].node.metadata == {"source": "s7"}
        assert response.source_nodes[0].node.get_content() == TEXTS[7] and response.source_nodes[0].score > 0.9
        found = str(response.response)
    else:
        from haystack import Pipeline

        from regrad_qdrant.bridges.haystack import ReGradAnswerer

        pipeline = Pipeline()
        pipeline.add_component("regrad", ReGradAnswerer(regrad, **options))
        given = pipeline.run({"regrad": {"query": question}})["regrad"]
        assert asyncio.run(pipeline.run_async({"regrad": {"query": question}}))["regrad"] == given
        assert given["documents"][0].content == TEXTS[7] and given["documents"][0].meta == {"source": "s7"}
        [found] = given["replies"]
    assert found == expected.text


# -- per call, by each framework's own convention -------------------------------------------------------


class Recorder:
    """Stands for a ReGrad: keeps what it was asked."""

    def __init__(self):
        self.asked = []
        self.bank = SimpleNamespace(store=SimpleNamespace(name="docs"))

    def answer(self, question, **options):
        self.asked.append((question, options))
        return Answer("yes", options.get("mode", "regrad"), [], Timings(), 1)

    async def aanswer(self, question, **options):
        return self.answer(question, **options)


TENANT = models.Filter(must=[models.FieldCondition(key="tenant", match=models.MatchValue(value="b"))])


def test_langchain_gives_options_for_one_call_in_all_of_its_ways():
    from regrad_qdrant.bridges.langchain import regrad_runnable

    regrad = Recorder()
    chain = regrad_runnable(regrad, mode="rag", top_k=2)
    whole = {"mode": "rag", "top_k": 2, "query_filter": TENANT}
    chain.invoke("q", query_filter=TENANT)
    chain.bind(query_filter=TENANT).invoke("q")
    chain.invoke("q", config={"configurable": {"query_filter": TENANT, "thread_id": "7"}})
    chain.invoke({"question": "q", "query_filter": TENANT, "chat_history": []})
    chain.invoke({"input": "q", "query_filter": None}, query_filter=TENANT)
    asyncio.run(chain.ainvoke({"query": "q"}, query_filter=TENANT))
    chain.batch(["q", "q"], query_filter=TENANT)
    assert regrad.asked == [("q", whole)] * 8
    chain.invoke("q", config={"configurable": {"top_k": 5}}, top_k=7)
    assert regrad.asked[-1] == ("q", {"mode": "rag", "top_k": 7})
    chain.invoke({"question": "q", "query": "in other words"}, top_k=7)
    assert regrad.asked[-1] == ("q", {"mode": "rag", "top_k": 7, "query": "in other words"})
    with pytest.raises(ValueError, match="no question under.*the input has text"):
        chain.invoke({"text": "q"})
    for wrong in (lambda: chain.invoke("q", filter=TENANT), lambda: regrad_runnable(regrad, filter=TENANT)):
        with pytest.raises(TypeError, match="'filter' is no option of ReGrad.answer"):
            wrong()


def test_llama_index_gives_its_own_filters():
    from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters

    from regrad_qdrant.bridges.llama_index import ReGradQueryEngine, qdrant_filter

    regrad = Recorder()
    of_tenant = MetadataFilters(filters=[MetadataFilter(key="tenant", value="b")])
    engine = ReGradQueryEngine(regrad, filters=of_tenant, mode="rag")
    engine.query("q")
    asyncio.run(ReGradQueryEngine(regrad, mode="rag").having(filters=of_tenant).aquery("q"))
    assert regrad.asked == [("q", {"mode": "rag", "query_filter": TENANT})] * 2
    engine.having(top_k=9).query("q")
    assert regrad.asked[-1][1] == {"mode": "rag", "top_k": 9, "query_filter": TENANT}
    several = MetadataFilters(
        filters=[
            MetadataFilter(key="year", value=2020, operator=FilterOperator.GTE),
            MetadataFilter(key="kind", value=["a", "b"], operator=FilterOperator.IN),
            MetadataFilters(filters=[MetadataFilter(key="draft", value="yes", operator=FilterOperator.NE)]),
            MetadataFilters(filters=[MetadataFilter(key="share", value=1.5, operator=FilterOperator.NE)]),
        ],
        condition="or",
    )
    first, second, third, fourth = qdrant_filter(several).should
    assert fourth.must[0].must_not[0].range.gte == fourth.must[0].must_not[0].range.lte == 1.5
    assert first.range.gte == 2020 and second.match.any == ["a", "b"] and third.must[0].key == "draft"
    with pytest.raises(ValueError, match="contains"):
        qdrant_filter(MetadataFilters(filters=[MetadataFilter(key="a", value="b", operator=FilterOperator.CONTAINS)]))
    with pytest.raises(TypeError, match="'filter' is no option"):
        ReGradQueryEngine(regrad, filter=of_tenant)


def test_llama_indexs_filters_find_what_its_own_store_finds():
    from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
    from llama_index.vector_stores.qdrant import QdrantVectorStore

    from regrad_qdrant.bridges.llama_index import qdrant_filter

    client = QdrantClient(":memory:")
    client.create_collection("docs", vectors_config={})
    payloads = [{"a": "p", "n": 1}, {"a": "q", "n": 2}, {"n": 3}, {"a": ["p", "q"], "n": 4}]
    client.upsert("docs", [models.PointStruct(id=i, vector={}, payload=payload) for i, payload in enumerate(payloads)])
    own = QdrantVectorStore(collection_name="docs", client=client)

    def one(key, value, operator):
        return MetadataFilter(key=key, value=value, operator=operator)

    nothing = MetadataFilters(filters=[])
    asked = [
        MetadataFilters(filters=[one(key, value, operator)])
        for operator in FilterOperator
        for key, value in (("a", "p"), ("a", "p,q"), ("a", ["p", "q"]), ("n", 2), ("n", 2.0), ("nosuch", "p"))
    ]
    asked += [
        MetadataFilters(filters=[nothing, *of], condition=condition)
        for condition in ("and", "or", "not")
        for of in ([one("a", "p", "==")], [MetadataFilters(filters=[one("a", "q", "!=")], condition="not")])
    ]
    compared = 0
    for filters in asked:
        try:
            expected = own._build_subfilter(filters)
        except (NotImplementedError, ValidationError):  # an operator that it lacks, or a value that it does not take
            continue
        found, theirs = (client.scroll("docs", of)[0] for of in (qdrant_filter(filters), expected))
        assert [point.id for point in found] == [point.id for point in theirs], filters
        compared += 1
    assert compared > 30


def test_haystack_gives_its_own_filters_at_run():
    from regrad_qdrant.bridges.haystack import ReGradAnswerer

    regrad = Recorder()
    answerer = ReGradAnswerer(regrad, mode="rag", top_k=2)
    filters = {"field": "meta.tenant", "operator": "==", "value": "b"}
    answerer.run("q", filters=filters, top_k=5)
    asyncio.run(answerer.run_async("q", filters=filters, mode="regrad"))
    [(_, first), (_, second)] = regrad.asked
    assert (first["mode"], first["top_k"]) == ("rag", 5) and (second["mode"], second["top_k"]) == ("regrad", 2)
    for options in (first, second):
        [condition] = options["query_filter"].must
        assert condition.key == "meta.tenant" and condition.match.value == "b"
