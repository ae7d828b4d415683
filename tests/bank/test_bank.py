"""The bank over every engine: in-process client, embedded Edge shard, and a server where QDRANT_URL names one."""

import json
import uuid
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch
from conftest import Letters
from people import OTHER, PEOPLE, SPACE, documents, fill, payloads, records
from qdrant_client import models

from regrad_qdrant import Bm25, Document, GradientBank
from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.atoms.record import Record, make_records
from regrad_qdrant.bank.assembly import assembled
from regrad_qdrant.bank.bank import Asked
from regrad_qdrant.bank.documents import point_id
from regrad_qdrant.bank.layouts import CORPUS, Layout
from regrad_qdrant.bank.place import MADE
from regrad_qdrant.bank.stores.base import PayloadWrite, Point, SparseVector, VectorNames
from regrad_qdrant.bank.stores.edge import EdgeStore
from regrad_qdrant.bank.stores.opening import open_store
from regrad_qdrant.bank.upkeep import count_finer
from regrad_qdrant.errors import BankError, DataError, RecordTooLargeError, StoreUnavailableError

NUMBERS = AtomLayout.flat(128)
MADE_SO = {"layout": CORPUS.noted(), "embedders": {"bm25": Bm25().noted()}}  # what a bank notes of what it made


@pytest.fixture
def bank(store):
    bank = GradientBank(store, store.name, SPACE)
    bank.create()
    assert bank.add(documents()) == 4
    return bank


def test_search_returns_text_score_and_atom(bank):
    fill(bank)
    hits = bank.search("Which Noor is a diver?", 2)
    assert hits[0].document_id == "d1" and hits[0].text == PEOPLE[1] and hits[0].score > 0
    assert hits[0].record == records(PEOPLE)[1]
    assert hits[0].payload == documents()[1].payload
    assert not hits[0].stale


def test_a_search_without_records_reads_everything_but_atoms(bank):
    fill(bank)
    [hit] = bank.search("Noor", 1, with_records=False)
    assert hit.record is None and hit.payload == documents()[1].payload


def test_texts_are_found_and_guarded_under_keys_of_any_name(store):
    bank = GradientBank(store, store.name, SPACE, layout=Layout("spaced", '"full text"."a.b"'))
    bank.create()
    bank.add([Document(i, {"full text": {"a.b": text}}) for i, text in enumerate(PEOPLE)])
    hits = list(bank.missing())
    assert [hit.text for hit in hits] == list(PEOPLE)
    bank.store.set_payload([PayloadWrite(1, {"full text": {"a.b": "Noor the judge"}})])
    bank.put(zip(hits, records(PEOPLE), strict=True))
    assert [hit.id for hit in bank.missing()] == [1] and not list(bank.stale())


def test_an_atom_is_left_out_where_a_title_has_come_since(bank):
    hits = sorted(bank.missing(), key=lambda hit: hit.text)
    bank.store.set_payload([PayloadWrite(hits[0].id, {"title": "The baker"})])
    bank.put(zip(hits, records([hit.text for hit in hits]), strict=True))
    assert [hit.id for hit in bank.missing()] == [hits[0].id] and not list(bank.stale())


@pytest.mark.parametrize("sidecar", [None, "regrad_test_atoms"])
def test_atoms_of_another_space_are_counted_and_can_be_left_alone(store, sidecar):
    first, second = (GradientBank(store, store.name, space, sidecar=sidecar) for space in (SPACE, OTHER))
    first.create()
    first.add(documents())
    assert second.count_of_other_spaces() == 0
    fill(first, 2)
    assert (first.count_of_other_spaces(), second.count_of_other_spaces()) == (0, 2)
    second.put(zip(list(second.missing()), records(PEOPLE, OTHER), strict=True), replace=False)
    assert (first.count_atoms(), second.count_atoms()) == (2, 2)
    fill(second, 2)
    assert (first.count_atoms(), second.count_atoms()) == (0, 4)


def test_search_takes_vectors_and_filters(bank):
    even = models.Filter(must=[models.FieldCondition(key="state", match=models.MatchValue(value="even"))])
    assert [hit.document_id for hit in bank.search("the baker diver potter judge", 4, query_filter=even)] != []
    assert {hit.payload["state"] for hit in bank.search("Ida Noor Galen Orla", 4, query_filter=even)} <= {"even"}
    vector = Bm25().query("Galen")
    assert isinstance(vector, SparseVector)
    assert bank.search(vector, 1)[0].document_id == "d2"


