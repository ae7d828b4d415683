import json
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import tiny_initialization, tiny_model

from regrad_loaders.data.facts import generate
from regrad_qdrant import Adapter, Document, GradientBank
from regrad_qdrant.atoms.record import Record
from regrad_qdrant.bank import ingest
from regrad_qdrant.bank.corpus import Passage, read_corpus
from regrad_qdrant.bank.documents import point_id
from regrad_qdrant.bank.ingest import add_corpus, attach_atoms, check_space
from regrad_qdrant.bank.layouts import Layout
from regrad_qdrant.bank.stores.base import PayloadWrite, json_bytes
from regrad_qdrant.errors import BankError, DataError, UnknownCodecError

PASSAGES = generate("train", 20, 1).passages


@pytest.fixture
def gradients(model, tokenizer, initialization):
    adapter = Adapter(model, initialization)
    return adapter.gradients(tokenizer)


@pytest.fixture
def bank(store, initialization):
    return GradientBank(store, store.name, initialization.fingerprint)


def atoms_of(bank):
    found = bank.store.scroll(None, 100, None, True)[0]
    records = {p.payload["id"]: Record.from_payload(p.payload["regrad"]) for p in found}
    return {key: (record.atom, *record.rest) for key, record in records.items()}


def test_every_passage_gets_the_atom_of_its_own_text(bank, gradients):
    assert add_corpus(bank, PASSAGES, gradients) == (20, 0)
    done = []
    report = attach_atoms(bank, gradients, "fp32", lambda *just: done.append(just), batch_tokens=256)
    assert (report.atoms_written, report.present, report.skipped) == (20, 0, {})
    points, sizes = zip(*done, strict=True)
    stored = [point.payload["regrad"] for point in bank.store.scroll(None, 100, None, True)[0]]
    assert sum(points) == 20 and sum(sizes) == report.bytes_written == sum(map(json_bytes, stored))
    for passage in PASSAGES[:5]:
        [hit] = bank.fetch([point_id(passage.id)])
        expected = gradients.atoms(gradients.windows(passage.text)).mean(0)
        found = hit.record.decode(bank.space, gradients.space.layout)
        assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_the_shapes_are_noted_once_beside_the_collection(bank, gradients):
    add_corpus(bank, PASSAGES[:2], gradients)
    attach_atoms(bank, gradients, "int4")
    noted = bank.store.read_metadata()[f"regrad.{bank.space}"]
    assert noted["space"] == "core"
    assert {name: tuple(shape) for name, shape in noted["shapes"].items()} == gradients.space.shapes


def test_a_second_run_computes_nothing(bank, gradients, monkeypatch):
    add_corpus(bank, PASSAGES, gradients)
    attach_atoms(bank, gradients, "int4")
    before = atoms_of(bank)
    monkeypatch.setattr(gradients, "atoms", None)
    assert add_corpus(bank, PASSAGES, gradients) == (0, 0)
    report = attach_atoms(bank, gradients, "int4")
    assert (report.atoms_written, report.present) == (0, 20) and atoms_of(bank) == before


def test_a_changed_text_is_computed_again_and_only_that(bank, gradients):
    add_corpus(bank, PASSAGES, gradients)
    attach_atoms(bank, gradients, "int4")
    before = atoms_of(bank)
    bank.store.set_payload([PayloadWrite(point_id(PASSAGES[3].id), {"text": "Ida Corvand plays the harp."})])
    report = attach_atoms(bank, gradients, "int4")
    after = atoms_of(bank)
    assert (report.atoms_written, report.present) == (1, 19) and not list(bank.stale())
    assert [key for key in before if before[key] != after[key]] == [PASSAGES[3].id]


def test_what_is_stale_is_renewed_without_reading_an_atom(bank, gradients, monkeypatch):
    add_corpus(bank, PASSAGES, gradients)
    attach_atoms(bank, gradients, "int4")
    texts = {passage.id: f"{passage.text} So it is." for passage in PASSAGES}
    add_corpus(bank, [Passage(p.id, texts[p.id], p.payload | {"text": texts[p.id]}) for p in PASSAGES], gradients)
    read = []

    def watched(method, points_of):
        def call(*arguments):
            found = method(*arguments)
            read.extend(point.payload["regrad"] for point in points_of(found) if "regrad" in point.payload)
            return found

        return call

    monkeypatch.setattr(bank.store, "retrieve", watched(bank.store.retrieve, lambda found: found))
    monkeypatch.setattr(bank.store, "scroll", watched(bank.store.scroll, lambda found: found[0]))
    report = attach_atoms(bank, gradients, "int4")
    assert (report.atoms_written, report.passed_over, report.present) == (20, 0, 0)
    assert read and not any("atom" in record or "atoms" in record for record in read)


