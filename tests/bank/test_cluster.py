"""Ingestion on a local Ray of two workers: the same atoms, and nothing lost when workers, documents or drivers fail.

A store that several processes share is one in-process engine behind an actor; a server takes its place outside tests.
"""

import functools
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'regrad-qdrant[ray]'")
import ray
import torch
from conftest import tiny_initialization, tiny_model, tiny_tokenizer
from qdrant_client import QdrantClient

from regrad_loaders.data.facts import generate
from regrad_qdrant import Adapter, Document, GradientBank
from regrad_qdrant.bank.cluster import Cluster, Ledger, _connected, _lacking, _rows, attach_on_cluster
from regrad_qdrant.bank.documents import point_id
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.bank.shard import Shard
from regrad_qdrant.bank.stores.base import PayloadWrite
from regrad_qdrant.bank.stores.client import ClientStore
from regrad_qdrant.errors import BankError, RegradError, StoreUnavailableError
from regrad_qdrant.model.gradients import EncodedDocument, GradientComputer
from regrad_qdrant.model.plugin import live_space, plug_in

PASSAGES = generate("train", 40, 1).passages
LETHAL = "Ida Lethal ends whoever reads this."
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of resources that it leaves to the system


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    """One Ray for all these tests; its workers, which begin with this environment, find the test's own modules."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patched.setenv(name, value)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


class Shared:
    """An actor's in-process store."""

    def __init__(self):
        self.store = ClientStore(QdrantClient(":memory:"), "docs", owns_client=True)
        self.calls = 0

    def call(self, method, arguments, options):
        self.calls += 1
        return getattr(self.store, method)(*arguments, **options)


class SharedStore:
    """A process' own end of it; `lost` stands for a server that is gone."""

    one_thread, copies_points, has_shard_keys, name = True, True, False, "docs"

    def __init__(self, actor, lost=()):
        self._actor, self._lost = actor, lost

    def __getattr__(self, method):
        if not hasattr(ClientStore, method):
            raise AttributeError(method)

        def call(*arguments, **options):
            if method in self._lost:
                raise StoreUnavailableError("the server is gone")
            return ray.get(self._actor.call.remote(method, arguments, options))

        return call

    def close(self):
        pass


def make_gradients():
    """What `load_gradients` does, with the tiny model."""
    model = tiny_model()
    initialization = tiny_initialization(model)
    plugged = plug_in(model, initialization)
    return GradientComputer(plugged, tiny_tokenizer(), live_space(plugged, initialization), initialization.max_length)


class Quick:
    """Stands for gradients where a test is of workers: a process begins with it in a third of the time."""

    max_length = 1000

    def __init__(self, layout, before=lambda texts: None):
        self.space, self._before = SimpleNamespace(layout=layout), before

    def windows(self, text):
        return [EncodedDocument(list(text.encode()), False, (0, len(text)))]

    def atoms(self, documents):
        self._before([bytes(document.ids).decode() for document in documents])
        return torch.tensor([[float(len(document.ids))] * self.space.layout.numel for document in documents])


def dies_once_then_of_lethal(marker, texts):
    """Ends the first worker that comes here, as a machine that is lost does; then every one that reads this text."""
    if any("Lethal" in text for text in texts):
        os._exit(9)
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return
    os._exit(9)


def short_of_memory(texts):
    if len(texts) > 12:
        raise MemoryError("too many at once")
    if any("Lethal" in text for text in texts):
        raise MemoryError("too long")


def open_bank(actor, space, lost=()):
    return GradientBank(SharedStore(actor, lost), "docs", space, sidecar=False)


@contextmanager
def filled(bank):
    with bank:
        bank.create()
        bank.add(Document(passage.id, {"id": passage.id, "text": passage.text}) for passage in PASSAGES)
        yield bank


@pytest.fixture
def initialization():
    return tiny_initialization(tiny_model())


@pytest.fixture
def embedded(tmp_path, initialization):
    """A bank that this process alone can open."""
    with filled(GradientBank.open(tmp_path, "docs", initialization.fingerprint)) as bank:
        yield bank


@pytest.fixture
def shared(initialization):
    """A bank that every process can open, and how."""
    actor = ray.remote(num_cpus=0)(Shared).remote()
    opening = functools.partial(open_bank, actor, initialization.fingerprint)
    with filled(opening()) as bank:
        yield bank, opening


def attach(bank, initialization, opening=None, make=make_gradients, workers=1, **options):
    return attach_on_cluster(bank, initialization, make, opening, "int8", Cluster("local", workers), **options)


def states(bank):
    return sorted(state for state, _ in bank.surveyed())


def test_two_workers_compute_what_one_process_does_and_this_one_writes_it(embedded, initialization, tokenizer):
    done = []
    report = attach(embedded, initialization, workers=2, on_progress=lambda *just: done.append(just))
    assert (report.atoms_written, report.present, report.passed_over, report.skipped) == (40, 0, 0, {})
    assert sum(points for points, _ in done) == 40 and sum(size for _, size in done) == report.bytes_written
    assert report.workers == 2 and 0 <= report.waiting <= 1 and report.restarts == 0
    gradients = Adapter(tiny_model(), initialization).gradients(tokenizer)
    for passage in PASSAGES[:8]:
        [hit] = embedded.fetch([point_id(passage.id)])
        expected = gradients.atoms(gradients.windows(passage.text)).mean(0)
        found = hit.record.decode(embedded.space, gradients.space.layout)
        assert (found - expected).norm() < 0.02 * expected.norm()
    again = attach(embedded, initialization, workers=2)
    assert (again.atoms_written, again.present) == (0, 40)