def test_filters_of_every_kind_agree_on_all_engines(bank):
    def found(**groups):
        rule = models.Filter(**groups)
        return sorted(point.payload["id"] for point in bank.store.scroll(rule, 10, None, True)[0])

    field = models.FieldCondition
    assert found(must=[field(key="id", match=models.MatchAny(any=["d0", "d3"]))]) == ["d0", "d3"]
    assert found(must=[field(key="id", match=models.MatchExcept(**{"except": ["d0"]}))]) == ["d1", "d2", "d3"]
    assert found(must=[field(key="nested.n", range=models.Range(gte=1, lt=3))]) == ["d1", "d2"]
    assert found(must_not=[models.HasIdCondition(has_id=[point_id("d0")])]) == ["d1", "d2", "d3"]
    assert found(must=[models.IsEmptyCondition(is_empty=models.PayloadField(key="regrad"))]) == ["d0", "d1", "d2", "d3"]
    either = [field(key="id", match=models.MatchValue(value=key)) for key in ("d1", "d2")]
    assert found(should=either, must_not=[models.Filter(must=[either[0]])]) == ["d2"]


def test_filters_on_places_counts_words_and_vectors_agree_on_all_engines(bank):
    cities = {"d0": (13.4, 52.5), "d1": (2.35, 48.85), "d2": (-0.1, 51.5)}
    for i, (key, (lon, lat)) in enumerate(cities.items()):
        extra = {"place": {"lon": lon, "lat": lat}, "tags": ["x"] * (i + 1)}
        bank.store.set_payload([PayloadWrite(point_id(key), extra)])

    def found(condition):
        rule = models.Filter(must=[condition])
        return sorted(point.payload["id"] for point in bank.store.scroll(rule, 10, None, True)[0])

    field, point = models.FieldCondition, models.GeoPoint
    paris = point(lon=2.35, lat=48.85)
    box = models.GeoBoundingBox(top_left=point(lon=-1, lat=52), bottom_right=point(lon=3, lat=48))
    corners = [(-2, 50), (1, 50), (1, 53), (-2, 53), (-2, 50)]
    around = models.GeoPolygon(exterior=models.GeoLineString(points=[point(lon=x, lat=y) for x, y in corners]))
    assert found(field(key="place", geo_radius=models.GeoRadius(center=paris, radius=1000))) == ["d1"]
    assert found(field(key="place", geo_bounding_box=box)) == ["d1", "d2"]
    assert found(field(key="place", geo_polygon=around)) == ["d2"]
    assert found(field(key="tags", values_count=models.ValuesCount(gte=2))) == ["d1", "d2"]
    assert found(field(key="text", match=models.MatchText(text="diver"))) == ["d1"]
    assert found(models.HasVectorCondition(has_vector="bm25")) == ["d0", "d1", "d2", "d3"]


def test_atoms_touch_nothing_but_their_own_key(bank):
    before = payloads(bank)
    fill(bank)
    after = payloads(bank)
    assert {key: {k: v for k, v in value.items() if k != "regrad"} for key, value in after.items()} == before
    assert set(after[point_id("d0")]["regrad"]) == {"v", "space", "sha", "codec", "atom"}
    assert bank.drop() == 4
    assert payloads(bank) == before
    assert bank.search("Noor", 1)[0].document_id == "d1"


def test_missing_and_status_count_what_is_there(bank):
    assert {hit.document_id for hit in bank.missing()} == {"d0", "d1", "d2", "d3"}
    fill(bank, 3)
    assert [(hit.document_id, hit.text) for hit in bank.missing()] == [("d3", PEOPLE[3])]
    status = bank.status()
    assert (status.points, status.atoms, status.missing, status.stale, status.codec) == (4, 3, 1, 0, "int8")
    size = len(json.dumps(records(PEOPLE)[0].to_payload()))
    assert status.bytes_median == pytest.approx(size, abs=8) and status.bytes_max >= status.bytes_median


def test_missing_can_be_filled_while_it_iterates(bank):
    seen = []
    for hit in bank.missing():
        bank.put([(hit.id, records([hit.text])[0])])
        seen.append(hit.document_id)
    assert sorted(seen) == ["d0", "d1", "d2", "d3"] and not list(bank.missing())


def test_a_changed_text_makes_its_atom_stale_and_a_new_document_has_none(bank):
    fill(bank)
    bank.store.set_payload([PayloadWrite(point_id("d2"), {"text": "Galen Zimuken the sailor"})])
    assert [hit.document_id for hit in bank.stale()] == ["d2"]
    assert bank.status().stale == 1
    assert bank.search("Galen", 1)[0].stale
    bank.add(documents()[3:])  # the application writes a document again: its atom is gone
    assert [hit.document_id for hit in bank.missing()] == ["d3"]
    assert bank.sync(documents()) == (0, 1)  # the text that the application changed, and nothing else


