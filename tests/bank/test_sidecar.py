"""Atoms in a collection of their own, beside the documents', over every engine."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from people import OTHER, PEOPLE, SPACE, documents, fill, payloads, records

from regrad_qdrant import Document, GradientBank
from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.bank.documents import point_id
from regrad_qdrant.bank.layouts import Layout
from regrad_qdrant.bank.place import MADE
from regrad_qdrant.bank.stores.base import PayloadWrite, VectorNames
from regrad_qdrant.errors import BankError

NUMBERS = AtomLayout.flat(128)


@pytest.fixture
def beside(store):
    """A bank whose atoms are in a collection of their own."""
    if store.sibling("atoms").exists():  # on a server, from a run before
        store.sibling("atoms").client.delete_collection("atoms")
    bank = GradientBank(store, store.name, SPACE, sidecar="atoms")
    bank.create()
    assert bank.add(documents()) == 4
    yield bank
    bank.close()


def test_a_sidecar_holds_the_atoms_and_the_documents_stay_as_they_were(beside):
    before = payloads(beside)
    assert [hit.document_id for hit in beside.missing()] and beside.status().missing == 4
    fill(beside, 3)
    assert payloads(beside) == before
    assert [hit.document_id for hit in beside.missing()] == ["d3"]
    assert [hit.record for hit in beside.search("Which Noor is a diver?", 1)] == [records(PEOPLE)[1]]
    assert beside.fetch([point_id("d2")])[0].record == records(PEOPLE)[2]
    status = beside.status()
    assert (status.points, status.atoms, status.missing, status.stale, status.codec) == (4, 3, 1, 0, "int8")
    assert beside.recode("sign", NUMBERS).recoded == 3 and beside.status().codec == "sign"
    assert beside.drop() == 3 and beside.status().atoms == 0 and payloads(beside) == before


def test_a_bank_that_is_not_told_finds_the_sidecar_that_was_noted_until_the_last_atom_goes(beside):
    beside.index()
    fill(beside)
    assert beside.note_sidecar()
    told_nothing = GradientBank(beside.store, beside.store.name, SPACE)
    assert told_nothing.in_sidecar and told_nothing.status() == beside.status()
    assert told_nothing.search("Which Noor is a diver?", 1)[0].record == records(PEOPLE)[1]
    assert not GradientBank(beside.store, beside.store.name, SPACE, sidecar=False).in_sidecar
    assert not GradientBank(beside.store, beside.store.name, OTHER).in_sidecar
    told_nothing.drop()
    assert not GradientBank(beside.store, beside.store.name, SPACE).in_sidecar


def test_a_sidecar_sees_changed_and_deleted_documents(beside):
    ids = fill(beside)
    beside.store.set_payload([PayloadWrite(ids[2], {"text": "Galen Zimuken the sailor"})])
    assert [hit.document_id for hit in beside.stale()] == ["d2"]
    [hit] = beside.search("Galen Zimuken", 1)
    assert hit.stale
    beside.put([(point_id("gone"), records(["x"])[0])])
    assert beside.status().atoms == 4  # an atom without a document is no atom of the bank
    old = replace(hit, payload=documents()[2].payload)
    before = beside.fetch([ids[2]])[0].record
    beside.put([(old, records(["other"])[0])])  # computed from a text that is no longer there
    assert beside.fetch([ids[2]])[0].record == before


def test_orphans_of_a_sidecar_are_counted_and_go_with_the_others(store):
    bank = GradientBank(store, store.name, SPACE, sidecar=f"{store.name}_atoms")
    bank.create()
    bank.add(documents())
    bank.put((point_id(f"d{i}"), record) for i, record in enumerate(records(PEOPLE)))
    bank.store.delete_points([point_id("d0")])
    status = bank.status()
    assert (status.points, status.atoms, status.orphans, status.missing) == (len(PEOPLE) - 1, len(PEOPLE) - 1, 1, 0)
    assert bank.drop() == len(PEOPLE)
    assert bank.atoms.count() == 0 and bank.status().orphans == 0


def test_status_reads_every_text_once_beside_a_sidecar_too(store, monkeypatch):
    bank = GradientBank(store, store.name, SPACE, sidecar=f"{store.name}_atoms")
    bank.create()
    bank.add(documents())
    bank.put((point_id(f"d{i}"), record) for i, record in enumerate(records(PEOPLE[:2])))
    read = []
    scroll = bank.store.scroll

    def watched(*arguments):
        points, following = scroll(*arguments)
        read.extend(point.id for point in points if "text" in point.payload)
        return points, following

    monkeypatch.setattr(bank.store, "scroll", watched)
    assert bank.layout.name == "corpus"
    read.clear()
    assert (bank.status().atoms, bank.status().missing) == (2, len(PEOPLE) - 2)
    assert len(read) == 2 * len(PEOPLE)  # two times status


def test_a_sidecars_name_is_no_path(beside):
    for name in ("../../x", "a/b", "", ".."):
        with pytest.raises(BankError, match="must not contain a path"):
            beside.keep_atoms_in(name)


def test_a_sidecar_that_was_made_after_a_bank_was_opened_is_found(store, monkeypatch):
    monkeypatch.setattr("regrad_qdrant.bank.collection.LOOK_AGAIN", 0.0)
    early = GradientBank(store, store.name, SPACE)
    early.create()
    early.add(documents())
    [before] = early.search("Noor", 1)
    later = GradientBank(store, store.name, SPACE, sidecar="regrad_test_atoms")
    later.index()
    fill(later)
    if not later.note_sidecar():
        pytest.skip("no metadata")
    [after] = early.search("Noor", 1)
    assert before.record is None and after.record == records(PEOPLE)[1]


def test_upkeep_of_a_bank_that_was_opened_before_the_sidecar_is_of_its_atoms(store):
    early = GradientBank(store, store.name, SPACE)
    early.create()
    early.add(documents())
    assert early.status().atoms == 0
    later = GradientBank(store, store.name, SPACE, sidecar="regrad_test_atoms")
    later.index()
    fill(later)
    if not later.note_sidecar():
        pytest.skip("no metadata")
    assert early.status().atoms == 4 and early.drop() == 4 and later.status().atoms == 0


def test_a_field_of_the_users_is_safe_where_the_atoms_were_in_a_sidecar_before(store):
    beside = GradientBank(store, store.name, SPACE, sidecar="regrad_test_atoms")
    beside.create()
    beside.add(documents())
    store.set_payload([PayloadWrite(point_id("d2"), {"regrad": {"mine": 1}})])
    beside.index()
    beside.note_sidecar()
    with pytest.raises(BankError, match="'regrad' that is no atom"):
        GradientBank(store, store.name, SPACE, sidecar=False).check_place()


def test_dropping_in_place_leaves_the_way_to_atoms_in_a_sidecar(beside):
    beside.index()
    fill(beside)
    if not beside.note_sidecar():
        pytest.skip("no metadata")
    assert GradientBank(beside.store, beside.store.name, SPACE, sidecar=False).drop() == 0
    assert GradientBank(beside.store, beside.store.name, SPACE).status().atoms == 4


def test_documents_go_from_every_sidecar_that_is_noted(beside):
    other = GradientBank(beside.store, beside.store.name, OTHER, sidecar="regrad_test_atoms")
    for bank in (beside, other):
        bank.index()
        fill(bank)
    if not (beside.note_sidecar() and other.note_sidecar()):
        pytest.skip("no metadata")
    told_nothing = GradientBank(beside.store, beside.store.name, "c" * 16)
    assert told_nothing.remove(["d1", "d2", "nosuch"]) == 2
    assert beside.atoms.count() == other.atoms.count() == 2


def test_another_space_reads_the_text_where_the_first_did_in_a_sidecar_too(store):
    first = GradientBank(store, store.name, SPACE, sidecar="regrad_test_atoms", layout=Layout("mine", "clean"))
    first.create()
    first.add([Document(1, {"text": "short", "clean": "the long clean text"})])
    first.index()
    space = SimpleNamespace(kind="lora", shapes={})
    first.describe(space, {"bm25": {"kind": "bm25", "language": "german"}})
    if not store.read_metadata():
        pytest.skip("no metadata")
    store.write_metadata({MADE: None})
    second = GradientBank(store, store.name, OTHER)
    assert second.layout.text == first.layout.text
    assert second.known("embedders") == {"bm25": {"kind": "bm25", "language": "german"}}


def test_a_bank_follows_where_atoms_are_kept_from_one_sidecar_to_another(beside, monkeypatch):
    monkeypatch.setattr("regrad_qdrant.bank.collection.LOOK_AGAIN", 0.0)
    beside.index()
    fill(beside)
    if not beside.note_sidecar():
        pytest.skip("no metadata")
    early = GradientBank(beside.store, beside.store.name, SPACE)
    assert early.search("Noor", 1)[0].record is not None
    beside.keep_atoms_in("regrad_test_atoms")
    beside.index()
    fill(beside)
    beside.note_sidecar()
    beside.store.sibling("atoms").delete_points([point_id(f"d{i}") for i in range(4)])
    assert early.search("Noor", 1)[0].record is not None and early.atoms.name == "regrad_test_atoms"


def test_a_sidecar_is_neither_the_documents_own_collection_nor_one_with_vectors(store):
    with pytest.raises(BankError, match="documents' own collection"):
        GradientBank(store, store.name, SPACE, sidecar=store.name)
    theirs = store.sibling("regrad_test_atoms")
    theirs.create(VectorNames({"text": 3}))
    beside = GradientBank(store, store.name, SPACE, sidecar="regrad_test_atoms")
    with pytest.raises(BankError, match=r"has vectors \(text\), so it is no sidecar"):
        beside.check_place()
