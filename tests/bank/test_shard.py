"""Shards: every point is one's, and processes that know nothing of each other fill a bank together."""

import uuid

import pytest

from regrad_loaders.data.facts import generate
from regrad_qdrant import Adapter, GradientBank
from regrad_qdrant.bank.ingest import add_corpus, attach_atoms
from regrad_qdrant.bank.shard import Shard
from regrad_qdrant.bank.stores.base import PayloadWrite
from regrad_qdrant.errors import DataError

PASSAGES = generate("train", 20, 1).passages


def test_every_point_is_in_one_shard_and_they_are_about_as_large():
    ids = [*range(1000), *(str(uuid.UUID(int=i * 7919)) for i in range(1000))]
    shards = [Shard(i, 4) for i in range(4)]
    sizes = [sum(shard.has(one) for one in ids) for shard in shards]
    assert sum(sizes) == 2000 and min(sizes) > 420
    assert all(sum(shard.has(one) for shard in shards) == 1 for one in ids)
    assert Shard(0, 4).has("AB") == Shard(0, 4).has("ab")  # a UUID in either case


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "a/b", "1/0", ""])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(DataError, match="I/N"):
        Shard.parse(text)


@pytest.mark.parametrize("sidecar", [None, "beside"])
def test_two_shards_fill_a_bank_and_again_there_is_nothing_to_do(store, model, tokenizer, initialization, sidecar):
    if sidecar:
        sidecar = f"{store.name}_atoms"
    gradients = Adapter(model, initialization).gradients(tokenizer)
    bank = GradientBank(store, store.name, initialization.fingerprint, sidecar=sidecar)
    add_corpus(bank, PASSAGES, gradients)
    reports = [attach_atoms(bank, gradients, "int4", shard=Shard(i, 2)) for i in range(2)]
    assert sum(report.atoms_written for report in reports) == 20 and all(r.passed_over == 0 for r in reports)
    assert all(0 < report.atoms_written < 20 for report in reports)
    again = [attach_atoms(bank, gradients, "int4", shard=Shard(i, 2)) for i in range(2)]
    assert sum(report.present for report in again) == 20 and not any(report.atoms_written for report in again)
    assert [state for state, _ in bank.surveyed()] == ["current"] * 20


def test_a_shard_renews_what_is_stale_in_it_and_leaves_the_others(store, model, tokenizer, initialization):
    gradients = Adapter(model, initialization).gradients(tokenizer)
    bank = GradientBank(store, store.name, initialization.fingerprint)
    add_corpus(bank, PASSAGES, gradients)
    attach_atoms(bank, gradients, "int4")
    hits = list(bank.points())
    bank.store.set_payload([PayloadWrite(hit.id, {"text": f"{hit.text} And more."}) for hit in hits])
    report = attach_atoms(bank, gradients, "int4", shard=Shard(0, 2))
    states = {hit.id: state for state, hit in bank.examined()}
    assert {key for key, state in states.items() if state == "current"} == {h.id for h in hits if Shard(0, 2).has(h.id)}
    assert report.atoms_written == list(states.values()).count("current")


def test_another_process_that_writes_meanwhile_hides_nothing_that_was_passed_over(
    store, model, tokenizer, initialization, monkeypatch
):
    gradients = Adapter(model, initialization).gradients(tokenizer)
    bank = GradientBank(store, store.name, initialization.fingerprint)
    add_corpus(bank, PASSAGES, gradients)
    own = [hit.id for hit in bank.points() if Shard(0, 2).has(hit.id)]
    gone = own[:2]
    put = GradientBank.put

    def losing(self, pairs, **options):
        pairs = list(pairs)
        if points := [hit.id for hit, _ in pairs if hit.id in gone]:
            self.store.set_payload([PayloadWrite(key, {"text": "Another text altogether."}) for key in points])
        return put(self, pairs, **options)

    monkeypatch.setattr(GradientBank, "put", losing)
    report = attach_atoms(bank, gradients, "int4", shard=Shard(0, 2))
    assert (report.passed_over, report.atoms_written) == (2, len(own) - 2)