@pytest.mark.parametrize("sidecar", [None, "regrad_test_atoms"])
def test_documents_go_with_all_that_is_theirs(bank, sidecar):
    bank.keep_atoms_in(sidecar)
    bank.index()
    fill(bank)
    assert bank.remove(["d1", "d3", "gone"]) == 2 and bank.remove(["d1"]) == 0
    status = bank.status()
    assert (status.points, status.atoms, status.orphans) == (2, 2, 0)
    assert {hit.document_id for hit in bank.search("Ida Noor Galen Orla", 4)} == {"d0", "d2"}


def test_sync_updates_a_point_and_keeps_what_the_application_added(bank):
    fill(bank)
    bank.store.set_payload([PayloadWrite(point_id("d1"), {"note": "theirs"})])
    other = GradientBank(bank.store, bank.store.name, OTHER, payload_key="regrad_b")
    fill(other)
    changed = [
        Document("d1", {"id": "d1", "text": "Noor Selowan the glazier", "state": "new"}),
        Document("d9", {"text": "x y"}),
    ]
    assert bank.sync([*documents()[:1], *changed]) == (1, 1)
    payload = payloads(bank)[point_id("d1")]
    assert (payload["note"], payload["state"], payload["text"]) == ("theirs", "new", "Noor Selowan the glazier")
    assert "regrad" in payload and "regrad_b" in payload
    assert [hit.document_id for hit in bank.stale()] == ["d1"]
    assert bank.search("glazier", 1)[0].document_id == "d1"  # the vector follows the text
    assert bank.sync(changed) == (0, 0)


def test_sync_of_some_fields_makes_the_vector_of_the_whole(bank):
    bank.create()
    bank.add([Document("d1", {"id": "d1", "title": "Zanzibar", "text": "Ida works as a baker."})])
    assert bank.sync([Document("d1", {"id": "d1", "text": "Ida works as a sailor."})]) == (0, 1)
    for asked in ("Zanzibar", "sailor"):
        [hit] = bank.search(asked, 1)
        assert hit.text == "Zanzibar\nIda works as a sailor."
    assert bank.sync([Document("d1", {"id": "d1", "state": "new"})]) == (0, 1)  # no text of its own
    assert payloads(bank)[point_id("d1")]["state"] == "new"


def test_documents_that_would_lack_a_vector_are_refused(store):
    class One:
        size = 2

        def documents(self, texts):
            return [[1.0, 0.5] for _ in texts]

        def query(self, text):
            return [1.0, 0.5]

    both = GradientBank(store, store.name, SPACE, embedders={"bm25": Bm25(), "dense": One()})
    both.create()
    both.add(documents())
    with pytest.raises(BankError, match="'dense' that nothing here makes"):
        GradientBank(store, store.name, SPACE).create()


@pytest.mark.parametrize("key", ["", "text", "id", "meta.regrad", "a[0]", "our key"])
def test_a_payload_key_that_would_harm_the_document_is_refused(store, key):
    with pytest.raises(BankError, match="payload key"):
        GradientBank(store, store.name, SPACE, payload_key=key)


def test_a_field_under_our_key_is_the_users(bank):
    with pytest.raises(BankError, match="'regrad', where atoms stand"):
        bank.add([Document("x", {"text": "a b", "regrad": "mine"})])


def test_closing_a_bank_leaves_the_users_client_open():
    from qdrant_client import QdrantClient

    client = QdrantClient(":memory:")
    with GradientBank(client, "docs", SPACE) as bank:
        bank.create()
    assert client.collection_exists("docs")
    client.close()


def test_two_spaces_live_side_by_side_under_two_keys(bank):
    fill(bank)
    other = GradientBank(bank.store, bank.store.name, OTHER, payload_key="regrad_b")
    assert len(list(other.missing())) == 4
    fill(other)
    assert bank.status().atoms == other.status().atoms == 4
    other.drop()
    assert bank.status().atoms == 4 and not any("regrad_b" in payload for payload in payloads(bank).values())


def test_an_atom_of_another_space_is_not_taken_for_ours(bank):
    fill(bank)
    other = GradientBank(bank.store, bank.store.name, OTHER)
    assert other.search("Noor", 1)[0].record is None
    assert other.status().atoms == 0 and other.drop() == 0
    assert bank.status().atoms == 4


