"""What only a server does: strict mode, limits, several shards.

The engine in process stands in, with a server's refusals; the same on a real one where QDRANT_URL names it, on a
collection of its own.
"""

import math
import os
import re
import uuid
from types import SimpleNamespace

import httpx
import pytest
import torch
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse

from regrad_qdrant import Document, GradientBank
from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.bank.bank import Asked
from regrad_qdrant.bank.documents import point_id
from regrad_qdrant.bank.embed import Bm25
from regrad_qdrant.bank.migrate import migrate
from regrad_qdrant.bank.stores.base import Configuration, PayloadWrite, VectorNames
from regrad_qdrant.bank.stores.client import ClientStore
from regrad_qdrant.bank.stores.edge import EdgeStore
from regrad_qdrant.errors import BankError

SPACE, COUNT, NUMBERS = "a" * 16, 12, AtomLayout.flat(128)
TEXTS = [f"Person {i} works as a diver." for i in range(COUNT)]
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect")


def refusal(said, code=400):
    return UnexpectedResponse(code, "", f"Bad request: {said}".encode(), httpx.Headers())


class Empty:
    points = ()


class Angle:
    """Texts on a circle, by the number that they name."""

    size = 2

    def documents(self, texts):
        return [self.query(text) for text in texts]

    def query(self, text):
        angle = int(re.search(r"\d+", text)[0]) / COUNT
        return [math.cos(angle), math.sin(angle)]


class Strict:
    """The in-process engine with a server's limits in front of it."""

    def __init__(self, *, shards=1, limit=None, capacity=None, exact=True, unindexed=True, upserts=None, searches=None):
        self.client = QdrantClient(":memory:")
        self.shards, self.limit, self.capacity, self.exact, self.unindexed = shards, limit, capacity, exact, unindexed
        self.upserts, self.searches = upserts, searches
        self.indexed, self.calls = set(), []

    def __getattr__(self, name):
        method = getattr(self.client, name)
        if not callable(method) or name.startswith("_"):
            return method

        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            self._check(name, arguments, options)
            answer = method(*arguments, **options)
            if name == "get_collection":
                answer.config.params.shard_number = self.shards
            return answer

        return call

    def _check(self, name, arguments, options):
        size = options.get("limit", len(arguments[1]) if name == "retrieve" else 0)
        size = max(size, *(one.limit for one in [*(options.get("prefetch") or ()), *_requests(name, arguments)]), 0)
        if self.limit is not None and size > self.limit:
            raise refusal(f'Limit exceeded {size} > {self.limit} for "limit". Help: Reduce the "limit" parameter.')
        written = len(arguments[1]) if name in ("upsert", "update_vectors") else 0
        if self.upserts is not None and written > self.upserts:
            raise refusal(f'Limit exceeded {written} > {self.upserts} for "upsert limit". Help: Reduce it.')
        searches = len(_requests(name, arguments))
        if self.searches is not None and searches > self.searches:
            raise refusal(f'Limit exceeded {searches} > {self.searches} for "search batch size". Help: Reduce it.')
        if self.capacity is not None and size > self.capacity:
            raise refusal("request larger than rate limiter capacity, please try to split your request", 429)
        if name == "count" and options.get("exact") and not self.exact:
            raise refusal("Exact count is not allowed. Help: set exact to false.")
        if name == "create_payload_index":
            self.indexed.add(arguments[1])
        if name == "delete_payload_index":
            self.indexed.discard(arguments[1])
        if not self.unindexed:
            given = options.get("scroll_filter") or options.get("count_filter")
            if name == "batch_update_points":
                given = next((o.set_payload.filter for o in arguments[1] if o.set_payload.filter), None)
            for key in _keys(given):
                if key not in self.indexed:
                    raise refusal(f'Index required but not found for "{key}". Help: Create an index for this key.')


def _requests(name, arguments):
    return arguments[1] if name == "query_batch_points" else ()