def test_a_corpus_that_changed_replaces_the_document(bank, gradients):
    add_corpus(bank, PASSAGES, gradients)
    attach_atoms(bank, gradients, "int4")
    new = Passage(PASSAGES[0].id, "Ida is a judge.", {"id": PASSAGES[0].id, "text": "Ida is a judge."})
    assert add_corpus(bank, [new, *PASSAGES[1:]], gradients) == (0, 1)
    assert attach_atoms(bank, gradients, "int4").atoms_written == 1
    assert bank.status().points == 20


def test_atoms_of_another_initialization_are_replaced_on_request_alone(bank, gradients):
    add_corpus(bank, PASSAGES[:3], gradients)
    attach_atoms(bank, gradients, "int4")
    other = GradientBank(bank.store, bank.store.name, "b" * 16)
    before = atoms_of(bank)
    with pytest.raises(BankError, match="3 points carry atoms of another space.*--payload-key.*--replace"):
        attach_atoms(other, gradients, "int4")
    assert atoms_of(bank) == before
    assert attach_atoms(other, gradients, "int4", replace=True).atoms_written == 3
    assert (bank.count_atoms(), other.count_atoms()) == (0, 3)


def test_a_text_that_changes_again_meanwhile_stays_stale_and_is_counted(bank, gradients, monkeypatch):
    add_corpus(bank, PASSAGES, gradients)
    attach_atoms(bank, gradients, "int4")
    texts = iter(["Ida Corvand plays the harp.", "Ida Corvand plays the lute."])

    def change():
        bank.store.set_payload([PayloadWrite(point_id(PASSAGES[3].id), {"text": next(texts)})])

    change()
    atoms = gradients.atoms
    monkeypatch.setattr(gradients, "atoms", lambda documents: (change(), atoms(documents))[1])
    report = attach_atoms(bank, gradients, "int4")
    assert (report.atoms_written, report.passed_over, bank.status().stale) == (0, 1, 1)


def test_an_embedded_shard_is_optimized_after_the_load(bank, gradients, monkeypatch):
    called = []
    optimize = bank.store.optimize
    monkeypatch.setattr(bank.store, "optimize", lambda: called.append(bank.count_atoms()) or optimize())
    add_corpus(bank, PASSAGES, gradients)
    attach_atoms(bank, gradients, "int4")
    assert called == [20] and bank.status().atoms == 20 and bank.search("Who?", 1) is not None


def test_what_can_not_have_an_atom_is_reported_and_the_rest_goes_on(bank, gradients):
    add_corpus(bank, PASSAGES, gradients)
    for passage, text in zip(PASSAGES, ["", "a"], strict=False):
        bank.store.set_payload([PayloadWrite(point_id(passage.id), {"text": text})])
    report = attach_atoms(bank, gradients, "int4")
    assert report.atoms_written == 18 and set(report.skipped) == {PASSAGES[1].id}
    assert "1 token" in report.skipped[PASSAGES[1].id]
    status = bank.status()
    assert (report.without_text, status.without_text, status.missing) == (1, 1, 1)


def test_a_collection_without_any_text_is_an_error_that_names_its_fields(bank, gradients):
    add_corpus(bank, PASSAGES[:3], gradients)
    bank.store.set_payload([PayloadWrite(point_id(p.id), {"text": "", "city": "Lisbon"}) for p in PASSAGES[:3]])
    told = GradientBank(bank.store, "docs", bank.space, layout=Layout("mine", "body"))
    with pytest.raises(BankError, match=r"none of the points has a text.*'city'.*--text-path"):
        attach_atoms(told, gradients, "int4")
    assert not told.noted()  # so that later readers look where they did before


def test_truncated_texts_are_counted(bank, gradients):
    long = Passage("long", PASSAGES[0].text * 9, {"id": "long", "text": PASSAGES[0].text * 9})
    add_corpus(bank, [long, Passage("short", "Ida is a judge.", {"id": "short", "text": "Ida is a judge."})], gradients)
    assert attach_atoms(bank, gradients, "int4", long_texts="truncate").truncated == 1


def test_a_text_of_one_token_is_refused_before_anything_is_written(bank, gradients):
    with pytest.raises(DataError, match="'bad'.*1 token"):
        add_corpus(bank, [*PASSAGES, Passage("bad", "a", {"id": "bad", "text": "a"})], gradients)
    assert not bank.store.exists()


@pytest.mark.parametrize("field", [float("nan"), "half \ud800", "x" * 2**24], ids=["nan", "surrogate", "large"])
def test_a_payload_that_cannot_be_written_is_refused_before_anything_is(bank, gradients, field):
    text = PASSAGES[0].text
    with pytest.raises(BankError, match="'bad'"):
        add_corpus(bank, [*PASSAGES, Passage("bad", text, {"id": "bad", "text": text, "n": field})], gradients)
    assert not bank.store.exists()


