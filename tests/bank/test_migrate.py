"""Copies between engines: in-process client, embedded Edge shard, and a server where QDRANT_URL names one."""

import pytest
import torch
from conftest import Letters
from qdrant_client import QdrantClient, models

from regrad_qdrant import Document, GradientBank
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.bank.embed import Bm25
from regrad_qdrant.bank.migrate import migrate
from regrad_qdrant.bank.stores.base import VectorNames
from regrad_qdrant.bank.stores.client import ClientStore
from regrad_qdrant.bank.stores.edge import EdgeStore
from regrad_qdrant.errors import BankError

SPACE, COUNT = "a" * 16, 300


def filled(store):
    bank = GradientBank(store, store.name, SPACE, embedders={"bm25": Bm25(), "letters": Letters()})
    bank.create()
    texts = [f"Person {i} works as a {('baker', 'diver')[i % 2]}." for i in range(COUNT)]
    bank.add(Document(i, {"text": text, "nested": {"n": [i]}}) for i, text in enumerate(texts))
    torch.manual_seed(0)
    bank.put(zip(range(COUNT), make_records(torch.randn(COUNT, 300), texts, SPACE, "sign"), strict=True))
    return bank


@pytest.fixture(params=["to edge", "from edge"])
def pair(request, tmp_path):
    """A filled store, and an empty one of another engine."""
    stores = ClientStore(QdrantClient(":memory:"), "docs"), EdgeStore(tmp_path / "copy")
    source, target = stores if request.param == "to edge" else stores[::-1]
    bank = filled(source)
    yield bank, target
    source.close()
    target.close()


def test_a_copy_has_every_point_and_answers_as_its_source(pair):
    bank, target = pair
    report = migrate(bank.store, target)
    assert (report.points, report.written, report.present, report.differing) == (COUNT, COUNT, 0, [])
    copy = GradientBank(target, target.name, SPACE, embedders=bank.embedders)
    assert copy.status() == bank.status() and target.vectors() == bank.store.vectors()
    [found], [expected] = (b.search("What does Person 7 do?", 1) for b in (copy, bank))
    assert found.payload == expected.payload and found.record == expected.record is not None
    for using in ("bm25", "letters"):  # further down scores tie
        scores = [[hit.score for hit in b.search("Person 7 works", 5, using=using)] for b in (copy, bank)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_a_copy_that_was_stopped_goes_on_and_a_changed_point_is_copied_again(pair):
    bank, target = pair

    def stop(_count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migrate(bank.store, target, stop)
    there = target.count()
    bank.add([Document(3, {"text": "Person 3 is a judge now."})])
    report = migrate(bank.store, target)
    assert 0 < there < COUNT and (report.written, report.present) == (COUNT - there + 1, there - 1)
    assert migrate(bank.store, target).written == 0
    assert target.read_ids([3])[3].payload == {"text": "Person 3 is a judge now."}


def test_a_copy_that_was_stopped_before_its_settings_were_complete_gets_them(pair, monkeypatch):
    bank, target = pair
    target.create(bank.store.vectors())
    bank.store.write_metadata({"made": "by them"})
    migrate(bank.store, target)
    assert target.read_metadata() == bank.store.read_metadata()
    target.write_metadata({"made": "by us"})
    migrate(bank.store, target)
    assert target.read_metadata()["made"] == "by us"  # a target with points keeps its own settings


def test_a_target_with_other_vectors_is_refused(pair):
    bank, target = pair
    target.create(VectorNames({"other": 3}))
    with pytest.raises(BankError, match="other vectors"):
        migrate(bank.store, target)


def test_a_servers_limits_are_settings_that_a_server_takes(monkeypatch):
    """What a collection says of its strict mode is of another type than what makes one."""
    client = QdrantClient(":memory:")
    store = ClientStore(client, "docs")
    filled(store)
    info = client.get_collection("docs")
    info.config.strict_mode_config = models.StrictModeConfigOutput(enabled=True, max_query_limit=50)
    monkeypatch.setattr(client, "get_collection", lambda _name: info)
    monkeypatch.setattr(ClientStore, "in_process", False)
    settings = store.configuration().settings
    given = {name.removesuffix("_config"): value for name, value in settings.items() if name.startswith("strict")}
    limits = models.CreateCollection(strict_mode_config=settings["strict_mode_config"]).strict_mode_config
    assert given and limits.enabled and limits.max_query_limit == 50


def test_distances_and_modifiers_are_kept(tmp_path):
    vectors = VectorNames({"a": 3, "b": 2}, ("s", "t"), {"a": "Dot"}, ("t",))
    source, target = EdgeStore(tmp_path / "one"), ClientStore(QdrantClient(":memory:"), "two")
    source.create(vectors)
    migrate(source, target)
    assert target.vectors() == vectors == source.vectors()
    source.close()


def test_a_copy_of_another_name_is_not_led_to_the_sources_sidecar():
    client = QdrantClient(":memory:")
    bank = GradientBank(client, "docs", SPACE, sidecar="atoms")
    bank.create()
    bank.add([Document(1, {"text": "Ida is a baker."})])
    bank.index()
    bank.put([(1, make_records(torch.randn(1, 300), ["Ida is a baker."], SPACE, "sign")[0])])
    assert bank.note_sidecar()
    migrate(bank.store, ClientStore(client, "copy"))
    copy = GradientBank(client, "copy", SPACE)
    assert not copy.in_sidecar and copy.drop() == 0
    assert GradientBank(client, "docs", SPACE).status().atoms == 1
    migrate(bank.store, ClientStore(QdrantClient(":memory:"), "docs"))  # the same name elsewhere is


def test_a_sidecar_is_copied_and_the_copy_can_be_taken_up_again(tmp_path):
    bank = GradientBank(QdrantClient(":memory:"), "docs", SPACE, sidecar="atoms")
    bank.create()
    bank.add([Document(1, {"text": "Ida is a baker."})])
    bank.put([(1, make_records(torch.randn(1, 300), ["Ida is a baker."], SPACE, "sign")[0])])
    target = EdgeStore(tmp_path / "atoms")
    assert [migrate(bank.atoms, target).written for _ in range(2)] == [1, 0]
    assert target.vectors() == bank.atoms.vectors() == VectorNames()
    target.close()