def _keys(given):
    for part in ("must", "must_not"):
        for condition in getattr(given, part, None) or ():
            if getattr(condition, "key", None):
                yield condition.key
            if getattr(condition, "is_empty", None):
                yield condition.is_empty.key


def bank_over(client, monkeypatch):
    monkeypatch.setattr(ClientStore, "in_process", False)
    bank = GradientBank(ClientStore(client, "docs"), "docs", SPACE)
    bank.store.create(VectorNames({}, ("bm25",)))
    bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS))
    return bank


def records():
    torch.manual_seed(0)
    return make_records(torch.randn(COUNT, 128), TEXTS, SPACE, "sign")


def fill(bank):
    bank.index()
    bank.put(zip([hit for hit in bank.points()], records(), strict=True))


def test_before_anything_is_indexed_status_looks_at_all_points(monkeypatch):
    bank = bank_over(Strict(unindexed=False), monkeypatch)
    status = bank.status()
    assert (status.points, status.atoms, status.missing) == (COUNT, 0, COUNT)
    assert len(list(bank.missing())) == COUNT and bank.count_atoms() == 0
    assert bank.count_of_other_spaces() == 0 and not bank.has_other_spaces() and bank.drop() == 0


def test_in_strict_mode_everything_that_filters_by_the_index_works(monkeypatch):
    client = Strict(unindexed=False)
    bank = bank_over(client, monkeypatch)
    fill(bank)
    assert bank.status().atoms == COUNT and bank.count_of_other_spaces() == 0
    assert bank.recode("sparse", NUMBERS).recoded == COUNT and bank.status().codec == "sparse"
    assert bank.recode("sparse", NUMBERS).recoded == 0
    assert bank.drop() == COUNT and bank.status().atoms == 0
    assert not client.indexed and bank.count_of_other_spaces() == 0 and bank.drop() == 0


def test_a_copy_of_an_embedded_bank_has_the_index_that_a_strict_server_asks_for(monkeypatch, tmp_path):
    source = EdgeStore(tmp_path / "docs")
    bank = GradientBank(source, "docs", SPACE)
    bank.create()
    bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS))
    fill(bank)
    bank.describe(SimpleNamespace(kind="lora", shapes={}))
    monkeypatch.setattr(ClientStore, "in_process", False)
    client = Strict(unindexed=False)
    migrate(source, ClientStore(client, "docs"))
    source.close()
    copy = GradientBank(ClientStore(client, "docs"), "docs", SPACE)
    assert client.indexed == {"regrad.space"} and copy.status().atoms == COUNT == copy.drop()


@pytest.mark.parametrize("limits", [{"limit": 5}, {"capacity": 3}], ids=["max_query_limit", "read_rate_limit"])
def test_pages_shrink_to_what_the_server_allows_and_lose_nothing(monkeypatch, limits):
    client = Strict(**limits)
    bank = bank_over(client, monkeypatch)
    fill(bank)
    assert bank.status().atoms == COUNT
    assert {hit.id for hit in bank.points()} == {point_id(f"d{i}") for i in range(COUNT)}
    assert len(bank.fetch([point_id(f"d{i}") for i in range(COUNT)])) == COUNT
    client.calls.clear()
    list(bank.points())
    assert all(options["limit"] <= 5 for name, _, options in client.calls if name == "scroll")  # it is remembered


@pytest.mark.parametrize("using", ["dense", ["dense", "bm25"]], ids=["dense", "fused"])
def test_a_search_looks_at_as_many_candidates_as_the_server_allows(monkeypatch, using):
    client = Strict()
    monkeypatch.setattr(ClientStore, "in_process", False)
    embedders = {"dense": Angle(), "bm25": Bm25()}
    bank = GradientBank(ClientStore(client, "docs"), "docs", SPACE, embedders=embedders)
    bank.create()
    bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS))
    question = "Who is person 1?"
    free = bank.search(question, 3, using=using)
    client.limit = 5
    found = bank.search(question, 3, using=using)
    assert [hit.document_id for hit in found] == [hit.document_id for hit in free]
    assert found[0].relevance == 1.0 > found[2].relevance
    client.calls.clear()
    bank.search(question, 3, using=using)
    sent = [
        one.limit if requests else one["limit"]
        for name, arguments, options in client.calls
        if name.startswith("query")
        for requests in [_requests(name, arguments)]
        for one in requests or [options]
    ]
    assert sent == ([3, 5] if using == "dense" else [5])  # it is remembered
    with pytest.raises(BankError, match="Limit exceeded 6 > 5"):  # what was asked for is never cut
        bank.search(question, 6, using=using)