def test_an_id_may_be_there_once_however_it_is_spelt(tmp_path):
    key = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    rows = [{"id": spelt, "text": "Ida is a judge."} for spelt in (key, key.upper())]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=f"line 2: the id '{key.upper()}' is there twice"):
        read_corpus(tmp_path / "corpus.jsonl")


def test_an_unknown_codec_is_refused_before_anything_is_computed(bank, gradients, monkeypatch):
    add_corpus(bank, PASSAGES, gradients)
    monkeypatch.setattr(gradients, "atoms", None)
    with pytest.raises(UnknownCodecError):
        attach_atoms(bank, gradients, "int5")


def test_pages_and_batches_lose_nothing(bank, gradients, monkeypatch):
    monkeypatch.setattr(ingest, "PAGE", 7)
    monkeypatch.setattr("regrad_qdrant.bank.writing.PAGE", 3)
    add_corpus(bank, PASSAGES, gradients)
    assert attach_atoms(bank, gradients, "int4", batch_tokens=200).atoms_written == 20


def test_a_gradient_that_is_not_finite_is_skipped_and_named(bank, gradients, monkeypatch):
    add_corpus(bank, PASSAGES[:3], gradients)
    atoms = gradients.atoms

    def broken(documents):
        flat = atoms(documents)
        flat[0, 0] = float("nan")
        return flat

    monkeypatch.setattr(gradients, "atoms", broken)
    report = attach_atoms(bank, gradients, "int4")
    assert report.atoms_written == 2 and list(report.skipped.values()) == ["its gradient is not finite"]


