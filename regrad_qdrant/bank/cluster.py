"""Ingestion on a Ray cluster: Ray Data streams what lacks an atom to workers that hold the model.

    read       tasks, a shard of the points each: ids, and of the payloads what the text is read from
    compute    actors with the model: gradients, coded and packed as they are stored
    write      into a server each actor by itself; into an embedded bank this process, its single writer

Ray Data holds each stage back while the next one is busy. What is written is not computed again, whoever dies: a batch
whose worker died is given to another one, and a document that ends the worker which computes it, twice, is left out and
named.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_qdrant import errors
from regrad_qdrant.atoms.record import Record
from regrad_qdrant.bank.documents import Hit
from regrad_qdrant.bank.ingest import (
    PAGE,
    Ingestion,
    IngestReport,
    LongTexts,
    check_options,
    check_space,
    put_what_fits,
)
from regrad_qdrant.bank.shard import Shard
from regrad_qdrant.bank.stores.base import PointId, pages
from regrad_qdrant.errors import MissingExtraError, RegradError
from regrad_qdrant.model.gradients import BATCH_TOKENS, GradientComputer

if TYPE_CHECKING:
    from regrad_qdrant.bank.bank import GradientBank
    from regrad_qdrant.model.initialization import MetaInitialization

READERS = 8  # tasks that read, at most
IN_FILE = 256  # documents of a file, where they go through files
BLOCK_BYTES = 2**16  # of texts that Ray hands on at a time: some sixty passages; its own 128 MiB go to one worker whole
BATCH = 64  # documents that a worker is given at a time, and may lose
IN_FLIGHT = 2  # batches that wait at a worker or are computed there: the first one that is ready must not take all
LETHAL = 2  # workers that a document may end before it is left out
Row = dict[str, Any]  # a batch as Ray Data has it: a column, an array or a list, by name


@dataclass
class ClusterReport(IngestReport):
    """What an ingestion on a cluster did."""

    workers: int = 0
    waiting: float = 0.0  # share of the workers' time in which they had nothing to do
    restarts: int = 0  # batches that were begun anew, since their worker had died


@dataclass(frozen=True)
class Cluster:
    """Where and how the work is done.

    Args:
        address: of a Ray cluster; `local` starts one on this machine, `auto` takes the one that is there.
        workers: actors that hold the model.
        gpus_per_worker: that Ray sets aside for each; a share of one too.
    """

    address: str = "local"
    workers: int = 1
    gpus_per_worker: float = 0.0


def attach_on_cluster(
    bank: GradientBank,
    initialization: MetaInitialization,
    make_gradients: Callable[[], GradientComputer],
    open_bank: Callable[[], GradientBank] | None,
    codec: str,
    cluster: Cluster,
    on_progress: Callable[[int, int], None] = lambda _points, _bytes: None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    long_texts: LongTexts = "window",
    replace: bool = False,
) -> ClusterReport:
    """`attach_atoms` by many workers.

    Args:
        make_gradients: called once in each worker, which loads the model there.
        open_bank: called in each task and worker, which read and write by themselves; None: this process does.

    Raises:
        BankError: as `attach_atoms`.
        RegradError: what ended a worker's work, such as a server that is gone. What was written stays written.
    """
    ray = _ray()
    check_options(codec, long_texts)
    check_space(bank, initialization.space, replace=replace)
    report = ClusterReport(workers=cluster.workers, present=bank.count_atoms())
    work = _Work(make_gradients, open_bank, bank.space, codec, batch_tokens, long_texts)
    started, worked, waited, renewed = time.perf_counter(), 0.0, 0.0, 0
    if next(_rows(bank, None), None) is None:
        return report
    with _connected(ray, cluster), tempfile.TemporaryDirectory(prefix="regrad-") as folder:
        ledger = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger).remote()
        rows = _lacking(ray, bank, open_bank, cluster, Path(folder))
        done = rows.map_batches(
            Worker,
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=cluster.workers, max_tasks_in_flight_per_actor=IN_FLIGHT),
            num_gpus=cluster.gpus_per_worker or None,
            fn_constructor_args=(work, ledger),
        )
        try:
            for row in done.iter_rows():
                part: IngestReport = IngestReport(**json.loads(row["report"]))
                if open_bank is None:
                    part.passed_over = _put(bank, json.loads(row["computed"]), part)
                    part.atoms_written -= part.passed_over
                _add(report, part)
                worked, waited, renewed = worked + row["worked"], waited + row["waited"], renewed + row["renewed"]
                on_progress(row["points"], part.bytes_written)
        except Exception as error:  # Ray wraps what a worker raised
            raise _cause(error) from error
        report.restarts = ray.get(ledger.restarts.remote())
    report.present -= renewed
    report.seconds = time.perf_counter() - started
    report.waiting = waited / max(waited + worked, 1e-9)
    bank.optimize()
    return report


def load_gradients(
    initialization: str, model: str | None, device: str, dtype: str, workers_here: int = 1
) -> GradientComputer:
    """The model with an initialization's plug-in, in the process that calls.

    Args:
        workers_here: processes that share this machine's processor.

    Raises:
        InitializationError, WrongModelError: if the model can't be had, or is another one.
    """
    import torch

    from regrad_qdrant.model.base_model import load_base_model
    from regrad_qdrant.model.initialization import MetaInitialization
    from regrad_qdrant.model.plugin import live_space, plug_in

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers_here))
    made = MetaInitialization.load(initialization)
    base, tokenizer = load_base_model(model or made.base.name, device=device, dtype=dtype)
    made.check_model(base)
    plugged = plug_in(base, made)
    return GradientComputer(plugged, tokenizer, live_space(plugged, made), made.max_length)


def open_bank(collection: str, space: str, *, url: str, api_key: str | None = None, **options: Any) -> GradientBank:
    """A bank of a server's, in the process that calls; options as those of `GradientBank`."""
    from regrad_qdrant.bank.bank import GradientBank
    from regrad_qdrant.bank.stores.opening import open_store

    return GradientBank(open_store(collection, url=url, api_key=api_key), collection, space, **options)