def test_requests_are_bounded_by_bytes(bank, monkeypatch):
    bank.max_request_bytes = 1200
    sizes = []
    set_payload = bank.store.set_payload

    def measured(writes):
        sizes.append(len(json.dumps([write.payload for write in writes])))
        set_payload(writes)

    monkeypatch.setattr(bank.store, "set_payload", measured)
    fill(bank)
    assert len(sizes) == 2 and max(sizes) <= 1200 and bank.status().atoms == 4


def test_a_record_over_the_bound_is_named_and_the_others_are_kept(bank):
    bank.max_request_bytes = 1000
    ids = [point_id(f"d{i}") for i in range(2)]
    small, large = records(PEOPLE[:1])[0], records(["x"], numel=10_000)[0]
    with pytest.raises(RecordTooLargeError, match=str(ids[1])):
        bank.put(zip(ids, [small, large], strict=True))
    assert bank.status().atoms == 1


def test_points_deleted_in_the_meantime_are_passed_over(bank):
    bank.put([(point_id("gone"), records(["x"])[0]), (point_id("d0"), records(PEOPLE)[0])])
    assert bank.status().points == 4 and bank.status().atoms == 1
    assert [hit.document_id for hit in bank.fetch([point_id("d0"), point_id("gone")])] == ["d0"]


def test_a_missing_vector_is_named_with_those_there_are(bank):
    with pytest.raises(BankError, match="no vector 'dense'.*bm25"):
        bank.search([0.1, 0.2], 1, using="dense")
    with pytest.raises(BankError, match="no vector 'dense'.*bm25"):
        bank.search("text", 1, using="dense")
    again = GradientBank(bank.store, bank.store.name, SPACE, embedders={"words": Bm25()})
    with pytest.raises(BankError, match="no vector 'words'"):
        again.create()
    with pytest.raises(BankError, match="k must be"):
        bank.search("text", 0)


def test_a_document_without_text_is_refused(bank):
    with pytest.raises(BankError, match="'x'.*no text"):
        bank.add([Document("x", {"title": "only"})])
    assert bank.store.count() == 4


def test_dense_vectors_beside_bm25(store):
    bank = GradientBank(store, store.name, SPACE, embedders={"bm25": Bm25(), "dense": Letters()})
    bank.create()
    bank.add(documents())
    assert bank.search(PEOPLE[2], 1, using="dense")[0].document_id == "d2"
    assert bank.search(Letters().query(PEOPLE[3]), 1, using="dense")[0].document_id == "d3"
    assert bank.search("Orla", 1)[0].document_id == "d3"  # bm25 where nothing is named


def test_metadata_is_kept_beside_the_collection(bank):
    bank.store.write_metadata({"regrad": {"a": 1}})
    bank.store.write_metadata({"other": 2})
    assert bank.store.read_metadata() == {MADE: MADE_SO, "regrad": {"a": 1}, "other": 2}


def test_an_edge_bank_is_there_after_it_was_closed(tmp_path):
    with GradientBank.open(tmp_path, "docs", SPACE) as bank:
        bank.create()
        bank.add(documents())
        fill(bank)
        with pytest.raises(StoreUnavailableError, match="open already, here or in another process"):
            EdgeStore(tmp_path / "docs").count()
    with GradientBank.open(tmp_path, "docs", SPACE) as bank:
        assert bank.status().atoms == 4
        assert bank.search("Noor", 1)[0].record == records(PEOPLE)[1]


def test_collections_that_can_not_be_opened(tmp_path):
    with pytest.raises(BankError, match="no collection 'docs'"):
        EdgeStore(tmp_path / "docs").count()
    with pytest.raises(StoreUnavailableError, match="can't reach"):
        open_store("docs", url="http://127.0.0.1:9")
    with pytest.raises(BankError, match="must not contain a path"):
        open_store("../docs", path=tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BankError, match="is a file"):
        open_store("docs", path=tmp_path / "file")


def test_a_folder_of_the_in_process_client_is_recognised(tmp_path):
    from qdrant_client import QdrantClient

    from regrad_qdrant.bank.stores.client import ClientStore

    client = QdrantClient(path=str(tmp_path / "local"))
    bank = GradientBank(client, "docs", SPACE)
    bank.create()
    bank.add(documents())
    client.close()
    again = open_store("docs", path=tmp_path / "local")
    assert isinstance(again, ClientStore) and again.count() == 4
    again.close()


def test_ids_keep_what_qdrant_can_keep():
    assert point_id(7) == 7
    assert point_id("5b1d0f3e-6f0e-5d0a-9c51-7a3f6f1c2b90") == "5b1d0f3e-6f0e-5d0a-9c51-7a3f6f1c2b90"
    assert point_id("squad-d1") == point_id("squad-d1") != point_id("squad-d2")


