"""Gradients that others have computed, from files into a bank."""

import pytest
import torch
from conftest import tiny_initialization

from regrad_qdrant import Document, GradientBank, ReGrad
from regrad_qdrant.bank.gradient_files import gradient_files, put_gradients, read_gradient
from regrad_qdrant.errors import DataError, InitializationError

TEXTS = {"a": "Ada Berg lives in Oslo and paints boats.", "7": "Bo Lund rows at dawn in Rome.", "c": "Cy has a goat."}


@pytest.fixture
def bank(model, store):
    initialization = tiny_initialization(model, "lora")
    with GradientBank(store, "docs", initialization.fingerprint) as bank:
        bank.create()
        ids = {"a": "a", "7": 7, "c": "c"}
        bank.add(Document(ids[key], {"id": ids[key], "text": text}) for key, text in TEXTS.items())
        yield bank, initialization


def saved(folder, name, tensors):
    folder.mkdir(exist_ok=True)
    torch.save({f"base_model.model.{key}.default.weight": value for key, value in tensors.items()}, folder / name)


def test_they_are_the_atoms_that_ingestion_would_have_computed(bank, model, tokenizer, tmp_path):
    bank, initialization = bank
    with ReGrad(model, tokenizer, bank, initialization) as regrad:
        flat = torch.cat([regrad.gradients.atoms([regrad.gradients.encode(text)]) for text in TEXTS.values()])
        for key, atom in zip(TEXTS, flat, strict=True):
            saved(tmp_path / "files", f"{key}.pt", initialization.space.unflatten(atom))
        told = []
        files = gradient_files(tmp_path / "files")
        report = put_gradients(bank, initialization, files, "fp32", lambda count, size: told.append((count, size)))
        assert (report.atoms_written, report.skipped) == (3, {})
        assert told == [(3, report.bytes_written)]
        status = bank.status()
        assert (status.atoms, status.missing, status.stale) == (3, 0, 0)
        of_text = {hit.text: hit.record for hit in bank.search("Ada Berg Bo Lund Cy goat", 3)}
        for text, atom in zip(TEXTS.values(), flat, strict=True):
            assert torch.equal(of_text[text].decode(bank.space, initialization.space.layout), atom)
        assert bank.search("goat", 1)[0].payload == {"id": "c", "text": TEXTS["c"]}


def test_a_file_that_fits_no_document_or_no_space_is_named_and_the_others_go_on(bank, tmp_path):
    bank, initialization = bank
    good = {name: torch.ones(shape) for name, shape in initialization.space.shapes.items()}
    folder = tmp_path / "files"
    saved(folder, "a.pt", good)
    saved(folder, "stranger.pt", good)
    saved(folder, "7.pt", dict(list(good.items())[1:]))
    saved(folder, "c.pt", good | {next(iter(good)): torch.full_like(next(iter(good.values())), float("nan"))})
    (folder / "d.pt").write_bytes(b"not a tensor")
    report = put_gradients(bank, initialization, gradient_files(folder), "int8")
    assert report.atoms_written == bank.status().atoms == 1
    assert set(report.skipped) == {"stranger", "7", "c", "d"}
    assert "must have the shape" in report.skipped["7"]
    assert "not finite" in report.skipped["c"]
    assert "no point" in report.skipped["stranger"]


def test_objects_are_never_unpickled(bank, tmp_path):
    class Mischief:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"x": Mischief()}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="can't be read as tensors"):
        read_gradient(tmp_path / "a.pt", bank[1])
    assert not (tmp_path / "made").exists()


def test_they_belong_to_the_whole_space(model, bank, tmp_path):
    with pytest.raises(InitializationError, match="space lora; this initialization's is core"):
        put_gradients(bank[0], tiny_initialization(model, "core"), [], "fp32")
    with pytest.raises(DataError, match=r"no \.pt file"):
        gradient_files(tmp_path)


def test_two_files_of_one_document_are_refused(tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.pt").write_bytes(b"")
    with pytest.raises(DataError, match="are of one document, 'a'"):
        gradient_files(tmp_path)


def test_a_record_that_no_request_can_hold_is_named_and_the_others_go_on(bank, tmp_path):
    bank, initialization = bank
    for key in TEXTS:
        saved(tmp_path / "files", f"{key}.pt", {n: torch.randn(s) for n, s in initialization.space.shapes.items()})
    bank.max_request_bytes = 64
    report = put_gradients(bank, initialization, gradient_files(tmp_path / "files"), "fp32")
    assert report.atoms_written == 0 and set(report.skipped) == set(TEXTS)
    assert all("may hold (64)" in why for why in report.skipped.values())