@dataclass(frozen=True)
class _Work:
    """What every worker is told."""

    make_gradients: Callable[[], GradientComputer]
    open_bank: Callable[[], GradientBank] | None
    space: str
    codec: str
    batch_tokens: int
    long_texts: LongTexts


class Ledger:
    """Which documents are being computed, and how many workers each has ended alone. An actor of its own."""

    def __init__(self) -> None:
        self._open: set[str] = set()
        self._ended: Counter[str] = Counter()
        self._restarts = 0

    def begin(self, keys: Sequence[str]) -> tuple[bool, list[str]]:
        """Whether a worker died over some of these before, and which of them are left out from now on."""
        again = not self._open.isdisjoint(keys)
        self._restarts += again
        self._open.update(keys)
        return again, [key for key in keys if self._ended[key] >= LETHAL]

    def alone(self, key: str) -> None:
        """This one is computed by itself now: if its worker dies, it was this one's fault."""
        self._ended[key] += 1

    def survived(self, key: str) -> None:
        del self._ended[key]

    def done(self, keys: Sequence[str]) -> None:
        self._open.difference_update(keys)

    def restarts(self) -> int:
        return self._restarts


class Worker:
    """An actor with the model: computes a batch of documents, and writes them where it can."""

    def __init__(self, work: _Work, ledger: Any) -> None:
        self._work, self._ledger = work, ledger
        self._gradients = work.make_gradients()
        self._bank = _Outbox(work.space) if work.open_bank is None else work.open_bank()
        self._ended = time.perf_counter()

    def __call__(self, batch: Row) -> Row:
        started = time.perf_counter()
        keys = [str(key) for key in batch["id"]]
        hits = {key: _hit(key, str(payload)) for key, payload in zip(keys, batch["payload"], strict=True)}
        again, lethal = self._asked("begin", keys)
        report = IngestReport()
        for key in lethal:
            report.skipped[str(hits[key].document_id)] = f"ended {LETHAL} workers that computed it alone"
        kept = [key for key in keys if key not in lethal]
        computed: list[tuple[Hit, Record]] = []
        for part in [[key] for key in kept] if again else [kept]:
            computed += self._computed(part, hits, report, alone=again)
        self._asked("done", keys)
        waited, self._ended = started - self._ended, time.perf_counter()
        return {
            "report": [json.dumps(asdict(report))],
            "computed": [json.dumps([[_key(hit.id), hit.payload, record.to_payload()] for hit, record in computed])],
            "points": [len(keys)],
            "renewed": [int(sum(batch["renewed"]))],
            "waited": [waited],
            "worked": [self._ended - started],
        }

    def _computed(
        self, keys: Sequence[str], hits: Mapping[str, Hit], report: IngestReport, *, alone: bool
    ) -> list[tuple[Hit, Record]]:
        """What is to be written by someone else; each by itself where together they fail."""
        part = IngestReport()
        try:
            if alone:
                self._asked("alone", keys[0])
            with Ingestion(
                self._bank, self._gradients, self._work.codec, self._work.batch_tokens, self._work.long_texts, part
            ) as ingestion:
                ingestion.attach([hits[key] for key in keys])
                sent = ingestion.sent()
            if alone:
                self._asked("survived", keys[0])
        except RegradError:
            raise
        except Exception as error:  # memory that is short for all of them, or one that can't be computed
            if isinstance(self._bank, _Outbox):
                self._bank.taken()
            if len(keys) == 1:
                report.skipped[str(hits[keys[0]].document_id)] = f"can't be computed: {error!r}"
                return []
            return [pair for key in keys for pair in self._computed([key], hits, report, alone=True)]
        if isinstance(self._bank, _Outbox):
            _add(report, part)
            return self._bank.taken()
        part.passed_over = len(sent) - self._bank.count_current(sent)
        part.atoms_written -= part.passed_over
        _add(report, part)
        return []

    def _asked(self, method: str, *arguments: Any) -> Any:
        return _ray().get(getattr(self._ledger, method).remote(*arguments))