def test_points_are_written_and_questions_searched_as_many_at_a_time_as_the_server_allows(monkeypatch):
    client = Strict(upserts=4, searches=2)
    monkeypatch.setattr(ClientStore, "in_process", False)
    embedders = {"dense": Angle(), "bm25": Bm25()}
    bank = GradientBank(ClientStore(client, "docs"), "docs", SPACE, embedders=embedders)
    bank.create()
    bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS))
    assert bank.store.count() == COUNT
    assert len(bank.store.read_ids([point_id(f"d{i}") for i in range(COUNT)])) == COUNT
    bank.sync([Document(f"d{i}", {"id": f"d{i}", "text": f"{text} Anew."}) for i, text in enumerate(TEXTS)])
    asked = [Asked(f"Who is person {i}?") for i in range(10)]  # 20 searches, as many as candidates of each
    found = bank.search_many(asked, 3, using="dense")
    assert [hits[0].relevance for hits in found] == [1.0] * 10
    client.calls.clear()
    assert bank.search_many(asked, 3, using="dense") == found
    batches = [arguments[1] for name, arguments, _ in client.calls if name == "query_batch_points"]
    assert {len(batch) for batch in batches} == {2} and max(one.limit for batch in batches for one in batch) > 3
    written = [len(arguments[1]) for name, arguments, _ in client.calls if name == "upsert"]
    assert max(written, default=0) <= 4


def test_a_collection_with_shard_keys_takes_no_atoms_in_place(monkeypatch):
    bank = bank_over(Strict(), monkeypatch)
    monkeypatch.setattr(ClientStore, "has_shard_keys", property(lambda self: self.name == "docs"))
    with pytest.raises(BankError, match="sharded by keys of its own"):
        bank.check_place()
    GradientBank(bank.store, "docs", SPACE, sidecar="atoms").check_place()


def test_a_sidecar_is_made_with_the_documents_shards_and_replicas_and_replaces_no_point(monkeypatch):
    client = Strict()
    bank = bank_over(client, monkeypatch)
    of_server = {"shard_number": 3, "replication_factor": 2, "write_consistency_factor": 2, "hnsw_config": {"m": 8}}
    found = Configuration(bank.store.vectors(), of_server)
    monkeypatch.setattr(ClientStore, "configuration", lambda self: found)
    bank.keep_atoms_in("atoms")
    fill(bank)
    [made] = [
        options for name, arguments, options in client.calls if name == "create_collection" and "atoms" in arguments
    ]
    assert made == {"vectors_config": {}, **{name: of_server[name] for name in list(of_server)[:3]}}
    [written] = [options for name, arguments, options in client.calls if name == "upsert" and "atoms" in arguments]
    assert written["update_mode"] == models.UpdateMode.INSERT_ONLY
    assert bank.status().atoms == COUNT


def test_a_rate_limiter_that_refuses_a_batch_is_asked_less_at_a_time_and_not_for_fewer_candidates(monkeypatch):
    client = Strict()
    monkeypatch.setattr(ClientStore, "in_process", False)
    bank = GradientBank(ClientStore(client, "docs"), "docs", SPACE, embedders={"dense": Angle()})
    bank.create()
    bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS))
    asked = [Asked(f"Who is person {i}?") for i in range(6)]
    free = bank.search_many(asked, 3, using="dense")
    check = client._check

    def limited(name, arguments, options):
        if len(_requests(name, arguments)) > 4:
            raise refusal("request larger than rate limiter capacity, please try to split your request", 429)
        check(name, arguments, options)

    monkeypatch.setattr(client, "_check", limited)
    assert bank.search_many(asked, 3, using="dense") == free