@pytest.fixture
def hybrid(store):
    """BM25 and a dense vector whose embedder counts letters."""
    bank = GradientBank(store, store.name, SPACE, embedders={"bm25": Bm25(), "letters": Letters()})
    bank.create()
    bank.add(documents())
    fill(bank)
    return bank


def test_hybrid_search_ranks_by_both_vectors_and_reads_k_atoms(hybrid, monkeypatch):
    read = []
    retrieve = hybrid.store.retrieve

    def counted(ids, with_payload):
        read.extend(ids)
        return retrieve(ids, with_payload)

    monkeypatch.setattr(hybrid.store, "retrieve", counted)
    hits = hybrid.search("Noor Selowan the diver", 2, using=["bm25", "letters"])
    assert hits[0].document_id == "d1" and len(hits) == 2 and len(read) == 2
    assert all(hit.record is not None for hit in hits) and hits[0].score > hits[1].score > 0
    vectors = {name: embedder.query("Noor Selowan the diver") for name, embedder in hybrid.embedders.items()}
    assert [hit.id for hit in hybrid.search(vectors, 2)] == [hit.id for hit in hits]


def test_a_text_needs_an_embedder(hybrid):
    bank = GradientBank(hybrid.store, hybrid.store.name, SPACE, embedders={"bm25": Bm25()})
    with pytest.raises(BankError, match=r"nothing embeds text for the vector 'letters'.*embedders=\{'letters': "):
        bank.search("text", 1, using="letters")


def test_a_point_that_is_named_again_is_fetched_once_under_its_first_score(bank):
    [first, second] = fill(bank, 2)
    hits = bank.fetch([first, second, first], [3.0, 2.0, 1.0])
    assert [(hit.id, hit.score) for hit in hits] == [(first, 3.0), (second, 2.0)]


def test_what_the_engine_can_not_read_of_a_query_is_an_error_of_the_bank(bank):
    strange = models.Filter(must=[models.FieldCondition(key="a b[", match=models.MatchValue(value=1))])
    with pytest.raises(BankError):
        bank.search("baker", 1, query_filter=strange)
    with pytest.raises(DataError, match="no valid Unicode"):
        bank.search("caf\udce9", 1)
    assert bank.search("baker", 1, using=[]) == bank.search("baker", 1)


@pytest.mark.parametrize("document", [Document("\udce9", {"text": "x"}), Document("x", {"text": "\udce9"})])
def test_a_document_of_half_a_letter_is_refused(bank, document):
    with pytest.raises(BankError, match="can't be written as JSON"):
        bank.add([document])


def test_hybrid_search_of_several_questions_fetches_once(hybrid, monkeypatch):
    asked = [Asked(text) for text in ("Noor Selowan the diver", "Ida Corvand the baker", "Orla Thornaby")]
    alone = [hybrid.search(one.query, 2, using=["bm25", "letters"]) for one in asked]
    calls = []
    retrieve = hybrid.store.retrieve
    monkeypatch.setattr(hybrid.store, "retrieve", lambda *arguments: calls.append(arguments) or retrieve(*arguments))
    assert hybrid.search_many(asked, 2, using=["bm25", "letters"]) == alone and len(calls) == 1


def test_hybrid_search_carries_the_filter_into_every_search(hybrid):
    odd = models.Filter(must=[models.FieldCondition(key="state", match=models.MatchValue(value="odd"))])
    hits = hybrid.search("Ida Corvand the baker", 4, using=["bm25", "letters"], query_filter=odd)
    assert {hit.document_id for hit in hits} == {"d1", "d3"}


def test_hits_of_a_retriever_of_ones_own_keep_its_order_and_scores(bank):
    fill(bank)
    hits = bank.fetch([point_id("d2"), point_id("gone"), point_id("d0")], [0.9, 0.8, 0.7])
    assert [(hit.document_id, hit.score) for hit in hits] == [("d2", 0.9), ("d0", 0.7)]


def test_recoding_makes_atoms_coarser_in_place_and_touches_nothing_else(bank):
    ids = fill(bank)
    before = payloads(bank)
    coarse = make_records(torch.ones(1, 128), [PEOPLE[3]], SPACE, "sparse")[0]
    bank.put([(ids[3], coarse)])
    done = []
    report = bank.recode("sign", NUMBERS, done.append)
    assert (report.recoded, report.failed, sum(done)) == (3, {}, 3)
    after = payloads(bank)
    for key in ids[:3]:
        old, new = before[key].pop("regrad"), after[key].pop("regrad")
        assert new["codec"] == "sign" and (new["sha"], new["space"]) == (old["sha"], old["space"])
        atoms = [Record.from_payload(value).decode(SPACE, NUMBERS) for value in (old, new)]
        assert torch.cosine_similarity(*atoms, dim=0) > 0.7
        assert after[key] == before[key]
    assert after[ids[3]]["regrad"]["codec"] == "sparse"  # coarser already: left as it is
    assert bank.recode("sign", NUMBERS).recoded == bank.recode("int8", NUMBERS).recoded == 0


