"""SIGKILL at random moments of writing, over the engines that live in this process's folders."""

import json
import random
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from qdrant_client import QdrantClient

from regrad_qdrant import Document, GradientBank
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.bank.stores.edge import EdgeStore
from regrad_qdrant.bank.stores.opening import open_store
from regrad_qdrant.errors import StoreUnavailableError

SPACE, COUNT, KILLS = "a" * 16, 400, 20
WRITER = textwrap.dedent(
    """
    import json, sys
    from regrad_qdrant import GradientBank, Record
    from regrad_qdrant.bank.stores.opening import open_store

    folder, name, records = sys.argv[1:]
    records = json.loads(open(records).read())
    bank = GradientBank(open_store(name, path=folder), name, "a" * 16)
    for hit in bank.missing():
        bank.put([(hit, Record.from_payload(records[str(hit.id)]))])
        print(hit.id, flush=True)
    bank.close()
    """
)


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
    command = [sys.executable, "-c", WRITER, str(folder / "bank"), "docs", str(folder / "records.json")]
    for kill in range(KILLS + 1):
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(rng.randrange(1, 30) if kill < KILLS else 2 * COUNT):
            line = writer.stdout.readline()
            if not line:
                break
            assert int(line) not in acknowledged  # nothing is written twice
            acknowledged.add(int(line))
        if kill < KILLS:
            writer.send_signal(signal.SIGKILL)
        rest = writer.communicate()[0].split()
        acknowledged.update(map(int, rest))
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