def test_a_worker_that_dies_loses_nothing_and_a_document_that_ends_workers_is_named(shared, initialization, tmp_path):
    bank, opening = shared
    bank.add([Document("bad", {"id": "bad", "text": LETHAL})])
    before = functools.partial(dies_once_then_of_lethal, str(tmp_path / "died"))
    make = functools.partial(Quick, initialization.space.layout, before)
    report = attach(bank, initialization, opening, make)
    assert (tmp_path / "died").exists() and report.restarts >= 3
    assert list(report.skipped) == ["bad"] and "ended 2 workers" in report.skipped["bad"]
    assert states(bank) == ["current"] * 40 + ["missing"]


def test_where_memory_is_short_for_a_batch_each_is_computed_by_itself(shared, initialization):
    bank, opening = shared
    bank.add([Document("bad", {"id": "bad", "text": LETHAL})])
    report = attach(
        bank, initialization, opening, functools.partial(Quick, initialization.space.layout, short_of_memory)
    )
    assert list(report.skipped) == ["bad"] and "MemoryError" in report.skipped["bad"]
    assert report.atoms_written == 40 and states(bank) == ["current"] * 40 + ["missing"]


def test_a_server_that_is_gone_is_said_and_the_next_run_does_the_rest(shared, initialization, tokenizer):
    bank, opening = shared
    gradients = Adapter(tiny_model(), initialization).gradients(tokenizer)
    make = functools.partial(Quick, initialization.space.layout)
    attach_atoms(bank, gradients, "int8", shard=Shard(0, 2))
    there = bank.count_atoms()
    changed = [hit.id for state, hit in bank.examined()][:3]
    bank.store.set_payload([PayloadWrite(key, {"text": "Another text altogether."}) for key in changed])
    with pytest.raises(StoreUnavailableError, match="the server is gone"):
        attach(bank, initialization, functools.partial(opening, lost=("set_payload",)), make)
    report = attach(bank, initialization, opening, make)
    assert (report.atoms_written, report.present) == (40 - there + 3, there - 3)
    assert states(bank) == ["current"] * 40


@pytest.mark.parametrize("by_tasks", [False, True])
def test_the_work_comes_in_small_blocks(shared, tmp_path, by_tasks):
    """As Ray has it by itself, all of a reader's documents would be one block, and go to one worker."""
    bank, opening = shared
    bank.add(Document(f"long{i}", {"id": f"long{i}", "text": "A word and another. " * 50}) for i in range(300))
    cluster = Cluster("local", 2)
    with _connected(ray, cluster):
        rows = _lacking(ray, bank, opening if by_tasks else None, cluster, tmp_path)
        sizes = [
            row["count"]
            for row in rows.map_batches(lambda rows: {"count": [len(rows["id"])]}, batch_size=None).iter_rows()
        ]
    assert sum(sizes) == 340 and max(sizes) <= 100, sizes


def test_atoms_of_another_space_are_not_written_over(embedded, initialization, tokenizer):
    attach_atoms(embedded, Adapter(tiny_model(), initialization).gradients(tokenizer), "int8")
    other = tiny_initialization(tiny_model(), rank=3)
    theirs = GradientBank(embedded.store, "docs", other.fingerprint, sidecar=False)
    with pytest.raises(BankError, match="atoms of another space"):
        attach(theirs, other)


def test_points_whose_atom_only_the_index_still_has_get_one(embedded, initialization, tokenizer, monkeypatch):
    attach_atoms(embedded, Adapter(tiny_model(), initialization).gradients(tokenizer), "int8")
    state, hit = next(iter(embedded.examined()))
    monkeypatch.setattr(embedded, "examined", lambda shard=None: iter([("gone", hit)]))
    assert state == "current" and [json.loads(row["id"]) for row in _rows(embedded, None)] == [hit.id]


def test_the_ledger_knows_whose_fault_it_was():
    ledger = Ledger()
    assert ledger.begin(["a", "b"]) == (False, [])
    assert ledger.begin(["a", "b"]) == (True, [])  # the worker died over them
    for _ in range(2):
        ledger.alone("b")
    ledger.alone("a")
    ledger.survived("a")
    assert ledger.begin(["a", "b"]) == (True, ["b"])
    ledger.done(["a", "b"])
    assert ledger.begin(["a"]) == (False, []) and ledger.restarts() == 2


def test_a_cluster_that_does_not_answer_is_said():
    def init(**_):
        raise ConnectionError("nobody there")

    deaf = SimpleNamespace(is_initialized=lambda: False, init=init)
    with pytest.raises(RegradError, match="no Ray cluster answers at 'auto': nobody there"):
        with _connected(deaf, Cluster("auto")):
            pass