def test_where_exact_counts_are_refused_approximate_ones_serve(monkeypatch):
    bank = bank_over(Strict(exact=False), monkeypatch)
    assert bank.store.count() == COUNT


def test_a_text_index_is_asked_in_the_clients_own_words_beside_a_vector_or_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(Strict, "query_points", lambda self, *_, **options: asked.append(options) or Empty(), False)
    bank = bank_over(Strict(), monkeypatch)
    bank.search("who dives", 2, using="text:body")
    bank.search("who dives", 2, using=["text:body", "bm25"])
    words = models.TextQuery(text="who dives")
    assert (asked[0]["query"], asked[0]["using"]) == (words, "body")
    assert [(p.query == words, p.using) for p in asked[1]["prefetch"]] == [(True, "body"), (False, "bm25")]


def test_an_embedded_engine_says_that_it_ranks_no_text_index(tmp_path):
    with GradientBank.open(tmp_path, "docs", SPACE) as bank:
        bank.create()
        with pytest.raises(BankError, match="ranks no text index"):
            bank.search("who dives", 2, using="text:body")


def test_what_a_servers_settings_mean_is_said(monkeypatch):
    client = Strict(shards=3)
    bank = bank_over(client, monkeypatch)
    assert "3 shards: atoms are written by id after a look" in bank.store.remarks()


def test_on_several_shards_writes_go_by_id_but_where_they_protect_a_foreign_atom(monkeypatch):
    client = Strict(shards=6)
    bank = bank_over(client, monkeypatch)
    bank.index()
    hits = list(bank.points())
    bank.store.set_payload([PayloadWrite(hits[0].id, {"text": "changed meanwhile"})])
    client.calls.clear()
    bank.put(zip(hits, records(), strict=True))
    operations = [o.set_payload for name, given, _ in client.calls if name == "batch_update_points" for o in given[1]]
    assert all(operation.filter is None and len(operation.points) == 1 for operation in operations)
    assert {o.points[0] for o in operations} == {hit.id for hit in hits[1:]}  # the changed one is passed over
    reads = [options["with_payload"] for name, _, options in client.calls if name == "retrieve"]
    assert reads == [["text", "title"]]  # nothing but what the condition compares
    client.calls.clear()
    bank.put(zip(hits, records(), strict=True), replace=False)
    operations = [o.set_payload for name, given, _ in client.calls if name == "batch_update_points" for o in given[1]]
    assert operations and all(operation.filter is not None for operation in operations)


def test_a_copy_takes_the_settings_along_and_names_what_its_engine_does_not_hold(monkeypatch, tmp_path):
    client = QdrantClient(":memory:")
    dense = models.VectorParams(size=4, distance=models.Distance.DOT, on_disk=True)
    client.create_collection("docs", vectors_config={"dense": dense})
    source = ClientStore(client, "docs")
    asked = {}
    configuration = source.configuration()
    tenant = models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True)
    monkeypatch.setattr(source, "configuration", lambda: replaced(configuration, tenant))

    class Server(ClientStore):
        in_process = False

        def _request(self, method, *arguments, **options):
            asked.setdefault(method, []).append((arguments, options))
            return (
                None
                if method in ("create_payload_index", "update_collection")
                else super()._request(method, *arguments, **options)
            )

    assert migrate(source, Server(QdrantClient(":memory:"), "copy")).left_out == []
    [(_, made)] = asked["create_collection"]
    assert made["vectors_config"]["dense"].on_disk and made["vectors_config"]["dense"].distance == "Dot"
    assert asked["create_payload_index"] == [(("tenant", tenant), {"wait": True})]
    left_out = migrate(source, EdgeStore(tmp_path / "edge")).left_out
    assert "the payload index on tenant" in left_out and any("on_disk" in setting for setting in left_out)


def replaced(configuration, tenant):
    from dataclasses import replace

    return replace(configuration, indexes={"tenant": tenant})