class _Outbox:
    """Stands in a worker for the bank that another process writes: it keeps what is to be written."""

    one_thread = False  # records are coded while the next gradients are computed

    def __init__(self, space: str) -> None:
        self.space = space
        self._kept: list[tuple[Hit, Record]] = []

    @property
    def atoms(self) -> _Outbox:
        return self

    def put(self, records: Iterable[tuple[Hit, Record]]) -> None:
        self._kept += records

    def taken(self) -> list[tuple[Hit, Record]]:
        taken, self._kept = self._kept, []
        return taken


def _lacking(
    ray: Any, bank: GradientBank, open_bank: Callable[[], GradientBank] | None, cluster: Cluster, folder: Path
) -> Any:
    """The points that lack an atom of their present text, as a Ray Dataset: read by tasks, or through files here."""
    if open_bank is not None:
        count = min(READERS, max(1, cluster.workers))
        shards = ray.data.from_items([{"index": i} for i in range(count)], override_num_blocks=count)
        return shards.map_batches(
            functools.partial(_read_shard, open_bank=open_bank, count=count), batch_size=1, num_cpus=0.1
        )
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("id", pyarrow.string()), ("payload", pyarrow.string()), ("renewed", pyarrow.bool_())])
    rows: Iterable[list[Row]] = pages(_rows(bank, None), IN_FILE)
    for i, page in enumerate(itertools.chain(rows, [[]])):  # an empty one says which columns there are
        parquet.write_table(pyarrow.Table.from_pylist(page, schema), folder / f"{i:06}.parquet")
    return ray.data.read_parquet(str(folder))


def _read_shard(batch: Row, open_bank: Callable[[], GradientBank], count: int) -> Iterator[Row]:
    """The points of one shard that lack an atom, page by page."""
    with open_bank() as bank:
        for page in pages(_rows(bank, Shard(int(batch["index"][0]), count)), PAGE):
            yield {name: [row[name] for row in page] for name in page[0]}


def _rows(bank: GradientBank, shard: Shard | None) -> Iterator[Row]:
    """The points of a shard, or all, that lack an atom of their present text."""
    for hit in bank.missing(shard):
        yield {"id": _key(hit.id), "payload": _payload(hit), "renewed": False}
    for state, hit in bank.examined(shard):
        if state != "current":
            yield {"id": _key(hit.id), "payload": _payload(hit), "renewed": True}


def _put(
    bank: GradientBank, computed: Sequence[tuple[str, dict[str, Any], dict[str, Any]]], report: IngestReport
) -> int:
    """Write what a worker computed; returns how many were passed over, since their points are gone or changed, or their
    records too large, which the report names."""
    pairs = [(Hit(json.loads(key), 0.0, "", payload), Record.from_payload(record)) for key, payload, record in computed]
    sent = put_what_fits(bank, pairs, report)
    return len(pairs) - bank.count_current([hit.id for hit, _ in sent])


def _key(point_id: PointId) -> str:
    """An id that keeps its type."""
    return json.dumps(point_id)


def _payload(hit: Hit) -> str:
    return json.dumps([hit.payload, hit.text, hit.key])


def _hit(key: str, payload: str) -> Hit:
    fields, text, own = json.loads(payload)
    return Hit(json.loads(key), 0.0, text, fields, key=own)


def _add(report: IngestReport, part: IngestReport) -> None:
    """Count a part's figures among the whole's."""
    for name in ("atoms_written", "bytes_written", "passed_over", "truncated", "windowed", "too_long", "without_text"):
        setattr(report, name, getattr(report, name) + getattr(part, name))
    report.skipped |= part.skipped


@contextmanager
def _connected(ray: Any, cluster: Cluster) -> Iterator[None]:
    """A connection to the cluster, in small blocks; one that was there before stays."""
    with _started(ray, cluster):
        context = ray.data.DataContext.get_current()
        former, context.target_max_block_size = context.target_max_block_size, BLOCK_BYTES
        try:
            yield
        finally:
            context.target_max_block_size = former


@contextmanager
def _started(ray: Any, cluster: Cluster) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong is raised, and Ray's files have the rest
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if cluster.address == "local":
        options |= {"num_cpus": cluster.workers + 2, "include_dashboard": False}
    try:
        ray.init(address=cluster.address, **options)
    except ConnectionError as error:
        raise RegradError(f"no Ray cluster answers at {cluster.address!r}: {error}") from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
    finally:
        ray.shutdown()


def _cause(error: BaseException) -> RegradError:
    """What of ours is behind an error of Ray's, or that error in ours."""
    if isinstance(error, RegradError):
        return error
    if own := re.findall(r"regrad_qdrant\.errors\.(\w+): (.*)", str(error)):  # in its traceback
        name, said = own[-1]
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, RegradError):
            return kind(said)
    return RegradError(f"the cluster gave up: {error}")


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError(f"a cluster needs Ray: pip install 'regrad-qdrant[ray]' ({error})") from error
    return ray