def test_recoding_leaves_what_it_can_not_read_and_names_it(bank):
    ids = fill(bank)
    broken = bank.fetch(ids[:1])[0].record
    bank.put([(ids[0], replace(broken, atom=broken.atom[:-8]))])
    report = bank.recode("int4", NUMBERS)
    assert report.recoded == 3 and list(report.failed) == [str(ids[0])]
    assert payloads(bank)[ids[0]]["regrad"]["codec"] == "int8"


def test_recoding_that_was_stopped_goes_on_where_it_was(bank):
    fill(bank)
    bank.max_request_bytes = 2000  # two atoms a page

    def stop(_count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bank.recode("sign", NUMBERS, stop)
    assert 0 < count_finer(bank, "sign", NUMBERS) < 4
    assert 0 < bank.recode("sign", NUMBERS).recoded < 4
    assert bank.status().codec == "sign"


def test_ids_are_found_however_a_uuid_is_spelled(bank):
    ids = fill(bank)
    bare = uuid.UUID(ids[1]).hex
    assert [hit.document_id for hit in bank.fetch([bare, uuid.UUID(ids[0])])] == ["d1", "d0"]
    with pytest.raises(BankError, match="1 scores for 2 ids"):
        bank.fetch(ids[:2], [1.0])


def test_fields_of_any_name_are_kept(bank):
    odd = Document("odd", {"id": "odd", "text": "Ida Corvand", "publish date": "1 May", "a.b": 3})
    assert bank.sync([odd]) == (1, 0) and bank.sync([odd]) == (0, 0)


def test_a_recoded_atom_does_not_replace_one_that_was_written_meanwhile(bank, monkeypatch):
    ids = fill(bank)
    newer = records(["Ida Corvand the judge"])[0]
    recoded = Record.recoded

    def meanwhile(self, *arguments):
        if self.sha == records(PEOPLE)[0].sha:
            bank.put([(ids[0], newer)])
        return recoded(self, *arguments)

    monkeypatch.setattr(Record, "recoded", meanwhile)
    bank.recode("sign", NUMBERS)
    assert bank.fetch([ids[0]])[0].record == newer


# -- what an index says and a payload no longer holds ---------------------------------------------------


class Believing:
    """A store whose index goes on finding points after their key is gone, as a server's does when an application
    deletes the parent key alone."""

    def __init__(self, store, ids):
        self.inner, self.ids = store, ids

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def scroll(self, query_filter, limit, offset, with_payload):
        if query_filter is None or not query_filter.must:  # the filter of what has an atom has a must alone
            return self.inner.scroll(query_filter, limit, offset, with_payload)
        found, following = self.inner.scroll(query_filter, limit, offset, with_payload)
        return [*found, *self.inner.retrieve(self.ids, with_payload)], following


def test_what_the_index_alone_remembers_is_missing_and_no_one_fails(bank):
    bank.store = Believing(bank.store, [point_id("d2")])
    bank.keep_atoms_in(None)
    bank.put((point_id(f"d{i}"), record) for i, record in enumerate(records(PEOPLE[:2])))
    status = bank.status()
    assert (status.atoms, status.stale, status.damaged) == (2, 0, 0)
    assert [state for state, _ in bank.examined()].count("gone") == 1
    assert bank.recode("sparse", NUMBERS).recoded == 2
    assert bank.drop() == 2


def test_dropping_takes_the_nested_key_first_and_leaves_nothing_of_ours(bank, monkeypatch):
    bank.put((point_id(f"d{i}"), record) for i, record in enumerate(records(PEOPLE)))
    bank.atoms.write_metadata({bank.metadata_key: {"space": "core"}, "theirs": 1})
    asked = []
    delete = bank.atoms.delete_keys
    monkeypatch.setattr(bank.atoms, "delete_keys", lambda keys, only: asked.append(keys) or delete(keys, only))
    assert bank.drop() == len(PEOPLE) and bank.drop() == 0
    assert asked[0] == ["regrad.space", "regrad"]
    assert bank.noted() == {} and bank.atoms.read_metadata() == {MADE: MADE_SO, "theirs": 1}
    assert (bank.status().atoms, bank.count_atoms()) == (0, 0)


def test_a_value_that_is_no_record_is_damaged_in_every_word(bank):
    bank.store.set_payload([PayloadWrite(point_id("d0"), {"regrad": {"v": 1, "space": SPACE}})])
    assert (bank.status().damaged, bank.status().stale, bank.status().atoms) == (1, 0, 1)
    [hit] = bank.fetch([point_id("d0")])
    assert hit.record is None and "sha, codec, atom are missing" in hit.damaged


def test_what_embeds_is_looked_up_once_and_not_for_every_question(bank, monkeypatch):
    fresh = GradientBank(bank.store, bank.store.name, SPACE)
    asked = []
    for name in ("exists", "read_metadata"):
        method = getattr(fresh.store, name)
        monkeypatch.setattr(fresh.store, name, lambda name=name, method=method: asked.append(name) or method())
    fresh.search("Noor", 1)
    first, asked[:] = list(asked), []
    fresh.search("Ida", 1)
    assert first and asked == [] and fresh.embedders["bm25"] is fresh.embedders["bm25"]


def test_what_a_client_takes_is_written(bank):
    bank.add([Document("d9", {"text": "Ada the miller", "since": datetime(2026, 1, 2, tzinfo=UTC)})])
    [hit] = bank.search("Ada", 1)
    assert hit.payload["since"].startswith("2026-01-02")
    with pytest.raises(BankError, match="document 'd8': its payload can't be written as JSON.*object"):
        bank.add([Document("d8", {"text": "Ada", "of": object()})])
    for number in (float("nan"), float("inf")):
        with pytest.raises(BankError, match="document 'd7': its payload can't be written as JSON"):
            bank.add([Document("d7", {"text": "Ada", "scores": [1.0, number]})])


def test_a_layout_that_a_newer_version_noted_is_said(bank):
    bank.add(documents())
    bank.atoms.write_metadata({bank.metadata_key: {"layout": {"name": "corpus", "text": "text", "weights": 3}}})
    with pytest.raises(BankError, match="a newer regrad-qdrant may know it.*--text-path"):
        assert GradientBank(bank.store, "docs", SPACE).layout


@pytest.mark.parametrize("sidecar", [None, "regrad_test_atoms"])
@pytest.mark.parametrize("value", ["mine", {"of": "mine"}, 7])
def test_a_field_of_the_users_under_the_banks_key_is_never_written_over(store, value, sidecar):
    first = GradientBank(store, store.name, SPACE)
    first.create()
    first.add(documents())
    if sidecar:
        first.keep_atoms_in(sidecar)
        first.index()
        first.atoms.upsert([Point(point_id("d2"), {}, {"regrad": value})])
    else:
        store.set_payload([PayloadWrite(point_id("d2"), {"regrad": value})])
    with pytest.raises(BankError, match="'regrad' that is no atom"):
        first.check_place()
    other = GradientBank(store, store.name, SPACE, payload_key="atoms", sidecar=sidecar)
    other.check_place()
    if sidecar:
        first.atoms.delete_keys(["regrad"], models.Filter(must=[models.HasIdCondition(has_id=[point_id("d2")])]))
    else:
        store.delete_keys(["regrad"], models.Filter(must=[models.HasIdCondition(has_id=[point_id("d2")])]))
    fill(first)
    first.check_place()


class Meanwhile(Letters):
    """An embedder that takes its time: something happens meanwhile."""

    def documents(self, texts):
        self.happens()
        return super().documents(texts)


def test_sync_keeps_a_point_that_came_and_passes_over_one_that_went_while_it_embedded(store):
    embedder = Meanwhile()
    embedder.happens = lambda: None
    bank = GradientBank(store, store.name, SPACE, embedders={"letters": embedder})
    bank.create()
    bank.add(documents()[:2])

    def happens():
        embedder.happens = lambda: None
        store.delete_points([point_id("d0")])
        vectors = {"letters": [float(i) for i in range(embedder.size)]}
        store.upsert([Point(point_id("d2"), vectors, {"id": "d2", "text": "something else", "app": "its own"})])

    embedder.happens = happens
    changed = [replace(one, payload=one.payload | {"text": f"{one.payload['text']} of old"}) for one in documents()]
    added, updated = bank.sync(changed[1:])
    found = payloads(bank)
    assert (added, updated) == (1, 2) and found[point_id("d2")]["app"] == "its own"
    assert found[point_id("d2")]["text"] == "Galen Zimuken the potter of old"
    embedder.happens = lambda: store.delete_points([point_id("d3")])
    reworded = [replace(one, payload=one.payload | {"text": f"{one.payload['text']} and new"}) for one in documents()]
    bank.sync(reworded[1:])
    left = payloads(bank)
    assert {payload["text"][-3:] for payload in left.values()} == {"new"} and point_id("d3") not in left


def test_an_embedded_shard_says_that_it_matches_no_true_and_false(tmp_path):
    store = EdgeStore(tmp_path / "docs")
    store.create(VectorNames({}, ("bm25",)))
    private = models.FieldCondition(key="private", match=models.MatchValue(value=True))
    with pytest.raises(BankError, match="can't match true and false"):
        store.scroll(models.Filter(must_not=[private]), 10, None, True)
    store.close()


def test_once_ingestion_has_noted_the_key_what_is_no_atom_under_it_is_damage(bank):
    bank.store.set_payload([PayloadWrite(point_id("d2"), {"regrad": "garbage"})])
    bank.store.write_metadata({bank.metadata_key: {"space": "lora"}})
    if not bank.noted():
        pytest.skip("this store keeps no metadata")
    bank.check_place()
    assert point_id("d2") in {hit.id for hit in bank.missing()}


def test_of_a_large_collection_the_first_points_are_looked_at(bank, monkeypatch):
    monkeypatch.setattr("regrad_qdrant.bank.place.LOOKED_THROUGH", 0)
    fill(bank, 3)
    bank.check_place()
    bank.store.set_payload([PayloadWrite(point_id("d3"), {"regrad": "mine"})])
    with pytest.raises(BankError, match="choose another key"):
        bank.check_place()


def test_other_spaces_in_the_documents_points_are_noted_and_those_in_a_sidecar_are_not(bank):
    other = GradientBank(bank.store, bank.store.name, OTHER)
    assert not bank.notes_other_spaces()
    bank.store.write_metadata({other.metadata_key: {"sidecar": "elsewhere"}})
    if not bank.store.read_metadata():
        pytest.skip("this store keeps no metadata")
    assert not bank.notes_other_spaces()
    bank.store.write_metadata({other.metadata_key: {"space": "lora"}})
    assert bank.notes_other_spaces() and not other.notes_other_spaces()


@pytest.mark.parametrize("further", [{"document": "a.pdf", "metadata": {"page": 1}}, {"body": "a.pdf"}])
def test_a_collection_that_a_bank_made_keeps_its_text_where_the_first_documents_had_it(store, monkeypatch, further):
    monkeypatch.setattr("regrad_qdrant.bank.writing.PAGE", 2)
    bank = GradientBank(store, store.name, SPACE)
    bank.create()
    given = [replace(one, payload=one.payload | further) for one in documents()]
    assert bank.sync(given) == (4, 0) and bank.sync(given) == (0, 0)
    assert [bank.search(name, 1)[0].text for name in ("Ida", "Orla")] == [PEOPLE[0], PEOPLE[3]]
    if store.read_metadata():  # as a later process finds it
        assert sorted(hit.text for hit in GradientBank(store, store.name, OTHER).missing()) == sorted(PEOPLE)


def test_words_are_of_one_language_for_every_bank_of_a_collection(store):
    bank = GradientBank(store, store.name, SPACE, embedders={"bm25": Bm25("german")})
    bank.create()
    bank.add([Document(1, {"id": "a", "text": "Die Häuser am Hafen"}), Document(2, {"id": "b", "text": "Ein Schiff"})])
    if not store.read_metadata():
        pytest.skip("this engine keeps no metadata")
    bank.drop()
    assert [hit.document_id for hit in GradientBank(store, store.name, OTHER).search("Welches Haus?", 1)] == ["a"]
    beside = assembled(store, OTHER, payload_key="second", dense="none")
    assert beside.embedders["bm25"].noted() == {"kind": "bm25", "language": "german"} and "dense" in beside.embedders
    with pytest.raises(BankError, match="leave --language and --dense out"):
        GradientBank(store, store.name, SPACE, embedders={"bm25": Bm25()}).create()


def test_an_id_that_is_in_no_list_is_no_list_of_letters(bank):
    for ask in (bank.remove, bank.fetch):
        with pytest.raises(BankError, match=r"ids go in a list: \['123'\]"):
            ask("123")
    assert bank.store.count() == 4


def test_a_document_that_is_given_twice_counts_once(bank):
    twice = [Document("new", {"id": "new", "text": text}) for text in ("Ida", "Noor")]
    assert bank.sync(twice) == (1, 0)
    assert [hit.text for hit in bank.fetch([point_id("new")])] == ["Noor"]


def test_a_closed_shard_stays_closed(bank):
    bank.close()
    if isinstance(bank.store, EdgeStore):
        with pytest.raises(BankError, match="is closed: open it anew"):
            bank.search("Ida", 1)