# -- on a real server -----------------------------------------------------------------------------------


@pytest.fixture(params=["rest", "grpc"])
def served(request):
    """A bank on a collection of its own in strict mode, filled."""
    if not os.environ.get("QDRANT_URL"):
        pytest.skip("QDRANT_URL is not set")
    client = QdrantClient(
        os.environ["QDRANT_URL"],
        api_key=os.environ.get("QDRANT_API_KEY"),
        prefer_grpc=request.param == "grpc",
        timeout=60,
        check_compatibility=False,
    )
    name = f"regrad_test_{uuid.uuid4().hex[:8]}"
    bank = GradientBank(client, name, SPACE)
    bank.store.create(VectorNames({}, ("bm25",)))
    bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS))
    yield bank, client, name
    client.delete_collection(name)


def strict(client, name, **limits):
    client.update_collection(name, strict_mode_config=models.StrictModeConfig(enabled=True, **limits))


def test_a_strict_server_is_filled_counted_recoded_and_emptied(served):
    bank, client, name = served
    strict(client, name, unindexed_filtering_retrieve=False, unindexed_filtering_update=False, search_allow_exact=False)
    assert bank.status().missing == COUNT
    fill(bank)
    assert bank.status().atoms == COUNT and bank.recode("sparse", NUMBERS).recoded == COUNT
    assert bank.drop() == COUNT and bank.drop() == 0
    status = bank.status()
    assert (status.atoms, status.missing) == (0, COUNT) and bank.noted() == {}


def test_a_server_with_small_pages_loses_nothing(served):
    bank, client, name = served
    strict(client, name, max_query_limit=5)
    fill(bank)
    assert bank.status().atoms == COUNT and len(list(bank.points())) == COUNT


def test_a_key_that_an_application_deletes_by_itself_is_missing_and_comes_back(served):
    bank, client, name = served
    fill(bank)
    client.delete_payload(name, ["regrad"], points=[point_id("d0")], wait=True)
    status = bank.status()
    assert (status.atoms, status.missing) == (COUNT - 1, 1)
    assert [state for state, _ in bank.examined()].count("gone") <= 1
    fill(bank)
    assert bank.status().atoms == COUNT


def test_a_text_index_is_ranked_by_the_server(served):
    bank, client, name = served
    if tuple(map(int, client.info().version.split(".")[:2])) < (1, 20):
        pytest.skip("text indexes are ranked from Qdrant 1.20")
    schema = models.TextIndexParams(type=models.TextIndexType.TEXT, scoring=True)
    client.create_payload_index(name, "text", schema, wait=True)
    fill(bank)
    assert bank.search("Who is person 7?", 1, using="text:text")[0].document_id == "d7"
    assert bank.search("Who is person 7?", 1, using=["text:text", "bm25"])[0].document_id == "d7"


def test_euclid_weighs_the_nearest_most(served):
    _, client, name = served
    other = f"{name}_euclid"
    client.create_collection(other, vectors_config=models.VectorParams(size=2, distance=models.Distance.EUCLID))
    try:
        points = [models.PointStruct(id=i, vector=[float(i), 0.0], payload={"text": str(i)}) for i in range(30)]
        client.upsert(other, points, wait=True)
        hits = GradientBank(client, other, SPACE, embedders={}).search([0.0, 0.0], 3, using="", with_records=False)
        assert [hit.id for hit in hits] == [0, 1, 2] and hits[0].relevance == 1 > hits[1].relevance
    finally:
        client.delete_collection(other)


def test_errors_of_a_missing_collection_are_sorted(served):
    _, client, _ = served
    with pytest.raises(BankError, match="regrad_no_such"):
        GradientBank(client, "regrad_no_such", SPACE).store.count()


def test_whole_points_are_read_in_pages_that_the_server_allows(monkeypatch):
    bank = bank_over(Strict(limit=5), monkeypatch)
    points, following = bank.store.read(COUNT, None)
    assert len(points) == 5 and following is not None
