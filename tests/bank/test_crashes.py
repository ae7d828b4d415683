"""SIGKILL at random moments of writing, over the engines that live in this process's folders."""

import json
import multiprocessing
import random
from itertools import islice

import pytest
import torch
from qdrant_client import QdrantClient

from regrad_qdrant import Document, GradientBank, Record
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.bank.stores.edge import EdgeStore
from regrad_qdrant.bank.stores.opening import open_store
from regrad_qdrant.errors import StoreUnavailableError

SPACE, COUNT, KILLS = "a" * 16, 160, 20
PROCESSES = multiprocessing.get_context("forkserver")  # whose processes begin with everything imported
PROCESSES.set_forkserver_preload([__name__])


def write(folder, connection):
    """What a process that may be killed does: it writes one record after the other, and says which it has written."""
    records = json.loads((folder / "records.json").read_text())
    with GradientBank(open_store("docs", path=folder / "bank"), "docs", SPACE) as bank:
        for hit in bank.missing():
            bank.put([(hit, Record.from_payload(records[str(hit.id)]))])
            connection.send(hit.id)


def said(connection):
    """The ids that a process sends until it ends."""
    while True:
        try:
            yield connection.recv()
        except (EOFError, OSError):  # the latter where it was killed in the middle of one
            return


@pytest.fixture(params=["edge", "client"])
def folder(request, tmp_path):
    """A folder with points and no atoms, and the records that they are to get."""
    if request.param == "client":
        QdrantClient(path=str(tmp_path / "bank")).close()
    texts = [f"Person {i} works as a diver." for i in range(COUNT)]
    bank = GradientBank(open_store("docs", path=tmp_path / "bank"), "docs", SPACE)
    bank.create()
    bank.add(Document(i, {"text": text}) for i, text in enumerate(texts))
    bank.close()
    torch.manual_seed(0)
    records = make_records(torch.randn(COUNT, 300), texts, SPACE, "sign")
    (tmp_path / "records.json").write_text(json.dumps({i: record.to_payload() for i, record in enumerate(records)}))
    return tmp_path


def written(folder):
    with GradientBank(open_store("docs", path=folder / "bank"), "docs", SPACE) as bank:
        points, _ = bank.store.scroll(None, 2 * COUNT, None, True)
        return {point.id: point.payload for point in points}


def test_what_was_written_survives_twenty_kills_and_nothing_is_doubled(folder):
    rng, acknowledged, records = random.Random(0), set(), json.loads((folder / "records.json").read_text())
    killed = []
    for kill in range(KILLS + 1):
        ours, theirs = PROCESSES.Pipe(duplex=False)
        writer = PROCESSES.Process(target=write, args=(folder, theirs))
        writer.start()
        theirs.close()
        heard = said(ours)
        written_now = list(islice(heard, rng.randrange(1, 12) if kill < KILLS else None))
        if kill < KILLS:
            writer.kill()
        written_now += heard
        writer.join()
        killed.append(writer.exitcode == -9)
        assert not acknowledged & set(written_now)  # nothing is written twice
        acknowledged.update(written_now)
    assert killed == [True] * KILLS + [False] and writer.exitcode == 0
    found = written(folder)
    assert sorted(found) == list(range(COUNT))
    assert {i for i, payload in found.items() if "regrad" in payload} == set(range(COUNT)) >= acknowledged
    assert all(payload["regrad"] == records[str(i)] for i, payload in found.items())
    assert all(payload["text"] == f"Person {i} works as a diver." for i, payload in found.items())


def test_a_folder_that_another_process_has_open_is_an_error_that_says_so(tmp_path):
    first = GradientBank.open(tmp_path, "docs", SPACE)
    first.create()
    second = EdgeStore(tmp_path / "docs")
    with pytest.raises(StoreUnavailableError, match="open already, here or in another process"):
        second.count()
    first.close()
    assert second.count() == 0
    second.close()