def test_long_texts_get_an_atom_of_each_window_or_are_truncated_or_skipped(bank, gradients):
    texts = {"long": " ".join(p.text for p in PASSAGES[:4]), "short": "Ida plays the harp."}
    long, short = (Passage(key, text, {"id": key, "text": text}) for key, text in texts.items())
    add_corpus(bank, [long, short], gradients)
    skipped = attach_atoms(bank, gradients, "fp32", long_texts="skip")
    assert (skipped.atoms_written, skipped.too_long, skipped.skipped) == (1, 1, {})
    windowed = attach_atoms(bank, gradients, "fp32", long_texts="window", batch_tokens=100)
    assert (windowed.atoms_written, windowed.windowed, windowed.truncated) == (1, 1, 0)
    windows = gradients.windows(long.text)
    assert len(windows) > 2 and [i for w in windows for i in w.ids] == gradients.tokenizer(long.text).input_ids
    assert max(len(w.ids) for w in windows) - min(len(w.ids) for w in windows) < len(windows)
    assert "".join(long.text[slice(*w.span)] for w in windows) == long.text
    [hit] = bank.fetch([point_id("long")])
    expected, layout = gradients.atoms(windows), gradients.space.layout
    found = torch.stack([window.decode(bank.space, layout) for window in hit.record.windows()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert hit.record.spans == tuple(window.span for window in windows)
    torch.testing.assert_close(hit.record.decode(bank.space, layout), expected.mean(0), rtol=1e-3, atol=1e-5)
    assert bank.status().stale == bank.status().damaged == 0 and attach_atoms(bank, gradients, "fp32").present == 2
    assert bank.recode("int8", layout).recoded == 2
    assert bank.fetch([point_id("long")])[0].record.spans == hit.record.spans
    with pytest.raises(DataError, match="'fold' is not one of window, truncate, skip"):
        attach_atoms(bank, gradients, "fp32", long_texts="fold")


def test_an_atom_never_ends_on_a_text_it_was_not_computed_from(bank, gradients, monkeypatch):
    """An application changes one text and replaces one point while their atoms are being computed."""
    add_corpus(bank, PASSAGES, gradients)
    atoms, changed, replaced = gradients.atoms, PASSAGES[2], PASSAGES[5]

    def meanwhile(documents):
        if meanwhile.first:
            meanwhile.first = False
            bank.store.set_payload([PayloadWrite(point_id(changed.id), {"text": "Ida Corvand plays the harp."})])
            bank.add([Document(replaced.id, replaced.payload | {"text": "Noor Selowan works as a judge."})])
        return atoms(documents)

    meanwhile.first = True
    monkeypatch.setattr(gradients, "atoms", meanwhile)
    report = attach_atoms(bank, gradients, "int8")
    assert report.passed_over >= 1 and report.atoms_written + report.passed_over == 20
    fresh = [hit for hit in bank.fetch([point_id(changed.id), point_id(replaced.id)]) if hit.record is not None]
    assert not any(hit.stale for hit in fresh) and bank.status().stale == 0
    attach_atoms(bank, gradients, "int8")
    status = bank.status()
    assert (status.atoms, status.missing, status.stale) == (20, 0, 0)


def test_stopped_by_an_error_it_goes_on_where_it_was(bank, gradients, monkeypatch):
    monkeypatch.setattr(ingest, "PAGE", 4)
    add_corpus(bank, PASSAGES, gradients)
    put, calls = bank.put, []

    def fails_at_the_third(records):
        calls.append(1)
        if len(calls) == 3:
            raise BankError("the connection is gone")
        return put(records)

    monkeypatch.setattr(bank, "put", fails_at_the_third)
    with pytest.raises(BankError):
        attach_atoms(bank, gradients, "int4")
    monkeypatch.setattr(bank, "put", put)
    there = bank.status().atoms
    report = attach_atoms(bank, gradients, "int4")
    assert 0 < there < 20 and report.atoms_written == 20 - there and bank.status().atoms == 20


def test_killed_in_the_middle_it_finishes_with_every_atom_once(tokenizer, tmp_path):
    """SIGKILL, without a chance to clean up: what was written stays, nothing is doubled."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_initialization(model).save(tmp_path / "init")
    lines = [json.dumps(passage.payload) for passage in PASSAGES]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from regrad_qdrant.bank import ingest
        from regrad_qdrant.bank.corpus import read_corpus
        from regrad_qdrant import Adapter, GradientBank, GradientComputer, MetaInitialization, load_base_model

        folder, fatal = Path(sys.argv[1]), int(sys.argv[2])
        ingest.PAGE = 8
        initialization = MetaInitialization.load(folder / "init")
        model, tokenizer = load_base_model(str(folder / "model"))
        adapter = Adapter(model, initialization)
        gradients = adapter.gradients(tokenizer)
        bank = GradientBank.open(folder / "bank", "docs", initialization.fingerprint)
        ingest.add_corpus(bank, read_corpus(folder / "corpus.jsonl"), gradients)
        done = 0

        def on_progress(count, _bytes):
            global done
            done += count
            if fatal and done >= fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        report = ingest.attach_atoms(bank, gradients, "int4", on_progress, batch_tokens=300)
        print(report.atoms_written, report.present)
        """
    )
    first = subprocess.run([sys.executable, "-c", script, str(tmp_path), "9"], capture_output=True, text=True)
    assert first.returncode == -9, first.stderr
    second = subprocess.run([sys.executable, "-c", script, str(tmp_path), "0"], capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    written, present = map(int, second.stdout.split())
    assert present >= 9 and written == 20 - present
    with GradientBank.open(tmp_path / "bank", "docs", tiny_initialization(model).fingerprint) as bank:
        status = bank.status()
        assert (status.points, status.atoms, status.missing, status.stale) == (20, 20, 0, 0)


def test_batches_and_single_documents_give_the_same_atoms(gradients):
    documents = [gradients.encode(passage.text) for passage in PASSAGES[:6]]
    single = torch.cat([gradients.atoms([document]) for document in documents])
    torch.testing.assert_close(gradients.atoms(documents), single, rtol=1e-4, atol=1e-6)


def test_a_record_that_no_request_can_hold_is_named_and_the_others_get_theirs(bank, gradients):
    long = Passage("long", " ".join(p.text for p in PASSAGES), {"id": "long"})
    long.payload["text"] = long.text
    add_corpus(bank, [*PASSAGES[:6], long, *PASSAGES[6:]], gradients)
    bank.max_request_bytes = 30_000
    for _ in range(2):
        report = attach_atoms(bank, gradients, "fp32")
        assert list(report.skipped) == ["long"] and "may hold (30000)" in report.skipped["long"]
        assert report.passed_over == 0
    assert bank.status().atoms == len(PASSAGES)


def test_a_corpus_with_the_banks_own_field_is_refused_before_anything_is_written(bank, gradients):
    add_corpus(bank, PASSAGES, gradients)
    attach_atoms(bank, gradients, "int4")
    before = atoms_of(bank)
    dumped = Passage(PASSAGES[0].id, PASSAGES[0].text, PASSAGES[0].payload | {"regrad": "mine"})
    with pytest.raises(BankError, match="has a field 'regrad', where atoms stand.*--payload-key"):
        add_corpus(bank, [Passage("new", "A new one.", {"text": "A new one."}), dumped], gradients)
    with pytest.raises(BankError, match="has a field 'regrad'"):
        bank.sync([Document(dumped.id, dumped.payload)])
    assert atoms_of(bank) == before


def test_an_estimate_of_other_spaces_refuses_nothing(bank, gradients, monkeypatch):
    add_corpus(bank, PASSAGES, gradients)
    attach_atoms(bank, gradients, "int4")
    monkeypatch.setattr(bank.atoms, "count", lambda _=None: 7)  # as a server in strict mode counts
    check_space(bank, gradients.space, replace=False)
